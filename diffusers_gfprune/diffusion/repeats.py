"""Calibration images again, with other noise and timesteps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from ..distributed import process_rank, world_size
from .batch import DiffusionBatch
from .schedulers import training_process

__all__ = ["repeated_batches"]


def repeated_batches(batches: Sequence[DiffusionBatch], scheduler, samples: int, seed: int = 0) -> list[DiffusionBatch]:
    """Batches, then their images again with other noise and timesteps, as often as it takes.

    Args:
        batches: Calibration batches, at least one; with several processes, the rows of this rank.
        scheduler: Scheduler of the model, or its process; timesteps are those of its training.
        samples: Number of images over all processes; there are slightly more if batches do not divide it.
        seed: Seed for noise and timesteps.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    repeated, process, ranks = list(batches), training_process(scheduler), world_size()
    for batch in itertools.cycle(batches):
        if ranks * sum(len(batch) for batch in repeated) >= samples:
            return repeated
        size = len(batch)
        # All ranks draw for the images of all, and take what is theirs
        noise = torch.randn(ranks * size, *batch.noise.shape[1:], generator=generator).to(batch.noise)
        timesteps = process.random_timesteps(ranks * size, generator).to(batch.timesteps)
        own = slice(process_rank() * size, (process_rank() + 1) * size)
        repeated.append(DiffusionBatch(batch.clean, noise[own], timesteps[own], batch.conditioning))
    return repeated
