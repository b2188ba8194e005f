"""`python -m diffusers_gfprune.export`: it says what it exported, and what is wrong in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffusers_gfprune.export import load_exported
from helpers.scripts import run_script
from helpers.tiny_pipelines import tiny_pipeline

PROGRAM = "python -m diffusers_gfprune.export: error: "


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


def test_it_says_what_it_exported(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave `--output_dir=~/export` as it is."""
    folder = tmp_path / "export"
    monkeypatch.setenv("HOME", str(tmp_path))
    run = run_script("diffusers_gfprune.export", pipeline, "--format", "torch", "--batch", "2", "--output_dir=~/export")
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.splitlines()
    assert first.startswith("exported to ~/export: torch, fp32, ") and first.endswith("KiB")
    assert second.startswith("maximum relative error to PyTorch ") and second.endswith("(4 timesteps, batch 2)")
    assert json.loads((folder / "export.json").read_text())["batch_size"] == 2
    assert load_exported(folder, trust_remote_code=True).config.sample_size == 8

    again = run_script("diffusers_gfprune.export", folder, "--format", "torch", "--output_dir", tmp_path / "again")
    assert again.stderr.startswith(f"{PROGRAM}pretrained_model_name_or_path={folder} is an export: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "tflite"], "format=tflite must be one of onnx, openvino, torch"),
        (["--format", "onnx", "--batch", "none"], "batch=none must be dynamic or a number of samples, at least 1"),
        (["--format", "torch", "--dtype", "int8"], "dtype=int8 must be fp32 or fp16 with format=torch"),
        (["--format", "onnx", "--num_images", "0"], "num_images=0 must be at least 1"),
        (["--format", "torch", "--output_dir", "/proc/export"], "output_dir=/proc/export cannot be written: "),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, pipeline: Path, tmp_path: Path) -> None:
    output = [] if "--output_dir" in words else ["--output_dir", tmp_path / "export"]
    run = run_script("diffusers_gfprune.export", pipeline, *words, *output)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(PROGRAM + message), run.stderr
    assert "Traceback" not in run.stderr and list(tmp_path.iterdir()) == []


def test_a_folder_without_a_pipeline_is_one_line(tmp_path: Path) -> None:
    run = run_script("diffusers_gfprune.export", tmp_path, "--format", "torch", "--output_dir", tmp_path / "export")
    assert run.returncode == 1
    message = f"{PROGRAM}pretrained_model_name_or_path={tmp_path} cannot be loaded: it has no model_index.json"
    assert run.stderr.splitlines()[-1].startswith(message)
