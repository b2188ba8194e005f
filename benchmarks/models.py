"""Models of the benchmarks: the digits teacher, two configurations with random weights, and Torch-Pruning's pruned models."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
import torch_pruning
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D

from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.metrics.model_size import count_macs, spatial_size

__all__ = ["batches_for", "build", "dense_config", "torch_pruning_model"]

ROOT = Path(__file__).resolve().parent.parent
# google/ddpm-cifar10-32
CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
# Many small layers, as in high-resolution models with small budgets
DEEP = {
    "sample_size": 128,
    "layers_per_block": 4,
    "block_out_channels": (32, 64, 64, 96, 128),
    "down_block_types": ("DownBlock2D",) * 2 + ("AttnDownBlock2D",) * 3,
    "up_block_types": ("AttnUpBlock2D",) * 3 + ("UpBlock2D",) * 2,
    "resnet_time_scale_shift": "scale_shift",
}


def build(model: str) -> UNet2DModel:
    """The digits teacher, or one of the configurations above with random weights."""
    torch.manual_seed(0)
    if model == "digits":
        return UNet2DModel.from_pretrained(ROOT / "training/digits/teacher/unet")
    return UNet2DModel(**{"cifar10": CIFAR10, "deep": DEEP}[model])


def dense_config(unet: UNet2DModel) -> dict:
    """Constructor arguments of a model, without private entries; one of those marks explicit values as defaults."""
    return {key: value for key, value in unet.config.items() if not key.startswith("_")}


def batches_for(unet: UNet2DModel, batch: int, count: int) -> list[tuple[torch.Tensor, ...]]:
    size = unet.config.sample_size
    shape = (batch, unet.config.in_channels, size, size)
    return [(torch.rand(shape) * 2 - 1, torch.randn(shape), torch.randint(0, 1000, (batch,))) for _ in range(count)]


def torch_pruning_model(dense: UNet2DModel, macs: float) -> UNet2DModel:
    """Prune with Torch-Pruning's pruner, by magnitude, at the uniform ratio whose MACs are nearest to `macs`.

    Norms keep their number of groups and attentions their number of heads, so not every ratio can be reached.
    """
    heads = {}
    for module in dense.modules():
        if isinstance(module, Attention):
            heads |= dict.fromkeys((module.to_q, module.to_k, module.to_v), module.heads)
    family = family_of(dense)
    example = family.example_inputs(dense, *spatial_size(dense))
    best, smallest_gap = None, math.inf
    for percent in range(20, 45):
        small = copy.deepcopy(dense)
        theirs = dict(zip(dense.modules(), small.modules()))
        pruner = torch_pruning.pruner.BasePruner(
            small,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            num_heads={theirs[module]: count for module, count in heads.items()},
            pruning_ratio=percent / 100,
            ignored_layers=[small.conv_out],
            forward_fn=family.predict,
        )
        pruner.step()
        for module in small.modules():
            if isinstance(module, (Upsample2D, Downsample2D)):
                module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels
        gap = abs(count_macs(small) - macs)
        if gap < smallest_gap:
            best, smallest_gap = small, gap
    return best
