"""The invariant of the package: a compacted model has the outputs of the masked one, and native norms."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from diffusers_gfprune.pruning.channel_groups import trace_channel_groups
from diffusers_gfprune.pruning.compaction import compact, plan_compaction
from diffusers_gfprune.pruning.masking import attach, dense_parameters
from diffusers_gfprune.remote.unet_2d_gfpruned import GFPrunedUNet2DModel
from helpers import families
from helpers.architectures import ARCHITECTURES, CIFAR10, build, inputs, random_masks
from helpers.compaction import (
    SEEDS,
    TO_Q,
    compacted,
    head_mask,
    kept_slice,
    loss,
    masked,
    planned,
    relative_error,
    run,
    traced,
)

CONV1 = "down_blocks.0.resnets.0.conv1"  # 16 channels in 4 units, those of norm2's groups

# --- invariant 2: compaction is lossless -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def architecture(request) -> tuple[str, UNet2DModel, Tensor]:
    """A model with masks, made once for all seeds, and its dense output."""
    unet = build(request.param)
    dense_output = run(unet)
    attach(unet, traced(request.param))
    return request.param, unet, dense_output


@pytest.mark.fast_variants(15)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES, indirect=True)
def test_compacted_equals_masked(architecture: tuple[str, UNet2DModel, Tensor], seed: int):
    """For any binary masks: this is what makes pruning free of sudden loss of information.

    And every norm left is a native one with groups of the dense size: any other is slower, and breaks torch.func.
    """
    name, unet, dense_output = architecture
    unet.channel_masks.set(random_masks(list(traced(name)), seed))
    masked_output = run(unet)
    small = compacted(unet, name)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in unet.parameters())
    assert relative_error(masked_output, dense_output) > 0.1  # or the masks would not matter
    assert relative_error(run(small), masked_output) <= 1e-4
    for key, module in small.named_modules():
        if isinstance(module, nn.GroupNorm):
            assert type(module) is nn.GroupNorm, key
            dense = unet.get_submodule(key)
            assert module.num_channels * dense.num_groups == dense.num_channels * module.num_groups, key


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize("name", ["base", "scale-shift", "three-levels", "class-embedding", "one-norm-group", "two-layers"])
def test_gradients_of_compacted_equal_those_of_masked(name: str):
    """Fine-tuning on the small model is what training under the masks would have been."""
    unet = masked(1, name)
    plan = planned(unet, name)
    small = compact(unet, plan)
    loss(unet).backward()
    loss(small).backward()
    found, expected = [], []
    for key, parameter in dense_parameters(unet).items():
        found.append(small.get_parameter(key).grad.flatten())
        # d/d(a w) = (d/dw) / a
        expected.append(kept_slice(unet, key, parameter.grad, traced(name)).flatten() / plan.factors.get(key, 1.0))
    assert relative_error(torch.cat(found), torch.cat(expected)) <= 1e-4


def test_compacted_equals_masked_on_cifar10():
    """The model of the paper at its real size: google/ddpm-cifar10-32."""
    torch.manual_seed(0)
    unet = UNet2DModel(**CIFAR10).eval()
    assert sum(parameter.numel() for parameter in unet.parameters()) == 35_746_307
    groups = trace_channel_groups(unet)
    arguments = inputs(unet, batch_size=1)
    with torch.no_grad():
        dense_output = unet(**arguments).sample
        attach(unet, groups).set(random_masks(groups, seed=0))
        masked_output = unet(**arguments).sample
        small = compact(unet, plan_compaction(unet, groups, unet.channel_masks.as_dict()))
        output = small(**arguments).sample
    assert sum(parameter.numel() for parameter in small.parameters()) < 20_000_000
    assert relative_error(masked_output, dense_output) > 0.1
    assert relative_error(output, masked_output) <= 1e-4


def test_all_ones_compact_to_the_dense_model():
    """Nothing to remove: no tables, the same weights and outputs bit for bit."""
    unet = masked({})
    small = compacted(unet)
    assert (small.config.layer_channels, small.config.norm_group_sizes, small.config.attention_heads) == ({}, {}, {})
    dense = build()
    assert list(small.state_dict()) == list(dense.state_dict())
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in small.state_dict().items())
    assert torch.equal(run(small), run(dense))


def test_weights_are_the_kept_slices():
    """Channels keep their order and their values, but for the factor of queries."""
    unet = masked(0)
    plan = planned(unet)
    small = compact(unet, plan)
    assert {name for name in plan.factors if not name.endswith((".to_q.weight", ".to_q.bias"))} == set()
    for name, parameter in dense_parameters(unet).items():
        expected = kept_slice(unet, name, parameter.detach()) * plan.factors.get(name, 1.0)
        assert torch.equal(small.get_parameter(name).detach(), expected), name


def test_one_unit_left_everywhere():
    """The smallest model that masks allow: fixed channels alone, or one unit."""
    last = {group.name: torch.zeros(group.num_units) for group in traced()}
    for group in traced():
        if not group.fixed:
            last[group.name][-1] = 1
    unet = masked(last)
    small = compacted(unet)
    smallest = {group.name: len(group.fixed) or len(group.units[-1]) for group in traced()}
    assert {name: small.get_submodule(name).weight.shape[0] for name in smallest} == smallest
    assert relative_error(run(small), run(unet)) <= 1e-4


# --- the plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.5, 1e-6, 1 - 1e-6])
def test_masks_that_are_not_binary_are_refused(value: float):
    """A soft mask has no smaller model: rounding it would change the outputs without a word."""
    unet = masked({CONV1: torch.tensor([1.0, 1.0, value, 0.0])})
    with pytest.raises(ValueError, match=f"{CONV1} has the value .*only binary masks"):
        planned(unet)


@pytest.mark.parametrize("mask", [torch.zeros(4), torch.ones(3)], ids=["empty", "short"])
def test_masks_without_a_smaller_model_are_refused(mask: Tensor):
    """Masks may come from elsewhere than `ChannelMasks`, which refuses these."""
    masks = {group.name: torch.ones(group.num_units) for group in traced()}
    with pytest.raises(ValueError, match=f"mask of {CONV1}"):
        plan_compaction(build(), traced(), {**masks, CONV1: mask})


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize(
    ("widths", "factor", "heads"),
    [
        ((2, 2, 2, 2), 0.5, None),  # sqrt(2 / 8)
        ((5, 5, 5, 5), math.sqrt(5 / 8), None),
        ((8, 0, 8, 8), None, 3),
        ((0, 0, 8, 0), None, 1),
        ((0, 2, 2, 0), 0.5, 2),
        ((8, 8, 8, 8), None, None),
    ],
)
def test_attention_keeps_the_dense_scale(widths: tuple[int, ...], factor: float | None, heads: int | None):
    """Attention divides by the square root of the head's width, which to_q makes up for; whole heads need nothing."""
    attention = "down_blocks.1.attentions.0"
    unet = masked({TO_Q: head_mask(*widths)})
    plan = planned(unet)
    expected = {} if factor is None else {f"{TO_Q}.{name}": pytest.approx(factor) for name in ("weight", "bias")}
    assert plan.factors == expected
    assert plan.attention_heads == ({} if heads is None else {attention: heads})
    small = compact(unet, plan)
    kept = head_mask(*widths).bool()
    weights = dense_parameters(unet)
    for letter, scale in (("q", factor or 1.0), ("k", 1.0), ("v", 1.0)):
        for parameter in ("weight", "bias"):
            name = f"{attention}.to_{letter}.{parameter}"
            torch.testing.assert_close(small.get_parameter(name), weights[name][kept] * scale)
    module = small.get_submodule(attention)
    assert (module.heads, module.inner_dim) == (heads or 4, sum(widths))
    assert relative_error(run(small), run(unet)) <= 1e-4


