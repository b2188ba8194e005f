"""Normalization of scores between groups, against known values."""

from __future__ import annotations

import pytest
import torch

from diffusers_gfprune.scoring.importance import normalize_scores


def test_normalized_scores_by_hand() -> None:
    """Each group is normalized by itself, whatever its scale, and its scores are not changed in place."""
    scores = {"a": torch.tensor([3.0, -1.0, 2.0]), "zero": torch.zeros(4)}
    found = normalize_scores({**scores, "large": scores["a"] * 1e6})
    assert found["a"].tolist() == found["large"].tolist() == pytest.approx([1.5, -0.5, 1.0])
    assert found["zero"].tolist() == [0.0] * 4
    assert scores["a"].tolist() == [3.0, -1.0, 2.0]
