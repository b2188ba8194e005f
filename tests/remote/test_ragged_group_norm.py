"""Norms with groups of unequal size, as in repositories of format 1, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diffusers_gfprune.remote.pruned_layers import RaggedGroupNorm

SIZES = (3, 1, 5, 2)


def random_norm(dtype: torch.dtype = torch.float32) -> RaggedGroupNorm:
    norm = RaggedGroupNorm(SIZES, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.to(dtype)


def by_hand(norm: RaggedGroupNorm, x: Tensor) -> Tensor:
    """Mean and variance over the channels of a group and all positions, in float64; x has shape (batch, channels, *)."""
    groups = []
    for group in x.double().split(SIZES, dim=1):
        values = group.flatten(1)
        mean, variance = values.mean(dim=1), values.var(dim=1, correction=0)
        shape = (-1, *[1] * (x.ndim - 1))
        groups.append((group - mean.view(shape)) / (variance + 1e-3).sqrt().view(shape))
    shape = (-1, *[1] * (x.ndim - 2))
    return torch.cat(groups, dim=1) * norm.weight.double().view(shape) + norm.bias.double().view(shape)


@pytest.mark.parametrize("shape", [(2, 11, 4, 6), (2, 11, 9), (3, 11, 1, 1)])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_values_are_those_of_the_definition(shape: tuple[int, ...], offset: float) -> None:
    """Images, tokens, single positions; and means that would take all digits from a variance of E[x^2] - E[x]^2."""
    norm, x = random_norm(), torch.randn(shape) + offset
    torch.testing.assert_close(norm(x).double(), by_hand(norm, x), rtol=1e-4, atol=2e-4 if offset else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_are_float32(dtype: torch.dtype) -> None:
    norm, x = random_norm(dtype), (torch.randn(2, 11, 16, 16) * 30).to(dtype)
    found = norm(x)
    assert found.dtype == dtype
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), by_hand(norm, x), rtol=rounding, atol=rounding)


def test_it_is_differentiated_twice() -> None:
    norm, x = random_norm(torch.float64), torch.randn(2, 11, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(norm, x)


def test_it_looks_like_a_group_norm() -> None:
    """Diffusers, accelerate and users look at type, names and repr."""
    norm = RaggedGroupNorm([3, 1, 2], eps=1e-6)
    assert isinstance(norm, nn.GroupNorm)
    assert (norm.num_channels, norm.num_groups, norm.eps) == (6, 3, 1e-6)
    assert {name: tuple(value.shape) for name, value in norm.state_dict().items()} == {"weight": (6,), "bias": (6,)}
    assert repr(norm) == "RaggedGroupNorm(group_sizes=[3, 1, 2], eps=1e-06)"
