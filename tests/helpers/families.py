"""Small models of every family besides `UNet2DModel`, whose architectures are in `helpers.architectures`."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from diffusers_gfprune.diffusion.batch import ModelInputs
from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.metrics.model_size import spatial_size
from diffusers_gfprune.pruning.blocks import trace_groups
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

CONDITION = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,  # number of heads
}
CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
TEXT_TIME = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 60,
}

PIXART = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "cross_attention_dim": 32,
    "caption_channels": 12,
}
SIZES = {"use_additional_conditions": True, "num_attention_heads": 3, "cross_attention_dim": 24}

SD3 = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 6,
}
NORMS = {"qk_norm": "rms_norm"}

# Class, and arguments of all its architectures
BASES: dict[str, tuple[type[ModelMixin], dict]] = {
    "dit": (DiTTransformer2DModel, DIT),
    "condition": (UNet2DConditionModel, CONDITION),
    "pixart": (PixArtTransformer2DModel, PIXART),
    "sd3": (SD3Transformer2DModel, SD3),
}

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
    "condition": {
        "base": {},
        "learned-variances": {"out_channels": 8},
        "two-layers": {"layers_per_block": 2, "transformer_layers_per_block": 2},
        "lists": {**CROSS, "layers_per_block": (2, 1), "attention_head_dim": (2, 8), "transformer_layers_per_block": (1, 2)},
        "unlike-transformers": {
            **CROSS,
            "transformer_layers_per_block": ((1,), (2,)),
            "reverse_transformer_layers_per_block": ((1, 2), (2, 1)),
        },
        "linear-projection": {"use_linear_projection": True, "upcast_attention": True},
        "only-cross-attention": {**CROSS, "only_cross_attention": (True, False)},
        "one-head": {"attention_head_dim": 1},
        "heads-of-one-channel": {"attention_head_dim": 32},
        "heads-that-do-not-divide": {"attention_head_dim": 3},
        "text-time": {**TEXT_TIME, "use_linear_projection": True},
        "projected-text": {"encoder_hid_dim": 10, "encoder_hid_dim_type": "text_proj"},
        "time-condition": {"time_cond_proj_dim": 6},
        "class-embedding": {"num_class_embeds": 10},
        "class-timestep": {"class_embed_type": "timestep"},
        "class-identity": {"class_embed_type": "identity"},
        "class-projection": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 14},
        "class-simple-projection": {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 14},
        "classes-beside-time": {"num_class_embeds": 10, "class_embeddings_concat": True},
        "given-classes-beside-time": {"class_embed_type": "identity", "class_embeddings_concat": True},
        "activations-of-time": {"time_embedding_act_fn": "silu", "timestep_post_act": "gelu"},
        "fourier-time": {"time_embedding_type": "fourier", "time_embedding_dim": 24},
        "scale-shift": {"resnet_time_scale_shift": "scale_shift", "act_fn": "mish"},
        "no-mid-block": {"mid_block_type": None},
        "plain-mid-block": {"mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1.4},
        "no-skip-time-activation": {"resnet_skip_time_act": True, "resnet_out_scale_factor": 1.2},
        "resnet-samplers": {
            "down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "resnet_skip_time_act": True,
            "resnet_out_scale_factor": 1.2,
        },
        "attention-blocks": {
            "down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "AttnUpBlock2D"),
        },
        "three-levels": {
            "block_out_channels": (16, 32, 48),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        },
        "odd-size": {"sample_size": (7, 9), "downsample_padding": 0},
        "wide-kernels": {"conv_in_kernel": 1, "conv_out_kernel": 5, "center_input_sample": True, "flip_sin_to_cos": False},
        "one-norm-group": {"norm_num_groups": 1},
    },
    "pixart": {
        "base": {},
        "fixed-variances": {"out_channels": None},
        "pixels": {"in_channels": 3, "out_channels": 6},
        "sizes": SIZES,
        "sizes-by-default": {
            **SIZES,
            "use_additional_conditions": None,
            "sample_size": 128,
            "patch_size": 32,
            "num_layers": 1,
        },
        "text-as-it-is": {"caption_channels": None, "cross_attention_dim": 20},
        "text-as-it-is-and-sizes": {**SIZES, "caption_channels": None, "cross_attention_dim": 7},
        "one-head": {"num_attention_heads": 1, "attention_head_dim": 32},
        "many-heads": {"num_attention_heads": 16, "attention_head_dim": 2},
        "heads-of-one-channel": {"num_attention_heads": 12, "attention_head_dim": 1, "cross_attention_dim": 12},
        "uneven-heads": {"num_attention_heads": 3, "attention_head_dim": 20, "cross_attention_dim": 60},
        "patches-of-one": {"patch_size": 1, "sample_size": 5},
        "odd-patches": {"patch_size": 3, "sample_size": 9},
        "one-patch": {"patch_size": 8},
        "no-attention-bias": {"attention_bias": False},
        "gelu": {"activation_fn": "gelu"},
        "geglu": {"activation_fn": "geglu"},
        "geglu-approximate": {"activation_fn": "geglu-approximate"},
        "swiglu": {"activation_fn": "swiglu"},
        "silu": {"activation_fn": "linear-silu"},
        "affine-norms": {"norm_elementwise_affine": True, "norm_eps": 1e-3, "interpolation_scale": 2},
        "one-layer": {"num_layers": 1, "attention_type": None},
        "four-layers": {"num_layers": 4, "upcast_attention": True},
    },
    "sd3": {
        "base": {},
        "norms": NORMS,
        "dual-attention": {"dual_attention_layers": (0,)},
        "dual-attention-of-the-last": {"dual_attention_layers": [1], "out_channels": None},
        "norms-and-dual-attention": {**NORMS, "dual_attention_layers": (0, 1)},
        "pixels": {"in_channels": 3, "out_channels": 3, **NORMS},
        "one-head": {"num_attention_heads": 1, "attention_head_dim": 32},
        "one-head-with-norms": {**NORMS, "num_attention_heads": 1, "attention_head_dim": 32},
        "many-heads": {**NORMS, "num_attention_heads": 16, "attention_head_dim": 2},
        "heads-of-one-channel": {"num_attention_heads": 12, "attention_head_dim": 1, "caption_projection_dim": 12},
        "uneven-heads": {"num_attention_heads": 3, "attention_head_dim": 20, "caption_projection_dim": 60},
        "uneven-heads-with-norms": {
            **{**NORMS, "dual_attention_layers": (0,)},
            **{"num_attention_heads": 5, "attention_head_dim": 12, "caption_projection_dim": 60},
        },
        "patches-of-one": {"patch_size": 1, "sample_size": 5, "pos_embed_max_size": 5},
        "odd-patches": {"patch_size": 3, "sample_size": 9, "pos_embed_max_size": 7},
        "one-patch": {"patch_size": 8, "pos_embed_max_size": 1},
        "one-layer": {"num_layers": 1, "dual_attention_layers": (0,)},
        "four-layers": {"num_layers": 4, **NORMS, "dual_attention_layers": (1,)},
    },
}
# Every test of the others for SD3 would take a minute
QUICK = {"sd3": ("norms-and-dual-attention", "uneven-heads")}
ALL = [
    pytest.param(family, name, marks=[] if name in QUICK.get(family, names) else [pytest.mark.slow])
    for family, names in ARCHITECTURES.items()
    for name in names
]


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

    def values(like: Tensor, count: int = 10) -> Tensor:
        if like.is_floating_point():
            return torch.randn(like.shape, generator=generator)
        return torch.randint(0, count, like.shape, generator=generator)

    conditioning = {name: values(like, 2 if "mask" in name else 10) for name, like in zeros.conditioning.items()}
    if "pooled_projections" in conditioning:  # SD3's text has no mask, and may be short
        conditioning["encoder_hidden_states"] = conditioning["encoder_hidden_states"][:, :9]
    timesteps = torch.randint(1, 1000, (batch_size,), generator=generator)
    return ModelInputs(values(zeros.sample), timesteps, conditioning)


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    """The whole output for the standard inputs, learned variances included."""
    sample, timesteps, conditioning = inputs(model)
    wanted: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, args, output: wanted.append(output.sample))
    conditioning = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in conditioning.items()}
    family_of(model).predict(model, ModelInputs(sample.to(model.dtype), timesteps, conditioning))
    handle.remove()
    return wanted[0]


def removable(family: str) -> str:
    """Name of an architecture that has blocks to remove."""
    return {"condition": "two-layers"}.get(family, "four-layers")


@functools.lru_cache
def traced(family: str, name: str = "base") -> tuple[ChannelGroup, ...]:
    """The groups of an architecture, traced once for all tests."""
    return tuple(trace_channel_groups(build(family, name)))


@functools.lru_cache
def pruned(family: str, name: str = "base", seed: int = 0, depth: str = "none") -> ModelMixin:
    """A pruned model, without half of its blocks with depth `"allow"`. Shared by tests: copy it before changing it."""
    model = build(family, name)
    groups = list(traced(family, name)) if depth == "none" else trace_groups(model, depth)
    return compact(model, plan_compaction(model, groups, random_masks(groups, seed)))
