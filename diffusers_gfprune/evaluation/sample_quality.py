"""What samples are measured with: features of real images, and the dense model's samples, each made once and kept.

Real images are read in shards, so that a data set of any size is measured in bounded memory; features are kept by what the
image files hold, so that a file that has changed is seen, and one that has not is not even decoded.

Long evaluations on many images are for `evaluate.py`; `SampleQuality` is what a pruning run shows of how it gets on
(`--eval_steps`) and of what came out.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.decoding import BrokenImage, EncodedImage, ImageDecoder
from ..data.sources import ImageRows, ImageStream
from ..metrics.cache import TensorCache, tensors_fingerprint
from ..metrics.features import FeatureNetwork, feature_network
from ..metrics.model_size import spatial_size, uses_tf32
from ..metrics.quality import Quality, SamplingSettings, extract_features
from ..metrics.sampling import to_uint8
from ..reports.provenance import installed_versions
from .run_arguments import EvaluationArguments

__all__ = [
    "RealFeatures",
    "SampleQuality",
    "dense_samples",
    "feature_identity",
    "model_identity",
    "sampling_settings",
    "shard_size",
]

# A covariance over pixels takes more images than pixels to be estimated, and cubic time to be taken the root of.
MAX_PIXEL_DIMENSIONS = 1024
# Images in a shard: at most, and so that they take no more than 64 MiB in float32
SHARD_IMAGES, SHARD_VALUES = 256, 2**24
BATCH_SIZE = 128
# What features are made with
FEATURE_PACKAGES = (
    *("clean-fid", "diffusers-gfprune", "efficientnet-lite-pytorch"),
    *("pillow", "torch", "torchvision", "transformers"),
)


def shard_size(shape: Sequence[int]) -> int:
    """Images of a shape `(channels, height, width)` that are made, or read, and kept at a time."""
    return max(1, min(SHARD_IMAGES, SHARD_VALUES // math.prod(shape)))


def sampling_settings(args: EvaluationArguments, null_label: int | None = None) -> SamplingSettings:
    """How a run draws its samples, of all labels but the null label."""
    return SamplingSettings(
        num_images=max(1, args.eval_images),  # none are drawn where none are wanted
        num_inference_steps=args.ddim_num_inference_steps,
        timestep_spacing=args.timestep_spacing,
        seed=args.eval_seed,
        batch_size=args.eval_batch_size,
        null_label=null_label,
    )


def model_identity(unet: nn.Module, scheduler) -> dict:
    """What the samples of a model depend on besides the settings, as JSON values."""
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    return {
        "weights": tensors_fingerprint(unet.state_dict()),
        "unet": repr(sorted(config.items())),
        "scheduler": repr(sorted((name, value) for name, value in scheduler.config.items() if not name.startswith("_"))),
        "device": next(unet.parameters()).device.type,
        "tf32": uses_tf32(next(unet.parameters()).device),
        "dtype": str(next(unet.parameters()).dtype),
        "versions": installed_versions("diffusers-gfprune", "diffusers", "torch"),
    }


def dense_samples(cache: TensorCache, settings: SamplingSettings, unet: nn.Module, scheduler, progress: str | None) -> Tensor:
    """Samples of a model in [0, 1], from the cache if they are there."""
    key = {**model_identity(unet, scheduler), **settings.identity()}
    cached = cache.get("samples", key, lambda: {"images": to_uint8(settings.sample(unet, scheduler, progress=progress))})
    return cached["images"].float() / 255


def feature_identity(network: FeatureNetwork) -> dict:
    """What features depend on besides the images, as JSON values."""
    return {**network.identity(), "versions": installed_versions(*FEATURE_PACKAGES)}


class RealFeatures:
    """Features of real images, shard by shard, which several processes may share out.

    Args:
        images: Real images, cropped at the centre and never flipped. Those that cannot be read are left out.
        networks: Make the features.
        cache: Keeps them.
        wanted: So many of the first images (>= 2; None: all of them, which takes a data set that can be counted).
        max_broken: More images than this that cannot be read are an error; None: any number is borne.

    Attributes:
        count: How many images are wanted, and there as far as that is known.
        fingerprint: Hash of what the files of all images hold, once `features` has seen them.
    """

    def __init__(
        self,
        images: ImageRows | ImageStream,
        networks: Sequence[FeatureNetwork],
        cache: TensorCache,
        wanted: int | None = None,
        max_broken: int | None = None,
    ) -> None:
        self.images, self.networks, self.cache, self.max_broken = images, tuple(networks), cache, max_broken
        self.count = min((number for number in (wanted, images.num_images) if number is not None), default=0)
        self.fingerprint: str | None = None
        self._made: dict[int, Shard] = {}

    def work(self, process: int = 0, processes: int = 1) -> int:
        """What `make` will tell `advance` in all; of a stream, at most."""
        if self.images.num_images is None:
            return self.count * len(self.networks) if process == 0 else 0
        size = shard_size(self.images.decoder.shape)
        starts = range(process * size, self.count, processes * size)
        return sum(min(size, self.count - start) for start in starts) * len(self.networks)

    def make(self, process: int = 0, processes: int = 1, advance: Callable[[int], object] | None = None) -> None:
        """Make one process's share: every `processes`-th shard, or all of them from a stream, which the first process reads.

        Args:
            process: Which one this is.
            processes: How many there are.
            advance: Told of each shard how many features it has had.

        Raises:
            ValueError: Too many images cannot be read.
        """
        for number, images in self._shards(process, processes) if self.networks else ():
            self._made[number] = self._features(images)
            self._check_broken(self._made.values())
            if advance is not None:
                advance(len(images) * len(self.networks))

    def features(self) -> dict[str, Tensor]:
        """All of them, in order; what other processes made comes from the cache.

        Returns:
            By name of the network, float32 with shape `(m, d)`.

        Raises:
            ValueError: Too many images cannot be read, or fewer than two can.
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
                raise ValueError(
                    f"{sum(map(len, rows))} real images that can be read are too few: a distance takes 2 at least"
                )
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
        pixels = functools.cache(lambda: _pixels(images, decoder))  # once for all networks, if at all
        digest = _digest(images) or hashlib.sha256(pixels().numpy().tobytes()).hexdigest()
        key = {"real": digest, "count": len(images), "shape": list(decoder.shape)}
        if decoder.enlarge:  # the same files are misfits in a set of larger ones
            key["enlarged"] = True

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
    """Images that were read together, unreadable ones included, and features of the others by name of the network."""

    count: int
    digest: str
    features: dict[str, Tensor]


