"""Settings of all tests: one thread per process (tests run in parallel), no network access, caches of their own."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

from helpers.environment import isolate

if "PYTEST_XDIST_WORKER" not in os.environ:  # pytest's processes share the caches of the first
    home = tempfile.mkdtemp(prefix="diffusers-gfprune-tests-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    isolate(os.environ, Path(home))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Processes that tests start find the helpers, too
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))

import pytest
import torch
from filelock import FileLock

from helpers.scripts import forget_accelerator

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test with the marker `fast_variants(n)`, leave n variants, spread evenly, and mark the others as slow."""
    variants: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("fast_variants") and not item.get_closest_marker("slow"):
            variants.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for found in variants.values():
        count = min(len(found), *found[0].get_closest_marker("fast_variants").args)
        kept = {round(i * (len(found) - 1) / max(1, count - 1)) for i in range(count)}
        for index, item in enumerate(found):
            if index not in kept:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection():
    """What is there before a file's tests is not searched for garbage again.

    Accelerate and others call `gc.collect()`, which takes a second with the modules of PyTorch, Diffusers and all tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_accelerator_left():
    """Accelerate keeps its state for the whole process; no test sees that of another."""
    yield
    forget_accelerator()


@pytest.fixture(autouse=True)
def little_recovery(monkeypatch: pytest.MonkeyPatch):
    """Pruning in one call uses few samples for recovery. Runs of scripts have none where it does not matter."""
    from diffusers_gfprune import one_shot

    monkeypatch.setattr(one_shot, "RECOVERY_SAMPLES", 32)


@pytest.fixture
def scripted():
    """The script of the criterion "scripted", empty before and after."""
    from helpers.pruners import script

    script.clear()
    yield script
    script.clear()


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A short run that nothing happened to, and the checkpoints of all its steps, which tests only read.

    The first of pytest's processes that asks for it makes it; others wait.
    """
    from helpers.resume import uninterrupted

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all processes
    folder /= "whole_run"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "run").exists():
            uninterrupted(folder)
    return folder / "run", folder / "kept"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    """A dense and a pruned model, and greyscale images, for evaluations."""
    from helpers.evaluations import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling fails the test."""
    from diffusers_gfprune.metrics.quality import SamplingSettings
    from helpers.evaluations import fail_to_sample

    monkeypatch.setattr(SamplingSettings, "sample", fail_to_sample)
