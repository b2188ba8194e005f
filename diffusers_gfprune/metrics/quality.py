"""Sample quality: distances to real images and similarity to the dense model's samples.

`Quality` holds everything that stays the same between measurements (settings of the sampler, features of the real images,
samples of the dense model). Curves over training, results of a run and later evaluations are therefore comparable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from ..argument_fields import NOT_NEGATIVE, SHARE, Range, at_least, check_fields
from ..diffusion.latents import LatentCodec
from ..diffusion.process import TIMESTEP_SPACINGS
from ..diffusion.schedulers import training_process
from ..families.lookup import family_of
from .conditions import SampleConditions, label_conditions
from .fidelity import (
    SSIM_WINDOW,
    frechet_distance,
    frechet_distance_pixels,
    kernel_distance,
    psnr_to_reference,
    ssim_to_reference,
)
from .model_size import spatial_size
from .sampling import sample_images, to_uint8

__all__ = ["Quality", "SamplingSettings", "extract_features", "kernel_metric"]

PIXELS = "pixels"
GUIDANCE = Range("be at least 0 and finite", lambda value: 0 <= value < math.inf)
# Arguments of every kernel distance
KERNEL = {"num_subsets": 100, "subset_size": 1000, "seed": 0}


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of the sampler.

    Attributes:
        num_images: Number of samples (>= 1).
        num_inference_steps: Number of steps (>= 1); None: the default of the model's process.
        timestep_spacing: One of `TIMESTEP_SPACINGS`; None: the sampler has only one.
        eta: Share of DDPM's noise in each step, in [0, 1]; 0 is deterministic.
        seed: Seed for the noise (>= 0).
        batch_size: Number of images in one forward pass (>= 1). Samples do not depend on it.
        null_label: Null label of a conditional model, which is not sampled.
        guidance_scale: Scale of classifier-free guidance; 1: none.
        sampler: Name of the sampler, set by `fitted`.
    """

    num_images: int = 1000
    num_inference_steps: int | None = None
    timestep_spacing: str | None = "leading"
    eta: float = 0.0
    seed: int = 1234
    batch_size: int = 128
    null_label: int | None = None
    guidance_scale: float = 1.0
    sampler: str = "DDIM"

    def __post_init__(self) -> None:
        check_fields(self, at_least(1), "num_images", "num_inference_steps", "batch_size")
        if self.timestep_spacing not in (None, *TIMESTEP_SPACINGS):
            raise ValueError(f"timestep_spacing={self.timestep_spacing} must be one of {', '.join(TIMESTEP_SPACINGS)}")
        check_fields(self, SHARE, "eta")
        check_fields(self, NOT_NEGATIVE, "seed")
        check_fields(self, GUIDANCE, "guidance_scale")

    def identity(self) -> dict:
        """Everything that samples depend on, except the model, as JSON values for result files."""
        values = {name: value for name, value in asdict(self).items() if name != "batch_size"}
        if self.null_label is None:
            del values["null_label"]
        if self.guidance_scale == 1:
            del values["guidance_scale"]
        return {"sampler": self.sampler, **values}

    def fitted(self, scheduler) -> tuple[SamplingSettings, tuple[str, ...]]:
        """Settings fitted to a model's process, and the changes, one line each (see `DiffusionProcess.fit_sampling`).

        Raises:
            ValueError: The model's sampler has no such spacing, or no `eta`.
        """
        process = training_process(scheduler)
        steps, spacing, changes = process.fit_sampling(self.num_inference_steps, self.timestep_spacing)
        fitted = replace(self, num_inference_steps=steps, timestep_spacing=spacing, sampler=process.sampler_title)
        if self.eta and spacing is None:
            raise ValueError(f"eta={self.eta:g} must be 0: it is for DDIM, and the model is {process.title}")
        return fitted, changes

    def sample(
        self,
        unet: nn.Module,
        scheduler,
        first: int = 0,
        count: int | None = None,
        progress: str | None = None,
        *,
        codec: LatentCodec | None = None,
        conditions: SampleConditions | None = None,
    ) -> Tensor:
        """Samples number `first` to `first + count - 1` of a model (default: all).

        Args:
            unet: The model.
            scheduler: Its scheduler.
            first: Number of the first sample.
            count: Number of samples.
            progress: Label of a progress bar; None: no bar.
            codec: Decodes latents; None: samples are pixels.
            conditions: What samples are conditioned on (default: the classes of the model in turn, if it has classes).

        Returns:
            Images in [0, 1], float32 with shape `(count, channels, height, width)`.
        """
        if conditions is None:
            conditions = label_conditions(family_of(unet).class_labels(unet.config), self.null_label)
        return sample_images(
            unet,
            scheduler,
            self.num_images - first if count is None else count,
            spatial_size(unet),
            self.num_inference_steps,
            self.seed,
            self.batch_size,
            conditions,
            progress,
            codec=codec,
            guidance_scale=self.guidance_scale,
            timestep_spacing=self.timestep_spacing,
            eta=self.eta,
            first=first,
        )


