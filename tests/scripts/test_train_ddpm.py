"""training/train_ddpm.py, the digits data set, and the shipped teacher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from sklearn.datasets import load_digits

from diffusers_gfprune.data.images import DataArguments
from diffusers_gfprune.metrics.model_size import count_parameters
from diffusers_gfprune.metrics.step_loss import StepLoss
from diffusers_gfprune.one_shot import images_to_tensor
from diffusers_gfprune.scripts import train_ddpm
from helpers.scripts import ROOT, assert_one_error, run_script

DIGITS = ROOT / "training/digits"


def command(tmp_path: Path, name: str, **config: object) -> list[object]:
    """Arguments of three steps of training on a tiny model."""
    config = {**json.loads((DIGITS / "unet_config.json").read_text()), "block_out_channels": [16, 16], **config}
    (tmp_path / "unet.json").write_text(json.dumps(config))
    return [
        *("--model_config", tmp_path / "unet.json", "--dataset_name", DIGITS, "--output_dir", tmp_path / name),
        *("--max_train_steps", 3, "--train_batch_size", 8, "--validation_steps", 2, "--validation_images", 8),
    ]


def train(tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess:
    """The script, as users start it."""
    words = [sys.executable, "training/train_ddpm.py", *command(tmp_path, "teacher"), *arguments]
    return subprocess.run([str(part) for part in words], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_training_leaves_a_pipeline(tmp_path: Path) -> None:
    run = train(tmp_path)
    assert run.returncode == 0, run.stderr
    assert "1,500 training images of train, 8 held-out images of validation" in run.stdout
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


@pytest.mark.slow
def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in step 8, from the checkpoint of step 6, bit for bit on a CPU; nothing is left beside the result.

    With labels, a tenth of which are dropped to the last one.
    """
    one_step = train_ddpm.training_step

    def stopping(args, state, *rest) -> None:
        if state.step == 7:
            raise KeyboardInterrupt
        one_step(args, state, *rest)

    def start(name: str, *arguments: str) -> Path:
        common = map(str, command(tmp_path, name, num_class_embeds=11))
        words = ["train_ddpm.py", *common, "--max_train_steps", "10", *arguments]
        monkeypatch.setattr(sys, "argv", words)
        train_ddpm.main()
        return tmp_path / name / "unet/diffusion_pytorch_model.safetensors"

    whole = start("whole", "--checkpointing_steps", "3")
    monkeypatch.setattr(train_ddpm, "training_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        start("parts", "--checkpointing_steps", "3")
    assert not (tmp_path / "parts").exists()
    monkeypatch.setattr(train_ddpm, "training_step", one_step)
    with pytest.raises(ValueError, match="another run: learning_rate was 0.0005, is 0.001"):
        start("parts", "--resume_from_checkpoint", "latest", "--learning_rate", "1e-3")
    for manifest in (tmp_path / "parts.training").glob("checkpoint-*/checkpoint.json"):
        content = json.loads(manifest.read_text())
        assert "max_broken_images" not in content["identity"]
        del content["crc32"]  # as earlier versions wrote it
        content["identity"] |= {"max_broken_images": 10, "validation_steps": 500}
        manifest.write_text(json.dumps(content))
    parts = start("parts", "--resume_from_checkpoint", "latest", "--max_broken_images", "7")  # as a run asks that met too many
    assert parts.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"unet.json", "whole", "parts"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_channels": 1, "out_channels": 3}, "out_channels=3 must be in_channels=1, or 2 with learned variances"),
        ({"out_channels": 2}, "the model has learned variances, which variance_type=fixed_small of the scheduler does not"),
        ({"sample_size": None}, "sample_size=None in its config"),
    ],
)
def test_models_that_no_pipeline_samples_are_refused(
    config: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before they are trained."""
    monkeypatch.setattr("sys.argv", ["train_ddpm.py", *map(str, command(tmp_path, "teacher", **config))])
    monkeypatch.setattr(train_ddpm, "load_images", lambda *_: pytest.fail("images are loaded"))
    with pytest.raises(ValueError, match=f"model_config=.*unet.json cannot be trained: {message}"):
        train_ddpm.main()


def test_numbers_out_of_range_are_refused() -> None:
    for name, wrong in (("lr_warmup_steps", -5), ("learning_rate", 0.0), ("train_batch_size", 0)):
        with pytest.raises(ValueError, match=f"{name}={wrong} must"):
            train_ddpm.TrainArguments(model_config="x", output_dir="y", **{name: wrong})


def test_loading_processes_divide_a_stream_and_nothing_else() -> None:
    """With another number of them, a resumed run would see some images twice and others never."""
    args = train_ddpm.TrainArguments(model_config="x", output_dir="y")
    unet = SimpleNamespace(config={"in_channels": 1, "_name_or_path": "z"})

    def identity(workers: int, streaming: bool) -> dict:
        data = DataArguments(dataset_name="x", dataloader_num_workers=workers, streaming=streaming)
        return train_ddpm.run_identity(args, data, unet, 1)

    assert identity(0, False) == identity(4, False) and identity(0, True) != identity(4, True)
    assert identity(0, True)["in_channels"] == 1 and "_name_or_path" not in identity(0, True)


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    assert_one_error(run_script("training/train_ddpm.py", *command(tmp_path, "teacher")), "output_dir=")
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
