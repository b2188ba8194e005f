"""`count_macs` against two independent counters, on real models: dense and pruned, digits and CIFAR-10.

- PyTorch's `FlopCounterMode` sees every matrix product and convolution, those of attention too as long as these run on the
  math backend (its registry has no entry for the fused kernel of CPUs).
- Torch-Pruning's counter sees layers by their type: not the two products of attention, which are taken off `count_macs`
  here, from the shapes that the queries have in a forward; and, on top, biases and norms.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import torch_pruning
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_gfprune.metrics.model_size import count_macs
from diffusers_gfprune.pruning.channel_groups import trace_channel_groups
from diffusers_gfprune.pruning.compaction import compact, plan_compaction
from helpers.architectures import CIFAR10, random_masks

TEACHER = Path(__file__).resolve().parents[2] / "training/digits/teacher/unet"
MODELS = ["digits", "cifar10", "digits-pruned", "cifar10-pruned"]
# Queries of every attention are (tokens, channels) with two products of tokens^2 x channels.
PRODUCTS = {
    "digits": 4 * 2 * 16**2 * 80,  # four over 4x4, five heads of 16 channels each
    "cifar10": 5 * 2 * 256**2 * 256 + 2 * 16**2 * 256,  # five over 16x16, the middle one over 4x4
}


@functools.lru_cache
def model(name: str) -> UNet2DModel:
    """One of the MODELS; pruned ones have uneven widths and, on CIFAR-10, a single head of uneven width."""
    torch.manual_seed(0)
    if name == "digits":
        return UNet2DModel.from_pretrained(TEACHER).eval()
    if name == "cifar10":
        return UNet2DModel(**CIFAR10).eval()
    dense = model(name.removesuffix("-pruned"))
    groups = trace_channel_groups(dense)
    return compact(dense, plan_compaction(dense, groups, random_masks(groups, seed=3))).eval()


def arguments(unet: UNet2DModel) -> dict[str, torch.Tensor]:
    """Of a forward at batch 1; none of these models wants labels."""
    size = unet.config.sample_size
    return {"sample": torch.zeros(1, unet.config.in_channels, size, size), "timestep": torch.zeros(1, dtype=torch.long)}


@torch.no_grad()
def attention_products(unet: UNet2DModel) -> int:
    """MACs of Q K^T and of the product with V, from the queries that a forward makes, `(1, tokens, channels)` each."""
    found: list[int] = []
    hooks = [
        module.to_q.register_forward_hook(lambda module, args, q: found.append(2 * q.shape[1] ** 2 * q.shape[2]))
        for module in unet.modules()
        if isinstance(module, Attention)
    ]
    unet(**arguments(unet))
    for hook in hooks:
        hook.remove()
    return sum(found)


@torch.no_grad()
def flops(unet: UNet2DModel) -> int:
    """Of a forward, by PyTorch's counter."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        unet(**arguments(unet))
    return counter.get_total_flops()


def test_pruned_models_are_uneven() -> None:
    """Otherwise agreement on them would not test uneven widths."""
    for name in ("digits-pruned", "cifar10-pruned"):
        assert len({module.out_channels for module in model(name).modules() if isinstance(module, nn.Conv2d)}) >= 8


@pytest.mark.parametrize("name", MODELS)
def test_macs_agree_with_the_flop_counter_of_pytorch(name: str) -> None:
    """Half of its FLOPs, to the last one."""
    unet = model(name)
    assert 2 * count_macs(unet) == flops(unet)


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize("name", MODELS)
def test_macs_agree_with_torch_pruning_but_for_attention(name: str) -> None:
    """Like with like: its counter leaves out the products of attention, so they are taken off ours, then 1 % is allowed."""
    unet = model(name)
    macs, params = torch_pruning.utils.count_ops_and_params(unet, arguments(unet))
    assert count_macs(unet) - attention_products(unet) == pytest.approx(macs, rel=0.01)
    assert sum(parameter.numel() for parameter in unet.parameters()) == params


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_attention_are_those_of_the_known_shapes(name: str) -> None:
    """What the comparison above takes off is known beforehand for dense models."""
    assert attention_products(model(name)) == PRODUCTS[name]
