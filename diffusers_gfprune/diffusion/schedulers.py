"""Schedulers of Diffusers, and the process of the models that they belong to.

Configurations of schedulers look alike and load into other classes without an error, so that the class of the scheduler
decides. `TRAINABLE_SCHEDULERS` and `REFUSED_SCHEDULERS` contain all schedulers of Diffusers 0.42 (checked by a test); other
schedulers are not supported.
"""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import DDPMScheduler

from .consistency import ConsistencyProcess
from .ddim import latent_config
from .ddpm import DDPMProcess
from .edm import EDMProcess
from .flow_matching import FlowMatchingProcess
from .process import DiffusionProcess

__all__ = [
    "REFUSED_SCHEDULERS",
    "TRAINABLE_SCHEDULERS",
    "check_scheduler_class",
    "ddpm_of_euler",
    "is_ddpm_sampled_by_euler",
    "training_process",
    "training_scheduler",
]

# Samplers of DDPMs: with the same betas they add the same noise (tests/diffusion/test_schedulers.py)
_DDPM = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
# Process of each scheduler that is supported
TRAINABLE_SCHEDULERS: Mapping[str, type[DiffusionProcess]] = {
    **dict.fromkeys(_DDPM, DDPMProcess),
    "CMStochasticIterativeScheduler": ConsistencyProcess,
    "EDMEulerScheduler": EDMProcess,
    "FlowMatchEulerDiscreteScheduler": FlowMatchingProcess,
}

_REFUSED = {
    "it has other continuous noise levels than EDM's": (
        *("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "IPNDMScheduler"),
        *("KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "KarrasVeScheduler", "LMSDiscreteScheduler"),
        *("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "ScoreSdeVeScheduler", "ScoreSdeVpScheduler"),
    ),
    "it is a sampler of EDMs that EDMEulerScheduler can be saved in place of": ("EDMDPMSolverMultistepScheduler",),
    "it is for flow matching in pipelines of other models than UNets": (
        *("FlowMapEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "HeliosScheduler"),
        *("LTXEulerAncestralRFScheduler", "PiflowScheduler", "MiniMaxH3Scheduler", "RFD4ProteinaScheduler"),
    ),
    "it is for distilled models, which noise prediction would undo": (
        *("ConsistencyDecoderScheduler", "FlowMatchLCMScheduler", "HeliosDMDScheduler", "LCMScheduler", "SCMScheduler"),
        "TCDScheduler",
    ),
    "it is for discrete tokens": (
        *("AmusedScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler"),
        "VQDiffusionScheduler",
    ),
    "its process is not that of a DDPM": (
        *("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDPMWuerstchenScheduler", "RePaintScheduler"),
        "UnCLIPScheduler",
    ),
    "it inverts images and does not sample": ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"),
}
# Reason for each scheduler that is not supported
REFUSED_SCHEDULERS = {name: reason for reason, names in _REFUSED.items() for name in names}


def check_scheduler_class(name: str, *bases: str) -> None:
    """Check the class of a scheduler.

    Args:
        name: Name of the class.
        bases: Names of its base classes.

    Raises:
        ValueError: Neither the class nor a base class is in `TRAINABLE_SCHEDULERS`.
    """
    if not any(known in TRAINABLE_SCHEDULERS for known in (name, *bases)):
        reason = next((REFUSED_SCHEDULERS[known] for known in (name, *bases) if known in REFUSED_SCHEDULERS), "it is unknown")
        supported = ", ".join(known.removesuffix("Scheduler") for known in TRAINABLE_SCHEDULERS)
        raise ValueError(f"scheduler={name} is not supported, {reason}; supported (each with Scheduler): {supported}")


def training_process(scheduler) -> DiffusionProcess:
    """The process of a scheduler's model.

    Args:
        scheduler: Scheduler of a trained pipeline; a process is returned as it is.

    Raises:
        ValueError: The scheduler is not in `TRAINABLE_SCHEDULERS`, or its configuration defines another process.
    """
    if isinstance(scheduler, DiffusionProcess):
        return scheduler
    names = [kind.__name__ for kind in type(scheduler).__mro__]
    check_scheduler_class(*names)
    known = next(name for name in names if name in TRAINABLE_SCHEDULERS)
    return TRAINABLE_SCHEDULERS[known](scheduler)


def is_ddpm_sampled_by_euler(name: str, config: Mapping) -> bool:
    """Whether a scheduler is Euler's method for a model that was trained as a DDPM with the same betas.

    Stable Diffusion XL is saved with it, and trained as a `DDPMScheduler` of the same configuration (as in Diffusers'
    `train_text_to_image_sdxl.py`). Distilled models are saved with it, too, but with trailing timesteps.

    Args:
        name: Name of the scheduler's class.
        config: Its configuration.
    """
    discrete = config.get("timestep_type", "discrete") == "discrete"
    return name == "EulerDiscreteScheduler" and discrete and config.get("timestep_spacing") == "leading"


def ddpm_of_euler(config: Mapping) -> DDPMScheduler:
    """The scheduler that a model was trained with, from the configuration of Euler's method (`is_ddpm_sampled_by_euler`)."""
    return DDPMScheduler.from_config(latent_config(config))


def training_scheduler(scheduler):
    """The scheduler of a latent pipeline as its model was trained: a `DDPMScheduler` in place of Euler's method.

    Args:
        scheduler: The scheduler that the pipeline is saved with.

    Returns:
        The same, unless `is_ddpm_sampled_by_euler`.
    """
    euler = is_ddpm_sampled_by_euler(type(scheduler).__name__, scheduler.config)
    return ddpm_of_euler(scheduler.config) if euler else scheduler
