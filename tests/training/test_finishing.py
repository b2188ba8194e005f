"""training/finishing.py: saving during a run."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffusers_gfprune.run_folder import RunFolder
from diffusers_gfprune.training.finishing import save_model


def test_a_full_disk_does_not_end_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The model saved before stays, and nothing is pushed."""
    folder = RunFolder(str(tmp_path / "run"), False)
    folder.staging.mkdir()

    def write(unet: object, place: Path) -> None:
        (place / "weights").write_text("half")
        if capacity < 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    run = SimpleNamespace(folder=folder, pipeline=SimpleNamespace(save=write), args=None, repo_id=None)
    state = SimpleNamespace(averaged=lambda: contextlib.nullcontext("model"), step=40)
    capacity = 1
    save_model(run, state)
    (folder.staging / "weights").write_text("whole")
    capacity, run.repo_id = 0, "me/model"  # args=None: a push would fail
    save_model(run, state)
    assert (folder.staging / "weights").read_text() == "whole"
    said = capsys.readouterr().err
    assert said.startswith("warning: the model of step 40 could not be saved in ")
    assert said.endswith("No space left on device; training continues\n")
    assert {path.name for path in tmp_path.iterdir()} == {folder.staging.name}
