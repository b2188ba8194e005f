"""training/rehearsal.py: errors at the end of a run are found before its first step; settings are adapted if possible."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch import nn

from diffusers_gfprune.evaluation import trials
from diffusers_gfprune.metrics import features
from diffusers_gfprune.metrics.quality import SamplingSettings
from diffusers_gfprune.metrics.speed import parse_settings
from diffusers_gfprune.run_folder import RunFolder
from diffusers_gfprune.scripts import prune_ddpm
from helpers.architectures import build
from helpers.scripts import plain_runs

ROOT = Path(__file__).resolve().parents[2]


SIX_STEPS = [
    *("--dataset_name", str(ROOT / "training/digits"), "--max_train_steps", "6", "--train_batch_size", "8"),
    *("--calibration_batches", "1", "--validation_images", "8", "--validation_steps", "3"),
    *("--speed_batch_sizes", "1", "--speed_modes", "eager"),
]


def write(folder: Path, scheduler, kind: type = DDPMPipeline, unet: nn.Module | None = None) -> list[str]:
    """A pipeline to start from, as arguments."""
    kind(unet=unet or build("base"), scheduler=scheduler).save_pretrained(folder)
    return ["--pretrained_model_name_or_path", str(folder)]


def run(tmp_path: Path, model: list[str], *arguments: object) -> dict:
    """Six steps, to their results."""
    with plain_runs():
        prune_ddpm.main([*SIX_STEPS, *model, "--output_dir", str(tmp_path / "run"), *map(str, arguments)])
    return json.loads((tmp_path / "run/results.json").read_text())


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step fails the test."""
    monkeypatch.setattr(prune_ddpm, "train", lambda *args: pytest.fail("training has begun"))


@pytest.mark.slow
def test_few_timesteps_and_a_ddim_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As many steps as there are, said; pipeline, scheduler and configuration are what they were."""
    model = write(tmp_path / "model", DDIMScheduler(num_train_timesteps=50, set_alpha_to_one=False), DDIMPipeline)
    evaluation = run(tmp_path, model, "--eval_images", 2)["evaluation"]
    assert evaluation["num_inference_steps"] == 50 and evaluation["timestep_spacing"] == "leading"
    said = capsys.readouterr()
    assert "warning: num_inference_steps=100 is more than the 50 timesteps that the model was trained with" in said.err
    assert re.search(r"tried      a sampling step, a timed forward pass, a card and a file of \d+\.\d KiB", said.out)
    for file in ("model_index.json", "scheduler/scheduler_config.json"):
        before, after = (json.loads((tmp_path / name / file).read_text()) for name in ("model", "run"))
        assert {**after, "unet": None} == {**before, "unet": None}
    assert json.loads((tmp_path / "run/model_index.json").read_text())["_class_name"] == "DDIMPipeline"


@pytest.mark.slow
def test_betas_that_ddim_does_not_make_and_spacing_that_leaves_out_the_noisy_half(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Samples are drawn with the model's own betas, from pure noise."""
    model = write(tmp_path / "model", DDPMScheduler(num_train_timesteps=20, beta_schedule="sigmoid"))
    results = run(tmp_path, model, "--eval_images", 2, "--ddim_num_inference_steps", 11)
    assert results["pruned"]["quality"]["ssim_to_dense"] is not None
    assert json.loads((tmp_path / "run/scheduler/scheduler_config.json").read_text())["beta_schedule"] == "sigmoid"
    assert results["evaluation"]["timestep_spacing"] == "trailing"
    assert "would start at timestep 10 of 20 and leave out the noisier ones" in capsys.readouterr().err


