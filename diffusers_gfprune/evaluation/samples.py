"""Samples, features and similarities in shards. Each shard is computed once, by one process, and cached.

A shard is a span of image numbers. Its content depends only on the model, the sampler's settings and these numbers (see
`diffusers_gfprune.metrics.sampling`), not on the process. A larger number of images later only adds shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..diffusion.latents import LatentCodec
from ..metrics.cache import TensorCache
from ..metrics.conditions import SampleConditions
from ..metrics.fidelity import SSIM_WINDOW, psnr, ssim_of_pairs
from ..metrics.quality import SamplingSettings, extract_features
from ..metrics.sampling import to_uint8
from ..reports.model_identity import model_identity
from .inputs import FolderImages
from .sample_quality import feature_identity, shard_size

__all__ = ["ImageSource", "Samples", "folder_source", "model_source", "shards"]

# Number of samples kept for pictures, including those of later comparisons
SHOWN = 64
Advance = Callable[[int], object]


def shards(num_images: int, shape: Sequence[int]) -> list[range]:
    """Divide image numbers into shards, for images of a shape `(channels, height, width)`."""
    size = shard_size(shape)
    return [range(start, min(start + size, num_images)) for start in range(0, num_images, size)]


def _nothing(count: int) -> None:
    pass


@dataclass
class ImageSource:
    """Images by number, and their features.

    Attributes:
        name: Key of its images in files.
        describe: Returns what the images of a span depend on, as JSON values.
        make: Returns the images of a span, uint8 with shape `(n, channels, height, width)`. It calls its second argument with
            the number of images of every batch.
        cache: Cache of images and features.
        keep: Whether to cache images as well as features.
    """

    name: str
    describe: Callable[[range], dict]
    make: Callable[[range, Advance], Tensor]
    cache: TensorCache
    keep: bool = True
    _last: tuple[range, Tensor] | None = field(default=None, init=False)  # all networks process a shard in a row

    def images(self, shard: range, advance: Advance = _nothing) -> Tensor:
        """Images of a shard, uint8 with shape `(n, channels, height, width)`."""
        if self._last is None or self._last[0] != shard:
            if self.keep:
                made = self.cache.get("samples", self.describe(shard), lambda: {"images": self.make(shard, advance)})["images"]
            else:
                made = self.make(shard, advance)
            self._last = shard, made
        return self._last[1]

    def features(self, network, shard: range, advance: Advance = _nothing) -> Tensor:
        """Features of a shard's images by a network, float32 with shape `(n, d)`."""

        def make() -> dict[str, Tensor]:
            return {"features": extract_features(network, self.images(shard, advance), advance=advance)}

        return self.cache.get("features", self._features_key(network, shard), make)["features"]

    def shown(self, shard: range) -> Tensor:
        """The first images of a shard for pictures, uint8."""
        key = {**self.describe(shard), "shown": SHOWN}
        return self.cache.get("shown", key, lambda: {"images": self.images(shard)[:SHOWN].clone()})["images"]

    def _features_key(self, network, shard: range) -> dict:
        return {**self.describe(shard), "network": feature_identity(network)}

    def has_images(self, shard: range) -> bool:
        """Whether the images of a shard are cached, or not generated at all."""
        return not self.keep or self.cache.has("samples", self.describe(shard))

    def has_features(self, network, shard: range) -> bool:
        """Whether features of a shard are cached."""
        return self.cache.has("features", self._features_key(network, shard))

    def forget_images(self, spans: Sequence[range]) -> None:
        """Remove cached images, which may take gigabytes, once all figures are computed."""
        for shard in spans:
            path = self.cache.path("samples", self.describe(shard))
            if path is not None:
                path.unlink(missing_ok=True)


def model_source(
    name: str,
    unet: nn.Module,
    scheduler,
    settings: SamplingSettings,
    cache: TensorCache,
    codec: LatentCodec | None = None,
    conditions: SampleConditions | None = None,
) -> ImageSource:
    """Source of a model's samples. The arguments are those of `SamplingSettings.sample`."""
    drawn = {key: value for key, value in settings.identity().items() if key != "num_images"}
    identity = {**model_identity(unet, scheduler, codec, conditions), **drawn}

    def make(shard: range, advance: Advance) -> Tensor:
        images = []
        for start in range(shard.start, shard.stop, settings.batch_size):
            count = min(settings.batch_size, shard.stop - start)
            batch = settings.sample(unet, scheduler, first=start, count=count, codec=codec, conditions=conditions)
            images.append(to_uint8(batch))
            advance(count)
        return torch.cat(images)

    return ImageSource(name, lambda shard: {**identity, "first": shard.start, "count": len(shard)}, make, cache)


def folder_source(name: str, images: FolderImages, cache: TensorCache) -> ImageSource:
    """Source of the images in a folder."""
    return ImageSource(
        name,
        lambda shard: {"files": images.digest(shard), "count": len(shard)},
        lambda shard, advance: images.read(shard),
        cache,
        keep=False,
    )


