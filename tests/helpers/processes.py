"""Processes of models in tests."""

from __future__ import annotations

from diffusers import CMStochasticIterativeScheduler, DDPMScheduler

from diffusers_gfprune.diffusion.consistency import ConsistencyProcess
from diffusers_gfprune.diffusion.ddpm import DDPMProcess


def ddpm(num_train_timesteps: int = 1000, **options) -> DDPMProcess:
    """The process of a DDPM."""
    return DDPMProcess(DDPMScheduler(num_train_timesteps=num_train_timesteps, **options))


def consistency(num_inference_steps: int | None = None, **options) -> ConsistencyProcess:
    """The process of a consistency model."""
    return ConsistencyProcess(CMStochasticIterativeScheduler(**options), num_inference_steps)
