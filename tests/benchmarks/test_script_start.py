"""Every script of benchmarks/ starts in a new interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.scripts import ROOT, SCRIPT_FOLDERS

SCRIPTS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]
# One interpreter for all of them, since most of the time goes to PyTorch and Diffusers; the modules beside the scripts go each
# time, and so does what a script does to the places where modules are looked for
START = """
import runpy, sys
from pathlib import Path
path, folders, scripts = sys.path[1:], tuple(sys.argv[1:3]), sys.argv[3:]
for script in scripts:
    for name in [n for n, m in sys.modules.items() if (getattr(m, "__file__", None) or "").startswith(folders)]:
        del sys.modules[name]
    sys.path[:] = [str(Path(script).parent), *path]
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, (script, stop.code)
    else:
        raise AssertionError(f"{script} has no --help")
"""


@pytest.mark.slow
def test_benchmarks_say_their_arguments() -> None:
    assert len(SCRIPTS) == 22
    command = [sys.executable, "-c", START, *SCRIPT_FOLDERS, *map(str, SCRIPTS)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    usages = [line.split()[1] for line in run.stdout.splitlines() if line.startswith("usage: ")]
    assert usages == [path.name for path in SCRIPTS]
