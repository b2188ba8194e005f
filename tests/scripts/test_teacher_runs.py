"""prune_ddpm.py without data: the dense model draws the images, and report and card say so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from diffusers_gfprune.scripts import prune_ddpm
from helpers.latent_pipelines import save
from helpers.scripts import ROOT, assert_one_error, forget_accelerator, plain_runs, run_script

SHORT = [
    *("--max_train_steps", "6", "--soft_fraction", "0.2", "--hard_fraction", "0.4", "--update_interval", "1"),
    *("--train_batch_size", "8", "--calibration_batches", "1", "--validation_images", "8", "--validation_steps", "3"),
    *("--eval_images", "6", "--ddim_num_inference_steps", "2", "--speed_batch_sizes", "0", "--recovery", "none"),
    *("--train_data", "teacher", "--num_teacher_images", "16", "--teacher_num_inference_steps", "2"),
]


def run(*words: object) -> None:
    forget_accelerator()
    with plain_runs():
        prune_ddpm.main([*SHORT, *map(str, words)])


@pytest.mark.slow
def test_a_text_model_is_pruned_from_prompts_alone(tmp_path: Path) -> None:
    pipeline, output, prompts = save("sd", tmp_path / "sd"), tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    places = ["--pretrained_model_name_or_path", pipeline, "--output_dir", output, "--teacher_images_dir", tmp_path / "images"]
    run(*places, "--teacher_prompts", prompts)
    report = json.loads((output / "pruning_report.json").read_text())
    nothing = {"name": "images drawn by the dense model", "hub_id": None, "drawn": True, "measured": False}
    assert report["dataset"] == {**nothing, "sampler": "2 steps of DDIM"}
    card = (output / "README.md").read_text()
    assert "scored and trained on 16 images that the dense model drew" in card and "not with real ones" in card
    assert StableDiffusionPipeline.from_pretrained(output, trust_remote_code=True).unet.config.layer_channels


@pytest.mark.slow
def test_a_data_set_besides_is_for_measurements(tmp_path: Path) -> None:
    digits, output = ROOT / "training/digits", tmp_path / "out"
    places = ["--pretrained_model_name_or_path", digits / "teacher", "--dataset_name", digits, "--output_dir", output]
    run(*places, "--cache_dir", tmp_path / "cache", "--teacher_images_dir", tmp_path / "images", "--eval_images", "66")
    report, results = (json.loads((output / name).read_text()) for name in ("pruning_report.json", "results.json"))
    assert report["dataset"]["drawn"] and report["dataset"]["measured"] and report["dataset"]["name"].endswith("digits")
    assert results["evaluation"]["distances"]["fd_pixels"]["reference_images"] == 1500
    card = (output / "README.md").read_text()
    assert "Measured on" in card and "not with real ones" not in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--train_data", "teachers"), "invalid choice: 'teachers'"),
        (("--teacher_prompts", "prompts.txt"), "teacher_prompts=prompts.txt does not fit the model, which takes no text"),
    ],
)
def test_bad_arguments_are_one_line(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    given = ["--pretrained_model_name_or_path", "training/digits/teacher", "--output_dir", str(tmp_path / "out")]
    assert_one_error(run_script("training/prune_ddpm.py", *SHORT, *given, *words), message)
    assert not (tmp_path / "out").exists()
