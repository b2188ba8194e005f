"""What the pruning run measures samples with: real images, feature networks, and the dense model's samples, made once.

Long evaluations on many images are for `evaluate.py`; here a run shows how it gets on (`--eval_steps`) and what came out.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpointing import tensors_fingerprint
from diffusers_gfprune.evaluation.cache import TensorCache
from diffusers_gfprune.evaluation.cost import spatial_size
from diffusers_gfprune.evaluation.features import FeatureNetwork, feature_network
from diffusers_gfprune.evaluation.quality import Quality, SamplingSettings, extract_features
from diffusers_gfprune.evaluation.sampling import to_uint8
from prune_arguments import EvaluationArguments

__all__ = ["SampleQuality", "dense_samples", "reference_features", "sampling_settings"]

# A covariance over pixels takes more images than pixels to be estimated, and cubic time to be taken the root of.
MAX_PIXEL_DIMENSIONS = 1024
BATCH_SIZE = 128


def sampling_settings(args: EvaluationArguments) -> SamplingSettings:
    """How a run draws its samples."""
    return SamplingSettings(
        num_images=max(1, args.eval_images),  # none are drawn where none are wanted
        num_inference_steps=args.ddim_num_inference_steps,
        timestep_spacing=args.timestep_spacing,
        seed=args.eval_seed,
        batch_size=args.eval_batch_size,
    )


def model_identity(unet: nn.Module, scheduler) -> dict:
    """What the samples of a model depend on besides the settings, as JSON values."""
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    return {
        "weights": tensors_fingerprint(unet.state_dict()),
        "unet": repr(sorted(config.items())),
        "scheduler": repr(sorted((name, value) for name, value in scheduler.config.items() if not name.startswith("_"))),
        "device": next(unet.parameters()).device.type,
        "dtype": str(next(unet.parameters()).dtype),
    }


def dense_samples(cache: TensorCache, settings: SamplingSettings, unet: nn.Module, scheduler, progress: str | None) -> Tensor:
    """Samples of a model in [0, 1], from the cache if they are there."""
    key = {**model_identity(unet, scheduler), **settings.identity()}
    kept = cache.get("samples", key, lambda: {"images": to_uint8(settings.sample(unet, scheduler, progress=progress))})
    return kept["images"].float() / 255


def reference_features(cache: TensorCache, network: FeatureNetwork, images: Tensor, progress: str | None = None) -> Tensor:
    """Features of real images, from the cache if they are there.

    Args:
        cache: Keeps them.
        network: Makes them.
        images: In [0, 1] with shape `(m, channels, height, width)`.
        progress: Text of a progress bar, if any.
    """
    key = {**network.identity(), "images": tensors_fingerprint({"": to_uint8(images)}), "count": len(images)}
    return cache.get("features", key, lambda: {"features": extract_features(network, images, BATCH_SIZE, progress)})[
        "features"
    ]


class SampleQuality:
    """Samples of the pruned model against real images and the dense model's samples.

    Args:
        args: The command line.
        dense: The dense model; it samples once, when it is first compared with.
        noise_scheduler: Of the model.
        images: Training images, with `head(count)`.
        device: Where the models are.
    """

    def __init__(self, args: EvaluationArguments, dense: nn.Module, noise_scheduler, images, device: torch.device) -> None:
        self.args, self.dense, self.scheduler, self.images, self.device = args, dense, noise_scheduler, images, device
        self.settings = sampling_settings(args)
        self.network = self._network() if args.eval_images else None
        self.cache = TensorCache(None if args.evaluation_cache_dir is None else Path(args.evaluation_cache_dir))

    def _network(self) -> FeatureNetwork | None:
        name = self.args.eval_features
        values = self.dense.config.in_channels * torch.Size(spatial_size(self.dense)).numel()
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
            real = self.images.head(self.args.eval_reference_images) / 2 + 0.5
            if self.args.eval_features != "auto" or len(real) > real[0].numel():
                networks = [self.network]
                reference[self.network.name] = reference_features(self.cache, self.network, real, "features of real images")
        return Quality(self.settings, networks, reference, samples)

    def sample(self, unet: nn.Module, progress: str | None = None) -> Tensor:
        """Samples of a model in [0, 1]."""
        return self.settings.sample(unet, self.scheduler, progress=progress)

    def measure(self, unet: nn.Module) -> dict[str, float | None]:
        """Distances and similarities of a model's samples, by metric."""
        return self.quality.measure(self.sample(unet))
