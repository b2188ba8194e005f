"""prune_ddpm.py with a budget in a runtime: layers, models and the result are exported to it, and the files say so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffusers_gfprune.scripts import prune_ddpm
from helpers.latency import time_by_macs
from helpers.scripts import ROOT, plain_runs
from helpers.tiny_pipelines import tiny_pipeline

RUN = [
    *("--dataset_name", str(ROOT / "training/digits"), "--max_train_steps", "6", "--train_batch_size", "8"),
    *("--calibration_batches", "1", "--validation_images", "8", "--eval_images", "0"),
    *("--target", "latency", "--ratio", "0.3", "--latency_backend", "onnxruntime", "--latency_batch_size", "64"),
    *("--speed_batch_sizes", "2", "--speed_modes", "eager", "onnxruntime"),
]


@pytest.mark.slow
def test_a_run_with_a_budget_in_a_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    time_by_macs(monkeypatch)
    tiny_pipeline(block_out_channels=(32, 32), norm_num_groups=8).save_pretrained(tmp_path / "model")
    folders = ["--output_dir", tmp_path / "run", "--evaluation_cache_dir", tmp_path / "cache"]
    with plain_runs():
        prune_ddpm.main([*RUN, "--pretrained_model_name_or_path", str(tmp_path / "model"), *map(str, folders)])
    results, said = json.loads((tmp_path / "run/results.json").read_text()), capsys.readouterr().out
    for model in ("dense", "pruned"):
        eager, exported = results[model]["speed"]
        assert (eager["mode"], exported["mode"], exported["device"]) == ("eager", "onnxruntime", "cpu")
        assert exported["latency_ms"] > 0 and exported["runtime_version"]
    budget = results["latency_budget"]
    assert budget["setting"]["mode"] == "onnxruntime" and budget["pair"]["share"] == pytest.approx(0.3, abs=0.03)
    card = " ".join((tmp_path / "run/README.md").read_text().split())
    for words in ("a function in onnxruntime", "ms, batch 2, onnxruntime", budget["words"]):
        assert words in said
    assert "latency, batch 2, onnxruntime" in card and "exported for the batch size, in onnxruntime" in card
    assert budget["words"] in card
    assert len(list((tmp_path / "cache").glob("layer-times-*"))) == 1


@pytest.mark.slow
def test_a_result_is_not_lost_if_its_time_cannot_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Such as by memory that the optimizer and the teacher did not take yet when layers were timed."""

    def out_of_memory(*arguments) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    time_by_macs(monkeypatch)
    monkeypatch.setattr("diffusers_gfprune.GradientFlowPruner.check_latency", out_of_memory)
    tiny_pipeline(block_out_channels=(32, 32), norm_num_groups=8).save_pretrained(tmp_path / "model")
    own = ("--latency_backend", "eager", "--speed_batch_sizes", "0", "--output_dir", str(tmp_path / "run"))
    with plain_runs():
        prune_ddpm.main([*RUN, "--pretrained_model_name_or_path", str(tmp_path / "model"), *own])
    assert "warning: the latency budget cannot be checked: CUDA out of memory" in capsys.readouterr().err
    assert "latency_budget" not in json.loads((tmp_path / "run/results.json").read_text())
    assert "Latency budget" not in (tmp_path / "run/README.md").read_text()