@pytest.mark.parametrize(
    ("units", "sizes"), [((1, 1, 1, 1), None), ((1, 0, 1, 1), [4, 4, 4]), ((0, 1, 0, 1), [4, 4]), ((0, 0, 0, 1), [4])]
)
def test_norms_lose_whole_groups(units: tuple[int, ...], sizes: list[int] | None):
    """A kept channel stays with all others of the group it was trained in."""
    name = "down_blocks.0.resnets.0.norm2"
    unet = masked({CONV1: torch.tensor(units, dtype=torch.float32)})
    small = compacted(unet)
    assert small.config.norm_group_sizes == ({} if sizes is None else {name: sizes})
    norm = small.get_submodule(name)
    assert type(norm) is nn.GroupNorm
    assert (norm.num_groups, norm.num_channels) == (sum(units), 4 * sum(units))
    assert relative_error(run(small), run(unet)) <= 1e-4


def test_norm_groups_that_straddle_the_concatenation():
    """48 channels in 4 norm groups of 12: the third, with 8 channels of the hidden state and 4 of the skip, always stays."""
    unet = masked({"up_blocks.0.upsamplers.0.conv": torch.tensor([1.0, 0.0])})
    plan = planned(unet)
    norm = "up_blocks.1.resnets.0.norm1"
    assert plan.norm_group_sizes == {norm: [12, 12, 12]}
    assert plan.kept[f"{norm}.weight", 0].tolist() == [*range(12), *range(24, 48)]
    small = compact(unet, plan)
    assert relative_error(run(small), run(unet)) <= 1e-4


