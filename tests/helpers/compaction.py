"""Masked and compacted versions of the small architectures, for the tests of compaction."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from diffusers_gfprune.pruning.channel_groups import ChannelGroup, trace_channel_groups
from diffusers_gfprune.pruning.compaction import CompactionPlan, compact, plan_compaction
from diffusers_gfprune.pruning.masking import attach
from diffusers_gfprune.remote.unet_2d_gfpruned import GFPrunedUNet2DModel
from helpers.architectures import CIFAR10, build, inputs, random_masks

SEEDS = (0, 1, 2, 3)
TO_Q = "down_blocks.1.attentions.0.to_q"


@functools.lru_cache
def traced(name: str = "base") -> tuple[ChannelGroup, ...]:
    """The groups of one of the ARCHITECTURES, traced once for all tests."""
    return tuple(trace_channel_groups(build(name)))


@functools.lru_cache
def cifar10() -> tuple[UNet2DModel, dict[str, ChannelGroup]]:
    """google/ddpm-cifar10-32, for which nothing is allocated, and its groups by name."""
    with torch.device("meta"):
        unet = UNet2DModel(**CIFAR10)
    return unet, {group.name: group for group in trace_channel_groups(unet)}


def groups_by_name(name: str = "base") -> dict[str, ChannelGroup]:
    """The same by group name."""
    return {group.name: group for group in traced(name)}


def masked(masks: dict[str, Tensor] | int, name: str = "base") -> UNet2DModel:
    """A masked model; an integer is the seed of random masks."""
    unet = build(name)
    attach(unet, traced(name)).set(random_masks(list(traced(name)), masks) if isinstance(masks, int) else masks)
    return unet


def planned(unet: UNet2DModel, name: str = "base") -> CompactionPlan:
    """The plan for the masks that the model has."""
    return plan_compaction(unet, traced(name), unet.channel_masks.as_dict())


def compacted(unet: UNet2DModel, name: str = "base") -> GFPrunedUNet2DModel:
    """The small model for the masks that the model has."""
    return compact(unet, planned(unet, name))


@torch.no_grad()
def run(unet: nn.Module) -> Tensor:
    """The output for the standard inputs."""
    return unet(**inputs(unet)).sample


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||, in float64."""
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def head_mask(*widths: int) -> Tensor:
    """A mask of 4 heads with 8 channels each, which keeps the first so many of each head."""
    return torch.cat([(torch.arange(8) < width).float() for width in widths])


def kept_slice(unet: UNet2DModel, name: str, tensor: Tensor, groups: Iterable[ChannelGroup] = ()) -> Tensor:
    """The part of a dense-shaped tensor whose channels are all kept, straight from the groups' definition."""
    flags = [torch.ones(size, dtype=torch.bool) for size in tensor.shape]
    for group in groups or traced():
        for piece in group.slices:
            if piece.name == name:
                flags[piece.dim][list(piece.positions)] = group.per_channel(unet.channel_masks[group.name]) == 1
    for dim, keep in enumerate(flags):
        tensor = tensor.index_select(dim, keep.nonzero().flatten())
    return tensor


def loss(unet: nn.Module, seed: int = 1) -> Tensor:
    """A loss to train on."""
    return unet(**inputs(unet, seed=seed)).sample.square().sum()
