"""Known answers for the trace: the parameter slices of each channel."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from torch import nn

from diffusers_gfprune.pruning.channel_groups import ChannelGroup, GroupSlice, trace_channel_groups
from diffusers_gfprune.pruning.compaction import compact, plan_compaction
from diffusers_gfprune.pruning.masking import attach, detach
from helpers.architectures import ARCHITECTURES, BASE, build, random_masks
from helpers.compaction import cifar10, groups_by_name, traced

# Derived from the diagram of the model: name of the first producer, channels, heads.
BASE_GROUPS = [
    ("conv_in", 16, 1),  # residual stream of the first level
    ("time_embedding.linear_1", 64, 1),
    ("time_embedding.linear_2", 64, 1),
    ("down_blocks.0.resnets.0.conv1", 16, 1),
    ("down_blocks.0.downsamplers.0.conv", 16, 1),
    ("down_blocks.1.attentions.0.to_q", 32, 4),
    ("down_blocks.1.attentions.0.to_out.0", 32, 1),  # stream of the second level and of the middle
    ("down_blocks.1.resnets.0.conv1", 32, 1),
    ("up_blocks.0.attentions.0.to_q", 32, 4),
    ("up_blocks.0.attentions.0.to_out.0", 32, 1),
    ("up_blocks.0.attentions.1.to_q", 32, 4),
    ("up_blocks.0.attentions.1.to_out.0", 32, 1),
    ("up_blocks.0.resnets.0.conv1", 32, 1),
    ("up_blocks.0.resnets.1.conv1", 32, 1),
    ("up_blocks.0.upsamplers.0.conv", 32, 1),
    ("up_blocks.1.resnets.0.conv1", 16, 1),
    ("up_blocks.1.resnets.0.conv2", 16, 1),
    ("up_blocks.1.resnets.1.conv1", 16, 1),
    ("up_blocks.1.resnets.1.conv2", 16, 1),
    ("mid_block.attentions.0.to_q", 32, 4),
    ("mid_block.resnets.0.conv1", 32, 1),
    ("mid_block.resnets.1.conv1", 32, 1),
]


def slices_of(group: ChannelGroup, module: str, parameter: str = "weight", role: str | None = None) -> list[GroupSlice]:
    """The slices that a group has of one parameter, by where their channels begin."""
    found = [s for s in group.slices if (s.module, s.parameter) == (module, parameter) and role in (None, s.role)]
    return sorted(found, key=lambda piece: piece.positions[0])


def never_pruned(unet: UNet2DModel) -> dict[tuple[str, int], int]:
    """Dimensions of parameters that no group may have, and their size."""
    fixed = [("conv_in.weight", 1), ("conv_out.weight", 0), ("conv_out.bias", 0), ("time_embedding.linear_1.weight", 1)]
    if unet.config.time_embedding_type == "fourier":
        fixed.append(("time_proj.weight", 0))
    if unet.config.time_embedding_type == "learned":
        fixed += [("time_proj.weight", 0), ("time_proj.weight", 1)]
    if unet.config.class_embed_type == "timestep":
        fixed.append(("class_embedding.linear_1.weight", 1))
    if isinstance(unet.class_embedding, nn.Embedding):
        fixed.append(("class_embedding.weight", 0))
    if unet.config.class_embed_type == "identity":  # labels are added to these channels from outside
        fixed += [("time_embedding.linear_2.weight", 0), ("time_embedding.linear_2.bias", 0)]
        fixed += [(name, 1) for name, _ in unet.named_parameters() if name.endswith("time_emb_proj.weight")]
    return {(name, dim): unet.get_parameter(name).shape[dim] for name, dim in fixed}


def test_groups_of_base_are_the_ones_worked_out_by_hand():
    """A regression of the trace would split or join groups."""
    assert [(group.name, group.num_channels, group.heads) for group in traced()] == BASE_GROUPS


@pytest.mark.fast_variants(9)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_channel_dimension_is_covered_exactly_once(name: str):
    """A channel in no group would never be cut, and one in two groups would be cut twice."""
    unet = build(name)
    covered = Counter()
    for group in traced(name):
        for piece in group.slices:
            assert len(piece.positions) == group.num_channels
            covered.update((piece.name, piece.dim, position) for position in piece.positions)
    fixed = never_pruned(unet)
    expected = {
        (parameter_name, dim, position)
        for parameter_name, parameter in unet.named_parameters()
        for dim in range(min(2, parameter.ndim))
        if (parameter_name, dim) not in fixed
        for position in range(parameter.shape[dim])
    }
    assert set(covered) == expected
    assert set(covered.values()) == {1}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_roles_follow_from_the_module_and_the_dimension(name: str):
    """The role decides about masks: producers and norms are masked, readers are not."""
    unet = build(name)
    for group in traced(name):
        for piece in group.slices:
            module = unet.get_submodule(piece.module)
            if isinstance(module, nn.GroupNorm):
                expected = "norm"
            elif isinstance(module, nn.Embedding):
                expected = "output"
            else:
                expected = "output" if piece.dim == 0 else "input"
            assert piece.role == expected, piece
        assert {"output", "input"} <= {piece.role for piece in group.slices}, group.name


def test_scale_shift_maps_both_halves_of_the_time_projection_to_one_channel():
    """The projection gives all scales, then all shifts: channel c owns rows c and c + width."""
    group = groups_by_name("scale-shift")["down_blocks.1.resnets.0.conv1"]
    for parameter in ("weight", "bias"):
        scale, shift = slices_of(group, "down_blocks.1.resnets.0.time_emb_proj", parameter)
        assert scale.positions == tuple(range(32))
        assert shift.positions == tuple(range(32, 64))


def test_default_time_projection_has_one_row_per_channel():
    """Without scale-shift, the projection is added, one value per channel."""
    group = groups_by_name()["down_blocks.1.resnets.0.conv1"]
    (piece,) = slices_of(group, "down_blocks.1.resnets.0.time_emb_proj")
    assert piece.positions == tuple(range(32))


@pytest.mark.parametrize(
    ("reader", "first", "first_width", "second", "second_width"),
    [
        ("up_blocks.0.resnets.1", "up_blocks.0.attentions.0.to_out.0", 32, "down_blocks.0.downsamplers.0.conv", 16),
        ("up_blocks.1.resnets.0", "up_blocks.0.upsamplers.0.conv", 32, "conv_in", 16),
        ("up_blocks.1.resnets.1", "up_blocks.1.resnets.0.conv2", 16, "conv_in", 16),
    ],
)
@pytest.mark.parametrize("layer", ["norm1", "conv1", "conv_shortcut"])
def test_skips_are_offset_by_the_width_of_the_other_branch(
    reader: str, first: str, first_width: int, second: str, second_width: int, layer: str
):
    """`torch.cat([hidden, skip])`: the skip's channel c is channel width + c of the norm and of the convolutions."""
    groups = groups_by_name()
    (hidden,) = slices_of(groups[first], f"{reader}.{layer}")
    (skip,) = slices_of(groups[second], f"{reader}.{layer}")
    assert hidden.positions == tuple(range(first_width))
    assert skip.positions == tuple(range(first_width, first_width + second_width))


