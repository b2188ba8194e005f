"""Known answers for units: channels of a group that norms prune together."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import nn

from diffusers_gfprune.pruning.channel_groups import ChannelGroup
from helpers.architectures import ARCHITECTURES, build
from helpers.compaction import cifar10, groups_by_name, traced


def blocks(first: int, size: int, count: int) -> tuple[tuple[int, ...], ...]:
    """So many units of `size` channels in a row."""
    return tuple(tuple(range(first + k * size, first + (k + 1) * size)) for k in range(count))


# Known units and fixed channels: norms have 4 groups, of 12 channels over a concatenation of 32 and 16.
BASE_UNITS = {
    # Its skips are channels 32 to 47 of 48: the norm group 24 to 35 has the first four of them and eight of the other branch,
    # and a norm over 16 + 16 channels has groups of 8, which join them to all the others.
    "conv_in": ((), range(16)),
    "time_embedding.linear_1": (blocks(0, 1, 64), ()),  # meets no norm
    "time_embedding.linear_2": (blocks(0, 1, 64), ()),
    "down_blocks.0.resnets.0.conv1": (blocks(0, 4, 4), ()),
    "down_blocks.0.downsamplers.0.conv": (blocks(4, 12, 1), range(4)),
    "down_blocks.1.attentions.0.to_q": (blocks(0, 1, 32), ()),
    "down_blocks.1.attentions.0.to_out.0": (blocks(0, 16, 2), ()),  # 64 channels with itself: groups of 16
    "down_blocks.1.resnets.0.conv1": (blocks(0, 8, 4), ()),
    "up_blocks.0.attentions.0.to_q": (blocks(0, 1, 32), ()),
    "up_blocks.0.attentions.0.to_out.0": (blocks(0, 24, 1), range(24, 32)),  # groups of 8 and of 12
    "up_blocks.0.attentions.1.to_q": (blocks(0, 1, 32), ()),
    "up_blocks.0.attentions.1.to_out.0": (blocks(0, 8, 4), ()),
    "up_blocks.0.resnets.0.conv1": (blocks(0, 8, 4), ()),
    "up_blocks.0.resnets.1.conv1": (blocks(0, 8, 4), ()),
    "up_blocks.0.upsamplers.0.conv": (blocks(0, 12, 2), range(24, 32)),
    "up_blocks.1.resnets.0.conv1": (blocks(0, 4, 4), ()),
    "up_blocks.1.resnets.0.conv2": (blocks(0, 8, 2), ()),
    "up_blocks.1.resnets.1.conv1": (blocks(0, 4, 4), ()),
    "up_blocks.1.resnets.1.conv2": (blocks(0, 4, 4), ()),
    "mid_block.attentions.0.to_q": (blocks(0, 1, 32), ()),
    "mid_block.resnets.0.conv1": (blocks(0, 8, 4), ()),
    "mid_block.resnets.1.conv1": (blocks(0, 8, 4), ()),
}


def test_units_of_base_are_the_ones_worked_out_by_hand():
    """Too small a unit would leave a part of a norm group, too large a one would prune more coarsely than norms need."""
    found = {group.name: (group.units, group.fixed) for group in traced()}
    assert found == {name: (units, tuple(fixed)) for name, (units, fixed) in BASE_UNITS.items()}


def test_a_single_norm_group_joins_all_channels():
    """With one group per norm, a group is one unit, or fixed where a norm reads it with another; others are not touched."""
    groups = groups_by_name("one-norm-group")
    assert {name for name, group in groups.items() if group.fixed} == {
        "conv_in",
        "down_blocks.0.downsamplers.0.conv",
        "up_blocks.0.attentions.0.to_out.0",
        "up_blocks.0.upsamplers.0.conv",
        "up_blocks.1.resnets.0.conv2",
    }
    for name, group in groups.items():
        if group.fixed:
            assert (group.units, group.fixed) == ((), tuple(range(group.num_channels)))
        else:
            no_norm = group.attention is not None or name.startswith("time_embedding")
            assert group.units == blocks(0, *((1, group.num_channels) if no_norm else (group.num_channels, 1)))


@pytest.mark.parametrize(
    ("name", "group", "units", "fixed"),
    [
        # 16 norm groups: of one channel, of 2 where 32 are normalized, of 3 where 48 are
        ("one-channel-per-norm-group", "down_blocks.0.resnets.0.conv1", blocks(0, 1, 16), ()),
        ("one-channel-per-norm-group", "down_blocks.1.resnets.0.conv1", blocks(0, 2, 16), ()),
        # the skip begins at 32 of 48, in the norm group 30 to 32
        ("one-channel-per-norm-group", "down_blocks.0.downsamplers.0.conv", blocks(1, 3, 5), (0,)),
        ("one-channel-per-norm-group", "up_blocks.0.upsamplers.0.conv", blocks(0, 3, 10), (30, 31)),
        # read by norms with groups of 2 and of 3: lcm(2, 3) = 6; the first unit is joined to the upsampler's last channels
        ("one-channel-per-norm-group", "conv_in", blocks(4, 6, 2), (0, 1, 2, 3)),
        # a stream that is upsampled before a norm sees it
        ("three-levels", "up_blocks.0.resnets.1.conv2", blocks(0, 1, 48), ()),
    ],
)
def test_units_of_other_architectures(name: str, group: str, units: tuple[tuple[int, ...], ...], fixed: tuple[int, ...]):
    """Known answers for cases that BASE does not have."""
    found = groups_by_name(name)[group]
    assert (found.units, found.fixed) == (units, fixed)


@pytest.mark.fast_variants(9)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_norm_group_is_of_one_unit_or_fixed(name: str):
    """Or a unit without which a norm has a part of a group left, whose statistics then change."""
    owner: dict[str, dict[int, tuple]] = defaultdict(dict)  # of every channel of every norm
    for group in traced(name):
        assert sorted([*group.fixed, *(c for unit in group.units for c in unit)]) == list(range(group.num_channels))
        of_channel = [(group.name, unit) if unit < group.num_units else None for unit in group.unit_of.tolist()]
        for piece in group.slices:
            if piece.role == "norm" and piece.parameter == "weight":
                owner[piece.module].update(zip(piece.positions, of_channel))
    norms = {key: module for key, module in build(name).named_modules() if isinstance(module, nn.GroupNorm)}
    assert owner.keys() == norms.keys()
    for key, norm in norms.items():
        size = norm.num_channels // norm.num_groups
        for block in blocks(0, size, norm.num_groups):
            assert len({owner[key][channel] for channel in block}) == 1, (key, block)


def test_units_of_cifar10_are_small():
    """What makes the method of use: units of up to 24 channels, and only two norm groups that straddle."""
    _, groups = cifar10()
    assert {size for group in groups.values() for size in group.unit_sizes.tolist()} == {1, 4, 8, 12, 16, 24}
    # Norm groups of 12 channels over 256 + 128: channels 252 to 255 of the one branch, and 0 to 7 of the other, go together,
    # and with them what other norms have in one group with those.
    assert {name: group.fixed for name, group in groups.items() if group.fixed} == {
        "up_blocks.2.attentions.1.to_out.0": tuple(range(240, 256)),  # groups of 8, too
        "down_blocks.0.downsamplers.0.conv": tuple(range(8)),
        "up_blocks.2.upsamplers.0.conv": tuple(range(252, 256)),
        "conv_in": tuple(range(8)),
    }
    assert groups["conv_in"].units == blocks(8, 24, 5)  # lcm(8, 12)


HAND = ChannelGroup("conv", 7, slices=(), units=((0, 2), (1,), (4, 5, 6)), fixed=(3,))


def test_values_of_units_and_of_channels():
    """A slip of one channel would mask another channel than the one that was scored."""
    assert (HAND.num_units, HAND.unit_sizes.tolist(), HAND.unit_of.tolist()) == (3, [2, 1, 3], [0, 1, 0, 3, 2, 2, 2])
    channels = HAND.per_channel(torch.tensor([0.25, 0.5, 0.75]))
    assert channels.tolist() == [0.25, 0.5, 0.25, 1.0, 0.75, 0.75, 0.75]
    assert HAND.per_unit(channels).tolist() == [0.25, 0.5, 0.75]
    rows = torch.stack([torch.arange(7.0), torch.ones(7)])
    assert HAND.unit_sums(rows).tolist() == [[2.0, 1.0, 15.0], [2.0, 1.0, 3.0]]
    fixed = ChannelGroup("conv", 2, slices=(), units=(), fixed=(0, 1))
    assert fixed.per_channel(torch.ones(0)).tolist() == [1.0, 1.0]
    assert fixed.per_unit(torch.ones(2)).tolist() == fixed.unit_sums(torch.ones(2)).tolist() == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 1, 0, 1, 1, 1, 1], r"conv has \[0.0, 1.0\] for channels \[0, 2\], which share a norm group"),
        ([1, 1, 1, 1, 0, 0, 0.5], r"conv has \[0.0, 0.5\] for channels \[4, 5, 6\]"),
        ([0, 1, 0, 0, 1, 1, 1], r"conv must be 1 for channels \[3\], which are never pruned"),
        ([1, float("nan"), 1, 1, 1, 1, 1], "conv has values that are NaN"),
        ([1, 1, 1], r"conv has shape \(3,\), not \(7,\)"),
    ],
    ids=["split", "split-soft", "fixed", "nan", "short"],
)
def test_values_of_channels_that_no_units_have_are_refused(values: list[float], message: str):
    """Explicit masks are by channel: a mask for a part of a norm group could not be compacted."""
    with pytest.raises(ValueError, match=message):
        HAND.per_unit(torch.tensor([float(value) for value in values]))
