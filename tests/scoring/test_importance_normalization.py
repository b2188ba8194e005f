"""Scores of different groups made comparable, by hand."""

from __future__ import annotations

import pytest
import torch

from diffusers_gfprune.scoring.importance import normalize_scores


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("none", [3.0, -4.0, 0.0, 5.0]),
        ("mean", [1.0, -4 / 3, 0.0, 5 / 3]),  # mean absolute value 3
        ("max", [0.6, -0.8, 0.0, 1.0]),
        ("l2", [3 / 50**0.5, -4 / 50**0.5, 0.0, 5 / 50**0.5]),
        ("standard", [2 / 11.5**0.5, -5 / 11.5**0.5, -1 / 11.5**0.5, 4 / 11.5**0.5]),  # mean 1, variance 46 / 4
    ],
)
def test_normalized_scores_by_hand(method: str, expected: list[float]) -> None:
    """Each group is normalized by itself, whatever its scale, and its scores are not changed in place."""
    scores = {"a": torch.tensor([3.0, -4.0, 0.0, 5.0]), "zeros": torch.zeros(3)}
    found = normalize_scores({**scores, "large": scores["a"] * 1e6}, method)
    assert found["a"].tolist() == pytest.approx(expected)
    if method != "none":
        assert found["large"].tolist() == pytest.approx(expected, abs=1e-6)
    assert found["zeros"].tolist() == [0, 0, 0]
    assert scores["a"].tolist() == [3.0, -4.0, 0.0, 5.0]


def test_unknown_normalization_is_refused() -> None:
    """The message lists what there is."""
    with pytest.raises(ValueError, match="normalization=softmax must be one of .*standard"):
        normalize_scores({"a": torch.ones(2)}, "softmax")
