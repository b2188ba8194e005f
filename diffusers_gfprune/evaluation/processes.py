"""Coordination of several evaluation processes: the main process can work first, and all processes fail together.

An error in a single process would leave the others waiting for it. Processes therefore exchange whether they succeeded at
every synchronization point. If one failed, its error is printed once and all processes exit.
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
from ..precision import check_float64

__all__ = ["ERRORS", "PROGRAM", "main_first", "make_accelerator", "together"]

# Errors that are reported in one line
ERRORS = (*USER_ERRORS, torch.OutOfMemoryError)
PROGRAM = "evaluate.py"
# One process may be days slower than another; a dead process is detected by its closed connection.
TIMEOUT = timedelta(days=14)

T = TypeVar("T")


def make_accelerator(timeout: timedelta = TIMEOUT, **options) -> Accelerator:
    """Create an `Accelerator` for several processes, with or without a GPU.

    Args:
        timeout: Time that processes wait for each other.
        options: Further arguments of `Accelerator`.

    Raises:
        ValueError: The `Accelerator` sees another number of processes than were launched, or a device without float64.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(
        # Otherwise Accelerate treats several processes without a GPU as separate runs.
        cpu=processes > 1 and not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        **options,
    )
    check_float64(accelerator.device)
    if accelerator.num_processes != processes:
        raise ValueError(f"WORLD_SIZE={processes} processes were launched, but Accelerate sees {accelerator.num_processes}")
    return accelerator


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Run a step in every process. If one fails, all exit, and the first one that failed prints its error.

    Raises:
        SystemExit: A process failed, and there are several.
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
    accelerator.wait_for_everyone()  # when one process exits, a launcher may kill the others before they print
    raise SystemExit(1)


def main_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run `work` in the main process first, which downloads, then in the others; return each process's own result."""
    for turn in (True, False):
        with together(accelerator):
            if accelerator.is_main_process is turn:
                result = work()
    return result
