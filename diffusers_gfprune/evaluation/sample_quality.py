"""References for sample quality: features of real images and samples of the dense model, each computed once and cached.

Real images are read in shards, so memory is bounded for a data set of any size. Features are cached by the content of the
image files: changed files are detected, and unchanged ones are not decoded again.

`SampleQuality` measures during a pruning run (`--eval_steps`) and at its end; `evaluate.py` is for evaluations on many images.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.decoding import EncodedImage, content_digest
from ..data.sources import HeldOut, ImageSource, readable_images
from ..diffusion.latents import LatentCodec
from ..diffusion.placement import moved
from ..families.lookup import family_of
from ..metrics.cache import TensorCache
from ..metrics.conditions import SampleConditions, label_conditions, row_conditions
from ..metrics.features import FeatureNetwork, feature_network
from ..metrics.quality import Quality, SamplingSettings, extract_features
from ..metrics.sampling import image_shape, to_uint8
from ..reports.model_identity import model_identity
from ..reports.provenance import installed_versions
from .run_arguments import EvaluationArguments

__all__ = ["RealFeatures", "SampleQuality", "dense_samples", "feature_identity", "shard_size"]

# A covariance of pixels needs more images than pixels, and its square root takes cubic time.
MAX_PIXEL_DIMENSIONS = 1024
# Limits of a shard: images, and values (64 MiB in float32)
SHARD_IMAGES, SHARD_VALUES = 256, 2**24
BATCH_SIZE = 128
# Packages that features depend on
FEATURE_PACKAGES = (
    *("clean-fid", "diffusers-gfprune", "efficientnet-lite-pytorch"),
    *("pillow", "torch", "torchvision", "transformers"),
)


def shard_size(shape: Sequence[int]) -> int:
    """Number of images of a shape `(channels, height, width)` in one shard."""
    return max(1, min(SHARD_IMAGES, SHARD_VALUES // math.prod(shape)))


def sampling_settings(args: EvaluationArguments, null_label: int | None = None) -> SamplingSettings:
    """Sampling settings of a run. The null label is not sampled."""
    return SamplingSettings(
        num_images=max(1, args.eval_images),  # with 0, nothing is sampled
        num_inference_steps=args.ddim_num_inference_steps,
        timestep_spacing=args.timestep_spacing,
        seed=args.eval_seed,
        batch_size=args.eval_batch_size,
        null_label=null_label,
        guidance_scale=args.guidance_scale,
    )


def dense_samples(
    cache: TensorCache,
    settings: SamplingSettings,
    unet: nn.Module,
    scheduler,
    progress: str | None,
    codec: LatentCodec | None = None,
    conditions: SampleConditions | None = None,
) -> Tensor:
    """Samples of a model in [0, 1], from the cache if available."""

    def make() -> dict[str, Tensor]:
        samples = settings.sample(unet, scheduler, progress=progress, codec=codec, conditions=conditions)
        return {"images": to_uint8(samples)}

    key = {**model_identity(unet, scheduler, codec, conditions), **settings.identity()}
    cached = cache.get("samples", key, make)
    return cached["images"].float() / 255


def feature_identity(network: FeatureNetwork) -> dict:
    """Everything that features depend on, except the images, as JSON values."""
    return {**network.identity(), "versions": installed_versions(*FEATURE_PACKAGES)}


class RealFeatures:
    """Features of real images in shards, which several processes can divide among them.

    Args:
        images: Real images, cropped at the centre and never flipped. Unreadable images are left out.
        networks: Feature networks.
        cache: Cache of the features.
        num_images: Number of first images to use (>= 2; None: all, which needs a data set of known length).
        max_broken: Maximum number of unreadable images; None: no limit.

    Attributes:
        count: Number of images to read, at most the length of the data set if it is known.
        fingerprint: Hash of the content of all image files, set by `features`.
    """

    def __init__(
        self,
        images: ImageSource,
        networks: Sequence[FeatureNetwork],
        cache: TensorCache,
        num_images: int | None = None,
        max_broken: int | None = None,
    ) -> None:
        self.images, self.networks, self.cache, self.max_broken = images.pixels, tuple(networks), cache, max_broken
        self.count = min((number for number in (num_images, images.num_images) if number is not None), default=0)
        self.fingerprint: str | None = None
        self._made: dict[int, Shard] = {}

    def work(self, process: int = 0, processes: int = 1) -> int:
        """Total of the numbers that `make` passes to `advance`; an upper bound for a stream."""
        if self.images.num_images is None:
            return self.count * len(self.networks) if process == 0 else 0
        size = shard_size(self.images.decoder.shape)
        starts = range(process * size, self.count, processes * size)
        return sum(min(size, self.count - start) for start in starts) * len(self.networks)

    def make(self, process: int = 0, processes: int = 1, advance: Callable[[int], object] | None = None) -> None:
        """Compute one process's share: every `processes`-th shard. The first process reads all shards of a stream.

        Args:
            process: Number of this process.
            processes: Number of processes.
            advance: Called for each shard with the number of extracted features.

        Raises:
            ValueError: Too many images are unreadable.
        """
        for number, images in self._shards(process, processes) if self.networks else ():
            self._made[number] = self._features(images)
            self._check_broken(self._made.values())
            if advance is not None:
                advance(len(images) * len(self.networks))

    def features(self) -> dict[str, Tensor]:
        """Features of all images, in order. Those of other processes are read from the cache.

        Returns:
            Features by network name, float32 with shape `(m, d)`.

        Raises:
            ValueError: Too many images are unreadable, or fewer than two are readable.
        """
        if self.images.num_images is None and not self._made:
            self.make()
        if self.images.num_images is not None and self.networks:
            self._made |= {n: self._features(images) for n, images in self._shards() if n not in self._made}
        shards = [self._made[number] for number in sorted(self._made)]
        self._check_broken(shards)
        digests = "".join(shard.digest for shard in shards)
        self.fingerprint = hashlib.sha256(digests.encode()).hexdigest()[:16] if shards else None
        features = {}
        for network in self.networks:
            rows = [shard.features[network.name] for shard in shards if len(shard.features[network.name])]
            if sum(map(len, rows)) < 2:
                raise ValueError(f"{sum(map(len, rows))} readable real images are too few: a distance needs at least 2")
            features[network.name] = torch.cat(rows)
        return features

    def _shards(self, process: int = 0, processes: int = 1) -> Iterator[tuple[int, list[EncodedImage]]]:
        size = shard_size(self.images.decoder.shape)
        if self.images.num_images is None:
            stream = islice(self.images.in_order(), self.count if process == 0 else 0)
            yield from enumerate(iter(lambda: list(islice(stream, size)), []))
            return
        for number in range(process, -(-self.count // size), processes):
            yield number, [self.images[i] for i in range(number * size, min((number + 1) * size, self.count))]

    def _features(self, images: Sequence[EncodedImage]) -> Shard:
        decoder = self.images.decoder
        # Decoded once for all networks, only if needed
        pixels = functools.cache(lambda: to_uint8(readable_images(images, decoder) / 2 + 0.5))
        digest = content_digest(images) or hashlib.sha256(pixels().numpy().tobytes()).hexdigest()
        key = {"real": digest, "count": len(images), "shape": list(decoder.shape)}
        if decoder.enlarge:  # in a set of larger images, these files do not fit the model
            key["enlarged"] = True
        if decoder.mode is not None:  # in which the data set declares its images
            key["mode"] = decoder.mode

        def make(network: FeatureNetwork) -> dict[str, Tensor]:
            readable = pixels()
            return {"features": extract_features(network, readable, BATCH_SIZE) if len(readable) else torch.empty(0, 0)}

        keys = {network: {**feature_identity(network), **key} for network in self.networks}
        features = {n.name: self.cache.get("features", keys[n], functools.partial(make, n))["features"] for n in self.networks}
        return Shard(len(images), digest, features)

    def _check_broken(self, shards: Iterable[Shard]) -> None:
        broken = sum(shard.count - min(map(len, shard.features.values())) for shard in shards)
        if self.max_broken is not None and broken > self.max_broken:
            raise ValueError(
                f"max_broken_images={self.max_broken} is exceeded: {broken} real images cannot be read or do not fit the model"
            )


class Shard(NamedTuple):
    """Number of images in a shard, unreadable ones included; hash of their files; features of the others by network name."""

    count: int
    digest: str
    features: dict[str, Tensor]


class SampleQuality:
    """Compares samples of the pruned model with real images and with samples of the dense model.

    Args:
        args: Evaluation arguments.
        dense: The dense model. It samples once, at the first measurement.
        scheduler: Scheduler of the saved model.
        images: Training images.
        device: Device of the models.
        codec: Decodes latents; None: samples are pixels.
        held_out: Held-out images, for models of text or with vectors: samples have their captions or vectors. They are read at
            the first measurement.

    Attributes:
        settings: Settings of the sampler, fitted to the model's timesteps.
        changes: Changes to the requested settings, one line each.
    """

    def __init__(
        self,
        args: EvaluationArguments,
        dense: nn.Module,
        scheduler,
        images,
        device: torch.device,
        codec: LatentCodec | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        self.args, self.dense, self.scheduler, self.images, self.device = args, dense, scheduler, images, device
        self.codec, self.held_out = codec, held_out
        self.settings, self.changes = sampling_settings(args, images.decoder.null_label).fitted(scheduler)
        if args.guidance_scale != 1 and not self.has_null:
            self.conditions.check_guidance(args.guidance_scale)
        self.network = self._network() if args.eval_images else None
        self.cache = TensorCache(None if args.evaluation_cache_dir is None else Path(args.evaluation_cache_dir))

    @property
    def has_null(self) -> bool:
        """Whether the model has a null label, or a null prompt."""
        if self.held_out is None:
            return bool(self.conditions.null)
        return family_of(self.dense).vector_size(self.dense.config) is None

    @functools.cached_property
    def conditions(self) -> SampleConditions:
        """What samples are conditioned on: captions of held-out images, or the classes of the model, in turn."""
        if self.held_out is not None:
            return row_conditions(self.held_out.conditioning, self.images.null_conditioning())
        return label_conditions(family_of(self.dense).class_labels(self.dense.config), self.images.decoder.null_label)

    def _network(self) -> FeatureNetwork | None:
        name = self.args.eval_features
        values = math.prod(image_shape(self.dense, self.codec))
        if name == "pixels":
            if self.settings.num_images <= values:
                drawn = self.args.eval_images
                raise ValueError(f"eval_features=pixels needs more than {values} images, not eval_images={drawn}")
            real = min(self.args.eval_reference_images, self.images.num_images or self.args.eval_reference_images)
            if real <= values:
                raise ValueError(f"eval_features=pixels needs more than {values} real images, and there are {real}")
        if name == "auto":
            name = "pixels" if values <= MAX_PIXEL_DIMENSIONS and self.settings.num_images > values else "none"
        if name == "none":
            return None
        if self.settings.num_images < 2:
            raise ValueError(f"eval_features={name} needs at least 2 images, not eval_images={self.args.eval_images}")
        return feature_network(name, inception_weights=self.args.inception_weights, device=self.device)

    @functools.cached_property
    def quality(self) -> Quality:
        """Created at first use: the dense model samples and real images are read."""
        with moved([self.dense], self.device):
            samples = dense_samples(
                *(self.cache, self.settings, self.dense.eval(), self.scheduler, "sampling (dense)"),
                *(self.codec, self.conditions),
            )
        networks, reference = [], {}
        if self.network is not None:
            real = RealFeatures(self.images, [self.network], self.cache, self.args.eval_reference_images)
            with tqdm(total=real.count, desc="features of real images", unit="image") as bar:
                real.make(advance=bar.update)
            features = real.features()[self.network.name]
            if self.args.eval_features != "auto" or len(features) > features.shape[1]:  # pixels are their own features
                networks, reference = [self.network], {self.network.name: features}
        return Quality(self.settings, networks, reference, samples)

    def sample(self, unet: nn.Module, progress: str | None = None) -> Tensor:
        """Samples of a model in [0, 1]."""
        return self.settings.sample(unet, self.scheduler, progress=progress, codec=self.codec, conditions=self.conditions)

    def measure(self, unet: nn.Module) -> dict[str, float | None]:
        """Distances and similarities of a model's samples, by metric."""
        return self.quality.measure(self.sample(unet))
