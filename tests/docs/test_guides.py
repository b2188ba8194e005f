"""docs/guides: scripts that guides show run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffusers_gfprune import criteria
from helpers.scripts import ROOT, SHORT, assert_one_error, run_script


def test_script_with_a_criterion_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It prunes by the criterion, and its user errors are one line."""
    built_in = dict(criteria._CRITERIA)
    guide = (ROOT / "docs/guides/own-criterion.md").read_text()
    found = re.findall(r"```python\n(# prune_l1\.py\n.*?)```", guide, flags=re.DOTALL)
    assert len(found) == 1
    script = tmp_path / "prune_l1.py"
    script.write_text(found[0])
    words = ("--recipe", "digits", "--criterion", "l1", "--output_dir", tmp_path / "run")
    monkeypatch.setattr(criteria, "_CRITERIA", dict(built_in))
    plan = run_script(script, *SHORT, *words, "--dry_run")
    assert plan.returncode == 0, plan.stderr
    assert "l1" in plan.stdout
    monkeypatch.setattr(criteria, "_CRITERIA", dict(built_in))  # scripts run in this process
    assert_one_error(run_script(script, *words, "--ratio", "2"), "ratio=2.0 must be between 0 and 1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prune_l1.py"]
