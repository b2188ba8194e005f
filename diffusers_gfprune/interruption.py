"""SIGTERM and SIGINT during training: noted when they come, obeyed at the end of the step.

Machines that are taken away say so with SIGTERM a little before; a person says it with Ctrl-C. Either way the step is
finished and saved first. A second signal is not waited for: the handlers from before are back by then. Both may reach every
process of a run, and loading processes have to live until the step is done.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Set
from types import FrameType

__all__ = ["Interruption", "StoppedBySignal", "asked_to_stop", "notice_dead_workers_at_next_batch", "obey_only_parent"]

SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})
LAUNCHED_BY_ACCELERATE = "ACCELERATE_MIXED_PRECISION"  # set by `accelerate launch` for what it starts


class StoppedBySignal(SystemExit):
    """End of a run that was asked to stop, with the exit status that shells give such a process (128 + signal).

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class Interruption:
    """Context in which SIGTERM and SIGINT are only noted.

    `accelerate launch` does not pass SIGTERM on to the one process that it started, but ends alone. A run that it left behind
    would go on unseen, into the folder that the next one resumes from: the end of the launcher counts as SIGTERM.

    Args:
        launched: Whether this process was started by a launcher (default: as the environment tells).
    """

    def __init__(self, launched: bool | None = None) -> None:
        launched = LAUNCHED_BY_ACCELERATE in os.environ if launched is None else launched
        self._launcher = os.getppid() if launched else None
        self._noted: int | None = None
        self._before: dict[int, object] = {}

    @property
    def signal(self) -> int | None:
        """The signal that came, if any."""
        if self._noted is None and self._launcher is not None and os.getppid() != self._launcher:
            return signal.SIGTERM
        return self._noted

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __enter__(self) -> Interruption:
        # Only the main thread may set handlers; elsewhere (a run inside a notebook's thread) signals do what they did.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()


def asked_to_stop(accelerator, interruption: Interruption) -> int | None:
    """The signal that a run is to stop for, if any of its processes was sent one; all of them call this after each step.

    Args:
        accelerator: Accelerate's, of this process.
        interruption: Of this process.

    Returns:
        Its number, on every process; SIGTERM where another process was sent one. None: go on.
    """
    asked = interruption.signal
    if accelerator.num_processes == 1:
        return asked
    if asked is not None:
        accelerator.set_trigger()
    return (asked or signal.SIGTERM) if accelerator.check_trigger() else None


def notice_dead_workers_at_next_batch() -> None:
    """Let the death of a loading process be noticed where a batch is asked for, within seconds, and nowhere else.

    PyTorch's handler of SIGCHLD raises wherever the run happens to be: in the middle of an update, or of a checkpoint. Call
    this once workers have been started, which is when that handler is set.
    """
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _exit_on_word_of(parent: int, signals: Set[int]) -> None:
    while signal.sigwaitinfo(signals).si_pid != parent:
        pass
    os._exit(0)


def obey_only_parent(worker: int = 0) -> None:
    """Let SIGTERM and SIGINT end this process only if they come from the process that started it.

    For loading processes: one that ends takes the run with it in the middle of a step. They still end with their parent, which
    they look for themselves.

    Args:
        worker: Number of the process, which PyTorch passes.
    """
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_exit_on_word_of, args=(os.getppid(), SIGNALS), daemon=True).start()