def test_a_stream_concatenated_with_itself_is_two_slices_of_one_group():
    """The first up resnet reads the middle's output and a skip of the same residual stream."""
    group = groups_by_name()["down_blocks.1.attentions.0.to_out.0"]
    for layer in ("norm1", "conv1", "conv_shortcut"):
        hidden, skip = slices_of(group, "up_blocks.0.resnets.0." + layer)
        assert hidden.positions == tuple(range(32))
        assert skip.positions == tuple(range(32, 64))


def test_residual_stream_joins_everything_that_adds_to_it():
    """Shortcut, second convolution and attention output write the same channels, in the middle block too."""
    group = groups_by_name()["down_blocks.1.attentions.0.to_out.0"]
    assert {piece.module for piece in group.slices if piece.role == "output"} == {
        "down_blocks.1.resnets.0.conv2",
        "down_blocks.1.resnets.0.conv_shortcut",
        "down_blocks.1.attentions.0.to_out.0",
        "mid_block.resnets.0.conv2",
        "mid_block.attentions.0.to_out.0",
        "mid_block.resnets.1.conv2",
    }


@pytest.mark.parametrize(
    ("name", "heads"),
    [("base", 4), ("one-head", 1), ("heads-of-one-channel", 32), ("heads-that-do-not-divide", 2)],
)
def test_query_key_and_value_are_one_group_with_heads(name: str, heads: int):
    """Head h owns a contiguous run of channels, the same in q, k and v, and in the input of the output projection."""
    attention = "down_blocks.1.attentions.0"
    width = build(name).get_submodule(attention).inner_dim
    group = groups_by_name(name)[f"{attention}.to_q"]
    assert (group.heads, group.attention, group.num_channels) == (heads, attention, width)
    expected = {(f"{attention}.to_{letter}", parameter, 0) for letter in "qkv" for parameter in ("weight", "bias")}
    assert {(piece.module, piece.parameter, piece.dim) for piece in group.slices} == {
        *expected,
        (f"{attention}.to_out.0", "weight", 1),
    }
    assert all(piece.positions == tuple(range(width)) for piece in group.slices)


