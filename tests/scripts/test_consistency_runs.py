"""prune_ddpm.py and evaluate.py on consistency models: trained by the teacher's output alone, sampled in one step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_gfprune.scripts import evaluate, prune_ddpm
from helpers.consistency_models import SIZE, consistency_pipeline, trained_pipeline
from helpers.scripts import ROOT, assert_one_error, forget_accelerator, plain_runs, run_script

SHORT = [
    *("--max_train_steps", "6", "--soft_fraction", "0.2", "--hard_fraction", "0.4", "--update_interval", "1"),
    *("--train_batch_size", "8", "--calibration_batches", "1", "--validation_images", "8", "--validation_steps", "3"),
    *("--eval_images", "66", "--speed_batch_sizes", "0", "--train_data", "teacher", "--num_teacher_images", "16"),
    *("--recovery", "none"),
]


def run(*words: object) -> None:
    forget_accelerator()
    with plain_runs():
        prune_ddpm.main([*SHORT, *map(str, words)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without data."""
    folder = tmp_path_factory.mktemp("consistency")
    trained_pipeline().save_pretrained(folder / "dense")
    run(
        "--pretrained_model_name_or_path",
        folder / "dense",
        "--output_dir",
        folder / "out",
        "--teacher_images_dir",
        folder / "t",
        "--recovery",
        "rankings",
    )
    return folder


@pytest.mark.slow
def test_a_run_needs_no_data(finished: Path) -> None:
    """Report and results say what was measured, and how."""
    report, results = (json.loads((finished / "out" / f).read_text()) for f in ("pruning_report.json", "results.json"))
    assert report["pipeline"]["process"] == "consistency"
    assert report["dataset"]["sampler"] == "1 step of multistep consistency sampling"
    assert results["dense"]["step_loss"] == 0 < results["pruned"]["step_loss"]
    assert results["evaluation"]["sampler"] == "multistep consistency sampling"
    assert (results["evaluation"]["num_inference_steps"], results["evaluation"]["timestep_spacing"]) == (1, None)
    assert 0 < results["pruned"]["quality"]["ssim_to_dense"] < 1
    assert report["curves"]["train_loss"] == [] or all(loss < 1 for loss in report["curves"]["train_loss"])
    assert [u["mask_value"] for u in report["mask_updates"]][-1] == 0


@pytest.mark.slow
def test_the_card_says_how_it_was_trained_and_measured(finished: Path) -> None:
    card = (finished / "out" / "README.md").read_text()
    text = " ".join(card.split())
    assert "trained by the output of the dense model alone" in text and "on the noise itself" not in text
    assert "mean squared distance to the images that the dense model makes in one step" in text
    assert "multistep consistency sampling with one step, seed" in text and "spacing" not in text
    assert "(1 step of multistep consistency sampling)" in text and "not with real ones" in text
    assert "song2023consistency" in card and "ho2020denoising" not in card and "- consistency-model\n" in card


@pytest.mark.slow
def test_stock_diffusers_loads_and_samples_the_result(finished: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(finished / "out")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=2, output_type="pt").images
    assert type(pipe).__name__ == "ConsistencyModelPipeline" and images.shape == (2, 1, SIZE, SIZE)


def evaluated(folder: Path, *words: object) -> dict:
    forget_accelerator()
    common = ("--num_images", 70, "--features", "pixels", "--speed_batch_sizes", 0, "--step_loss_timesteps", 4)
    places = ("--output_dir", folder / "eval", "--evaluation_cache_dir", folder / "cache", "--overwrite_output_dir")
    evaluate.main([str(word) for word in (*common, *places, *words)])
    return json.loads((folder / "eval/results.json").read_text())


def write_images(folder: Path, count: int = 100, vectors: int | None = None) -> Path:
    """A data set of noise, with vectors if asked for."""
    generator = np.random.default_rng(0)
    columns = {"image": [Image.fromarray(generator.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)) for _ in range(count)]}
    if vectors is not None:
        columns["condition"] = generator.standard_normal((count, vectors)).astype("float32").tolist()
    features = {"image": datasets.Image()}
    if vectors is not None:
        features["condition"] = datasets.List(datasets.Value("float32"), length=vectors)
    folder = folder / "images"
    folder.mkdir()
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(folder / "train-00000.parquet")
    return folder


