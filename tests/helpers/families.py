"""Small models of every family besides `UNet2DModel`, whose architectures are in `helpers.architectures`."""

from __future__ import annotations

import functools

import torch
from diffusers import DiTTransformer2DModel, ModelMixin
from torch import Tensor, nn

from diffusers_gfprune.diffusion.batch import ModelInputs
from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.metrics.model_size import spatial_size
from diffusers_gfprune.pruning.channel_groups import ChannelGroup, trace_channel_groups
from diffusers_gfprune.pruning.compaction import compact, plan_compaction
from helpers.architectures import random_masks

DIT = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}

# Class, and arguments of all its architectures
BASES: dict[str, tuple[type[ModelMixin], dict]] = {"dit": (DiTTransformer2DModel, DIT)}

# What differs from the base, by family and name
ARCHITECTURES: dict[str, dict[str, dict]] = {
    "dit": {
        "base": {},
        "learned-variances": {"out_channels": 8},
        "pixels": {"in_channels": 3, "out_channels": 6},
        "one-head": {"num_attention_heads": 1, "attention_head_dim": 32},
        "many-heads": {"num_attention_heads": 16, "attention_head_dim": 2},
        "heads-of-one-channel": {"num_attention_heads": 12, "attention_head_dim": 1},
        "uneven-heads": {"num_attention_heads": 3, "attention_head_dim": 20},
        "patches-of-one": {"patch_size": 1, "sample_size": 5},
        "odd-patches": {"patch_size": 3, "sample_size": 9},
        "one-patch": {"patch_size": 8},
        "no-attention-bias": {"attention_bias": False},
        "gelu": {"activation_fn": "gelu"},
        "geglu": {"activation_fn": "geglu"},
        "geglu-approximate": {"activation_fn": "geglu-approximate"},
        "swiglu": {"activation_fn": "swiglu"},
        "silu": {"activation_fn": "linear-silu"},
        "affine-norms": {"norm_elementwise_affine": True, "norm_eps": 1e-3},
        "one-layer": {"num_layers": 1},
        "four-layers": {"num_layers": 4, "upcast_attention": True},
    },
}
ALL = [(family, name) for family, names in ARCHITECTURES.items() for name in names]


def build(family: str, name: str = "base", seed: int = 0) -> ModelMixin:
    """A model in evaluation mode, with all weights perturbed, since fresh biases and norms would hide mistakes."""
    kind, base = BASES[family]
    torch.manual_seed(seed)
    model = kind(**{**base, **ARCHITECTURES[family][name]}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def inputs(model: nn.Module, batch_size: int = 2, seed: int = 1) -> ModelInputs:
    """Noise, timesteps far apart, and random conditioning."""
    generator = torch.Generator().manual_seed(seed)
    zeros = family_of(model).example_inputs(model, *spatial_size(model), batch_size)

    def values(like: Tensor) -> Tensor:
        if like.is_floating_point():
            return torch.randn(like.shape, generator=generator)
        return torch.randint(0, 10, like.shape, generator=generator)

    conditioning = {name: values(like) for name, like in zeros.conditioning.items()}
    timesteps = torch.randint(1, 1000, (batch_size,), generator=generator)
    return ModelInputs(values(zeros.sample), timesteps, conditioning)


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    """The whole output for the standard inputs, learned variances included."""
    sample, timesteps, conditioning = inputs(model)
    wanted: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, args, output: wanted.append(output.sample))
    family_of(model).predict(model, ModelInputs(sample.to(model.dtype), timesteps, conditioning))
    handle.remove()
    return wanted[0]


@functools.lru_cache
def traced(family: str, name: str = "base") -> tuple[ChannelGroup, ...]:
    """The groups of an architecture, traced once for all tests."""
    return tuple(trace_channel_groups(build(family, name)))


@functools.lru_cache
def pruned(family: str, name: str = "base", seed: int = 0) -> ModelMixin:
    """A pruned model. Shared by tests: copy it before changing it."""
    model, groups = build(family, name), list(traced(family, name))
    return compact(model, plan_compaction(model, groups, random_masks(groups, seed)))
