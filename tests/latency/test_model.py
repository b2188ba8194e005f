"""latency/model.py: the time of a pruned model from tables with known entries."""

from __future__ import annotations

import json

import numpy as np
import pytest

from diffusers_gfprune.latency.budget import model_of_widths
from diffusers_gfprune.latency.layer_workloads import Convolution, LayerCall, LinearLayer, trace_layer_calls
from diffusers_gfprune.latency.model import Correction, LatencyModel, plan_grids
from diffusers_gfprune.pruning.allocation import allocate_per_group
from diffusers_gfprune.pruning.budget import width_ladder
from diffusers_gfprune.pruning.channel_groups import ChannelGroup, trace_channel_groups
from diffusers_gfprune.pruning.cost_model import CostModel
from helpers.architectures import build

SCALE = 2e-6  # share of the dense time that a layer takes for each pair of channels


@pytest.fixture(scope="module")
def groups() -> list[ChannelGroup]:
    return trace_channel_groups(build("three-levels"))


def bilinear_model(groups: list[ChannelGroup], scale: float = SCALE) -> LatencyModel:
    """A model of time whose layers take (1 + in) (1 + out) units each."""
    model = LatencyModel(build("three-levels"), groups)
    model.set_shares([scale * np.outer(1 + np.array(grid.wide_in), 1 + np.array(grid.wide_out)) for grid in model.grids])
    return model


def summed(calls: list[LayerCall]) -> float:
    return SCALE * sum((1 + call.wide_in) * (1 + call.wide_out) for call in calls)


def test_times_are_those_of_the_layers_that_are_left(groups: list[ChannelGroup]) -> None:
    """A bilinear table is met exactly between its points, where widths are multiples of the blocks."""
    unet, model = build("three-levels"), bilinear_model(groups)
    assert model.removed(model.dense) == pytest.approx(0)
    assert model.rest == pytest.approx(1 - summed(trace_layer_calls(unet)))
    kept = np.array([16 if 16 in width_ladder(group) else group.num_channels for group in groups])
    calls = trace_layer_calls(model_of_widths(unet, groups, kept))
    assert len(calls) == len(model.calls)
    gone = summed(trace_layer_calls(unet)) - summed(calls)
    assert gone > 0.01 and model.predicted(kept) == pytest.approx(gone)
    assert model.seconds(kept) == pytest.approx(1 - model.removed(kept))


def test_convolutions_compute_whole_blocks(groups: list[ChannelGroup]) -> None:
    """17 channels take as long as 32, and 16 do not."""
    model = bilinear_model(groups)
    index = next(i for i, group in enumerate(groups) if group.num_channels == 48 and group.attention is None)
    found = {}
    for width in (48, 33, 32, 17, 16):
        kept = model.dense.copy()
        kept[index] = width
        found[width] = model._layers(kept) - model._layers(model.dense)
    norms = SCALE  # widths of norms are not blocked, and each channel is a unit
    assert abs(found[33]) < 20 * 15 * norms
    assert abs(found[17] - found[32]) < 20 * 15 * norms < found[33] - found[32]
    assert found[17] - found[16] > 20 * 15 * norms


def test_layers_longer_than_the_forward_leave_no_rest(groups: list[ChannelGroup]) -> None:
    """A table that explains more than all is scaled down."""
    model = bilinear_model(groups, scale=100 * SCALE)
    assert model.rest == 0
    assert model.removed(model.dense) == pytest.approx(0)


def test_the_rest_is_split_so_that_a_measurement_is_explained(groups: list[ChannelGroup]) -> None:
    """The constant c: all of the rest, none of it, or what lies between."""
    model = bilinear_model(groups)
    narrow = model.dense // 4
    assert model.correction.constant == 1
    least = model.predicted(narrow)
    assert model.explain(narrow, least) == pytest.approx(1)
    assert model.explain(narrow, least - 0.1) == 1 and model.explain(narrow, 1.0) == 0
    model.correction = Correction(constant=model.explain(narrow, least + 0.2))
    assert 0 < model.correction.constant < 1
    assert model.removed(narrow) == pytest.approx(least + 0.2)