def kernel_metric(metric: str) -> str:
    """Name of the kernel distance on the same features as a Fréchet distance: `kid` for `fid`, `kd_x` for `fd_x`."""
    return "kid" if metric == "fid" else metric.replace("fd_", "kd_", 1)


def extract_features(network, images: Tensor, batch_size: int = 128, advance: Callable[[int], object] | None = None) -> Tensor:
    """Features of images, computed in batches.

    Args:
        network: A `FeatureNetwork`.
        images: Images with shape `(n, channels, height, width)`, n >= 1: uint8, or float in [0, 1] (rounded to 8 bits).
        batch_size: Number of images in a batch.
        advance: Called for each batch with its number of images.

    Returns:
        float32 on the CPU, with shape `(n, d)`.
    """
    features = []
    for batch in images.split(batch_size):
        features.append(network(batch if batch.dtype == torch.uint8 else to_uint8(batch)))
        if advance is not None:
            advance(len(batch))
    return torch.cat(features)


class Quality:
    """Measures samples.

    Args:
        settings: Settings of the sampler. Nothing is sampled here.
        networks: Feature networks of the distances.
        reference: Features of real images by network name, each with shape `(m, d)`.
        dense_samples: Samples of the dense model in [0, 1], with the same numbers; None: no similarity is measured.
        kernel: Whether kernel distances are also measured.
    """

    def __init__(
        self,
        settings: SamplingSettings,
        networks: Sequence = (),
        reference: Mapping[str, Tensor] | None = None,
        dense_samples: Tensor | None = None,
        kernel: bool = False,
    ) -> None:
        self.settings, self.networks, self.reference = settings, tuple(networks), dict(reference or {})
        self.dense_samples, self.kernel = dense_samples, kernel

    def distances(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Distances, by metric, between features of samples and of real images.

        Args:
            features: Features by network name, each with shape `(n, d)`.
        """
        distances = {}
        for network in self.networks:
            mine, real = features[network.name], self.reference[network.name]
            distance = frechet_distance_pixels if network.name == PIXELS else frechet_distance
            distances[network.metric] = distance(mine, real)
            if self.kernel:
                distances[kernel_metric(network.metric)] = kernel_distance(mine, real, **KERNEL)
        return distances

    def similarities(self, samples: Tensor) -> dict[str, float | None]:
        """SSIM and PSNR to the dense model's samples.

        Returns:
            `ssim_to_dense` (not for images smaller than its window of 7 pixels) and `psnr_to_dense` in dB (None if all
            images are equal). Empty without samples of the dense model.
        """
        if self.dense_samples is None:
            return {}
        dense = self.dense_samples[: len(samples)]
        similarities = {"psnr_to_dense": psnr_to_reference(samples, dense)}
        if min(samples.shape[-2:]) >= SSIM_WINDOW:
            similarities["ssim_to_dense"] = ssim_to_reference(samples, dense)
        return similarities

    def measure(self, samples: Tensor) -> dict[str, float | None]:
        """Distances and similarities of samples in [0, 1], by metric."""
        return {**self._distances_of(samples), **self.similarities(samples)}

    def measure_dense(self) -> dict[str, float]:
        """Distances of the dense model's own samples, by metric."""
        return self._distances_of(self.dense_samples)

    def _distances_of(self, samples: Tensor) -> dict[str, float]:
        return self.distances({network.name: extract_features(network, samples) for network in self.networks})

    def describe(self) -> dict[str, dict]:
        """Title, features, number of real images and kernel arguments of each distance, by metric, for result files."""
        described = {}
        for network in self.networks:
            depends = {"features": network.description, "reference_images": len(self.reference[network.name])}
            described[network.metric] = {"title": network.title, **depends}
            if self.kernel:
                title = "KID" if network.metric == "fid" else network.title.replace("FD-", "KD-", 1)
                described[kernel_metric(network.metric)] = {"title": title, **depends, **KERNEL}
        return described