def test_groups_outside_attention_have_one_head():
    """Only channels inside of attention are bound to heads."""
    groups = groups_by_name("three-levels")
    assert {name for name, group in groups.items() if group.attention is not None} == {
        name for name in groups if name.endswith(".to_q")
    }
    assert {group.heads for group in groups.values() if group.attention is None} == {1}


def test_class_identity_leaves_the_time_embedding_whole():
    """Labels from outside are added to these channels, so their number is the user's."""
    groups = groups_by_name("class-identity")
    written = {piece.name for group in groups.values() for piece in group.slices if piece.role == "output"}
    assert "time_embedding.linear_2.weight" not in written
    assert "time_embedding.linear_1.weight" in written


def test_class_embedding_columns_belong_to_the_time_embedding():
    """Both are summed; rows are classes, and stay."""
    group = groups_by_name("class-embedding")["time_embedding.linear_2"]
    (piece,) = slices_of(group, "class_embedding")
    assert (piece.dim, piece.role, piece.positions) == (1, "output", tuple(range(64)))


@pytest.mark.parametrize(
    ("argument", "block"),
    [
        ("down_block_types", "SkipDownBlock2D"),
        ("down_block_types", "AttnSkipDownBlock2D"),
        ("down_block_types", "KDownBlock2D"),
        ("down_block_types", "KCrossAttnDownBlock2D"),
        ("down_block_types", "DownEncoderBlock2D"),
        ("down_block_types", "AttnDownEncoderBlock2D"),
        ("up_block_types", "SkipUpBlock2D"),
        ("up_block_types", "KUpBlock2D"),
        ("up_block_types", "KCrossAttnUpBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
        ("up_block_types", "AttnUpDecoderBlock2D"),
        ("mid_block_type", "UNetMidBlock2DCrossAttn"),
    ],
)
def test_unsupported_blocks_are_refused_by_name(argument: str, block: str):
    """Every block that `UNet2DModel` builds and pruning does not know: guessing would cut the wrong channels."""
    value = {"down_block_types": ("DownBlock2D", block), "up_block_types": (block, "UpBlock2D")}.get(argument, block)
    unet = UNet2DModel(**{**BASE, argument: value})
    with pytest.raises(ValueError, match=rf"{argument}={block}\b"):
        trace_channel_groups(unet)


def test_old_block_names_are_the_supported_blocks():
    """The first configs on the Hub prefix block names with UNetRes."""
    old = UNet2DModel(
        **{
            **BASE,
            "down_block_types": ("UNetResDownBlock2D", "UNetResAttnDownBlock2D"),
            "up_block_types": ("UNetResAttnUpBlock2D", "UNetResUpBlock2D"),
        }
    )
    assert tuple(trace_channel_groups(old)) == traced()


def test_a_pruned_model_is_refused():
    """Its widths are not those of its config; the dense model is to be pruned further instead."""
    unet = build()
    small = compact(unet, plan_compaction(unet, traced(), random_masks(list(traced()), seed=0)))
    with pytest.raises(ValueError, match="GFPrunedUNet2DModel"):
        trace_channel_groups(small)


@pytest.mark.parametrize(
    ("module", "setting", "value", "message"),
    [
        ("mid_block.attentions.0", "heads", 2, "mid_block.attentions.0.heads=2 must be 4"),
        ("mid_block.attentions.0", "scale", 1.0, "mid_block.attentions.0.scale=1.0 must be 0.35"),
        ("down_blocks.0.resnets.0.norm1", "num_groups", 2, "norm1.num_groups=2 must be 4"),
        ("up_blocks.0.resnets.0", "output_scale_factor", 2.0, "output_scale_factor=2.0 must be 1.0"),
        ("conv_norm_out", "eps", 1e-3, "conv_norm_out.eps=0.001 must be 1e-05"),
        ("conv_in", "padding", (0, 0), r"conv_in.padding=\(0, 0\) must be"),
    ],
)
def test_modules_that_do_not_match_the_config_are_refused(module: str, setting: str, value: object, message: str):
    """The pruned model is built from the config, and would compute something else without a word."""
    unet = build()
    setattr(unet.get_submodule(module), setting, value)
    with pytest.raises(ValueError, match=f"^the model does not match its config: .*{message}"):
        trace_channel_groups(unet)


def test_another_activation_is_refused_and_another_state_is_not():
    unet = build()
    unet.train().enable_gradient_checkpointing()
    for module in unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5  # what --dropout sets
    assert tuple(trace_channel_groups(unet)) == traced()
    unet.conv_act = torch.nn.ReLU()
    with pytest.raises(ValueError, match="conv_act.__class__='ReLU' must be 'SiLU'"):
        trace_channel_groups(unet)


def test_heads_that_change_after_tracing_are_refused():
    unet = build()
    groups = list(traced())
    unet.mid_block.attentions[0].heads = 2
    with pytest.raises(ValueError, match="mid_block.attentions.0.heads=2 must be 4"):
        plan_compaction(unet, groups, random_masks(groups, seed=0))


def test_another_model_is_refused():
    """Only the class is checked, so that the message names the argument."""
    other = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(ValueError, match="AutoencoderKL"):
        trace_channel_groups(other)


@pytest.mark.parametrize("head_dim", [33, 64])
def test_a_head_wider_than_its_attention_is_refused(head_dim: int):
    """Diffusers builds attention with zero heads then, which fails at the first forward only."""
    unet = UNet2DModel(**{**BASE, "attention_head_dim": head_dim})
    with pytest.raises(ValueError, match=f"attention_head_dim={head_dim}"):
        trace_channel_groups(unet)


def test_a_model_with_an_extra_parameter_is_refused():
    """A layer that the config does not tell of may read any channel."""
    unet = build()
    unet.conv_in.adapter = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="conv_in.adapter"):
        trace_channel_groups(unet)


