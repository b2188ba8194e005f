"""training/timestep_density.py: a mean that stays the same with less variance, and what a run keeps of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_gfprune.training.timestep_density import DECAY, PARTS, UNIFORM, UPDATE_STEPS, TimestepDensity


def even(count: int) -> Tensor:
    """Positions in the middle of `count` equal parts."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def errors(times: Tensor) -> Tensor:
    """As those of a denoiser: 400 times as large at low noise as at high noise."""
    return (-6 * times).exp()


def measured(density: TimestepDensity | None = None, steps: int = UPDATE_STEPS, of=errors) -> TimestepDensity:
    """After a few steps."""
    density = density or TimestepDensity()
    for _ in range(steps):
        density.add(even(4 * PARTS), of(even(4 * PARTS)))
        density.finish_step(lambda tensor: tensor)
    return density


def test_it_is_uniform_until_errors_are_known() -> None:
    """At first nothing is, then parts are missing, then the student is the teacher."""
    unseen, half, same = TimestepDensity(), TimestepDensity(), measured(of=torch.zeros_like)
    for _ in range(UPDATE_STEPS):
        half.add(even(8) / 2, torch.ones(8))
        half.finish_step(lambda tensor: tensor)
    for density in (unseen, half, same):
        placed, weights = density.place(even(100))
        torch.testing.assert_close(placed, even(100), rtol=0, atol=1e-12)
        assert torch.equal(weights, torch.ones(100))


def test_density_follows_the_roots_of_squares() -> None:
    """A quarter of the error has half the density, apart from the uniform share."""
    density = measured(of=lambda times: torch.where(times < 0.5, 4.0, 1.0)).density()
    expected = np.repeat([2, 1], PARTS // 2) / 1.5 * (1 - UNIFORM) + UNIFORM
    np.testing.assert_allclose(density, expected, rtol=1e-6)


def test_weighted_means_are_those_of_uniform_times() -> None:
    """Of any function; each part has its share of the positions, and stays within its ends."""
    density = measured()
    times = even(200_000)
    placed, weights = density.place(times)
    assert placed.dtype == torch.float64 and weights.dtype == torch.float32
    assert 0 <= placed.min() and placed.max() < 1 and (placed.diff() > 0).all()
    assert weights.max() <= 1 / UNIFORM and weights.max() > 2 and weights.min() < 0.5
    for function in (torch.ones_like, errors, lambda x: x, lambda x: (20 * x).sin()):
        assert (weights * function(placed)).mean().item() == pytest.approx(function(times).mean().item(), abs=1e-4)
    shares = np.histogram(placed, bins=PARTS, range=(0, 1))[0] / len(placed)
    np.testing.assert_allclose(shares, density.density() / PARTS, atol=1e-4)


def test_gradients_vary_less() -> None:
    """Variance of a mean of independent draws, for gradients as long as the root of the error."""
    density, generator = measured(), torch.Generator().manual_seed(0)
    times = torch.rand(100_000, dtype=torch.float64, generator=generator)
    signs = torch.randint(2, times.shape, generator=generator) * 2.0 - 1
    placed, weights = density.place(times)
    plain, placed = signs * errors(times).sqrt(), weights * signs * errors(placed).sqrt()
    best = errors(even(1000)).sqrt().mean() ** 2  # no density has less
    assert 0.9 * best < placed.var() < 0.7 * plain.var()


@pytest.mark.parametrize("end", [0.0, np.nextafter(1.0, 0), np.nextafter(0.5, 0), 0.5])
def test_ends_stay_inside(end: float) -> None:
    placed, weights = measured().place(torch.tensor([end], dtype=torch.float64))
    assert 0 <= placed.item() < 1 and weights.isfinite().all()
    assert TimestepDensity().place(torch.tensor([end], dtype=torch.float64))[0].item() == pytest.approx(end, abs=1e-12)


def test_it_forgets() -> None:
    """What was measured long ago hardly counts."""
    density = measured(of=lambda times: 1e3 * (1 - times))
    measured(density, steps=UPDATE_STEPS * 100, of=lambda times: 1 + times)
    expected = measured(of=lambda times: 1 + times).density()
    np.testing.assert_allclose(density.density(), expected, rtol=1e3 * DECAY**100)
    assert density.density()[-1] > density.density()[0]


def test_overflows_are_left_out() -> None:
    """Losses in fp16 may be infinite for a step."""
    density = TimestepDensity()
    density.add(even(PARTS), torch.full((PARTS,), torch.inf))
    assert not density.current.any()
    assert np.array_equal(measured(density).density(), measured().density())


def test_processes_count_as_one() -> None:
    """Each has its rows of the batch; sums are over all of them."""
    ranks = [TimestepDensity(), TimestepDensity()]
    for _ in range(UPDATE_STEPS):
        for rank, density in enumerate(ranks):
            times = even(4 * PARTS)[rank::2]
            density.add(times, errors(times))
        total = ranks[0].current + ranks[1].current
        for density in ranks:
            density.finish_step(lambda tensor, total=total: total)
    assert np.array_equal(ranks[0].density(), ranks[1].density())
    np.testing.assert_allclose(ranks[0].density(), measured().density(), rtol=1e-6)


def test_a_restored_one_continues_the_same() -> None:
    """In the middle of an interval, through JSON."""
    whole = measured(steps=UPDATE_STEPS + 3)
    other = TimestepDensity()
    other.restore(json.loads(json.dumps(whole.values())))
    assert torch.equal(other.recent, whole.recent) and other.recent.any()
    for density in (whole, other):
        measured(density, of=lambda times: 1 + times)
    assert np.array_equal(whole.density(), other.density())
    assert whole.values() == other.values()


def test_reports_name_timesteps() -> None:
    """Those in the middle of the parts, for JSON."""
    density = measured()
    described = json.loads(json.dumps(density.describe(lambda times: (1000 * times).long())))
    assert described["timesteps"] == [int(1000 * time) for time in even(PARTS)]
    assert described["density"] == density.density().tolist()
