"""Schedules: known values of the curves, and masks that change only at scheduled steps."""

from __future__ import annotations

import math

import pytest

from diffusers_gfprune.pruning.schedules import SCHEDULES, PruningSchedule, rise

# Soft steps, end steps, interval: usual, one-shot, no hard phase, no soft phase, intervals that do and do not divide N.
SPANS = [
    (100, 200, 10),
    (100, 200, 7),
    (0, 0, 5),
    (10, 10, 3),
    (0, 20, 6),
    (1, 2, 1),
    (5, 30, 50),
    (30, 90, 30),
]


@pytest.mark.parametrize(
    ("shape", "half"),
    [
        ("linear", 0.5),
        ("cosine", 0.5),
        ("exponential", 1 / (1 + math.exp(-2.5))),  # (1 - a^2) = (1 - a)(1 + a) with a = exp(-2.5)
        ("cubic", 0.875),
    ],
)
def test_rise_has_known_values(shape: str, half: float) -> None:
    """The ends are exact, because masks must be binary at N; the middle tells the shapes apart."""
    assert rise(shape, 0.0) == 0.0
    assert rise(shape, 0.5) == pytest.approx(half, abs=1e-12)
    assert rise(shape, 1.0) == 1.0


def test_every_shape_has_a_known_value_above() -> None:
    """A shape that is added later needs a known value too."""
    assert set(SCHEDULES) == {"linear", "cosine", "exponential", "cubic"}


@pytest.mark.parametrize("shape", SCHEDULES)
def test_rise_is_strictly_monotone(shape: str) -> None:
    """A curve that falls again would unprune channels for no reason of rank."""
    values = [rise(shape, index / 200) for index in range(201)]
    assert all(first < second for first, second in zip(values, values[1:]))


@pytest.mark.parametrize("shape", SCHEDULES)
def test_rise_counts_outside_fractions_as_the_nearer_end(shape: str) -> None:
    """Cubic and cosine would otherwise turn back beyond 1."""
    assert rise(shape, -0.3) == 0.0
    assert rise(shape, 1.7) == 1.0


def test_unknown_shape_is_refused() -> None:
    """The message names the value and what it could be."""
    with pytest.raises(ValueError, match="schedule=quadratic .*cubic"):
        rise("quadratic", 0.5)


def test_phases_at_the_borders() -> None:
    """N is the first step of the hard phase, M the first of fine-tuning."""
    schedule = PruningSchedule(soft_steps=100, end_steps=200, update_interval=10)
    assert [schedule.phase(step) for step in (0, 99, 100, 199, 200, 1000)] == [
        "soft",
        "soft",
        "hard",
        "hard",
        "finetune",
        "finetune",
    ]


def test_one_shot_has_no_phase_but_fine_tuning() -> None:
    """With N = M = 0 the masks are final at step 0."""
    schedule = PruningSchedule(soft_steps=0, end_steps=0, update_interval=5)
    assert schedule.phase(0) == "finetune"
    assert (schedule.sparsity(0), schedule.mask_value(0)) == (1.0, 0.0)
    assert schedule.update_steps() == [0]


def test_no_hard_phase_when_soft_ends_at_the_end() -> None:
    """With N = M the full target is still reached: by a ranking at N, or by one that aims at N."""
    schedule = PruningSchedule(soft_steps=10, end_steps=10, update_interval=3)
    assert {schedule.phase(step) for step in range(30)} == {"soft", "finetune"}
    assert schedule.update_steps() == [3, 6, 9, 10]
    smooth = PruningSchedule(soft_steps=10, end_steps=10, update_interval=3, interpolate=True)
    assert smooth.update_steps() == [0, 3, 6, 9]
    assert smooth.goal_step(9) == 10


@pytest.mark.parametrize("sparsity_schedule", SCHEDULES)
@pytest.mark.parametrize("mask_schedule", SCHEDULES)
def test_sparsity_rises_to_one_and_mask_value_falls_to_zero(sparsity_schedule: str, mask_schedule: str) -> None:
    """s_t and p_t follow their own shapes in the soft phase, and are exactly 1 and 0 from N on."""
    schedule = PruningSchedule(40, 80, 4, sparsity_schedule, mask_schedule)
    sparsity = [schedule.sparsity(step) for step in range(100)]
    value = [schedule.mask_value(step) for step in range(100)]
    assert (sparsity[0], value[0]) == (0.0, 1.0)
    assert sparsity == sorted(sparsity)
    assert value == sorted(value, reverse=True)
    assert sparsity[20] == pytest.approx(rise(sparsity_schedule, 0.5))
    assert value[20] == pytest.approx(1 - rise(mask_schedule, 0.5))
    assert sparsity[39] < 1.0 and value[39] > 0.0
    assert set(sparsity[40:]) == {1.0} and set(value[40:]) == {0.0}


@pytest.mark.parametrize("interpolate", [False, True])
@pytest.mark.parametrize(("soft", "end", "interval"), SPANS)
def test_update_steps_agree_with_is_update(soft: int, end: int, interval: int, interpolate: bool) -> None:
    """Two descriptions of one thing: the list for plots and logs, the question for the training loop."""
    schedule = PruningSchedule(soft, end, interval, interpolate=interpolate)
    assert schedule.update_steps() == [step for step in range(end + 3 * interval + 5) if schedule.is_update(step)]


@pytest.mark.parametrize(("soft", "end", "interval"), SPANS)
def test_end_of_the_soft_phase_is_always_an_update(soft: int, end: int, interval: int) -> None:
    """Masks become binary at N; without a ranking there the full target would never be reached."""
    schedule = PruningSchedule(soft, end, interval)
    assert schedule.is_update(soft)
    assert soft in schedule.update_steps()


@pytest.mark.parametrize(("soft", "end", "interval"), SPANS)
def test_rankings_aim_at_one_another_and_at_the_end_of_the_soft_phase(soft: int, end: int, interval: int) -> None:
    """Interpolated masks reach the goal of one ranking where the next starts, and binary masks at the full target at N."""
    schedule = PruningSchedule(soft, end, interval, interpolate=True)
    rankings = [step for step in schedule.update_steps() if step <= soft]
    goals = [schedule.goal_step(step) for step in rankings]
    assert rankings[0] == 0
    assert goals == [*rankings[1:], soft]
    assert (schedule.sparsity(goals[-1]), schedule.mask_value(goals[-1])) == (1.0, 0.0)


@pytest.mark.parametrize(("soft", "end", "interval"), SPANS)
def test_without_interpolation_a_ranking_is_its_own_goal(soft: int, end: int, interval: int) -> None:
    """The published form: masks change at once. So they do in the hard phase either way."""
    schedule, smooth = (PruningSchedule(soft, end, interval, interpolate=value) for value in (False, True))
    assert all(schedule.goal_step(step) == step for step in range(end + 5))
    assert all(smooth.goal_step(step) == step for step in range(soft, end + 5))


@pytest.mark.parametrize(("soft", "end", "interval"), SPANS)
def test_nothing_is_ranked_where_nothing_can_change(soft: int, end: int, interval: int) -> None:
    """Without interpolation a ranking at step 0 of a soft phase would be wasted, as s_t = 0; from M on masks are frozen."""
    schedule = PruningSchedule(soft, end, interval)
    assert not any(schedule.is_update(step) for step in range(min(interval, soft)))
    for interpolate in (False, True):
        schedule = PruningSchedule(soft, end, interval, interpolate=interpolate)
        assert not any(schedule.is_update(step) for step in range(max(end, soft + 1), end + 50))
