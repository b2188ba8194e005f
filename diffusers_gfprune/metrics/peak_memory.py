"""Peak memory of a forward pass, counted and not sampled, with the same definition on all devices.

It is the bytes of the weights and of the arguments, plus the maximum that one forward pass, after the warm-up, allocates in
addition. On CUDA the allocator counts it. On a CPU it is summed from the allocations and releases recorded by PyTorch's
profiler. These include kernels and compiled code, but not scratch memory that other libraries allocate. The resident size of
the process, used in `benchmarks/cost.py`, needs a process for each figure and contains everything else that the process has
loaded.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["allocated_at_most", "storage_bytes"]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages; shared ones are counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def allocated_at_most(forward: Callable[[], object], device: torch.device) -> int:
    """Peak number of bytes that a call allocates, including its result, in addition to those already held."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet_profiler(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = forward()
    del result
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes, initial=0))


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Set the log level of the profiler's library, which otherwise logs an error without a GPU."""
    name = "KINETO_LOG_LEVEL"
    unset = name not in os.environ
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if unset:
            del os.environ[name]