@pytest.mark.parametrize(
    ("pairs", "answers"),
    [
        ((), {0.0: 0.0, 0.3: 0.3, 1.0: 1.0}),
        (((0.4, 0.2),), {0.2: 0.1, 0.4: 0.2, 0.8: 0.4}),
        (((0.8, 0.6), (0.4, 0.2)), {0.2: 0.1, 0.6: 0.4, 0.8: 0.6, 1.0: 0.75}),
        (((0.4, 0.38), (0.41, 0.42)), {0.405: 0.4}),  # two measurements of one thing
        (((0.2, 0.3), (0.4, 0.1), (0.6, 0.5)), {0.2: 0.2 * 0.2 / 0.3, 0.3: 0.2, 0.6: 0.5}),  # out of order: their mean
        (((0.4, -0.1),), {0.2: 0.0, 0.4: 0.0, 0.9: 0.0}),  # slower than before
        (((0.5, 0.8),), {0.9: 1.0}),  # no time is negative
    ],
)
def test_corrections(pairs: tuple, answers: dict[float, float]) -> None:
    """Known answers of the piecewise linear function; it never falls."""
    correct = Correction(pairs=pairs)
    assert {x: correct(x) for x in answers} == pytest.approx(answers)
    values = [correct(x) for x in np.linspace(0, 1, 101)]
    assert values == sorted(values)


def test_what_is_saved_is_what_is_loaded(groups: list[ChannelGroup]) -> None:
    """A resumed run must choose the same widths: the state is bit-identical after JSON."""
    model = bilinear_model(groups)
    model.correction = Correction(0.3, ((0.4, 1 / 3), (0.7, 0.6)), dense_seconds=0.1 + 0.2)
    other = LatencyModel(build("three-levels"), groups)
    other.load_dict(json.loads(json.dumps(model.to_dict())))
    assert other.correction == model.correction
    for share in (0.9, 0.5, 0.2):
        assert other.seconds((share * model.dense).astype(int)) == model.seconds((share * model.dense).astype(int))


def test_a_damaged_table_is_refused(groups: list[ChannelGroup]) -> None:
    model = bilinear_model(groups)
    whole = model.to_dict()
    for damaged in ({}, {**whole, "shares": whole["shares"][1:]}, {**whole, "correction": {"slope": 1}}):
        with pytest.raises(ValueError, match="table of layer times"):
            LatencyModel(build("three-levels"), groups).load_dict(damaged)


def test_grids_hold_every_width(groups: list[ChannelGroup]) -> None:
    """The dense widths are points; the three values of a pixel, or the one of a gray image, are never pruned."""
    calls = trace_layer_calls(build("three-levels"))
    grids, grid_of = plan_grids(calls, groups, "cpu")
    for call, index in zip(calls, grid_of):
        assert call.workload == grids[index].workload
        assert call.wide_in in grids[index].wide_in and call.wide_out in grids[index].wide_out
    first = next(index for call, index in zip(calls, grid_of) if call.module == "conv_in")
    assert grids[first].wide_in == (1,) and len(grids[first].wide_out) == 1  # 16 channels are one block
    points = sum(len(grid.wide_in) * len(grid.wide_out) for grid in grids)
    assert points < 4 * len(calls)
    assert all(type(g.workload) in (Convolution, LinearLayer) or g.wide_in == (0,) for g in grids)


def test_grids_of_a_runtime_are_coarser(groups: list[ChannelGroup]) -> None:
    """Each point is a model that is loaded. The dense widths stay points."""
    unet = build("three-levels")
    in_pytorch, in_runtime = LatencyModel(unet, groups), LatencyModel(unet, groups, runtime="onnxruntime")
    points = [sum(len(grid.wide_in) * len(grid.wide_out) for grid in model.grids) for model in (in_pytorch, in_runtime)]
    assert points[1] < points[0] and in_runtime.calls == in_pytorch.calls
    for grid, wide_in, wide_out in in_runtime.calls:
        assert wide_in in in_runtime.grids[grid].wide_in and wide_out in in_runtime.grids[grid].wide_out
    assert LatencyModel(unet.to("meta"), groups, runtime="openvino").grids == in_runtime.grids  # on the CPU anyway


def test_a_budget_in_time_is_met(groups: list[ChannelGroup]) -> None:
    """`CostModel` takes seconds from the model of time, and widths are found as for any other target."""
    unet, model = build("three-levels"), bilinear_model(groups, scale=6 * SCALE)
    with pytest.raises(ValueError, match="target=latency needs measured times"):
        CostModel(unet, groups).removed("latency", model.dense)
    cost = CostModel(unet, groups, seconds=model.seconds)
    ladders = [width_ladder(group, 1, 0.1) for group in groups]
    most = cost.removed("latency", np.array([ladder[-1] for ladder in ladders]))
    kept = allocate_per_group(cost, "latency", most / 2, ladders)
    assert cost.removed("latency", kept) == pytest.approx(most / 2, abs=0.01)
    marginal = cost.marginal("latency", cost.dense)
    assert (marginal > 0).all()  # not 0, though the last channel alone is one of a block