@pytest.mark.parametrize("dry_run", [False, True])
def test_zero_terminal_snr_and_trailing_spacing(dry_run: bool, tmp_path: Path, no_training: None) -> None:
    model = write(tmp_path / "model", DDPMScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(
        ValueError, match="timestep_spacing=trailing starts at timestep 999, where rescale_betas_zero_snr=True"
    ):
        run(tmp_path, model, "--timestep_spacing", "trailing", "--eval_images", 2, *(["--dry_run"] if dry_run else []))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def broken(unet: nn.Module) -> nn.Module:
    """Weights that overflow, and are finite."""
    with torch.no_grad():
        unet.conv_out.weight.fill_(1e38)
    return unet


def test_a_model_that_predicts_no_numbers(tmp_path: Path, no_training: None) -> None:
    model = write(tmp_path / "model", DDPMScheduler(), unet=broken(build("base")))
    with pytest.raises(ValueError, match="pretrained_model_name_or_path=.* predicts values that are not finite in float32"):
        run(tmp_path, model, "--eval_images", 2)


def test_features_are_tried(tmp_path: Path, no_training: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self, images):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(features.Pixels, "__call__", fails)
    with pytest.raises(ValueError, match=r"features=pixels of images of shape \(1, 8, 8\) fail: out of memory$"):
        run(tmp_path, write(tmp_path / "model", DDPMScheduler()), "--eval_images", 100, "--ddim_num_inference_steps", 2)


def test_timing_is_tried(tmp_path: Path, no_training: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args, **options):
        raise ValueError("no clock")

    monkeypatch.setattr(trials, "measure_speed", fails)
    with pytest.raises(ValueError, match=r"speed cannot be measured \(no clock\): pass --speed_batch_sizes 0"):
        run(tmp_path, write(tmp_path / "model", DDPMScheduler()), "--eval_images", 0)


def test_what_cannot_be_compiled_is_said_and_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The results have a row with the reason, without local paths."""

    def fails(function):
        raise RuntimeError("no compiler in /opt/secret/bin/g++\nand more")

    monkeypatch.setattr(torch, "compile", fails)
    settings = parse_settings([1, 16], ["float32", "bfloat16"], ["eager", "compiled"])
    rows, tried = trials.try_speed(build("base"), settings)
    assert [(row["dtype"], row["mode"], "error" in row) for row in rows] == [
        ("float32", "eager", False),
        ("bfloat16", "eager", False),
    ]
    failed = "a compiled function (fails and will not be measured: RuntimeError: no compiler in g++)"
    assert tried == ["a timed forward pass", "a timed forward pass", failed]
    planned = "batch 1, 16; float32, bfloat16; eager, compiled; contiguous (8 compilations, of half a minute or more each)"
    assert trials.describe_speed(settings) == f"speed      of both models at the end: {planned}"


def test_a_runtime_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(module, tensors, runtime):
        if runtime == "openvino":
            raise trials.ConversionError("openvino cannot run this model: no reason")
        return lambda: None

    monkeypatch.setattr(trials, "model_call", fails)
    settings = parse_settings([1, 16], modes=["onnxruntime", "openvino"])
    _, tried = trials.try_speed(build("base"), settings)
    reason = "ConversionError: openvino cannot run this model: no reason"
    assert tried == [
        *("a timed forward pass", "a function in onnxruntime"),
        f"a function in openvino (fails and will not be measured: {reason})",
    ]
    assert trials.describe_speed(settings).endswith(
        "onnxruntime, openvino; contiguous (8 exports, of seconds to minutes each)"
    )


def test_the_card_is_tried(tmp_path: Path, no_training: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendered from made-up figures and the run's provenance."""
    monkeypatch.setattr(prune_ddpm, "describe_dataset", lambda *args: {"name": "x", "hub_id": "not an id"})
    with pytest.raises(ValueError, match="'not an id' in the card's metadata must be a Hub id"):
        run(tmp_path, write(tmp_path / "model", DDPMScheduler()), "--eval_images", 2)


def test_writing_is_tried(tmp_path: Path, no_training: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(RunFolder, "try_writing", lambda self, size: sizes.append(size))
    run_dry = [*SIX_STEPS, *write(tmp_path / "model", DDPMScheduler()), "--output_dir", str(tmp_path / "run"), "--dry_run"]
    with plain_runs():
        prune_ddpm.main(run_dry)
    unet = build("base")
    assert sizes == [4 * sum(parameter.numel() for parameter in unet.parameters())]


def test_betas_that_leave_nothing_are_not_blamed_on_the_model() -> None:
    """Nor on an option that is off: abar_199 is 0 in float32."""
    scheduler = DDPMScheduler(num_train_timesteps=200, beta_start=0.9, beta_end=0.99, clip_sample=False)
    settings = SamplingSettings(num_images=1, num_inference_steps=2, timestep_spacing="linspace")
    with pytest.raises(ValueError, match="timestep_spacing=linspace starts at timestep 199, where beta_end=0.99 of the sched"):
        trials.try_sampling("model=x", build("base"), scheduler, settings)


def test_a_step_that_is_not_finite_is_not_blamed_on_the_model() -> None:
    """The prediction is finite, and what DDIM makes of it overflows."""
    unet = build("base")
    with torch.no_grad():
        unet.conv_out.weight.zero_()
        unet.conv_out.bias.fill_(3e38)
    scheduler = DDPMScheduler(clip_sample=False)
    with pytest.raises(ValueError, match="model=x: a DDIM step from timestep 998 gives values that are not finite"):
        trials.try_sampling("model=x", unet, scheduler, SamplingSettings(num_images=1, num_inference_steps=500))
