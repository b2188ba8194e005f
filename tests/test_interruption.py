"""interruption.py: the first signal is recorded, the second has its usual effect."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from diffusers_gfprune import interruption
from diffusers_gfprune.interruption import Interruption, StoppedBySignal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted(number: int) -> None:
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert interruption.signal is None
        os.kill(os.getpid(), number)
        assert interruption.signal == number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_a_launcher_passes_on_again_changes_nothing(number: int) -> None:
    """Ctrl-C reaches all processes of a terminal, and then those of a launcher once more."""
    with Interruption() as interruption:
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert interruption.signal == number


def test_a_second_ctrl_c_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "REPEATED_WITHIN", -1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # parallel tests run with SIGINT ignored
    try:
        stop_twice()
    finally:
        signal.signal(signal.SIGINT, before)


def stop_twice() -> None:
    with pytest.raises(KeyboardInterrupt), Interruption():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("launched", [True, False])
def test_the_end_of_the_launcher_is_a_signal(launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with Interruption(launched) as interruption:
        assert interruption.signal is None
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert interruption.signal == (signal.SIGTERM if launched else None)


def test_the_environment_tells_whether_there_is_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    interruption = Interruption()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert interruption.signal == signal.SIGTERM


def test_handlers_are_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError), Interruption():
        raise ValueError
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_leave_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with Interruption():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_exit_status_is_that_of_a_signal() -> None:
    assert StoppedBySignal(signal.SIGTERM).code == 143
    assert StoppedBySignal(signal.SIGINT).code == 130


def sleeping_child(script: str) -> subprocess.Popen:
    """A process that obeys only its parent, ready for signals."""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="signals do not say who sent them here")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_loading_processes_obey_only_their_parent(number: int) -> None:
    # By its file: the package imports torch, whose threads a worker, which is a fork, does not have
    ready = f"import runpy; runpy.run_path({interruption.__file__!r})['obey_only_parent'](); print('ready', flush=True); "
    process = sleeping_child(ready + "import time; time.sleep(30)")
    sender = "import os, sys; os.kill(int(sys.argv[1]), int(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", sender, str(process.pid), str(int(number))], check=True)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=10) == 0
