"""Small versions of every kind of `UNet2DModel` that pruning supports, and random masks for them."""

from __future__ import annotations

import functools

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_gfprune import GFPrunedUNet2DModel
from diffusers_gfprune.pruning.blocks import RemovableBlock, trace_groups
from diffusers_gfprune.pruning.channel_groups import ChannelGroup
from diffusers_gfprune.pruning.compaction import compact, plan_compaction

BASE = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
THREE_LEVELS = {
    "block_out_channels": (16, 32, 48),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
RESNET_SAMPLERS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
}

# What differs from BASE, by name.
ARCHITECTURES: dict[str, dict] = {
    "base": {},
    "rgb": {"in_channels": 3, "out_channels": 3},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale-shift-attention-norm": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8},
    "fourier-time": {"time_embedding_type": "fourier"},
    "learned-time": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "narrow-time-embedding": {"time_embedding_dim": 24},
    "class-embedding": {"num_class_embeds": 10},
    "class-timestep": {"class_embed_type": "timestep"},
    "class-identity": {"class_embed_type": "identity"},
    "class-embedding-scale-shift": {"num_class_embeds": 10, "resnet_time_scale_shift": "scale_shift"},
    "decreasing-widths": {"block_out_channels": (32, 16)},
    "equal-widths": {"block_out_channels": (16, 16)},
    "one-level": {
        "block_out_channels": (16,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",),
    },
    "three-levels": THREE_LEVELS,
    "three-levels-two-layers": {**THREE_LEVELS, "layers_per_block": 2},
    "two-layers": {"layers_per_block": 2},
    "fine-units": {"block_out_channels": (32, 32), "norm_num_groups": 16},  # units of two or four channels, none straddles
    "one-norm-group": {"norm_num_groups": 1},
    "one-channel-per-norm-group": {"norm_num_groups": 16},
    "one-head": {"attention_head_dim": None},
    "heads-of-one-channel": {"attention_head_dim": 1},
    "heads-that-do-not-divide": {"attention_head_dim": 12},
    "no-mid-attention": {"add_attention": False},
    "no-mid-block": {"mid_block_type": None},
    "no-attention": {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
    "resnet-samplers": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "resnet-sampler-blocks": RESNET_SAMPLERS,
    "resnet-sampler-blocks-scale-shift": {**RESNET_SAMPLERS, "resnet_time_scale_shift": "scale_shift"},
    "asymmetric-padding": {"downsample_padding": 0},
    "non-square": {"sample_size": (8, 16)},
    "centred-input": {"center_input_sample": True},
    "mid-scale-factor": {"mid_block_scale_factor": 1.4},
    "mish": {"act_fn": "mish"},
    "gelu": {"act_fn": "gelu"},
    "relu": {"act_fn": "relu"},
    "fourier-learned-classes": {
        "time_embedding_type": "fourier",
        "num_class_embeds": 10,
        "resnet_time_scale_shift": "scale_shift",
        "layers_per_block": 2,
    },
}

# google/ddpm-cifar10-32
CIFAR10 = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
}


def build(name: str = "base", seed: int = 0) -> UNet2DModel:
    """A model of one of the ARCHITECTURES in evaluation mode, with weights that make every part matter.

    Freshly initialized biases, norm scales and shifts are constants, which would hide mistakes: all are perturbed.
    """
    torch.manual_seed(seed)
    unet = UNet2DModel(**{**BASE, **ARCHITECTURES[name]}).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return unet


def inputs(unet: UNet2DModel, batch_size: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """Arguments of a forward: noise, two timesteps far apart, labels where the model wants them."""
    generator = torch.Generator().manual_seed(seed)
    size = unet.config.sample_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    found = {
        "sample": torch.randn(batch_size, unet.config.in_channels, *size, generator=generator),
        "timestep": torch.randint(1, 1000, (batch_size,), generator=generator),
    }
    if unet.config.class_embed_type == "identity":
        width = unet.time_embedding.linear_2.out_features
        found["class_labels"] = torch.randn(batch_size, width, generator=generator)
    elif unet.class_embedding is not None:
        found["class_labels"] = torch.randint(0, 10, (batch_size,), generator=generator)
    return found


def random_mask(group: ChannelGroup, generator: torch.Generator) -> Tensor:
    """A binary mask of units that could be compacted: any share of them, whole heads off, the other heads shrunk alike.

    Half of the removable blocks are off.
    """
    if isinstance(group, RemovableBlock):
        return (torch.rand(1, generator=generator) < 0.5).float()
    if group.attention is None or group.whole_heads:
        if group.num_units == 0:
            return torch.ones(0)
        share = 0.1 + 0.8 * torch.rand(1, generator=generator)
        mask = (torch.rand(group.num_units, generator=generator) < share).float()
        mask[torch.randint(group.num_units, (1,), generator=generator)] = 1
        return mask
    head_dim = group.num_channels // group.heads
    width = int(torch.randint(1, head_dim + 1, (1,), generator=generator))
    alive = torch.rand(group.heads, generator=generator) < 0.7
    alive[torch.randint(group.heads, (1,), generator=generator)] = True
    mask = torch.zeros(group.heads, head_dim)
    for head in alive.nonzero().flatten().tolist():
        mask[head, torch.randperm(head_dim, generator=generator)[:width]] = 1
    return mask.view(-1)


def random_masks(groups: list[ChannelGroup], seed: int) -> dict[str, Tensor]:
    """A random mask for every group, by unit."""
    generator = torch.Generator().manual_seed(seed)
    return {group.name: random_mask(group, generator) for group in groups}


@functools.lru_cache
def pruned(name: str = "base", seed: int = 0, depth: str = "none") -> GFPrunedUNet2DModel:
    """A pruned model, missing heads included, and half of the blocks with depth `"allow"`. Shared by tests: copy it before
    changing it."""
    unet = build(name)
    groups = trace_groups(unet, depth)
    return compact(unet, plan_compaction(unet, groups, random_masks(groups, seed)))


@torch.no_grad()
def run(unet: nn.Module) -> Tensor:
    """The output for the standard inputs, in the model's dtype."""
    arguments = inputs(unet)
    return unet(**{**arguments, "sample": arguments["sample"].to(unet.dtype)}).sample


class NoMemory(TorchDispatchMode):
    """Fails a test that makes a tensor of more than a few values outside of the meta device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                assert leaf.numel() <= 1000, f"{func} allocated {tuple(leaf.shape)}"
        return result
