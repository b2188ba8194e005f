"""Processes that evaluate together: they start together, one goes first where that saves work, and they fail together.

An error in one process alone would leave the others waiting for it. So wherever processes meet, they tell each other whether
they got there; if one did not, it says why, once, and all end.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from ..errors import USER_ERRORS, one_line

__all__ = ["ERRORS", "PROGRAM", "main_first", "make_accelerator", "together"]

# Errors that one line explains
ERRORS = (*USER_ERRORS, torch.OutOfMemoryError)
PROGRAM = "evaluate.py"
# One process may be days slower than another; one that died is noticed by its closed connection.
TIMEOUT = timedelta(days=14)

T = TypeVar("T")


def make_accelerator(timeout: timedelta = TIMEOUT, **options) -> Accelerator:
    """Accelerate, for several processes with or without a GPU.

    Args:
        timeout: How long processes wait for each other.
        options: Further arguments of `Accelerator`.

    Raises:
        ValueError: It does not see the processes that were launched.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(
        # Accelerate would take several processes without a GPU for as many runs of their own.
        cpu=processes > 1 and not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        **options,
    )
    if accelerator.num_processes != processes:
        raise ValueError(f"WORLD_SIZE={processes} processes were launched, but Accelerate sees {accelerator.num_processes}")
    return accelerator


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """A step that every process takes; if one fails, all end, and the first one that failed says why.

    Raises:
        SystemExit: Another process failed, or this one among several.
    """
    if accelerator.num_processes == 1:
        yield
        return
    said = None
    try:
        yield
    except Exception as error:
        said = f"{PROGRAM}: error: {one_line(error)}" if isinstance(error, ERRORS) else traceback.format_exc()
    failed = accelerator.gather(torch.tensor([int(said is not None)], device=accelerator.device))
    if not failed.any():
        return
    if int(failed.nonzero()[0]) == accelerator.process_index:
        print(said, file=sys.stderr, flush=True)
    accelerator.wait_for_everyone()  # a launcher that sees one end may kill the others, before they have spoken
    raise SystemExit(1)


def main_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` returns in each process, done by the main process first: it downloads, the others find it done."""
    for turn in (True, False):
        with together(accelerator):
            if accelerator.is_main_process is turn:
                result = work()
    return result
