"""run_folder.py: runs are published completely or not at all."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import datasets
import pytest

from diffusers_gfprune.run_folder import RunFolder, write_json
from helpers.scripts import ROOT, assert_one_error, files_limited_to, run_script

TEACHER = ROOT / "training/digits/teacher"


def test_publish_moves_everything_at_once(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"), overwrite=False)
    with folder:
        folder.prepare()
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
        folder.prepare()
        assert (folder.path / "old.txt").exists()
        folder.publish()
    assert not (folder.path / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_link_stays_where_the_folder_it_points_to_is_replaced(tmp_path: Path) -> None:
    """Every time; the files of the run are beside that folder."""
    (tmp_path / "disk/run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk/run")
    for number in range(2):
        folder = RunFolder(str(tmp_path / "link"), overwrite=True)
        assert (folder.path, folder.name) == (tmp_path / "disk/run", "link")
        folder.check()
        with folder:
            folder.prepare()
            (folder.staging / "model_index.json").write_text(str(number))
            folder.publish()
        assert (tmp_path / "link").is_symlink() and (tmp_path / "link/model_index.json").read_text() == str(number)
        assert {path.name for path in tmp_path.iterdir()} == {"disk", "link"}
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["run"]


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"), overwrite=False)
    with pytest.raises(ValueError, match="nan"), folder:
        folder.prepare()
        raise ValueError("nan")
    assert list(tmp_path.iterdir()) == []


def test_an_error_after_the_pipeline_was_saved_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A plot that fails after days of training must not cost the model."""
    folder = RunFolder(str(tmp_path / "run"), overwrite=False)
    with pytest.raises(OSError, match="plot"), folder:
        folder.prepare()
        (folder.staging / "model_index.json").write_text("{}")
        raise OSError("plot")
    assert (folder.staging / "model_index.json").exists()
    assert str(folder.staging) in capsys.readouterr().err


def test_a_full_disk_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(2**30, 2**30 - 2**20, 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    folder = RunFolder(str(tmp_path / "run"), overwrite=False)
    with pytest.raises(ValueError, match="the disk has 1 MiB free"):
        folder.prepare()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_no_model_of_an_interrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(2**30, 2**30 - 2**20, 2**20)
    folder = RunFolder(str(tmp_path / "run"), overwrite=False)
    folder.prepare()
    (folder.staging / "model_index.json").write_text("{}")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="the disk has 1 MiB free"), folder:
        folder.prepare(resuming=True)
    assert (folder.staging / "model_index.json").exists()


@pytest.mark.parametrize("saved", [True, False])
def test_two_runs_do_not_write_to_one_folder(tmp_path: Path, saved: bool) -> None:
    """The second one would delete what the first has saved. Afterwards nothing is left, and the folder can be written."""
    first, second = (RunFolder(str(tmp_path / "run"), overwrite=True) for _ in range(2))
    with first:
        first.prepare()
        if saved:
            (first.staging / "model_index.json").write_text("{}")
        with (
            pytest.raises(ValueError, match="output_dir=.*run is being written by another run: choose another folder"),
            second,
        ):
            second.prepare()
        first.save(lambda fresh: (fresh / "model_index.json").write_text("{}"))
        first.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    with second:
        second.prepare()
        (second.staging / "model_index.json").write_text("{}")
        second.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_is_refused_removes_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    earlier = RunFolder(str(tmp_path / "run"), overwrite=False)
    earlier.prepare()
    (earlier.staging / "weights").write_text("")
    earlier._unlock()
    folder = RunFolder(str(tmp_path / "run"), overwrite=False)
    with pytest.raises(ValueError, match="too few images"), folder:
        folder.lock()
        raise ValueError("too few images")
    assert [path.name for path in tmp_path.rglob("*")] == [".run.incomplete", "weights"]


