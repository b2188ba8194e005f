"""Processes of models in tests."""

from __future__ import annotations

from diffusers import (
    CMStochasticIterativeScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from diffusers_gfprune.diffusion.consistency import ConsistencyProcess
from diffusers_gfprune.diffusion.ddpm import DDPMProcess
from diffusers_gfprune.diffusion.edm import EDMProcess
from diffusers_gfprune.diffusion.flow_matching import FlowMatchingProcess


def ddpm(num_train_timesteps: int = 1000, **options) -> DDPMProcess:
    """The process of a DDPM."""
    return DDPMProcess(DDPMScheduler(num_train_timesteps=num_train_timesteps, **options))


def consistency(num_inference_steps: int | None = None, **options) -> ConsistencyProcess:
    """The process of a consistency model."""
    return ConsistencyProcess(CMStochasticIterativeScheduler(**options), num_inference_steps)


def edm(**options) -> EDMProcess:
    """The process of an EDM."""
    return EDMProcess(EDMEulerScheduler(**options))


def flow_matching(**options) -> FlowMatchingProcess:
    """The process of a flow-matching model."""
    return FlowMatchingProcess(FlowMatchEulerDiscreteScheduler(**options))
