"""The cost model: costs predicted from widths are those of the compacted model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch_pruning
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention

from diffusers_gfprune.metrics.model_size import count_macs, count_parameters, layer_positions
from diffusers_gfprune.pruning import masking
from diffusers_gfprune.pruning.channel_groups import trace_channel_groups
from diffusers_gfprune.pruning.compaction import compact, plan_compaction
from diffusers_gfprune.pruning.cost_model import COUNTED_TARGETS, CostModel
from helpers.architectures import ARCHITECTURES, BASE, CIFAR10, build, inputs, random_masks

# One of each thing that costs: attention layouts, samplers, embeddings, skips between unequal widths, odd image sizes.
ARCHITECTURES_THAT_COST_DIFFERENTLY = [
    "base",
    "scale-shift",
    "fourier-time",
    "class-embedding",
    "class-identity",
    "three-levels",
    "heads-that-do-not-divide",
    "no-mid-block",
    "resnet-sampler-blocks",
    "asymmetric-padding",
    "non-square",
]


@pytest.fixture(scope="module")
def cifar10() -> UNet2DModel:
    """google/ddpm-cifar10-32 without memory for its weights."""
    with torch.device("meta"):
        return UNet2DModel(**CIFAR10)


@pytest.mark.fast_variants(4)
@pytest.mark.parametrize("name", ARCHITECTURES_THAT_COST_DIFFERENTLY)
def test_costs_are_those_of_the_dense_and_of_the_compacted_model(name: str) -> None:
    """Budgets are searched on predictions; they are met only if predictions are exact for models that really exist."""
    unet = build(name)
    groups = trace_channel_groups(unet)
    cost = CostModel(unet, groups)
    assert cost.macs(cost.dense) == count_macs(unet)
    assert cost.parameters(cost.dense) == count_parameters(unet)
    assert cost.channels(cost.dense) == sum(group.num_channels for group in groups)

    masking.attach(unet, groups)
    masks = random_masks(groups, seed=5)
    small = compact(unet, plan_compaction(unet, groups, masks))
    kept = np.array([int(group.per_channel(masks[group.name]).sum()) for group in groups])
    assert cost.macs(kept) == count_macs(small)
    assert cost.parameters(kept) == count_parameters(small)
    assert cost.channels(kept) == kept.sum() < cost.dense.sum()
    assert cost.macs(kept) < cost.macs(cost.dense)


def test_architectures_above_exist() -> None:
    """A renamed architecture would otherwise fail with an unclear KeyError."""
    assert set(ARCHITECTURES_THAT_COST_DIFFERENTLY) <= set(ARCHITECTURES)


def test_costs_of_a_masked_model_are_those_of_the_dense_one() -> None:
    """The pruner may be given a model with masks on; only shapes count."""
    unet = build("base")
    groups = trace_channel_groups(unet)
    dense = CostModel(unet, groups)
    masking.attach(unet, groups)
    unet.channel_masks.set(random_masks(groups, seed=0))
    masked = CostModel(unet, groups)
    half = dense.dense // 2
    for target in COUNTED_TARGETS:
        assert masked.cost(target, half) == dense.cost(target, half)


def test_sample_size_overrides_that_of_the_model() -> None:
    """MACs of a convolution grow with the area, parameters do not."""
    unet = build("no-attention")
    groups = trace_channel_groups(unet)
    small, large = CostModel(unet, groups), CostModel(unet, groups, sample_size=(16, 32))
    assert large.macs(large.dense) == count_macs(unet, (16, 32)) > 6 * small.macs(small.dense)
    assert large.parameters(large.dense) == small.parameters(small.dense)


def test_cifar10_model_costs_what_is_published(cifar10: UNet2DModel) -> None:
    """35.7M parameters and 6.06 GMACs (Diff-Pruning, table 1) are the anchor that pruned sizes are compared by.

    The published count is Torch-Pruning's, which sees layers only; the two matrix products of attention come on top here.
    """
    cost = CostModel(cifar10, trace_channel_groups(cifar10))
    assert cost.parameters(cost.dense) == 35_746_307
    assert cost.macs(cost.dense) == count_macs(cifar10)
    positions = layer_positions(cifar10)
    products = sum(
        2 * positions[f"{name}.to_q"] ** 2 * module.to_q.out_features
        for name, module in cifar10.named_modules()
        if isinstance(module, Attention)
    )
    assert products == 5 * 2 * 256**2 * 256 + 2 * 16**2 * 256  # five attentions over 16x16, the middle one over 4x4
    assert cost.macs(cost.dense) - products == pytest.approx(6.06e9, rel=0.01)


def test_macs_agree_with_torch_pruning_without_attention() -> None:
    """An independent count; it adds biases and activations, which are few next to products in a model this wide."""
    options = {**ARCHITECTURES["no-attention"], "add_attention": False, "block_out_channels": (64, 128)}
    unet = UNet2DModel(**{**BASE, **options}).eval()
    assert not any(isinstance(module, Attention) for module in unet.modules())
    macs, params = torch_pruning.utils.count_ops_and_params(unet, inputs(unet, batch_size=1))
    assert count_macs(unet) == pytest.approx(macs, rel=0.01)
    assert count_parameters(unet) == params


@pytest.mark.parametrize("target", COUNTED_TARGETS)
def test_removed_is_a_share_of_the_dense_cost(target: str) -> None:
    """0 for the dense model; more for every channel that goes."""
    unet = build("base")
    groups = trace_channel_groups(unet)
    cost = CostModel(unet, groups)
    assert cost.removed(target, cost.dense) == 0
    marginal = cost.marginal(target, cost.dense)
    assert marginal.shape == (len(groups),)
    for index in range(len(groups)):
        fewer = cost.dense.copy()
        fewer[index] -= 1
        assert marginal[index] > 0
        assert cost.removed(target, fewer) == pytest.approx(marginal[index] / cost.cost(target, cost.dense))


def test_unknown_target_is_refused() -> None:
    """The message lists the targets."""
    unet = build("one-level")
    cost = CostModel(unet, trace_channel_groups(unet))
    with pytest.raises(ValueError, match="target=flops .*macs"):
        cost.removed("flops", cost.dense)
