"""Runs that are killed, stopped, or lose disk space or workers: nothing is lost, and resumed runs give the same result."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from helpers.resume import assert_same_result, run_here, start, wait_for_checkpoint
from helpers.scripts import files_limited_to

RESUME = ("--resume_from_checkpoint", "latest")


def finish(output_dir: Path, *arguments: object) -> None:
    """Resume to the end, in this process."""
    run_here(output_dir, *RESUME, *arguments)


def kill_again_and_again(output_dir: Path, moments: list[float]) -> int:
    """Start the run once for every moment (seconds after its start), kill it then, and let it end at last.

    Returns:
        How many times it was killed before it had ended by itself.
    """
    killed = 0
    for moment in moments:
        process = start(output_dir, *RESUME)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        else:
            break
        finally:
            process.communicate()
    if not output_dir.exists():
        finish(output_dir)
    return killed


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 7])
def test_killed_while_training(whole_run: tuple[Path, Path], tmp_path: Path, step: int) -> None:
    """At a random time after the checkpoint of a step, often in the next step."""
    process = start(tmp_path / "run")
    wait_for_checkpoint(process, tmp_path / "run", step)
    time.sleep(random.uniform(0, 0.1))
    process.kill()
    process.communicate()
    assert not (tmp_path / "run").exists()
    finish(tmp_path / "run")
    assert_same_result(whole_run[0], tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_killed_at_twenty_random_moments(whole_run: tuple[Path, Path], tmp_path: Path) -> None:
    clock = time.perf_counter()
    process = start(tmp_path / "whole")
    assert process.communicate() and process.returncode == 0
    whole = time.perf_counter() - clock
    generator, killed, rounds = random.Random(0), 0, 0
    while killed < 20:
        rounds += 1
        moments = [generator.uniform(0.2, 1.0) * whole for _ in range(5)]
        killed += kill_again_and_again(tmp_path / f"run-{rounds}", moments)
        assert_same_result(whole_run[0], tmp_path / f"run-{rounds}")
    print(f"killed {killed} times over {rounds} runs, {whole:.1f} s each")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(whole_run: tuple[Path, Path], tmp_path: Path, number: int) -> None:
    """Between two checkpoints: the step is finished, saved, and the process leaves with the status of the signal."""
    arguments = ("--checkpointing_steps", 7)
    process = start(tmp_path / "run", *arguments)
    wait_for_checkpoint(process, tmp_path / "run", 7)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 128 + number, said
    assert "Traceback" not in said and f"stopped by {signal.Signals(number).name} after step " in said
    assert {path.name for path in tmp_path.iterdir()} == {"run.training"}
    finish(tmp_path / "run", *arguments)
    assert_same_result(whole_run[0], tmp_path / "run")


@pytest.mark.slow
def test_a_disk_that_fills_during_a_checkpoint(
    whole_run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """No file may grow over 5.5 MB: the moments of the masked model do not fit, those of the compacted one do."""
    with files_limited_to(5_500_000):
        run_here(tmp_path / "run", "--checkpointing_steps", 8)
    said = capsys.readouterr().err
    assert said.count("could not be saved in") == 1 and said.count("training continues") == 1
    assert "checkpoint-8 could not be saved" in said
    assert_same_result(whole_run[0], tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_a_loading_process_that_dies(whole_run: tuple[Path, Path], tmp_path: Path) -> None:
    """One line, no traceback, and the run can be resumed."""
    arguments = ("--dataloader_num_workers", 1)
    process = start(tmp_path / "run", *arguments)
    wait_for_checkpoint(process, tmp_path / "run", 3)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    _, said = process.communicate()
    errors = [line for line in said.splitlines() if line.startswith("prune_ddpm.py: error: ")]
    assert process.returncode != 0 and "Traceback" not in said
    assert len(errors) == 1 and "loading images failed" in errors[0] and "last good checkpoint" in errors[0]
    finish(tmp_path / "run", *arguments)
    assert_same_result(whole_run[0], tmp_path / "run")


@pytest.mark.slow
def test_workers_leave_the_signal_to_the_run(whole_run: tuple[Path, Path], tmp_path: Path) -> None:
    """A whole process group receives the signal, as from schedulers: loading processes must live until the step is saved."""
    arguments = ("--dataloader_num_workers", 1, "--checkpointing_steps", 7)
    process = start(tmp_path / "run", *arguments)
    wait_for_checkpoint(process, tmp_path / "run", 7)
    for each in (*psutil.Process(process.pid).children(recursive=True), process):
        each.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 143 and "stopped by SIGTERM after step " in said, said
    finish(tmp_path / "run", *arguments)
    assert_same_result(whole_run[0], tmp_path / "run")
