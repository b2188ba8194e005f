"""evaluate.py in separate processes: killed and resumed, with shared work, and failing together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusers_gfprune.evaluation.processes import main_first, together
from helpers.evaluations import ROOT, run

LAUNCH = (
    *(str(Path(sys.executable).parent / "accelerate"), "launch", "--quiet", "--num_machines", "1", "--mixed_precision", "no"),
    *("--dynamo_backend", "no", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
)
ARGUMENTS = (
    *("--model", "training/digits/teacher", "--dataset_name", "training/digits", "--num_reference_images", "700"),
    *("--features", "pixels", "--speed_batch_sizes", "0", "--step_loss_timesteps", "2", "--validation_images", "16"),
    *("--num_images", "600", "--num_inference_steps", "2"),  # in three shards
)


def start(folder: Path, *arguments: object, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen:
    """Start the script in separate processes."""
    common = ("--evaluation_cache_dir", folder / "cache", "--output_dir", folder / "out")
    command = [*launcher, "training/evaluate.py", *ARGUMENTS, *common, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in command], cwd=ROOT, env=environment, **pipes)


def figures(results: dict) -> dict:
    """All that does not depend on time and folders."""
    depends = {name: value for name, value in results["evaluation"].items() if name != "num_processes"}
    return {"model": results["model"], "evaluation": depends}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Results of one uninterrupted process."""
    folder, here = tmp_path_factory.mktemp("whole"), os.getcwd()
    os.chdir(ROOT)
    try:
        return run(folder, *ARGUMENTS, short=())
    finally:
        os.chdir(here)


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on(whole: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was made before, to the same figures."""
    process = start(tmp_path)
    while process.poll() is None and not list((tmp_path / "cache").glob("features-*")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("features-*")}
    assert 1 <= len(before) < 3 and len(list((tmp_path / "cache").glob("samples-*"))) < 3
    monkeypatch.chdir(ROOT)
    results = run(tmp_path, *ARGUMENTS, short=())
    assert figures(results) == figures(whole)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert {path.name for path in tmp_path.iterdir()} == {"out", "cache"}


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(whole: dict, tmp_path: Path) -> None:
    printed, said = (process := start(tmp_path, launcher=LAUNCH)).communicate()
    assert process.returncode == 0, said
    assert printed.count("plan:") == 1 and printed.count("saved: ") == 1
    assert "600 of 600 remain to be drawn by 2 processes" in printed
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["evaluation"]["num_processes"] == 2
    assert figures(results) == figures(whole)
    assert "are not in" not in said  # all shards are found, whichever process made them


WORK = """
import sys
from diffusers_gfprune.evaluation.processes import main_first, make_accelerator, together
accelerator = make_accelerator()
rank = accelerator.process_index
assert accelerator.num_processes == 2
say = lambda text: sys.stdout.write(text + "\\n") and sys.stdout.flush()  # a line at once
say(f"first {main_first(accelerator, lambda: rank * 10)}")
for failing in ((0,), (1,), (0, 1)):
    try:
        with together(accelerator):
            if rank in failing:
                raise ValueError(f"{failing} fail:\\n said by {rank}")
    except SystemExit as stop:
        say(f"ended with {stop.code}")
try:
    main_first(accelerator, lambda: 1 / rank)
except SystemExit:
    say("ended")
with together(accelerator):
    pass
accelerator.end_training()
"""


@pytest.mark.slow
def test_processes_fail_together(tmp_path: Path) -> None:
    """One line of error for all of them, and none is left waiting."""
    script = tmp_path / "work.py"
    script.write_text(WORK)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*LAUNCH, str(script)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["ended"] * 2 + ["ended with 1"] * 6 + ["first 0", "first 10"]
    errors = [line for line in done.stderr.splitlines() if line.startswith("evaluate.py: error")]
    assert errors == [
        "evaluate.py: error: (0,) fail: said by 0",
        "evaluate.py: error: (1,) fail: said by 1",
        "evaluate.py: error: (0, 1) fail: said by 0",
    ]
    assert done.stderr.count("ZeroDivisionError: division by zero") == 1  # a mistake of ours shows where it is


@pytest.mark.slow
def test_error_on_the_main_process_ends_all(tmp_path: Path) -> None:
    """As users see it."""
    (tmp_path / "out").mkdir()
    process = start(tmp_path, launcher=LAUNCH)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert [line for line in said.splitlines() if line.startswith("evaluate.py: error")] == [
        f"evaluate.py: error: output_dir={tmp_path / 'out'} already exists: choose another folder, or pass "
        f"--overwrite_output_dir"
    ]


class Alone:
    """An accelerator of one process, which nothing may be asked of."""

    num_processes, process_index, is_main_process = 1, 0, True


def test_one_process_raises_what_went_wrong() -> None:
    with pytest.raises(ZeroDivisionError), together(Alone()):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="^no$"):
        main_first(Alone(), lambda: int("no") if False else (_ for _ in ()).throw(ValueError("no")))
    assert main_first(Alone(), lambda: 3) == 3
