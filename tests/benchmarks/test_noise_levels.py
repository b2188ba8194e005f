"""noise_levels.py: what the error of a single step changes in the samples."""

from __future__ import annotations

import json
from pathlib import Path

import noise_levels
import pytest
import torch
from documents import README
from torch import Tensor

from helpers.processes import ddpm

STEPS = 8


def nothing(sample: Tensor, timestep: Tensor) -> Tensor:
    return torch.zeros_like(sample)


def changes(dense, pruned, levels: int = STEPS) -> list[dict]:
    noise = 1e-3 * torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))  # predicted samples are not clipped
    return noise_levels.step_changes(dense, pruned, ddpm(1000).sampler(STEPS), noise, levels)


def test_a_constant_error_changes_samples_by_the_step_in_sigma() -> None:
    """DDIM is Euler's method in sigma = sqrt((1 - abar) / abar), from one timestep of the sampler to the next, and to zero."""
    process, error = ddpm(1000), 1e-4
    found = changes(nothing, lambda sample, timestep: torch.full_like(sample, error))
    abar = process.scheduler.alphas_cumprod
    sigmas = [float(((1 - abar[row["timestep"]]) / abar[row["timestep"]]).sqrt()) for row in found]
    assert [row["timestep"] for row in found] == process.sampler(STEPS).timesteps.tolist()
    for row, sigma, following in zip(found, sigmas, [*sigmas[1:], 0.0]):
        assert row["error"] == pytest.approx(error**2)
        assert row["change"] == pytest.approx((error * (sigma - following)) ** 2, rel=5e-3)


def test_only_the_steps_at_which_models_differ_count() -> None:
    found = changes(nothing, lambda sample, timestep: torch.full_like(sample, 1e-4 * float(timestep > 500)), levels=4)
    assert len(found) == 4
    for row in found:
        assert (row["error"] > 0) == (row["change"] > 0) == (row["timestep"] > 500)


def test_a_model_is_level_with_itself() -> None:
    def prediction(sample: Tensor, timestep: Tensor) -> Tensor:
        return 0.5 * sample

    assert all(row["error"] == row["change"] == 0 for row in changes(prediction, prediction))


def test_the_table_is_that_of_the_results() -> None:
    results = json.loads(noise_levels.RESULTS.read_text())
    assert set(results) == {"digits", "cifar10"}
    assert noise_levels.table(results) in README.read_text()


def test_shares_are_those_of_the_finding() -> None:
    """Most of the error is at low noise, most of the change of samples at high noise."""
    results = json.loads(noise_levels.RESULTS.read_text())

    def share(dataset: str, name: str, low: bool, bound: int) -> float:
        rows = results[dataset]["rows"]
        chosen = sum(row[name] for row in rows if (row["timestep"] <= bound if low else row["timestep"] >= bound))
        return round(100 * chosen / sum(row[name] for row in rows))

    assert [share("cifar10", name, True, 179) for name in ("error", "change")] == [96, 14]
    assert [share("cifar10", name, False, 498) for name in ("error", "change")] == [2, 70]
    assert [share("digits", name, True, 180) for name in ("error", "change")] == [84, 5]


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^dataset must be given, or write$"):
        noise_levels.main(["--results", str(tmp_path / "results.json")])
    with pytest.raises(ValueError, match=r"^images=0 must be at least 1$"):
        noise_levels.main(["--dataset", "digits", "--images", "0"])