def test_a_model_with_another_width_than_its_config_is_refused():
    """Somebody else's surgery left the config behind."""
    unet = build()
    unet.conv_in = nn.Conv2d(1, 12, 3, padding=1)
    with pytest.raises(ValueError, match=r"conv_in\.weight must have shape \(16, 1, 3, 3\)"):
        trace_channel_groups(unet)


def test_a_masked_model_is_refused_until_detached():
    """Its parameters have other names."""
    unet = build()
    attach(unet, traced())
    with pytest.raises(ValueError, match="already has channel masks: detach"):
        trace_channel_groups(unet)
    detach(unet)
    assert tuple(trace_channel_groups(unet)) == traced()


def test_tracing_leaves_the_model_alone():
    """The trace runs on a twin: weights, gradients, hooks, mode and random state stay as they were."""
    unet = build().train()
    unet.conv_in.weight.requires_grad_(False)
    unet.conv_out.weight.grad = torch.full_like(unet.conv_out.weight, 2.0)
    unet.conv_in.register_forward_pre_hook(lambda module, args: pytest.fail("the model ran"))
    before = copy.deepcopy(unet.state_dict())
    attributes = {name: set(vars(module)) for name, module in unet.named_modules()}
    random_state = torch.get_rng_state()
    trace_channel_groups(unet)
    after = unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: set(vars(module)) for name, module in unet.named_modules()} == attributes
    assert all(module.training for module in unet.modules())
    assert not unet.conv_in.weight.requires_grad
    assert unet.conv_out.weight.requires_grad
    assert torch.equal(unet.conv_out.weight.grad, torch.full_like(unet.conv_out.weight, 2.0))
    assert len(unet.conv_in._forward_pre_hooks) == 1
    assert torch.equal(torch.get_rng_state(), random_state)


def test_groups_do_not_depend_on_dtype_or_device():
    """A model that is loaded in half precision, or has no memory yet, is pruned alike."""
    assert tuple(trace_channel_groups(build().to(torch.bfloat16))) == traced()
    assert tuple(trace_channel_groups(build().to("meta"))) == traced()


def test_cifar10_groups_cover_the_whole_model():
    """The model of the paper, whose attention has one head of all channels."""
    unet, groups = cifar10()
    assert sum(parameter.numel() for parameter in unet.parameters()) == 35_746_307
    assert groups["down_blocks.1.attentions.0.to_q"].heads == 1
    assert groups["down_blocks.1.attentions.0.to_q"].num_channels == 256
    covered = {(piece.name, piece.dim) for group in groups.values() for piece in group.slices}
    dims = {(name, dim) for name, parameter in unet.named_parameters() for dim in range(min(2, parameter.ndim))}
    assert dims - covered == set(never_pruned(unet))
