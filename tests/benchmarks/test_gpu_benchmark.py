"""benchmarks/gpu.py: rows of three models, and the error on a machine without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gpu
import models as bench_models
import pytest
import torch

from helpers.scripts import ROOT, assert_one_error, run_script

NARROW = {
    **{"sample_size": 16, "block_out_channels": (32, 32), "layers_per_block": 1},
    **{"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
}


@pytest.mark.slow
def test_rows_of_every_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(bench_models, "CIFAR10", {**bench_models.CIFAR10, **NARROW})
    output = tmp_path / "gpu.json"
    sizes = ("--train_batch_size", "2", "--batch_sizes", "3", "--repeats", "2", "--modes", "eager", "--channel_multiple", "4")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", *sizes, "--output", str(output)])
    gpu.main()
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
    found = json.loads(output.read_text())
    steps = [(row["model"], row["dtype"], row["batch_size"]) for row in found["steps"]]
    names = ("dense", "masked", "compacted")
    assert steps == [(name, dtype, 2) for dtype in ("float32", "bfloat16") for name in names]
    assert [row["model"] for row in found["forwards"]] == ["dense", "compacted"] * 2
    assert all(row["batch_size"] == 3 and row["speedup"] > 0 for row in found["forwards"])
    assert found["channel_multiple"] == 4
    assert found["promised_by_macs"] == pytest.approx(2, rel=0.05)
    printed = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--table", "--output", str(output)])
    gpu.main()
    assert capsys.readouterr().out == printed
    assert [line.split(" | ")[0] for line in printed.splitlines()[2:]] == [
        *("| training step, fp32", "| training step, bf16", "| forward, fp32", "| forward, bf16")
    ]


@pytest.mark.slow
def test_parts_and_widths_are_those_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_models, "CIFAR10", {**bench_models.CIFAR10, **NARROW})
    models, _ = gpu.three_models(torch.device("cpu"), 16)
    widths = {module.out_channels for module in models["compacted"].modules() if isinstance(module, torch.nn.Conv2d)}
    assert 16 in widths and all(width % 16 == 0 for width in widths - {3})
    for part, other in (gpu.PARTS, gpu.PARTS[::-1]):
        output = tmp_path / f"{part}.json"
        sizes = ("--train_batch_size", "1", "--batch_sizes", "1", "--repeats", "1", "--modes", "eager", "--parts", part)
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", *sizes, "--output", str(output)])
        gpu.main()
        found = json.loads(output.read_text())
        assert found[part] and not found[other]


@pytest.mark.slow
def test_compiled_steps_are_those_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is to be compiled in one piece: what Dynamo leaves out would run eagerly under the name of compiled."""
    monkeypatch.setattr(bench_models, "CIFAR10", {**bench_models.CIFAR10, **NARROW})
    asked = []
    monkeypatch.setattr(torch, "compile", lambda unet, **options: asked.append(options) or unet)
    models, removed = gpu.three_models(torch.device("cpu"))
    assert removed == pytest.approx(0.5, rel=0.05)
    rows = gpu.measure(models, gpu.step_of, 2, "bfloat16", "compiled", repeats=1)
    assert [(row["model"], row["mode"]) for row in rows] == [(name, "compiled") for name in models]
    assert asked == [{"fullgraph": True, "dynamic": False}] * 3


@pytest.mark.parametrize("name", ["gpu", "gpu-64", "gpu-compiled", "gpu-compiled-64"])
def test_tables_of_the_document_are_those_of_the_results(name: str) -> None:
    table = gpu.table(json.loads(gpu.OUTPUT.with_stem(name).read_text()))
    assert table in (ROOT / "benchmarks/README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cuda:1"], "device=cuda:1: no CUDA device is available"),
        (["--repeats", "0"], "repeats=0 must be at least 1"),
        (["--train_batch_size", "-1"], "train_batch_size=-1 must be at least 1"),
        (["--channel_multiple", "0"], "channel_multiple=0 must be at least 1"),
        (["--batch_sizes", "4", "0"], r"batch_sizes=\[4, 0\] must be at least 1"),
        (["--device", "cpu"], r"modes=\['eager', 'graph'\]: a graph needs a CUDA device, got device=cpu"),
    ],
)
def test_bad_arguments_are_refused(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is built or written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "three_models", None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words, "--output", str(tmp_path / "gpu.json")])
    with pytest.raises(ValueError, match=f"^{message}$"):
        gpu.main()
    assert not list(tmp_path.iterdir())


def test_an_error_is_one_line(tmp_path: Path) -> None:
    run = run_script("benchmarks/gpu.py", "--table", "--output", tmp_path / "none.json")
    assert run.returncode == 1
    assert_one_error(run, "none.json")
