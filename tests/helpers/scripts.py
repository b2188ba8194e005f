"""Scripts in this process, without the seconds of imports in a new interpreter; short runs of `prune_ddpm.py`."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

from accelerate.state import AcceleratorState, GradientState

ROOT = Path(__file__).resolve().parents[2]
# Where scripts find the modules beside them
SCRIPT_FOLDERS = tuple(str(ROOT / name) for name in ("training", "benchmarks"))
# Arguments of a short run
SHORT = [
    *("--max_train_steps", "20", "--train_batch_size", "16", "--calibration_batches", "1", "--eval_images", "66"),
    *("--ddim_num_inference_steps", "2", "--validation_steps", "10", "--validation_images", "16"),
    *("--speed_batch_sizes", "1", "--speed_modes", "eager", "--recovery", "none"),
]
RUN_FILES = {
    "README.md",
    "model_index.json",
    "pipeline.py",
    "pruning.png",
    "pruning_report.json",
    "results.json",
    "samples.png",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusers_gfprune.py",
    "unet/diffusion_pytorch_model.safetensors",
    "widths.png",
}


def forget_accelerator() -> None:
    """Accelerate keeps its state for the whole process; the next run makes its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Inside, no file may grow over so many bytes, as where a quota is used up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def _working_directory(folder: str | Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _is_beside_scripts(module: object) -> bool:
    return (getattr(module, "__file__", None) or "").startswith(SCRIPT_FOLDERS)


@contextlib.contextmanager
def _imports_of_a_script(folder: str) -> Iterator[None]:
    """Inside, modules are found where a script in `folder` finds them, and those beside the scripts are imported anew."""
    modules = {name: module for name, module in sys.modules.items() if _is_beside_scripts(module)}
    path = [place for place in sys.path if place not in (*SCRIPT_FOLDERS, str(Path(__file__).parent))]
    for name in modules:
        del sys.modules[name]
    try:
        with mock.patch.object(sys, "path", [folder, *path]):
            yield
    finally:
        for name in [name for name, module in sys.modules.items() if _is_beside_scripts(module)]:
            del sys.modules[name]
        sys.modules.update(modules)


def run_script(
    script: str | Path, *words: object, cwd: str | Path = ROOT, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script in this process as `python script words` runs it in a new one, including `if __name__ == "__main__"`.

    The script gets its own arguments, working directory, environment, `sys.path`, and modules of this repository's scripts (so
    that what a test has patched in these is not in effect). What differs is that all other modules are imported already: what
    these made of the environment stays (see `HubServer.use`), and so do the limits of the process.

    Args:
        script: Path below the repository, or absolute; or the name of a module, as after `python -m`.
        words: The command line.
        cwd: Working directory.
        environment: Variables to set.

    Returns:
        Exit status and what was printed, as `subprocess.run` returns them.
    """
    path = ROOT / script
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    is_file = path.is_file()
    out, err = io.StringIO(), io.StringIO()
    argv = [str(script), *map(str, words)]
    forget_accelerator()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_imports_of_a_script(str(path.parent) if is_file else str(cwd)))
        stack.enter_context(mock.patch.object(sys, "argv", argv))
        stack.enter_context(mock.patch.dict(os.environ, environment or {}))
        stack.enter_context(_working_directory(cwd))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        status = 0
        try:
            if is_file:
                runpy.run_path(str(path), run_name="__main__")
            else:
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)
                runpy.run_module(str(script), run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            if isinstance(stop.code, str):
                err.write(stop.code + "\n")
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except Exception:
            traceback.print_exc(file=err)
            status = 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess([sys.executable, *argv], status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def plain_runs() -> Iterator[None]:
    """Inside, runs of this process draw no diagrams and time no step for their plan, which takes a fifth of a short run.

    Both are in the run of `test_prune_ddpm.py` that is started as users start it. `prune_ddpm.main` is to be called, not
    `run_script`, whose modules are fresh.
    """
    from diffusers_gfprune.scripts import prune_ddpm
    from diffusers_gfprune.training import finishing
    from diffusers_gfprune.training.estimate import StepEstimate

    def draw(path: Path, report: dict) -> None:
        path.write_bytes(b"")

    def estimate(args, *rest: object) -> StepEstimate:
        images = args.training.train_batch_size
        return StepEstimate(images, 0.1, images, 2**20, 2**20, images, 2**20)

    with contextlib.ExitStack() as stack:
        for module, name, other in (
            (finishing, "plot_pruning", draw),
            (finishing, "plot_widths", draw),
            (prune_ddpm, "estimate_run", estimate),
        ):
            stack.enter_context(mock.patch.object(module, name, other))
        yield


def assert_one_error(run: subprocess.CompletedProcess[str], message: str) -> None:
    """The script failed with one line on standard error, which starts with its name, and no traceback."""
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    name = next(Path(word).name for word in run.args if word.endswith(".py"))
    errors = [line for line in run.stderr.splitlines() if line.startswith(f"{name}: error: ")]
    assert len(errors) == 1 and message in errors[0], run.stderr
