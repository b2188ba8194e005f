"""training/run_folder.py: runs appear whole or not at all, and dense pipelines load in every layout."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "training/digits/teacher"
sys.path.insert(0, str(ROOT / "training"))

from run_folder import RunFolder, load_dense_pipeline, write_json  # noqa: E402


def test_publish_moves_everything_at_once(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"), overwrite=False)
    with folder:
        folder.prepare(nn.Linear(2, 2))
        write_json(folder.staging / "results.json", {"a": 1})
        assert not folder.path.exists()
        folder.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (folder.path / "results.json").read_text() == '{\n  "a": 1\n}\n'


def test_overwriting_replaces_only_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/old.txt").write_text("old")
    folder = RunFolder(str(tmp_path / "run"), overwrite=True)
    with folder:
        folder.prepare(nn.Linear(2, 2))
        assert (folder.path / "old.txt").exists()
        folder.publish()
    assert not (folder.path / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"), overwrite=False)
    with pytest.raises(ValueError, match="nan"), folder:
        folder.prepare(nn.Linear(2, 2))
        raise ValueError("nan")
    assert list(tmp_path.iterdir()) == []


def test_an_error_after_the_pipeline_was_saved_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A plot that fails after days of training must not cost the model."""
    folder = RunFolder(str(tmp_path / "run"), overwrite=False)
    with pytest.raises(OSError, match="plot"), folder:
        folder.prepare(nn.Linear(2, 2))
        (folder.staging / "model_index.json").write_text("{}")
        raise OSError("plot")
    assert (folder.staging / "model_index.json").exists()
    assert str(folder.staging) in capsys.readouterr().err


def test_a_full_disk_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(2**30, 2**30 - 2**20, 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    folder = RunFolder(str(tmp_path / "run"), overwrite=False)
    with pytest.raises(ValueError, match="the disk has 1 MiB free"):
        folder.prepare(nn.Linear(2, 2))
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = RunFolder(str(tmp_path / "file/run"), overwrite=False)
    with pytest.raises(ValueError, match="cannot be written"):
        folder.prepare(nn.Linear(2, 2))


def test_a_write_that_fails_at_the_end_is_one_clear_line(tmp_path: Path) -> None:
    """Files may grow to 100 KB only: saving the weights fails as it does on a full disk."""
    command = [
        *(sys.executable, "training/prune_ddpm.py", "--pretrained_model_name_or_path", TEACHER),
        *("--dataset_name", "training/digits", "--output_dir", tmp_path / "run", "--preset", "one-shot"),
        *("--criterion", "random", "--max_train_steps", "1", "--eval_images", "0", "--validation_images", "8"),
        *("--calibration_batches", "1", "--train_batch_size", "8", "--latency_batch_size", "0"),
    ]
    run = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert run.returncode != 0 and "Traceback" not in run.stderr
    assert len([line for line in run.stderr.splitlines() if line.startswith("prune_ddpm.py: error: ")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_model_of_a_run_that_did_not_end_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"), overwrite=True)
    folder.staging.mkdir()
    (folder.staging / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="a run that did not end"):
        folder.check()
    assert (folder.staging / "model_index.json").exists()


@pytest.mark.parametrize("name", ["model", "."])
def test_what_the_run_reads_is_never_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="which this run reads"):
        RunFolder(str(tmp_path / name), overwrite=True, inputs=[str(tmp_path / "model"), None]).check()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "abc"}),
        ("unet/config.json", {"block_out_channels": None}),
        ("unet/config.json", {"norm_num_groups": 0}),
        ("model_index.json", {"unet": None}),
        ("unet/config.json", {"out_channels": 2}),
    ],
)
def test_broken_configurations_are_refused(file: str, change: dict, tmp_path: Path) -> None:
    shutil.copytree(TEACHER, tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match="pretrained_model_name_or_path="):
        load_dense_pipeline(str(tmp_path / "model"))


def test_components_at_the_root(tmp_path: Path) -> None:
    """Old repositories, such as google/ddpm-cifar10-32, have no subfolders."""
    for source in (TEACHER / "unet", TEACHER / "scheduler", TEACHER):
        for path in source.iterdir():
            if path.is_file():
                shutil.copy(path, tmp_path / path.name)
    unet, scheduler = load_dense_pipeline(str(tmp_path))
    expected, _ = load_dense_pipeline(str(TEACHER))
    assert scheduler.config.num_train_timesteps == 1000
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), expected.parameters()))


def test_another_kind_of_pipeline_is_refused(tmp_path: Path) -> None:
    shutil.copytree(TEACHER, tmp_path / "model")
    index = tmp_path / "model/model_index.json"
    index.write_text(index.read_text().replace("UNet2DModel", "UNet2DConditionModel"))
    with pytest.raises(ValueError, match="its unet is a UNet2DConditionModel"):
        load_dense_pipeline(str(tmp_path / "model"))


def test_a_broken_index_is_refused(tmp_path: Path) -> None:
    shutil.copytree(TEACHER, tmp_path / "model")
    (tmp_path / "model/model_index.json").write_text("{not json")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_dense_pipeline(str(tmp_path / "model"))


def started(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path / "run"), overwrite=False)
    folder.check()
    folder.prepare(nn.Linear(1, 1))
    return folder


def test_saving_on_the_way_replaces_everything(tmp_path: Path) -> None:
    folder = started(tmp_path)
    folder.save(lambda fresh: (fresh / "old").write_text("1"))
    folder.save(lambda fresh: (fresh / "new").write_text("2"))
    assert [path.name for path in folder.staging.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == [folder.staging.name]


def test_save_that_fails_leaves_the_last_one(tmp_path: Path) -> None:
    folder = started(tmp_path)
    folder.save(lambda fresh: (fresh / "model_index.json").write_text("1"))

    def fails(fresh: Path) -> None:
        (fresh / "model_index.json").write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        folder.save(fails)
    assert (folder.staging / "model_index.json").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == [folder.staging.name]


@pytest.mark.parametrize("what", ["incomplete", "saving", "replaced"])
def test_model_left_by_a_killed_run_is_not_overwritten(tmp_path: Path, what: str) -> None:
    left = tmp_path / f".run.{what}"
    left.mkdir()
    (left / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=f"run.{what} holds the model of a run that did not end"):
        RunFolder(str(tmp_path / "run"), overwrite=True).check()


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    """It would be read as it is, and its results would name a commit that nobody looked at."""
    with pytest.raises(ValueError, match=f"={tmp_path} is a folder, and has no revision=v9: revisions are of the Hub"):
        load_dense_pipeline(str(tmp_path), "v9")
