"""Latency budgets from end to end with made-up times: the pruner measures, plans, and resumes from a checkpoint."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import UNet2DModel

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner, one_shot, prune_pipeline
from diffusers_gfprune.latency import budget as latency_budget
from diffusers_gfprune.latency import calibration, layer_times
from diffusers_gfprune.latency.budget import measured_latency_model
from diffusers_gfprune.latency.calibration import TimePair
from diffusers_gfprune.metrics.model_size import count_macs
from diffusers_gfprune.metrics.speed import PreparedForward
from diffusers_gfprune.pruning.channel_groups import trace_channel_groups
from diffusers_gfprune.runtimes import requirements
from helpers.architectures import build
from helpers.latency import shares_by_macs, time_by_macs
from helpers.tiny_pipelines import tiny_pipeline

CONFIG = GFPruneConfig.from_preset(
    "one-shot", target="latency", ratio=0.4, total_steps=1, criterion="magnitude", channel_multiple=1
)


class Machine:
    """On which the share c of a model's time is constant, the other goes with its MACs, and models save less than they should.

    Args:
        unet: The dense model.
        constant: Share of the dense time that no width changes.
    """

    def __init__(self, unet, constant: float = 0.2) -> None:
        self.macs, self.constant, self.measured = count_macs(unet), constant, 0

    def share(self, small) -> float:
        """Share of the dense time that a model saves."""
        return ((1 - self.constant) * (1 - count_macs(small) / self.macs)) ** 1.2

    def measure(self, small) -> TimePair:
        """In place of `time_pair`."""
        self.measured += 1
        return TimePair(self.share(small), 0.001, 0.02, 0.02 * (1 - self.share(small)), 9)

    def layer_shares(self, unet, grids, calls, setting, *arguments, **options) -> list[np.ndarray]:
        """In place of that: layers take 1 - `constant`, in proportion to their MACs."""
        return shares_by_macs(grids, calls, 1 - self.constant)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(build("three-levels"))
    monkeypatch.setattr(latency_budget, "layer_shares", machine.layer_shares)
    monkeypatch.setattr(calibration, "prepare_forward", lambda model, *rest: PreparedForward(model, []))
    monkeypatch.setattr(calibration, "time_pair", lambda dense, small, *rest: machine.measure(small))
    return machine


def test_the_time_asked_for_is_the_time_that_goes(machine: Machine) -> None:
    """Even if the layer times predict something else; the check reports it in a line."""
    dense = build("three-levels")
    pruner = GradientFlowPruner(copy.deepcopy(dense), CONFIG)
    assert 2 <= machine.measured <= 5
    pruner.step(0, [])
    small = pruner.compact()
    assert machine.share(small) == pytest.approx(0.4, abs=0.03)
    check = pruner.check_latency(dense, small)
    assert check.pair.share == machine.share(small) and not check.missed
    assert "asked for 40.0% less, predicted 40" in str(check)
    assert pruner.history[-1].sparsity == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("ratio", [0.6, 0.66])
def test_the_widths_that_were_measured_are_the_plan(machine: Machine, monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    """Also where the correction makes other multiples possible than the layer times alone."""
    unet, measured, model_of = build("three-levels"), [], latency_budget.model_of_widths

    def model_of_widths(*arguments) -> UNet2DModel:
        measured.append(arguments[2])
        return model_of(*arguments)

    monkeypatch.setattr(latency_budget, "model_of_widths", model_of_widths)
    config = GFPruneConfig(**{**CONFIG.to_dict(), "channel_multiple": "auto", "ranking": "group", "ratio": ratio})
    pruner = GradientFlowPruner(copy.deepcopy(unet), config)
    assert any((pruner.planned_widths == widths).all() for widths in measured)
    small = model_of(unet, pruner.groups, pruner.planned_widths)
    assert pruner.latency["calibration"][-1]["measured"] == machine.share(small) == pytest.approx(ratio, abs=0.03)


def test_a_machine_that_cannot_compile_is_found_before_layers_are_timed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_budget, "compilation_error", lambda device: "InvalidCxxCompiler: No working C++ compiler")
    config = GFPruneConfig(**{**CONFIG.to_dict(), "latency_backend": "compile"})
    with pytest.raises(ValueError, match=r"^latency_backend=compile does not work on this machine: InvalidCxxCompiler: No"):
        GradientFlowPruner(build("three-levels"), config)
    assert machine.measured == 0


@pytest.mark.slow
def test_the_time_can_be_that_of_a_runtime(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    """Widths are those that CPUs like, bars count layers and models, and the check names the runtime."""
    dense = build("three-levels")
    config = GFPruneConfig(**{**CONFIG.to_dict(), "latency_backend": "openvino", "channel_multiple": "auto"})
    pruner = GradientFlowPruner(copy.deepcopy(dense), config)
    assert pruner._device_type() == "cpu"
    assert "timing models" in capsys.readouterr().err
    pruner.step(0, [])
    small = pruner.compact()
    assert machine.share(small) == pytest.approx(0.4, abs=0.03)
    assert "time of a forward (batch 1, float32, openvino): asked for 40.0% less" in str(pruner.check_latency(dense, small))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_budget_in_a_runtime_from_end_to_end(runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers and models are exported, layers are timed, and their table is kept for the next time."""
    time_by_macs(monkeypatch)
    dense = tiny_pipeline(block_out_channels=(32, 32), norm_num_groups=8).unet
    config = GFPruneConfig(**{**CONFIG.to_dict(), "latency_backend": runtime, "latency_batch_size": 16})
    pruner = GradientFlowPruner(copy.deepcopy(dense), config, latency_cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    pruner.step(0, [])
    check = pruner.check_latency(dense, pruner.compact())
    assert check.pair.share == pytest.approx(0.4, abs=0.03) and runtime in str(check)
    monkeypatch.setattr(layer_times, "measure_shares", lambda *args, **options: pytest.fail("measured again"))
    GradientFlowPruner(copy.deepcopy(dense), config, latency_cache_dir=tmp_path)


def test_a_missing_runtime_is_found_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, with the command that installs it; also where images would be drawn first."""
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
    options = {"target": "latency", "latency_backend": "onnxruntime"}
    message = r"^onnxruntime, onnx, onnxscript not installed: pip install 'diffusers-gfprune\[onnx\]'$"
    with pytest.raises(ImportError, match=message):
        GradientFlowPruner(build("one-level"), GFPruneConfig(**options))
    monkeypatch.setattr(one_shot, "draw_images", lambda *args: pytest.fail("images are drawn"))
    with pytest.raises(ImportError, match=message):
        tiny_pipeline().prune(**options)
    with pytest.raises(ImportError, match=message):
        prune_pipeline(tiny_pipeline(), **options)
    GFPruneConfig(**{**options, "target": "macs"}).check_installed()


@pytest.mark.parametrize("depth", [pytest.param("allow", marks=pytest.mark.slow), "only"])
def test_removed_blocks_save_their_time(depth: str, machine: Machine) -> None:
    """With channels, or alone; then the nearest set of blocks is taken."""
    dense = build("three-levels")
    config = GFPruneConfig(**{**CONFIG.to_dict(), "depth": depth, "ratio": 0.3})
    pruner = GradientFlowPruner(copy.deepcopy(dense), config)
    pruner.step(0, [])
    small = pruner.compact()
    assert small.config.removed_blocks and (small.config.layer_channels != {}) == (depth == "allow")
    assert machine.share(small) == pytest.approx(0.3, abs=0.03)
    assert pruner.check_latency(dense, small).pair.share == machine.share(small)


@pytest.mark.slow
def test_a_run_that_goes_on_measures_nothing_and_plans_the_same(machine: Machine) -> None:
    """Times are never measured the same twice: the checkpoint's are taken over, before widths or masks are."""
    unet = build("three-levels")
    first = GradientFlowPruner(copy.deepcopy(unet), CONFIG)
    first.step(0, [])
    state = first.state_dict()
    state["values"] = json.loads(json.dumps(state["values"]))
    before = machine.measured
    again = GradientFlowPruner(copy.deepcopy(unet), CONFIG, latency=state["values"]["latency"])
    assert machine.measured == before
    assert (again.planned_widths == first.planned_widths).all()
    machine.constant = 0.4  # another day
    other = GradientFlowPruner(copy.deepcopy(unet), CONFIG)
    assert (other.planned_widths != first.planned_widths).any()
    other.load_state_dict(state)
    assert (other.planned_widths == first.planned_widths).all()
    assert other.latency == first.latency == again.latency
    by_macs = GradientFlowPruner(copy.deepcopy(unet), GFPruneConfig(criterion="magnitude"))
    with pytest.raises(ValueError, match="must have the same target as this pruner, target=macs"):
        by_macs.load_state_dict(state)
    with pytest.raises(ValueError, match="target=macs must be latency"):
        by_macs.check_latency(unet, unet)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("latency_batch_size", 16, "latency_batch_size=1, which must be 16:"),
        ("latency_dtype", "bfloat16", "latency_dtype=float32, which must be bfloat16:"),
        ("latency_backend", "compile", "latency_backend=eager, which must be compiled:"),
    ],
)
def test_times_of_another_setting_are_refused(machine: Machine, name: str, value: object, words: str) -> None:
    """Another batch size takes other time for the same widths. Times of earlier versions have no setting."""
    first = GradientFlowPruner(build("three-levels"), CONFIG)
    state = first.state_dict()
    latency = json.loads(json.dumps(first.latency))
    config = GFPruneConfig(**{**CONFIG.to_dict(), name: value})
    with pytest.raises(ValueError, match=f"^times were measured with {words} measure them again$"):
        GradientFlowPruner(build("three-levels"), config, latency=latency)
    del latency["setting"]
    other = GradientFlowPruner(build("three-levels"), config, latency=latency)
    with pytest.raises(ValueError, match=f"^latency of the pruner's state cannot be used: times were measured with {words}"):
        other.load_state_dict(state)


def test_time_that_no_width_changes_is_an_error_before_any_training(machine: Machine) -> None:
    """The narrowest model is measured, and what it saves is the most that can be asked for; the model is left alone."""
    machine.constant = 0.7
    unet = build("three-levels")
    with pytest.raises(ValueError, match=r"ratio=0.4 of latency .*maximum is 0\.2\d+ with.*larger latency_batch_size"):
        GradientFlowPruner(unet, CONFIG)
    assert machine.measured == 1
    assert not hasattr(unet, "channel_masks")


def test_times_without_a_model_are_refused(machine: Machine) -> None:
    """A checkpoint whose values were written over."""
    unet = build("three-levels")
    groups = trace_channel_groups(unet)
    with pytest.raises(ValueError, match="must have an entry model"):
        measured_latency_model(unet, groups, 0.4, CONFIG.latency_setting(), lambda cost: [], measurements={"calibration": []})