class Samples:
    """All samples of an evaluation: those of one source, or of a model and its reference model.

    Args:
        sources: One or two sources.
        networks: Feature networks.
        spans: Shards.
    """

    def __init__(self, sources: Sequence[ImageSource], networks: Sequence, spans: Sequence[range]) -> None:
        self.sources, self.networks, self.spans = list(sources), list(networks), list(spans)
        # Avoid computing anything twice if the cache cannot be written
        self._made: dict[tuple, Tensor] = {}
        self._paired: dict[range, dict[str, Tensor]] = {}
        self._shown: dict[str, Tensor] = {}

    def make(self, process: int = 0, processes: int = 1, advance: Advance = _nothing) -> None:
        """Compute one process's share: every `processes`-th shard.

        Args:
            process: Number of this process.
            processes: Number of processes.
            advance: Called for every batch with the number of images that were sampled, or whose features were extracted.
        """
        for shard in self.spans[process::processes]:
            for source in self.sources:
                for network in self.networks:
                    self._made[source.name, network.name, shard] = source.features(network, shard, advance)
            self._paired[shard] = self._pair(shard, advance)
            if shard == self.spans[0]:
                self._shown = {source.name: source.shown(shard) for source in self.sources}

    def unsampled(self, process: int = 0, processes: int = 1) -> list[int]:
        """Number of images of each source that a process still has to sample."""
        missing = [0] * len(self.sources)
        for shard in self.spans[process::processes]:
            paired = len(self.sources) < 2 or self.sources[0].cache.has("similarities", self._pair_key(shard))
            for index, source in enumerate(self.sources):
                done = paired and all(source.has_features(network, shard) for network in self.networks)
                missing[index] += 0 if done or source.has_images(shard) else len(shard)
        return missing

    def work(self, process: int = 0, processes: int = 1) -> int:
        """Total of the numbers that `make` passes to `advance`."""
        lacking = [
            len(shard)
            for shard in self.spans[process::processes]
            for source in self.sources
            for network in self.networks
            if not source.has_features(network, shard)
        ]
        return sum(self.unsampled(process, processes)) + sum(lacking)

    def features(self, source: ImageSource) -> dict[str, Tensor]:
        """Features of all samples of a source, by network name; float32 with shape `(n, d)`."""

        def of(network, shard: range) -> Tensor:
            made = self._made.get((source.name, network.name, shard))
            return source.features(network, shard) if made is None else made

        return {network.name: torch.cat([of(network, shard) for shard in self.spans]) for network in self.networks}

    def similarities(self) -> dict[str, float | None]:
        """Mean SSIM of all pairs, and PSNR of the mean squared error in dB (None if all pairs are equal).

        Returns:
            `psnr_to_dense` and, unless images are too small, `ssim_to_dense`; empty without a reference model.
        """
        if len(self.sources) < 2 or not self.spans:
            return {}
        parts = [self._paired[shard] if shard in self._paired else self._pair(shard) for shard in self.spans]
        error = torch.cat([part["squared_error"] for part in parts]).mean().item()
        similarities = {"psnr_to_dense": psnr(error)}
        if "ssim" in parts[0]:
            similarities["ssim_to_dense"] = torch.cat([part["ssim"] for part in parts]).mean().item()
        return similarities

    def shown(self) -> dict[str, Tensor]:
        """The first images of each source for pictures, uint8 by source name; empty without samples."""
        if self.spans and not self._shown:
            self._shown = {source.name: source.shown(self.spans[0]) for source in self.sources}
        return self._shown

    def _pair_key(self, shard: range) -> dict:
        return {"source": self.sources[0].describe(shard), "reference": self.sources[1].describe(shard)}

    def _pair(self, shard: range, advance: Advance = _nothing) -> dict[str, Tensor]:
        """SSIM and squared error of each pair of a shard, float64 with shape `(n,)`; no SSIM if images are too small."""
        if len(self.sources) < 2:
            return {}

        def make() -> dict[str, Tensor]:
            mine, other = (source.images(shard, advance).float() / 255 for source in self.sources)
            pairs = {"squared_error": ((mine.double() - other.double()) ** 2).flatten(1).mean(dim=1)}
            if min(mine.shape[-2:]) >= SSIM_WINDOW:
                pairs["ssim"] = torch.from_numpy(ssim_of_pairs(mine, other))
            return pairs

        return self.sources[0].cache.get("similarities", self._pair_key(shard), make)

    def forget_images(self) -> None:
        """Remove the model's images. Those of a reference model, or of a model evaluated alone, are kept for reuse."""
        if len(self.sources) == 2 and self.spans:
            key = self._pair_key(self.spans[0])
            if key["source"] != key["reference"]:
                self.sources[0].forget_images(self.spans)
