"""benchmarks/label_dropout.py: rises are computed from the losses, and the document has the table of the stored results."""

from __future__ import annotations

import json
from pathlib import Path

import label_dropout
import pytest
from documents import README

ROOT = Path(__file__).resolve().parents[2]


def test_rises_and_their_means() -> None:
    """Known answers: 10 % and 30 %, then 20 % and 50 %."""
    dense = {"step_loss": 1.0, "step_loss_null_label": 2.0}
    first = label_dropout.rises({"dense": dense, "pruned": {"step_loss": 1.1, "step_loss_null_label": 2.6}})
    second = label_dropout.rises({"dense": dense, "pruned": {"step_loss": 1.2, "step_loss_null_label": 3.0}})
    assert first == pytest.approx({"step_loss": 0.1, "step_loss_null_label": 0.3})
    rows = [{"label_dropout": 0.1, "rise": first}, {"label_dropout": 0.1, "rise": second}]
    assert label_dropout.table(rows).splitlines()[-1] == "| 0.1 | 2 | 15.0% | 40.0% | 2.67 |"


def test_the_document_shows_the_results() -> None:
    """And they meet what dropping labels is for: the null label loses at most half as much again as the others."""
    rows = json.loads(label_dropout.RESULTS.read_text())["runs"]
    assert label_dropout.table(rows) in README.read_text("utf-8")
    ratio = {
        share: sum(r["rise"]["step_loss_null_label"] for r in rows if r["label_dropout"] == share)
        / sum(r["rise"]["step_loss"] for r in rows if r["label_dropout"] == share)
        for share in (0.0, 0.1)
    }
    assert ratio[0.1] <= 1.5 < ratio[0.0]


def test_bad_arguments_are_one_line() -> None:
    with pytest.raises(SystemExit, match="label_dropout.py: error: prune_steps=0 must be at least 1"):
        label_dropout.main(["--prune_steps", "0"])
