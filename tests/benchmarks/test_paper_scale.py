"""The plan of a run at the paper's scale: hours, gaps and predicted distances are those of known answers."""

from __future__ import annotations

import json

import paper_scale
import pytest

GPU = {
    "steps": [
        {"model": model, "dtype": dtype, "mode": mode, "samples_per_second": rate}
        for model, rate in (("masked", 100.0), ("compacted", 200.0), ("dense", 50.0))
        for dtype in ("bfloat16", "float32")
        for mode in ("graph", "eager")
    ],
    "forwards": [
        {"model": model, "dtype": "bfloat16", "mode": mode, "samples_per_second": rate}
        for model, rate in (("dense", 400.0), ("compacted", 500.0))
        for mode in ("graph", "eager")
    ],
}
RUN = {"pruning_steps": 100, "fine_tuning_steps": 400, "batch_size": 10, "rankings": 3, "calibration_batches": 2}


def test_hours_add_up_steps_the_teacher_and_rankings() -> None:
    """1,000 masked images, 4,000 compacted ones, 5,000 for the teacher; 60 scored ones, each two dense steps."""
    seconds = 1000 / 100 + 4000 / 200 + 2 * 60 / 50
    assert paper_scale.hours({**RUN, "teacher": False}, GPU, "graph", 2.0) == pytest.approx(seconds / 3600)
    assert paper_scale.hours({**RUN, "teacher": True}, GPU, "graph", 2.0) == pytest.approx((seconds + 5000 / 400) / 3600)
    assert paper_scale.sampling_hours(GPU, "graph") == pytest.approx(5e6 * (1 / 400 + 1 / 500) / 3600)


def test_the_plan_is_that_of_the_recipe() -> None:
    """100,000 steps of 128 images; the published form has no teacher and needs second derivatives."""
    published, default = (paper_scale.lengths(arguments) for arguments, _ in paper_scale.RUNS.values())
    for run in (published, default):
        assert (run["pruning_steps"] + run["fine_tuning_steps"], run["batch_size"]) == (100_000, 128)
    assert (published["criterion"], published["teacher"]) == ("gradient-flow-weights", False)
    assert (default["criterion"], default["teacher"]) == ("gradient-flow", True)


def run_of(final: float, middle: float) -> dict:
    curves = {"quality_steps": [30], "quality": {"fd_efflite0": [middle]}}
    dense, pruned = {"fd_efflite0": 20.0, "macs": 100}, {"fd_efflite0": final, "macs": 57}
    return {"dense": dense, "pruned": pruned, "steps": 90, "curves": curves}


def test_the_gap_left_predicts_the_distance() -> None:
    """The rivals are 10 and 30 above the dense model at the end, 40 in the middle: a mean gap of 20 and of 40."""
    rivals, ours = [run_of(30.0, 60.0), run_of(50.0, 60.0)], [run_of(24.0, 30.0), run_of(26.0, 40.0)]
    assert paper_scale.gap_left(ours, rivals, 90) == pytest.approx([0.2, 0.3])
    assert paper_scale.gap_left(ours, rivals, 30) == pytest.approx([0.25, 0.5])
    middle, end = paper_scale.distance_table({"no-recovery": ours, "diff-pruning": rivals}).splitlines()[2:]
    assert middle.split(" | ")[3:] == ["43%", "2", "30", "0.38 ± 0.18", "4.60 ± 0.19 |"]  # 4.19 + 1.10 x share
    assert end.split(" | ")[3:] == ["43%", "2", "90", "0.25 ± 0.07", "4.46 ± 0.08 |"]


def test_either_rival_is_compared_where_it_was_measured() -> None:
    """The second was measured at the end only: 10 above the dense model, of which 4 and 6 are left."""
    other = run_of(30.0, 0.0)
    other["curves"] = {}
    ours = [run_of(24.0, 30.0), run_of(26.0, 40.0)]
    found = {"default": ours, "diff-pruning": [run_of(40.0, 60.0)], "torch-pruning": [other]}
    rows = [row.split(" | ") for row in paper_scale.distance_table(found).splitlines()[2:]]
    assert [row[5:7] for row in rows] == [["30", "0.38 ± 0.18"], ["90", "0.25 ± 0.07"], ["90", "0.50 ± 0.14"]]
    assert [row[2] for row in rows] == ["Diff-Pruning, one-shot"] * 2 + ["Torch-Pruning as in Diff-Pruning's script"]


def test_it_has_what_it_reads() -> None:
    """The committed measurements hold all rates, in both modes."""
    gpu = json.loads((paper_scale.RESULTS / "gpu.json").read_text())
    for mode in paper_scale.MODES.values():
        assert paper_scale.sampling_hours(gpu, mode) > 0
        assert 0 < paper_scale.hours({**RUN, "teacher": True}, gpu, mode, 2.0) < 1