def _pixels(images: Sequence[EncodedImage], decoder: ImageDecoder) -> Tensor:
    """Those that can be read: uint8 with shape `(n, channels, height, width)`."""
    pixels = []
    for image in images:
        with contextlib.suppress(BrokenImage):
            pixels.append(to_uint8(decoder(image) / 2 + 0.5))
    return torch.stack(pixels) if pixels else torch.empty(0, *decoder.shape, dtype=torch.uint8)


def _digest(images: Sequence[EncodedImage]) -> str | None:
    """Hash of the images' files; None if one of them is not on this machine."""
    digest = hashlib.sha256()
    for image in images:
        encoded = image.encoded or {"bytes": b"", "path": None}
        if image.is_path:
            if not os.path.isfile(encoded["path"]):
                return None
            encoded = {"bytes": Path(encoded["path"]).read_bytes()}
        digest.update(len(encoded["bytes"] or b"").to_bytes(8, "little") + (encoded["bytes"] or b""))
    return digest.hexdigest()


class SampleQuality:
    """Samples of the pruned model against real images and the dense model's samples.

    Args:
        args: The command line.
        dense: The dense model; it samples once, when it is first compared with.
        scheduler: Of the model, as it was saved.
        images: Training images.
        device: Where the models are.

    Attributes:
        settings: How samples are drawn, as the model's timesteps allow.
        changes: What is not as the command line says, a line each.
    """

    def __init__(self, args: EvaluationArguments, dense: nn.Module, scheduler, images, device: torch.device) -> None:
        self.args, self.dense, self.scheduler, self.images, self.device = args, dense, scheduler, images, device
        self.settings, self.changes = sampling_settings(args, images.decoder.null_label).fitted(scheduler)
        self.network = self._network() if args.eval_images else None
        self.cache = TensorCache(None if args.evaluation_cache_dir is None else Path(args.evaluation_cache_dir))

    def _network(self) -> FeatureNetwork | None:
        name = self.args.eval_features
        values = self.dense.config.in_channels * math.prod(spatial_size(self.dense))
        if name == "pixels" and self.settings.num_images <= values:
            raise ValueError(f"eval_features=pixels needs more than {values} images, not eval_images={self.args.eval_images}")
        if name == "auto":
            name = "pixels" if values <= MAX_PIXEL_DIMENSIONS and self.settings.num_images > values else "none"
        if name == "none":
            return None
        return feature_network(name, inception_weights=self.args.inception_weights, device=self.device)

    @functools.cached_property
    def quality(self) -> Quality:
        """Made when it is first asked for: the dense model samples, real images are read."""
        home = next(self.dense.parameters()).device
        samples = dense_samples(
            self.cache, self.settings, self.dense.to(self.device).eval(), self.scheduler, progress="sampling (dense)"
        )
        self.dense.to(home)
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
        return self.settings.sample(unet, self.scheduler, progress=progress)

    def measure(self, unet: nn.Module) -> dict[str, float | None]:
        """Distances and similarities of a model's samples, by metric."""
        return self.quality.measure(self.sample(unet))
