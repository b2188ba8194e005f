"""training/prune_ddpm.py: through the launcher, as a script and as a function, with valid and invalid input."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

import diffusers_gfprune
from diffusers_gfprune.fingerprints import tensors_fingerprint
from diffusers_gfprune.metrics.model_size import count_macs, count_parameters
from diffusers_gfprune.metrics.step_loss import StepLoss
from diffusers_gfprune.one_shot import images_to_tensor
from diffusers_gfprune.scripts import prune_ddpm
from diffusers_gfprune.training import timestep_density
from helpers.scripts import ROOT, RUN_FILES, SHORT, assert_one_error, forget_accelerator, plain_runs, run_script

TEACHER = ROOT / "training/digits/teacher"
# Nothing is sampled or timed at the end of a run
UNMEASURED = ("--eval_images", 0, "--speed_batch_sizes", 0)
DEFAULT_RECOVERY = ("--recovery", "rankings")  # short runs do without


# With --quiet, as in the README; otherwise Accelerate adds a traceback to errors
LAUNCH = (
    *(str(Path(sys.executable).parent / "accelerate"), "launch", "--quiet", "--num_processes", "1", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A short run through the launcher, as users start it; later arguments take precedence."""
    command = [*LAUNCH, "training/prune_ddpm.py", *SHORT, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def run_short(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The script in this process."""
    return run_script("training/prune_ddpm.py", *SHORT, *arguments)


def run_here(*arguments: object) -> None:
    """Its function, whose errors are raised."""
    forget_accelerator()
    with plain_runs():
        prune_ddpm.main([*SHORT, *map(str, arguments)])


def digits(output_dir: Path, *arguments: object) -> list[object]:
    return [
        *("--pretrained_model_name_or_path", TEACHER, "--dataset_name", "training/digits"),
        *("--output_dir", output_dir, *arguments),
    ]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A short run on the digits, through `accelerate launch`, and what it printed."""
    output = tmp_path_factory.mktemp("runs") / "digits"
    run = launch(*digits(output, "--use_ema"))
    assert run.returncode == 0, run.stderr
    return output, run.stdout


def test_run_leaves_exactly_these_files(finished_run: tuple[Path, str]) -> None:
    output, _ = finished_run
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert files == RUN_FILES
    assert [path.name for path in output.parent.iterdir()] == [output.name]  # nothing half-made beside it


def test_run_says_its_plan_and_its_results(finished_run: tuple[Path, str]) -> None:
    _, printed = finished_run
    plan = ("plan: remove 50.0% of macs", "soft 2, hard 2, fine-tuning 16")
    for text in (*plan, "FD-pixels", "SSIM to dense", "ms, batch 1, eager"):
        assert text in printed


def test_run_meets_its_budget(finished_run: tuple[Path, str]) -> None:
    output, _ = finished_run
    results = json.loads((output / "results.json").read_text())
    assert results["pruned"]["macs"] / results["dense"]["macs"] == pytest.approx(0.5, abs=0.01)
    unet = diffusers_gfprune.GFPrunedUNet2DModel.from_pretrained(output / "unet")
    assert count_macs(unet) == results["pruned"]["macs"]
    assert count_parameters(unet) == results["pruned"]["parameters"]
    assert tensors_fingerprint(unet.state_dict()) == results["pruned"]["weights"]  # averaged ones


def test_report_is_consistent(finished_run: tuple[Path, str]) -> None:
    output, _ = finished_run
    report = json.loads((output / "pruning_report.json").read_text())
    kept = sum(group["kept_channels"] for group in report["channel_groups"])
    assert report["mask_updates"][-1]["kept_channels"] == kept
    assert report["mask_updates"][-1]["phase"] == "hard"
    assert report["curves"]["compaction"]["step"] == 4
    masked, compacted = (report["curves"]["compaction"][f"step_loss_{name}"] for name in ("masked", "compacted"))
    assert compacted == pytest.approx(masked, rel=1e-4)
    assert len(report["curves"]["schedule_steps"]) == 4
    timesteps, density = report["timestep_density"].values()
    assert timesteps == sorted(timesteps) and np.mean(density) == pytest.approx(1)
    assert max(density) > 1.2  # pruning changes predictions at some timesteps more than at others


@pytest.mark.parametrize("scheduler", [None, DDIMScheduler, DPMSolverMultistepScheduler])
def test_run_loads_as_a_pipeline(finished_run: tuple[Path, str], scheduler: type | None) -> None:
    output, _ = finished_run
    pipeline = DiffusionPipeline.from_pretrained(output)
    if scheduler is not None:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
        if scheduler is DPMSolverMultistepScheduler:  # DDPMPipeline passes a generator that this scheduler also takes
            assert type(pipeline.scheduler) is scheduler
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (2, 8, 8, 1) and np.isfinite(images).all()


@pytest.mark.slow
def test_same_seed_gives_the_same_weights(finished_run: tuple[Path, str], tmp_path: Path) -> None:
    """A run is a function of its arguments, whatever process it is in and has been in before."""
    output, _ = finished_run
    run_here(*digits(tmp_path / "again", "--use_ema", *UNMEASURED))
    first, second = (load_file(folder / "unet/diffusion_pytorch_model.safetensors") for folder in (output, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    run = run_short(*digits(tmp_path / "run", "--dry_run", *DEFAULT_RECOVERY))
    assert run.returncode == 0, run.stderr
    assert "macs" in run.stdout and re.search("time       (about|at most) ", run.stdout) and "conv_in" in run.stdout
    assert " rankings of 1 calibration batch, recovery at each" in run.stdout
    assert "even cut" in run.stdout and "ranking=sensitivity will choose other widths" in run.stdout
    assert "dataset_name=training/digits, splits train (1,500), validation (297): 1,797 images in all" in run.stdout
    assert "1,500 training images of train, 16 held-out images of validation" in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_time_from_a_smaller_batch_is_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers_gfprune.training.estimate.TIME_LIMIT", 0.0)
    run = run_short(*digits(tmp_path / "run", "--dry_run"))
    assert re.search(r"time       at most .* of 16 images, extrapolated from 1\)", run.stdout), run.stdout


@pytest.mark.slow
def test_masks_that_freeze_at_the_last_step(tmp_path: Path) -> None:
    """With M at the end of the run there is no fine-tuning, and the result is still compacted."""
    run_here(*digits(tmp_path / "run", "--hard_fraction", 1.0, "--max_train_steps", 6, *UNMEASURED))
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["pruned"]["macs"] / results["dense"]["macs"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.slow
def test_a_budget_in_time(tmp_path: Path) -> None:
    """From the table of layer times to the card; what is measured at the end is not asserted, the machine may be busy."""
    run = tmp_path / "run"
    words = ("--target", "latency", "--ratio", 0.1, "--latency_batch_size", 16, "--evaluation_cache_dir", tmp_path / "cache")
    run_here(*digits(run, *words))
    results, report = (json.loads((run / name).read_text()) for name in ("results.json", "pruning_report.json"))
    assert results["latency_budget"]["asked"] == 0.1
    assert results["latency_budget"]["words"] in (run / "README.md").read_text()
    assert report["latency_calibration"] and results["pruned"]["macs"] < results["dense"]["macs"]
    assert len(list((tmp_path / "cache").glob("layer-times-*.safetensors"))) == 1  # for the next run


def image_folder(path: Path, size: tuple[int, int] = (8, 8), mode: str = "L", count: int = 40) -> Path:
    path.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(count):
        shape = size if mode == "L" else (*size, 3)
        Image.fromarray(generator.integers(0, 255, shape, dtype=np.uint8), mode).save(path / f"{index}.png")
    return path


@pytest.mark.slow
def test_image_folder_as_data(tmp_path: Path) -> None:
    """A folder of image files, not square and larger than the model's images, trains as well."""
    folder = image_folder(tmp_path / "images", size=(12, 16))
    run_here(
        *("--pretrained_model_name_or_path", TEACHER, "--train_data_dir", folder, "--output_dir", tmp_path / "run"),
        *("--max_train_steps", 2, "--random_flip", "--preset", "one-shot", "--criterion", "taylor", *UNMEASURED),
    )
    assert (tmp_path / "run/model_index.json").exists()


def teacher_copy(path: Path) -> Path:
    shutil.copytree(TEACHER, path)
    return path


def pickled_teacher(path: Path) -> Path:
    """A teacher whose weights are a pickle that would leave a file if it were loaded."""

    class Harm:
        def __reduce__(self):
            return (open, (str(path / "harm"), "w"))

    teacher_copy(path)
    (path / "unet/diffusion_pytorch_model.safetensors").unlink()
    (path / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Harm()))
    return path


def truncated_teacher(path: Path) -> Path:
    weights = teacher_copy(path) / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    return path


def teacher_without_a_weight(path: Path) -> Path:
    weights = teacher_copy(path) / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["conv_out.bias"]
    save_file(tensors, weights)
    return path


def nan_teacher(path: Path) -> Path:
    weights = teacher_copy(path) / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.bias"][:] = float("nan")
    save_file(tensors, weights)
    return path


BAD_INPUT = {
    "missing model": (["--pretrained_model_name_or_path", "./nowhere"], "pretrained_model_name_or_path=./nowhere"),
    "missing data": (["--dataset_name", "./nowhere"], "dataset_name=./nowhere is not a folder"),
    "two data sources": (["--train_data_dir", "."], "dataset_name"),
    "wrong resolution": (["--resolution", "16"], "resolution=16"),
    "ratio of 0": (["--ratio", "0"], "ratio=0"),
    "ratio above 1": (["--ratio", "1.5"], "ratio=1.5"),
    "unreachable budget": (["--ratio", "0.97", "--min_keep_ratio", "0.5"], "ratio=0.97 of macs cannot be removed"),
    "distillation above 1": (["--distillation_weight", "1.5"], "distillation_weight=1.5 must be in [0, 1]"),
    "unknown criterion": (["--criterion", "guess"], "criterion=guess must be one of gradient-flow"),
    "batch larger than data": (["--train_batch_size", "5000"], "train_batch_size=5000"),
    "no such column": (["--image_column", "picture"], "image_column=picture"),
    "unknown schedule": (["--lr_scheduler", "foo"], "invalid choice: 'foo'"),
    "column without images": (["--image_column", "label"], "image_column=label must be a column of images"),
    "output over the model": (["--output_dir", str(TEACHER), "--overwrite_output_dir"], "which this run reads"),
    "no such recipe": (["--recipe", "cifar11"], "recipe=cifar11 is neither a file nor a shipped recipe"),
    "no such checkpoint": (
        ["--resume_from_checkpoint", "checkpoint-9"],
        "resume_from_checkpoint=checkpoint-9 is not a checkpoint",
    ),
    "accumulation of 0": (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps=0 must be at least 1"),
    "fp16 without a GPU": (["--mixed_precision", "fp16"], "mixed_precision=fp16 needs a GPU for loss scaling"),
    "8-bit Adam, channels-last weights": (["--use_8bit_adam", "--channels_last"], "use_8bit_adam=True cannot be used"),
    "dropout of 1": (["--dropout", "1"], "dropout=1.0 must be in [0, 1)"),
    "curves without samples": (["--eval_steps", "5", "--eval_images", "0"], "eval_steps=5 needs eval_images, which is 0"),
    "too few samples for pixels": (["--eval_features", "pixels", "--eval_images", "64"], "needs more than 64 images"),
    "weights of another network": (["--inception_weights", "x.pt"], "inception_weights=x.pt needs eval_features=inception"),
    "seed below 0": (["--eval_seed", "-1"], "eval_seed=-1 must not be negative"),
    "scores to check of predictions": (["--check_scores"], "needs criterion=gradient-flow-weights, not gradient-flow"),
    "scores to check of magnitude": (["--check_scores", "--criterion", "magnitude"], "not magnitude, which takes no Hessian"),
    "phases out of order": (["--soft_fraction", "0.5"], "soft_fraction=0.5 and hard_fraction=0.2"),
    "no repository name": (["--push_to_hub", "--hub_model_id", "two words"], "hub_model_id=two words is not a valid"),
    "a repository without a push": (["--hub_model_id", "alice/x"], "hub_model_id=alice/x needs --push_to_hub"),
    "nothing saved to push": (["--push_to_hub", "--hub_strategy", "every_save"], "hub_strategy=every_save needs"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_arguments_are_refused_before_anything_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments, message = BAD_INPUT[name]
    with pytest.raises((ValueError, SystemExit)) as refused:
        run_here(*digits(tmp_path / "run", *arguments))
    said = str(refused.value) if issubclass(refused.type, ValueError) else capsys.readouterr().err
    assert message in said
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trackio" else find(name, *rest))
    with pytest.raises(ValueError, match="report_to=trackio needs the package trackio: pip install trackio"):
        prune_ddpm.main([*SHORT, *map(str, digits(tmp_path / "run", "--report_to", "trackio"))])


@pytest.mark.parametrize("name", ["missing data", "unknown schedule"])
def test_bad_arguments_end_in_one_clear_line(name: str, tmp_path: Path) -> None:
    arguments, message = BAD_INPUT[name]
    assert_one_error(run_short(*digits(tmp_path / "run", *arguments)), message)
    assert list(tmp_path.iterdir()) == []


BAD_MODELS = {
    "pickle": (pickled_teacher, "not pickles"),
    "truncated": (truncated_teacher, "cannot be loaded"),
    "missing weight": (teacher_without_a_weight, "conv_out.bias"),
    "nan": (nan_teacher, "not finite"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models_are_refused(name: str, tmp_path: Path) -> None:
    make, message = BAD_MODELS[name]
    model = make(tmp_path / "model")
    assert_refused_here(message, *digits(tmp_path / "run", "--pretrained_model_name_or_path", model))
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    assert not (model / "harm").exists()


def test_a_bad_model_ends_in_one_clear_line(tmp_path: Path) -> None:
    model = truncated_teacher(tmp_path / "model")
    run = run_short(*digits(tmp_path / "run", "--pretrained_model_name_or_path", model))
    assert_one_error(run, BAD_MODELS["truncated"][1])


@pytest.mark.slow
def test_errors_through_the_launcher_are_one_clear_line_too(tmp_path: Path) -> None:
    assert_one_error(launch(*digits(tmp_path / "run", "--ratio", 2)), "ratio=2")


@pytest.mark.slow
def test_a_broken_image_is_left_out_and_counted(tmp_path: Path) -> None:
    """It does not stop the run, unless requested."""
    folder = image_folder(tmp_path / "images")
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:40])
    arguments = (
        *("--pretrained_model_name_or_path", TEACHER, "--train_data_dir", folder, "--output_dir", tmp_path / "run"),
        *("--preset", "one-shot", "--criterion", "random", "--max_train_steps", 6, "--validation_images", 4, *UNMEASURED),
    )
    assert_refused_here("max_broken_images=0", *arguments, "--max_broken_images", 0)
    run = run_short(*arguments)
    assert run.returncode == 0, run.stderr
    assert "warning: 1 images could not be read and were left out" in run.stderr
    report = json.loads((tmp_path / "run/pruning_report.json").read_text())
    assert report["unreadable_images"] == ["7.png"]  # and no path of this machine, which would keep the run from being pushed


@pytest.mark.slow
def test_half_precision_training_measures_what_it_saves(tmp_path: Path) -> None:
    """Scores and results are those of the saved model, not of autocast."""
    run_here(*digits(tmp_path / "run", "--mixed_precision", "bf16", "--max_train_steps", 6, *UNMEASURED))
    results = json.loads((tmp_path / "run/results.json").read_text())
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    rows = datasets.load_dataset("parquet", data_files=str(ROOT / "training/digits/data/validation.parquet"))["train"]
    held_out = images_to_tensor(rows["image"][:16], channels=1)
    assert StepLoss(held_out, pipeline.scheduler)(pipeline.unet) == pytest.approx(results["pruned"]["step_loss"], rel=1e-5)


def test_images_that_do_not_fit_the_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Colour is refused, a set of small images is enlarged, as shown in the plan."""
    common = ("--pretrained_model_name_or_path", TEACHER, "--output_dir", tmp_path / "run", "--train_data_dir")
    assert_refused_here("mode RGB", *common, image_folder(tmp_path / "colour", mode="RGB"))
    run_here(*common, image_folder(tmp_path / "small", size=(4, 4)), "--dry_run")
    assert "all are scaled up to the model's size" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_existing_output_is_kept_unless_asked(tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    assert_refused_here("output_dir=", *digits(output))
    assert (output / "mine.txt").read_text() == "precious"
    quick = ("--overwrite_output_dir", "--preset", "one-shot", "--criterion", "random", "--max_train_steps", 1)
    assert_refused_here("holds mine.txt and no model_index.json", *digits(output, *quick))
    (output / "model_index.json").write_text("{}")  # as an earlier run leaves it
    run_here(*digits(output, *quick, *UNMEASURED))
    assert not (output / "mine.txt").exists() and (output / "unet/config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["stratified", "independent"])
def test_timesteps_of_a_batch(sampling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stratified ones are one from each of as many parts as the batch has images."""
    next_batch, seen = prune_ddpm.next_batch, []

    def seeing(*arguments: object):
        seen.append(next_batch(*arguments))
        return seen[-1]

    monkeypatch.setattr(prune_ddpm, "next_batch", seeing)
    quick = ("--preset", "one-shot", "--criterion", "random", "--max_train_steps", 3, *UNMEASURED)
    run_here(*digits(tmp_path / "run", *quick, "--timestep_sampling", sampling))
    parts = [sorted((batch.timesteps * len(batch) // 1000).tolist()) for batch, *_ in seen]
    assert len(parts) == 3 and all(weights is None for *_, weights in seen)
    assert all((found == list(range(16))) == (sampling == "stratified") for found in parts)


def test_timesteps_are_drawn_where_errors_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default: uniform until errors are known, then more at low noise, with smaller weights."""
    next_batch, seen = prune_ddpm.next_batch, []

    def seeing(*arguments: object):
        seen.append(next_batch(*arguments))
        return seen[-1]

    monkeypatch.setattr(prune_ddpm, "next_batch", seeing)
    monkeypatch.setattr(timestep_density, "UPDATE_STEPS", 3)
    quick = ("--preset", "one-shot", "--criterion", "random", "--max_train_steps", 6, *UNMEASURED)
    run_here(*digits(tmp_path / "run", *quick, "--gradient_accumulation_steps", 2))
    *first, last = seen
    assert len(seen) == 12 and all((weights == 1).all() for *_, weights in first[:6])
    assert all(len(weights.unique()) > 4 for *_, weights in (*first[6:], last))
    batch, times, weights = last
    assert torch.equal(batch.timesteps, (times * 1000).long())
    low = times < 0.25
    assert low.sum() > 4 and weights[low].mean() < 0.8 * weights[~low].mean()


def test_diverging_loss_is_an_error(tmp_path: Path) -> None:
    diverging = ("--learning_rate", 1e30, "--max_grad_norm", 1e30, "--preset", "one-shot", "--criterion", "magnitude")
    assert_refused_here("lower learning_rate=1e+30", *digits(tmp_path / "run", *diverging))
    assert list(tmp_path.iterdir()) == []


def assert_refused_here(message: str, *arguments: object) -> None:
    """Raises, in this process, the exception that ends the script."""
    with pytest.raises((ValueError, OSError)) as refused:
        run_here(*arguments)
    assert message in str(refused.value)
