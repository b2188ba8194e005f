"""latency/layer_workloads.py: every layer of a forward is found, and can be run separately at any width."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from diffusers_gfprune.families.sd3_transformer_2d import TEXT_TOKENS
from diffusers_gfprune.latency.layer_workloads import (
    AttentionProducts,
    Convolution,
    CrossAttentionProducts,
    Inputs,
    LayerCall,
    LinearLayer,
    Norm,
    trace_layer_calls,
)
from diffusers_gfprune.metrics.model_size import count_macs
from helpers import families
from helpers.architectures import build
from helpers.families import BASES


def macs(call: LayerCall) -> int:
    """Multiply-accumulates of a call at batch 1, from its workload alone."""
    work = call.workload
    if isinstance(work, Convolution):
        return call.positions * math.prod(work.kernel) * call.wide_in * call.wide_out
    if isinstance(work, LinearLayer):
        return call.positions * call.wide_in * call.wide_out
    return 2 * work.tokens * work.key_tokens * call.wide_out if isinstance(work, AttentionProducts) else 0


@pytest.mark.parametrize(
    "name", ["base", "scale-shift", "non-square", "class-embedding", "three-levels", "asymmetric-padding"]
)
def test_no_layer_is_missing(name: str) -> None:
    """The calls have all MACs of the model, all of its norms, and a SiLU behind every norm outside of attention."""
    unet = build(name)
    calls = trace_layer_calls(unet)
    assert sum(macs(call) for call in calls) == count_macs(unet)
    norms = {call.module: call.workload for call in calls if isinstance(call.workload, Norm)}
    assert set(norms) == {module for module, layer in unet.named_modules() if isinstance(layer, nn.GroupNorm)}
    attentions = {module for module, layer in unet.named_modules() if isinstance(layer, Attention)}
    assert {module.removesuffix(".group_norm") for module, work in norms.items() if not work.silu} <= attentions
    assert not any(work.silu for module, work in norms.items() if module.endswith(".group_norm"))


@pytest.mark.parametrize("family", BASES)
def test_no_layer_of_another_family_is_missing(family: str) -> None:
    """Cross-attentions to text have other keys than queries, and the first block of a DiT has layers that are called twice."""
    model = families.build(family)
    calls = trace_layer_calls(model)
    assert sum(macs(call) for call in calls) == count_macs(model)
    crossed = [call.module for call in calls if isinstance(call.workload, CrossAttentionProducts)]
    assert all(".attn2." in name for name in crossed) and bool(crossed) == (family in ("condition", "pixart"))


def test_products_of_joint_attention_have_the_tokens_of_image_and_text() -> None:
    calls = trace_layer_calls(families.build("sd3", "norms-and-dual-attention"))
    products = {call.module: call.workload for call in calls if isinstance(call.workload, AttentionProducts)}
    assert products["transformer_blocks.0.attn.to_q"] == AttentionProducts(16 + TEXT_TOKENS, 4)
    assert products["transformer_blocks.0.attn2.to_q"] == AttentionProducts(16, 4)


def test_layers_of_one_kind_share_a_workload() -> None:
    """The table has an entry for a workload; many would be a table of every layer."""
    calls = {call.module: call for call in trace_layer_calls(build("two-layers"))}
    first, second = (calls[f"down_blocks.0.resnets.{index}.conv2"].workload for index in (0, 1))
    assert first == second == Convolution((8, 8), (3, 3), (1, 1), (1, 1), True)
    query = calls["down_blocks.1.attentions.0.to_k"].workload
    assert query == LinearLayer(16, transposed=True, bias=True)  # 4 x 4 pixels, which lie in memory channel by channel
    assert calls["down_blocks.1.attentions.0.to_out.0"].workload == LinearLayer(16, transposed=False, bias=True)


@pytest.mark.parametrize(
    ("workload", "shape"),
    [
        (Convolution((6, 4), (3, 3), (2, 2), (1, 1), True), (2, 8, 3, 2)),
        (LinearLayer(5, transposed=True, bias=True), (2, 5, 8)),
        (LinearLayer(0, transposed=False, bias=False), (2, 8)),
        (Norm((6, 4), 4, silu=True), (2, 8, 6, 4)),
        (Norm((5,), 4, silu=False), (2, 8, 5)),
        (AttentionProducts(5, heads=4), (2, 5, 8)),
        (CrossAttentionProducts(5, 4, keys=3), (2, 5, 8)),
    ],
)
def test_a_workload_runs_at_a_width(workload, shape: tuple[int, ...]) -> None:
    """With the shapes that it has inside of a model."""
    module, tensors = workload.layer(3, 8, Inputs(2, torch.device("cpu"), torch.float32))
    assert tuple(module(*tensors).shape) == shape
    assert all(values.is_contiguous() for values in tensors)  # as runtimes take them
