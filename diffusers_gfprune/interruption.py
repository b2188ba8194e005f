"""SIGTERM and SIGINT during training: recorded on arrival, handled at the end of the step.

Preemptible machines send SIGTERM shortly before they stop; users press Ctrl-C. In both cases the current step is finished and
saved first. A second signal takes effect at once, unless it follows within seconds: a launcher passes on the signal that its
processes have already received with it. Both signals may reach every process of a run, and data loading workers must survive
until the step is finished.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Set
from types import FrameType

__all__ = ["Interruption", "StoppedBySignal", "asked_to_stop", "notice_dead_workers_at_next_batch", "obey_only_parent"]

REPEATED_WITHIN = 5  # seconds
SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})
LAUNCHED_BY_ACCELERATE = "ACCELERATE_MIXED_PRECISION"  # set by `accelerate launch` for its processes


class StoppedBySignal(SystemExit):
    """Exit of a run after a signal, with the exit status 128 + signal number, as in shells.

    Args:
        number: Signal number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class Interruption:
    """Context in which SIGTERM and SIGINT are only recorded.

    `accelerate launch` does not forward SIGTERM to a single process that it started. The orphaned run would continue in the
    background and write to the folder that the next run resumes from. The end of the launcher therefore counts as SIGTERM, if
    it ends after this object was made: make it when the process starts.

    Args:
        launched: Whether this process was started by a launcher (default: detected from the environment).
    """

    def __init__(self, launched: bool | None = None) -> None:
        launched = LAUNCHED_BY_ACCELERATE in os.environ if launched is None else launched
        self._launcher = os.getppid() if launched else None
        self._noted: int | None = None
        self._noted_at = 0.0
        self._before: dict[int, object] = {}

    @property
    def signal(self) -> int | None:
        """The received signal, if any."""
        if self._noted is None and self._launcher is not None and os.getppid() != self._launcher:
            return signal.SIGTERM
        return self._noted

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted is None:
            self._noted, self._noted_at = number, time.monotonic()
        elif time.monotonic() - self._noted_at > REPEATED_WITHIN:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __enter__(self) -> Interruption:
        # Only the main thread may set handlers. In other threads (a run inside a notebook) signals keep their handlers.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()


def asked_to_stop(accelerator, interruption: Interruption) -> int | None:
    """Check whether any process of a run has received a signal. All processes call this after each step.

    Args:
        accelerator: The `Accelerator` of this process.
        interruption: The `Interruption` of this process.

    Returns:
        The signal number on every process; SIGTERM if only another process received a signal. None: continue.
    """
    asked = interruption.signal
    if accelerator.num_processes == 1:
        return asked
    if asked is not None:
        accelerator.set_trigger()
    return (asked or signal.SIGTERM) if accelerator.check_trigger() else None


def notice_dead_workers_at_next_batch() -> None:
    """Report the death of a data loading worker at the next batch only.

    PyTorch's SIGCHLD handler raises at any point of the run, such as in the middle of an update or a checkpoint. Without it,
    the next batch raises within seconds. Call this after the workers were started, since starting them sets the handler.
    """
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _exit_on_word_of(parent: int, signals: Set[int]) -> None:
    while signal.sigwaitinfo(signals).si_pid != parent:
        pass
    os._exit(0)


def obey_only_parent(worker: int = 0) -> None:
    """Ignore SIGTERM and SIGINT unless they come from the parent process.

    For data loading workers: a worker that ends would abort the run in the middle of a step. Workers still end with their
    parent, which they check themselves.

    Args:
        worker: Index of the worker, passed by PyTorch.
    """
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_exit_on_word_of, args=(os.getppid(), SIGNALS), daemon=True).start()
