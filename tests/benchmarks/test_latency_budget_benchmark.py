"""benchmarks/latency_budget.py: what is asked for, and what its table says."""

from __future__ import annotations

from contextlib import nullcontext

import latency_budget
import pytest
from latency_budget import CASES
from models import build

from diffusers_gfprune.latency.calibration import TimePair


def case_of(asked: float, measured: float, most: float) -> dict:
    rows = {"latency": {"asked": asked, "pair": {"share": measured, "spread": 0.004}, "macs_removed": 0.6}}
    return {**rows, "macs": {"pair": {"share": 0.1, "spread": 0.004}}, "most": most, "planning_seconds": 14.2}


@pytest.mark.parametrize(("most", "asked"), [(0.8, 0.4), (0.42, 0.4), (0.4, 0.2), (0.252, 0.13), (0.1, 0.05)])
def test_what_can_be_removed_is_asked_for(most: float, asked: float) -> None:
    """40 %, or half of what the narrowest model saves."""
    assert latency_budget.budget(most) == asked


def test_the_narrowest_model_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every group of channels at its smallest width."""
    models = []

    def measure(small) -> TimePair:
        models.append(small)
        return TimePair(0.25, 0.004, 2.0, 1.5, 7)

    monkeypatch.setattr(latency_budget, "latency_meter", lambda *args, **options: nullcontext(measure))
    unet = build("digits")
    assert latency_budget.largest_share(unet, CASES["digits-1"].config("latency", 0.4)) == 0.25
    # Norms of 48 channels have groups of six, those of 80 channels groups of ten
    (small,) = models
    assert small.down_blocks[0].resnets[0].norm2.num_channels == 6
    assert small.down_blocks[1].resnets[0].norm2.num_channels == 10


def test_cases_have_the_backend_of_their_name() -> None:
    for name, case in CASES.items():
        config = case.config("latency", 0.4)
        assert config.latency_backend == case.backend and (case.backend == "eager" or name.endswith(case.backend))
        assert config.latency_batch_size == case.batch_size and str(case.batch_size) in name.split("-")
        assert (config.ranking == "global") == ("magnitude" in name)
    assert CASES["digits-16-compile"].backend == "compile"


def test_the_table_has_every_case() -> None:
    cases = {"digits-1": case_of(0.13, 0.139, 0.252), "digits-16-compile": case_of(0.4, 0.3, 0.7)}
    rows = latency_budget.table({"cases": cases}).splitlines()[2:]
    assert rows == [
        "| digits-1 | 13% (of 25% at most) | 13.9% ± 0.4% | -60% | 10.0% ± 0.4% | 14 s |",
        "| digits-16-compile | 40% | 30.0% ± 0.4% (missed) | -60% | 10.0% ± 0.4% | 14 s |",
    ]
