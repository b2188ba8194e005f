"""Everything that samples of a model depend on, as a key of caches."""

from __future__ import annotations

import torch
from torch import nn

from ..diffusion.latents import LatentCodec
from ..fingerprints import tensors_fingerprint
from ..metrics.conditions import SampleConditions
from ..precision import float32_description
from .provenance import installed_versions

__all__ = ["model_identity"]


def model_identity(
    unet: nn.Module,
    scheduler,
    codec: LatentCodec | None = None,
    conditions: SampleConditions | None = None,
    device: torch.device | str | None = None,
) -> dict:
    """Everything that samples of a model depend on, except the sampling settings, as JSON values.

    Args:
        unet: The denoiser.
        scheduler: Its scheduler.
        codec: Decodes its samples, if these are latents.
        conditions: Conditions of the samples, if it takes any.
        device: Device that it samples on; None: the one on which it is.
    """
    device = next(unet.parameters()).device if device is None else torch.device(device)
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    return {
        "weights": tensors_fingerprint(unet.state_dict()),
        "unet": repr(sorted(config.items())),
        "scheduler": repr(sorted((name, value) for name, value in scheduler.config.items() if not name.startswith("_"))),
        "device": device.type,
        **float32_description(device),
        "dtype": str(next(unet.parameters()).dtype),
        "versions": installed_versions("diffusers-gfprune", "diffusers", "torch"),
        **({} if codec is None else {"codec": codec.identity()}),
        **({} if conditions is None else conditions.description),
    }
