"""training/train_ddpm.py, the digits it trains on, and the teacher it made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers import DDPMPipeline
from sklearn.datasets import load_digits

from diffusers_gfprune.evaluation.cost import count_parameters
from diffusers_gfprune.evaluation.step_loss import StepLoss
from diffusers_gfprune.one_shot import images_to_tensor

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "training/digits"


def train(tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Three steps of training on a tiny model."""
    config = {**json.loads((DIGITS / "unet_config.json").read_text()), "block_out_channels": [16, 16]}
    (tmp_path / "unet.json").write_text(json.dumps(config))
    command = [
        *(sys.executable, "training/train_ddpm.py", "--model_config", tmp_path / "unet.json"),
        *("--dataset_name", "training/digits", "--output_dir", tmp_path / "teacher", "--max_train_steps", 3),
        *("--train_batch_size", 8, "--validation_steps", 2, "--validation_images", 8, *arguments),
    ]
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)


def test_training_leaves_a_pipeline(tmp_path: Path) -> None:
    run = train(tmp_path)
    assert run.returncode == 0, run.stderr
    files = {str(path.relative_to(tmp_path / "teacher")) for path in (tmp_path / "teacher").rglob("*") if path.is_file()}
    assert files == {
        "model_index.json",
        "samples.png",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "teacher")
    assert pipeline(batch_size=1, num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    run = train(tmp_path)
    assert run.returncode != 0 and "Traceback" not in run.stderr
    assert "train_ddpm.py: error: output_dir=" in run.stderr
    assert list((tmp_path / "teacher").iterdir()) == []


def test_the_digits_are_those_of_scikit_learn() -> None:
    files = {split: str(DIGITS / f"data/{split}.parquet") for split in ("train", "validation")}
    splits = datasets.load_dataset("parquet", data_files=files)
    assert {name: len(split) for name, split in splits.items()} == {"train": 1500, "validation": 297}
    shipped = np.concatenate([np.stack([np.asarray(image) for image in splits[name]["image"]]) for name in splits])
    labels = np.concatenate([splits[name]["label"] for name in splits])
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    assert np.array_equal(shipped, np.rint(digits.images[order] * 255 / 16).astype(np.uint8))
    assert np.array_equal(labels, digits.target[order])


def test_the_teacher_predicts_noise() -> None:
    """On images it was not trained on. A model that predicts no noise at all has a loss of 1."""
    pipeline = DDPMPipeline.from_pretrained(DIGITS / "teacher")
    rows = datasets.load_dataset("parquet", data_files=str(DIGITS / "data/validation.parquet"))["train"]
    held_out = images_to_tensor(rows["image"][:128], channels=1)
    assert StepLoss(held_out, pipeline.scheduler)(pipeline.unet) < 0.08
    assert count_parameters(pipeline.unet) == 1_201_761
    assert all(torch.isfinite(parameter).all() for parameter in pipeline.unet.parameters())