def test_a_lock_leaves_no_folders_behind(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "a/b/run"), overwrite=False)
    with folder:
        folder.lock()
        assert (tmp_path / "a/b/.run.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_logs_survive_a_run_that_is_killed_while_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It saves its pipeline again when it resumes, which replaces what was published halfway."""
    folder = RunFolder(str(tmp_path / "run"), overwrite=False)
    folder.prepare()
    for name in ("logs", "samples"):
        (folder.training / name).mkdir(parents=True)
        (folder.training / name / "1").write_text(name)
        (folder.training / name / "latest").symlink_to("gone")  # as trackers do, also to files of another machine

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("diffusers_gfprune.run_folder.os.replace", killed)
        folder.publish()
    folder.save(lambda fresh: (fresh / "model_index.json").write_text("{}"))
    folder.publish()
    assert (folder.path / "logs/1").read_text() == "logs" and (folder.path / "samples/1").read_text() == "samples"
    assert (folder.path / "logs/latest").is_symlink() and not folder.training.exists()


def test_the_home_folder_has_its_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells do not expand it in `--output_dir=~/run`, nor YAML in a recipe."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder("~/run", overwrite=False).path == tmp_path / "run"


def test_an_output_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = RunFolder(str(tmp_path / "file/run"), overwrite=False)
    with pytest.raises(ValueError, match="cannot be written"):
        folder.prepare()


def test_a_write_that_would_fail_at_the_end_fails_before_training(tmp_path: Path) -> None:
    """Files may grow to 100 KB only: saving the weights would fail as it does where a quota is used up."""
    arguments = [
        *("--pretrained_model_name_or_path", TEACHER, "--dataset_name", "training/digits", "--output_dir", tmp_path / "run"),
        *("--preset", "one-shot", "--criterion", "random", "--max_train_steps", 1, "--eval_images", 0),
        *("--validation_images", 8, "--calibration_batches", 1, "--train_batch_size", 8, "--speed_batch_sizes", 0),
    ]
    datasets.load_dataset("training/digits")  # in its cache, which is more than one file may hold
    with files_limited_to(100_000):
        run = run_script("training/prune_ddpm.py", *arguments)
    assert_one_error(run, "a file of the size of the weights, 4.6 MiB, cannot be written beside it")
    assert "soft pruning" not in run.stderr and list(tmp_path.iterdir()) == []


def test_trying_to_write_leaves_nothing(tmp_path: Path) -> None:
    """Not even the folders that it takes."""
    RunFolder(str(tmp_path / "a/b/run"), overwrite=False).try_writing(3 * 2**20 + 5)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written beside it: Not a directory"):
        RunFolder(str(tmp_path / "file/run"), overwrite=False).try_writing(1)


def test_the_model_of_a_run_that_did_not_end_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"), overwrite=True)
    folder.staging.mkdir()
    (folder.staging / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="an unfinished run"):
        folder.check()
    assert (folder.staging / "model_index.json").exists()


@pytest.mark.parametrize("name", ["model", "."])
def test_what_the_run_reads_is_never_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="which this run reads"):
        RunFolder(str(tmp_path / name), overwrite=True, inputs=[str(tmp_path / "model"), None]).check()


@pytest.mark.parametrize(("output", "given"), [("model", "link"), ("link", "model"), ("link", "link/inner"), (".", "link")])
def test_what_the_run_reads_is_known_behind_a_link(output: str, given: str, tmp_path: Path) -> None:
    (tmp_path / "model/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(ValueError, match="which this run reads"):
        RunFolder(str(tmp_path / output), overwrite=True, inputs=[str(tmp_path / given)]).check()
    with pytest.raises(ValueError, match="encoding_cache_dir=.* must not be in output_dir="):
        RunFolder(str(tmp_path / output), overwrite=True).check_outside(encoding_cache_dir=tmp_path / given)


@pytest.mark.parametrize(
    ("held", "marker", "message"),
    [
        ({}, "model_index.json", None),
        ({"model_index.json": "{}", "notes.txt": "mine"}, "model_index.json", None),
        ({"other-run/model_index.json": "{}"}, "model_index.json", "holds other-run and no model_index.json"),
        ({"model_index.json": "{}"}, "export.json", "holds model_index.json and no export.json"),
        ({"anything": ""}, None, None),  # the caller checks it
    ],
)
def test_only_earlier_results_are_replaced(tmp_path: Path, held: dict, marker: str | None, message: str | None) -> None:
    """A folder of several runs is not one of them."""
    (tmp_path / "run").mkdir()
    for name, text in held.items():
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
    folder = RunFolder(str(tmp_path / "run"), overwrite=True, marker=marker)
    if message is None:
        folder.check()
        return
    for resuming in (False, True):
        with pytest.raises(ValueError, match=f"run {message}: it is not an earlier result, choose another folder"):
            folder.check(resuming)


def test_a_file_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="run is a file: it is not an earlier result"):
        RunFolder(str(tmp_path / "run"), overwrite=True).check()


def started(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path / "run"), overwrite=False)
    folder.check()
    folder.prepare()
    return folder


def test_saving_on_the_way_replaces_everything(tmp_path: Path) -> None:
    folder = started(tmp_path)
    folder.save(lambda fresh: (fresh / "old").write_text("1"))
    folder.save(lambda fresh: (fresh / "new").write_text("2"))
    assert [path.name for path in folder.staging.iterdir()] == ["new"]
    assert {path.name for path in tmp_path.iterdir()} == {folder.staging.name, ".run.lock"}


def test_save_that_fails_leaves_the_last_one(tmp_path: Path) -> None:
    folder = started(tmp_path)
    folder.save(lambda fresh: (fresh / "model_index.json").write_text("1"))

    def fails(fresh: Path) -> None:
        (fresh / "model_index.json").write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        folder.save(fails)
    assert (folder.staging / "model_index.json").read_text() == "1"
    assert {path.name for path in tmp_path.iterdir()} == {folder.staging.name, ".run.lock"}


@pytest.mark.parametrize("what", ["incomplete", "saving", "replaced"])
def test_model_left_by_a_killed_run_is_not_overwritten(tmp_path: Path, what: str) -> None:
    left = tmp_path / f".run.{what}"
    left.mkdir()
    (left / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=f"run.{what} contains the model of an unfinished run"):
        RunFolder(str(tmp_path / "run"), overwrite=True).check()


def test_folders_that_the_run_writes_are_outside(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"), overwrite=False)
    folder.check_outside(encoding_cache_dir=tmp_path / "run-cache", evaluation_cache_dir=None)
    for inside in ("run", "run/a/b", "other/../run/cache"):
        with pytest.raises(ValueError, match="encoding_cache_dir=.*run.* must not be in output_dir=.*/run$"):
            folder.check_outside(encoding_cache_dir=tmp_path / inside)