def test_tables_name_the_layers_that_changed_and_no_others():
    """The published config is what a reader of it sees: input and output channels by layer."""
    unet = masked({CONV1: torch.tensor([1.0, 0.0, 1.0, 1.0]), TO_Q: head_mask(8, 8, 0, 8)})
    config = compacted(unet).config
    attention = "down_blocks.1.attentions.0"
    assert config.layer_channels == {
        CONV1: [16, 12],
        "down_blocks.0.resnets.0.time_emb_proj": [64, 12],
        "down_blocks.0.resnets.0.conv2": [12, 16],
        f"{attention}.to_q": [32, 24],
        f"{attention}.to_k": [32, 24],
        f"{attention}.to_v": [32, 24],
        f"{attention}.to_out.0": [24, 32],
    }
    assert config.norm_group_sizes == {"down_blocks.0.resnets.0.norm2": [4, 4, 4]}
    assert config.attention_heads == {attention: 3}
    assert {key: value for key, value in config.items() if key in build().config} == dict(build().config)


@pytest.mark.parametrize("name", ["base", "scale-shift", "class-embedding", "fourier-time"])
def test_the_config_alone_rebuilds_the_model(name: str):
    """`from_pretrained` has nothing but config.json: through JSON, it builds the same shapes."""
    small = compacted(masked(0, name), name)
    twin = GFPrunedUNet2DModel.from_config(json.loads(json.dumps(dict(small.config))))
    twin.load_state_dict(small.state_dict())
    assert torch.equal(run(twin.eval()), run(small))


# --- what the small model takes over -----------------------------------------------------------------------------------


def test_the_masked_model_is_left_alone():
    """Compaction during pruning: weights, masks and outputs of the masked model stay, and no memory is shared."""
    unet = masked(0)
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    before = run(unet)
    small = compacted(unet)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert list(unet.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
    assert torch.equal(run(unet), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype):
    """A model pruned in half precision must not come back in full."""
    small = compacted(masked(0).to(dtype))
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    assert {parameter.device.type for parameter in small.parameters()} == {"cpu"}


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept(training: bool):
    """Dropout stays enabled or disabled in every module."""
    small = compacted(masked(0).train(training))
    assert {module.training for module in small.modules()} == {training}


def test_requires_grad_is_kept():
    """Frozen weights stay frozen, and no others."""
    unet = masked(0)
    frozen = {"conv_in.weight", "conv_out.bias", "mid_block.attentions.0.to_q.weight", "conv_norm_out.weight"}
    for name, parameter in dense_parameters(unet).items():
        parameter.requires_grad_(name not in frozen)
    small = compacted(unet)
    assert {name for name, parameter in small.named_parameters() if not parameter.requires_grad} == frozen


@pytest.mark.parametrize("enabled", [True, False])
def test_gradient_checkpointing_is_kept(enabled: bool):
    """A run that needs it for memory would fail without, right after compaction."""
    unet = masked(0)
    if enabled:
        unet.enable_gradient_checkpointing()
    assert compacted(unet).is_gradient_checkpointing is enabled


# --- settings that are not in the configuration ------------------------------------------------------------------------


def test_rates_of_dropout_and_freeu_are_carried_over() -> None:
    """Loops set them after loading; fine-tuning goes on with the compacted model."""
    dit = families.build("dit", "base").train()
    labels = [module for module in dit.modules() if isinstance(module, LabelEmbedding)]
    for module in labels:
        module.dropout_prob = 0.0
    dit.transformer_blocks[0].ff.net[1].p = 0.3
    condition = families.build("condition", "base")
    condition.enable_freeu(0.9, 0.2, 1.2, 1.4)
    for model in (dit, condition):
        groups = trace_channel_groups(model)
        attach(model, groups)
        model.channel_masks.set(random_masks(groups, 0))
        small = compact(model, plan_compaction(model, groups, model.channel_masks.as_dict()))
        if model is dit:
            found = [module.dropout_prob for module in small.modules() if isinstance(module, LabelEmbedding)]
            assert labels and found == [0.0] * len(labels)
            assert small.transformer_blocks[0].ff.net[1].p == 0.3 and small.transformer_blocks[1].ff.net[1].p == 0.0
        else:
            assert [(block.s1, block.s2, block.b1, block.b2) for block in small.up_blocks] == [(0.9, 0.2, 1.2, 1.4)] * 2


def test_attention_slices_of_a_single_head() -> None:
    """Half of one head is none, by which Diffusers divides."""
    unet = families.build("condition", "base")
    groups = trace_channel_groups(unet)
    one = {group.name: torch.arange(group.num_units) < group.num_units // group.heads for group in groups if group.attention}
    attach(unet, groups).set({name: mask.float() for name, mask in one.items()})
    small = compact(unet, plan_compaction(unet, groups, unet.channel_masks.as_dict()))
    assert small.config.attention_heads and set(small.config.attention_heads.values()) == {1}
    known = families.run(small)
    for size in ("auto", "max"):
        small.set_attention_slice(size)
        torch.testing.assert_close(families.run(small), known, rtol=1e-4, atol=1e-5)
