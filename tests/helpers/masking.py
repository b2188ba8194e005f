"""Masked models with their masks, and what tests of masking compare."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from diffusers_gfprune.pruning.masking import ChannelMasks, attach, dense_parameters
from helpers.architectures import build, inputs, random_masks
from helpers.compaction import traced

CONV1 = "down_blocks.0.resnets.0.conv1"  # 16 channels in 4 units, those of norm2's groups


def masked(name: str = "base", seed: int | None = 0) -> tuple[UNet2DModel, ChannelMasks]:
    """A model with random binary masks, or with ones where `seed` is None."""
    unet = build(name)
    masks = attach(unet, traced(name))
    if seed is not None:
        masks.set(random_masks(list(traced(name)), seed))
    return unet, masks


@torch.no_grad()
def run(unet: nn.Module, dense: UNet2DModel | None = None) -> Tensor:
    """The output for the standard inputs, in float64."""
    return unet(**inputs(dense or unet)).sample.double()


def loss_gradients(unet: UNet2DModel) -> dict[str, Tensor]:
    """Gradients of a loss by dense parameter name."""
    unet.zero_grad()
    unet(**inputs(unet)).sample.square().sum().backward()
    return {name: p.grad.clone() for name, p in dense_parameters(unet).items() if p.grad is not None}