@pytest.mark.slow
def test_evaluations_compare_with_the_dense_model(finished: Path, tmp_path: Path) -> None:
    images = ("--dataset_name", write_images(tmp_path), "--validation_images", 16, "--cache_dir", tmp_path / "data")
    found = evaluated(tmp_path, "--model", finished / "out", "--reference_model", finished / "dense", *images)
    assert found["reference_model"]["step_loss"] == 0 < found["model"]["step_loss"]
    assert len(found["model"]["step_loss_by_timestep"]) == 4 and found["evaluation"]["num_inference_steps"] == 1
    alone = evaluated(tmp_path, "--model", finished / "out", *images, "--num_inference_steps", 2)
    assert alone["model"]["step_loss"] is None and alone["evaluation"]["num_inference_steps"] == 2
    assert alone["model"]["quality"]["fd_pixels"] > 0


@pytest.mark.slow
def test_vectors_come_from_the_data_set(tmp_path: Path) -> None:
    """class_embed_type=identity: a column of lists; the dense model draws images with those of held-out ones."""
    consistency_pipeline(class_embed_type="identity").save_pretrained(tmp_path / "dense")
    data = write_images(tmp_path, 60, vectors=64)
    places = ["--pretrained_model_name_or_path", tmp_path / "dense", "--output_dir", tmp_path / "out"]
    run(*places, "--dataset_name", data, "--cache_dir", tmp_path / "data", "--teacher_images_dir", tmp_path / "t")
    report, results = (json.loads((tmp_path / "out" / f).read_text()) for f in ("pruning_report.json", "results.json"))
    assert report["pipeline"]["condition"] == "vectors" and results["evaluation"]["num_vectors"] == 8
    assert results["pruned"]["quality"]["psnr_to_dense"] > 0


@pytest.mark.slow
def test_a_run_started_as_users_start_it_goes_to_its_end(tmp_path: Path) -> None:
    """In an interpreter of its own, with a checkpoint at the third step, which goes when the run is done."""
    trained_pipeline().save_pretrained(tmp_path / "dense")
    command = [sys.executable, "training/prune_ddpm.py", *SHORT, "--pretrained_model_name_or_path", str(tmp_path / "dense")]
    command += [
        "--teacher_images_dir",
        str(tmp_path / "t"),
        "--checkpointing_steps",
        "3",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "drawn by the dense model in 1 step of multistep consistency sampling" in done.stdout
    assert (tmp_path / "out/unet/config.json").is_file() and not list(tmp_path.rglob("checkpoint-*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--distillation_weight", "0.5"), "distillation_weight=0.5 must be 1: the model is a consistency model"),
        (("--preset", "paper"), "distillation_weight=0 must be 1: the model is a consistency model"),
        (("--criterion", "taylor"), "criterion=taylor must be one of gradient-flow, magnitude, random"),
        (("--snr_gamma", "5"), "snr_gamma=5 must be left out: it is for DDPMs"),
        (("--timestep_spacing", "trailing"), "timestep_spacing=trailing must be left out: it is for DDIM"),
    ],
)
def test_options_of_noise_prediction_are_one_line(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    consistency_pipeline().save_pretrained(tmp_path / "dense")
    given = ["--pretrained_model_name_or_path", str(tmp_path / "dense"), "--output_dir", str(tmp_path / "out")]
    assert_one_error(run_script("training/prune_ddpm.py", *SHORT, *given, *words), message)
    assert not (tmp_path / "out").exists()


def test_vectors_without_a_data_set_are_one_line(tmp_path: Path) -> None:
    consistency_pipeline(class_embed_type="identity").save_pretrained(tmp_path / "dense")
    given = ["--pretrained_model_name_or_path", str(tmp_path / "dense"), "--output_dir", str(tmp_path / "out")]
    message = "train_data=teacher needs dataset_name or train_data_dir with vectors of 64 values"
    assert_one_error(run_script("training/prune_ddpm.py", *SHORT, *given), message)
    data = write_images(tmp_path, 60, vectors=3)
    images = ["--dataset_name", str(data), "--cache_dir", str(tmp_path / "data")]
    message = "the data set must have one column of lists of 64 floating-point values"
    assert_one_error(run_script("training/prune_ddpm.py", *SHORT, *given, *images), message)
