"""Normalization of scores between groups, against known values."""

from __future__ import annotations

import pytest
import torch

from diffusers_gfprune.pruning.blocks import RemovableBlock
from diffusers_gfprune.pruning.channel_groups import ChannelGroup
from diffusers_gfprune.scoring.importance import normalize_scores


def group(name: str, *sizes: int) -> ChannelGroup:
    """A group with units of some sizes, without layers."""
    channels = iter(range(sum(sizes)))
    units = tuple(tuple(next(channels) for _ in range(size)) for size in sizes)
    return ChannelGroup(name, sum(sizes), slices=(), units=units)


def test_normalized_scores_by_hand() -> None:
    """Each group is normalized by itself, whatever its scale, and its scores are not changed in place."""
    scores = {"a": torch.tensor([3.0, -1.0, 2.0]), "zero": torch.zeros(4), "none": torch.zeros(0)}
    groups = [group("a", 1, 1, 1), group("zero", 1, 1, 1, 1), group("none"), group("large", 1, 1, 1)]
    found = normalize_scores({**scores, "large": scores["a"] * 1e6}, groups)
    assert found["none"].shape == (0,)
    assert found["a"].tolist() == found["large"].tolist() == pytest.approx([1.5, -0.5, 1.0])
    assert found["zero"].tolist() == [0.0] * 4
    assert scores["a"].tolist() == [3.0, -1.0, 2.0]


def test_the_mean_is_that_of_channels() -> None:
    """Units of four channels have four times the score of units of one; of unequal units, the larger weigh more."""
    scores = {"single": torch.tensor([1.0, 3.0]), "fours": torch.tensor([4.0, 12.0]), "mixed": torch.tensor([1.0, 5.0])}
    found = normalize_scores(scores, [group("single", 1, 1), group("fours", 4, 4), group("mixed", 1, 2)])
    assert (found["fours"] / 4).tolist() == found["single"].tolist() == [0.5, 1.5]
    assert found["mixed"].tolist() == [0.5, 2.5]


def test_blocks_are_divided_by_their_common_mean() -> None:
    """Each has one score, which would be 1 otherwise."""
    blocks = [RemovableBlock(name, 1, (), ((0,),)) for name in ("first", "second")]
    scores = {"first": torch.tensor([1.0]), "second": torch.tensor([3.0]), "fours": torch.tensor([40.0, 40.0])}
    found = normalize_scores(scores, [group("fours", 4, 4), *blocks])
    assert [found[name].item() for name in ("first", "second")] == [0.5, 1.5]
    assert found["fours"].tolist() == [4.0, 4.0]
