"""reports/results.py: one form of `results.json` for runs and evaluations; earlier versions are converted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffusers_gfprune.reports.results import ModelFigures, Results, read_results

CARD = Path(__file__).resolve().parents[2] / "model_cards/digits-gfpruned"
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
EVALUATION = {"num_images": 1000, "seed": 0}
ROW = {"batch_size": 1, "dtype": "float32", "mode": "eager", "latency_ms": 2.0, "hardware": "abacus"}


def evaluation() -> dict:
    """Results of an evaluation, as their file has them."""
    model = ModelFigures("a", "c0ffee", "12ab34cd", True, 15, 200, 60, 0.03, {"5": 0.03}, {"fid": 4.0, "psnr": None}, [ROW])
    return Results("evaluation", model, ModelFigures("org/dense"), EVALUATION, "evaluate.py").to_dict()


def earlier_run(version: int) -> dict:
    """Results of a pruning run of format version 1, 2 or 3."""
    dense, pruned = ({"parameters": n, "macs": 2 * n, "step_loss": 1 / n, "fd_pixels": 0.5} for n in (20, 10))
    pruned["ssim_to_dense"] = 0.75
    values = {"format_version": version, "dense": dense, "pruned": pruned, "evaluation": EVALUATION}
    if version == 3:
        return values | {"speed": [{"model": name, **ROW} for name in ("dense", "pruned")]}
    dense["latency"], pruned["latency"] = (None, None) if version == 1 else (ROW, ROW)
    return values


def write(path: Path, values: object) -> Path:
    path.write_text(json.dumps(values))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Of either kind, with and without a reference model, by the file and by its folder."""
    run = Results.from_dict(earlier_run(3))
    run.latency_budget = {"asked": 0.1, "words": "10 % less"}
    alone = Results("evaluation", ModelFigures("samples", quality={"fid": 5.0}), None, EVALUATION, "evaluate.py")
    for results in (run, alone, Results.from_dict(evaluation())):
        path = write(tmp_path / "results.json", results.to_dict())
        assert read_results(path) == read_results(tmp_path) == results
    assert set(run.to_dict()) == {"format_version", "kind", "dense", "pruned", "evaluation", "latency_budget"}
    assert set(alone.to_dict()) == {"format_version", "kind", "model", "reference_model", "evaluation", "command"}
    assert run.to_dict()["pruned"].keys() == alone.to_dict()["model"].keys()


@pytest.mark.parametrize("version", [1, 2, 3])
def test_runs_of_every_version_are_read(version: int) -> None:
    results = Results.from_dict(earlier_run(version))
    speed = [] if version == 1 else [ROW]
    quality = {"fd_pixels": 0.5, "ssim_to_dense": 0.75}
    assert results.kind == "pruning run" and results.evaluation == EVALUATION
    assert results.model == ModelFigures("pruned", parameters=10, macs=20, step_loss=0.1, quality=quality, speed=speed)
    dense = ModelFigures("dense", parameters=20, macs=40, step_loss=0.05, quality={"fd_pixels": 0.5}, speed=speed)
    assert results.reference_model == dense
    assert Results.from_dict(results.to_dict()) == results


@pytest.mark.parametrize("version", [1, 2, 4])
def test_evaluations_of_every_version_are_read(version: int) -> None:
    values = {**evaluation(), "format_version": version}
    results = Results.from_dict(values)
    assert results.to_dict() == {**values, "format_version": 4}
    assert results.model.speed == [ROW] and results.command == "evaluate.py"


def test_the_committed_run_is_read() -> None:
    values, results = json.loads((CARD / "results.json").read_text()), read_results(CARD)
    assert values["format_version"] == 4 and results.to_dict() == values


def test_results_of_a_run_of_format_3_are_read() -> None:
    """Those of `make prune` by an earlier version."""
    file = FIXTURES / "results-format-3.json"
    values, results = json.loads(file.read_text()), read_results(file)
    assert values["format_version"] == 3
    assert results.model.macs == values["pruned"]["macs"]
    assert results.model.quality["ssim_to_dense"] == values["pruned"]["ssim_to_dense"]
    assert [row["latency_ms"] for row in results.model.speed] == [
        row["latency_ms"] for row in values["speed"] if row["model"] == "pruned"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 5}, "kind=evaluation and format_version=5 must be one of pruning run, evaluation and 1 to 4"),
        ({"format_version": None}, "format_version=None"),
        ({"kind": "test"}, "kind=test"),
        ({"kind": ["evaluation"]}, r"kind=\['evaluation'\] and format_version=4 must be one of pruning run"),
        ({"evaluation": [1]}, "evaluation="),
        ({"command": 3}, "command=3"),
        ({"model": None}, "missing or malformed"),
        ({"model": {"parameters": 3}}, "missing or malformed.*name"),
        ({"model": {"name": "a", "surprise": 1}}, "unknown field surprise"),
        ({"model": {"name": "a", "macs": "many"}}, "macs='many'"),
        ({"model": {"name": "a", "parameters": True}}, "parameters=True"),
        ({"model": {"name": "a", "ema": 1}}, "ema=1"),
        ({"model": {"name": "a", "quality": {"fid": "low"}}}, "fid='low'"),
        ({"model": {"name": "a", "quality": None}}, "quality=None"),
        ({"model": {"name": "a", "speed": [3]}}, "speed=3"),
        ({"model": {"name": "a", "step_loss_by_timestep": {"5": "x"}}}, "5='x'"),
        ({"reference_model": "x"}, "missing or malformed"),
    ],
)
def test_malformed_results_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = write(tmp_path / "results.json", {**evaluation(), **change})
    with pytest.raises(ValueError, match=message) as caught:
        read_results(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("which", ["dense", "pruned", "speed", "evaluation"])
def test_runs_that_lack_something_are_refused(which: str) -> None:
    values = earlier_run(3)
    del values[which]
    with pytest.raises(ValueError, match=f"missing or malformed: '{which}'"):
        Results.from_dict(values)


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_what_is_no_results_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(ValueError, match="results.json does not exist"):
        read_results(path)
    path.write_text(content)
    with pytest.raises(ValueError, match="results.json cannot be read"):
        read_results(path)
