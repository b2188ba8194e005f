"""training/tracking.py: values in tensorboard, and saved grids of samples."""

from __future__ import annotations

import contextlib
import errno
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from diffusers_gfprune.run_folder import RunFolder
from diffusers_gfprune.training import tracking
from diffusers_gfprune.training.arguments import parse_arguments
from diffusers_gfprune.training.tracking import Tracking
from helpers.figures import cells
from helpers.resume import STEPS, run_here

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tracked") / "run"
    samples = ("--sample_steps", 6, "--num_samples", 4, "--ddim_num_inference_steps", 2)
    run_here(run, "--report_to", "tensorboard", "--distillation_weight", 0.5, *samples)
    return run


@pytest.fixture(scope="module")
def events(tracked: Path):
    found = event_accumulator.EventAccumulator(str(tracked / "logs/diffusers-gfprune"))
    found.Reload()
    return found


@pytest.mark.slow
def test_logs_and_samples_move_into_the_finished_run(tracked: Path) -> None:
    assert not tracked.with_name("run.training").exists()
    assert {path.name for path in (tracked / "samples").iterdir()} == {"step-6.png", "step-12.png"}
    early, late = (cells(tracked / f"samples/step-{step}.png", columns=4) for step in (6, 12))
    assert early.shape[:2] == (2, 4) and (early[0] == late[0]).all()  # the dense model's, from the same noise
    assert (early[1] != late[1]).any() and (late[0] != late[1]).any()
    assert len(np.unique(late[0])) > 10  # samples, not one shade


def test_curves_have_their_points(events) -> None:
    for name in ("train/loss", "train/noise", "train/distillation", "train/gradient_norm", "speed/eta_seconds"):
        assert [event.step for event in events.Scalars(name)] == [4, 8, 12, 16], name
    assert [event.step for event in events.Scalars("pruning/p_t")] == [4, 8]
    for speed, left in zip(events.Scalars("speed/images_per_second"), events.Scalars("speed/eta_seconds"), strict=True):
        assert left.value * speed.value / 8 == pytest.approx(STEPS - speed.step, rel=1e-4)  # batches of 8 images are left
    steps = [event.step for event in events.Scalars("validation/step_loss")]
    assert steps[0] == 0 and steps[-1] == STEPS


def test_rankings_are_logged_group_by_group(events, tracked: Path) -> None:
    shares = [name for name in events.Tags()["scalars"] if name.startswith("pruning/sparsity/")]
    assert len(shares) == 22 and "pruning/sparsity/conv_in" in shares
    assert [event.step for event in events.Scalars("pruning/macs")] == [0, 2, 6]
    assert events.Scalars("pruning/sparsity")[-1].value == pytest.approx(0.5, abs=0.01)
    kept = {group["name"]: group for group in json.loads((tracked / "pruning_report.json").read_text())["channel_groups"]}
    for name in shares:
        group = kept[name.removeprefix("pruning/sparsity/")]
        removed = 1 - group["kept_channels"] / group["dense_channels"]
        assert events.Scalars(name)[-1].value == pytest.approx(removed, abs=1e-6), name


def test_samples_are_logged_beside_the_dense_models(events) -> None:
    assert [event.step for event in events.Images("samples")] == [6, 12]


@pytest.mark.parametrize("tracker", [pytest.param(name, marks=pytest.mark.slow) for name in ("wandb", "trackio")])
def test_other_trackers_get_curves_and_samples(tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read as it is imported
    pytest.importorskip(tracker)
    monkeypatch.chdir(tmp_path)  # nothing is to be written here
    samples = ("--sample_steps", 3, "--num_samples", 4, "--ddim_num_inference_steps", 2)
    run_here(tmp_path / "runs/run", "--report_to", tracker, "--max_train_steps", 6, "--logging_steps", 3, *samples)
    if tracker == "wandb":
        logs = tmp_path / "runs/run/logs/wandb"
        assert len(list(logs.glob("offline-run-*/run-*.wandb"))) == 1
        assert len(list(logs.glob("offline-run-*/files/media/images/samples_3_*.png"))) == 8  # four of each model
        assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    else:
        assert {path.parent.name for path in (tmp_path / "trackio").rglob("*.png")} == {"3", "6"}
        assert {path.name for path in tmp_path.iterdir()} == {"runs", "trackio"}


def test_a_full_disk_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """No half picture is left."""

    @dataclass
    class Settings:
        num_images: int = 0

        def sample(self, unet: object, **options) -> torch.Tensor:
            return torch.zeros(self.num_images, 1, 8, 8)

    def write(path: Path, *args, **options) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tracking, "save_sample_grid", write)
    quality = SimpleNamespace(settings=Settings(), scheduler=None, codec=None, conditions=None, dense=nn.Linear(1, 1))
    args = parse_arguments(["--pretrained_model_name_or_path", "m", "--dataset_name", "d"])
    state = SimpleNamespace(averaged=contextlib.nullcontext, step=6)
    accelerator = SimpleNamespace(is_main_process=True, device=torch.device("cpu"), trackers=[])
    Tracking(args, accelerator, RunFolder(str(tmp_path / "run"), False), quality).log_samples(state)
    assert "step-6.png could not be saved: " in (said := capsys.readouterr().err) and said.endswith("training continues\n")
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(("more", "project"), [((), "diffusers-gfprune"), (("--tracker_project_name", "faces"), "faces")])
def test_the_project_of_the_tracker_is_that_of_the_command_line(more: tuple, project: str, tmp_path: Path) -> None:
    started = []
    words = ["--pretrained_model_name_or_path", "m", "--dataset_name", "d", "--report_to", "tensorboard", *more]
    accelerator = SimpleNamespace(init_trackers=lambda name, **_: started.append(name), is_main_process=True)
    Tracking(parse_arguments(words), accelerator, RunFolder(str(tmp_path / "run"), False), None)
    assert started == [project]


def test_a_tracker_that_does_not_start_is_named(tmp_path: Path) -> None:
    """Before images are encoded or drawn; each tracker has its own errors."""

    def not_logged_in(*args, **kwargs) -> None:
        raise Exception("No API key configured.\nUse `wandb login`")

    words = ["--pretrained_model_name_or_path", "m", "--dataset_name", "d", "--report_to", "tensorboard"]
    accelerator = SimpleNamespace(init_trackers=not_logged_in, is_main_process=True)
    with pytest.raises(ValueError, match=r"^report_to=tensorboard cannot be started: No API key configured\. "):
        Tracking(parse_arguments(words), accelerator, RunFolder(str(tmp_path / "run"), False), None)
