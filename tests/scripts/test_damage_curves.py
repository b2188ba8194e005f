"""Runs of `prune_ddpm.py` with widths by damage curves: what they say, and what they report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.resume import run_here


@pytest.mark.slow
def test_a_run_reports_the_curves_that_its_widths_follow_from(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """On the digits: few shares of each group that can be narrowed, damage that rises, and widths that are cheaper by it than
    the same share of every group."""
    words = ("--preset", "one-shot", "--ranking", "curves", "--max_train_steps", 1, "--train_batch_size", 32)
    run_here(tmp_path / "run", *words, "--checkpointing_steps", 0)
    assert "ranking=curves will choose other widths, by the damage of " in capsys.readouterr().out
    report = json.loads((tmp_path / "run/pruning_report.json").read_text())
    curves = report["damage_curves"]
    groups = {group["name"]: group for group in report["channel_groups"]}
    assert report["config"]["ranking"] == "curves" and curves.keys() <= groups.keys() and len(curves) > 10
    for name, curve in curves.items():
        assert curve["dense"] == groups[name]["dense_channels"] and 1 <= len(curve["widths"]) <= 4
        assert curve["damages"][-1] > curve["damages"][0] > 0 or len(curve["widths"]) == 1
    narrowed = [name for name, group in groups.items() if group["kept_channels"] < group["dense_channels"]]
    assert set(narrowed) <= curves.keys()
    kept = {name: groups[name]["kept_channels"] / groups[name]["dense_channels"] for name in curves}
    # The last layers do a hundred times the damage of the middle block
    assert kept["up_blocks.1.resnets.1.conv2"] > kept["mid_block.resnets.1.conv1"]
