"""The diffusion process of a model's training, and the schedulers that are supported for it.

The training loss, the scores and the step loss add noise as in Ho et al. (arXiv 2006.11239, equation 4),

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,    abar_t = prod_(s <= t) (1 - beta_s),    t = 0, ..., T - 1 an integer,

with the betas of the model, which predicts eps, x_0 or v. A Diffusers scheduler is supported if it has these betas and passes
x_t to the model without scaling. Schedulers with continuous noise levels scale the input and have fractional timesteps; those
of flow matching or distilled models use another process. Their configurations look alike and load into other classes without
an error, so that the class decides. `TRAINABLE_SCHEDULERS` and `REFUSED_SCHEDULERS` contain all schedulers of Diffusers 0.42
(checked by a test); other schedulers are not supported.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import DDPMScheduler

from ..errors import one_line

__all__ = [
    "REFUSED_SCHEDULERS",
    "TRAINABLE_SCHEDULERS",
    "check_scheduler_class",
    "check_variance_type",
    "is_ddpm_sampled_by_euler",
    "training_process",
]

# Samplers of the same process: with the same betas they add the same noise (tests/diffusion/test_process.py)
TRAINABLE_SCHEDULERS = (
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

_FLOW = "it is for flow matching"
_REFUSED = {
    "it has continuous noise levels": (
        *("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EulerAncestralDiscreteScheduler"),
        *("EulerDiscreteScheduler", "HeunDiscreteScheduler", "IPNDMScheduler", "KDPM2AncestralDiscreteScheduler"),
        *("KDPM2DiscreteScheduler", "KarrasVeScheduler", "LMSDiscreteScheduler", "ScoreSdeVeScheduler"),
        *("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "ScoreSdeVpScheduler"),
    ),
    _FLOW: (
        *("FlowMapEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
        *("HeliosScheduler", "LTXEulerAncestralRFScheduler", "PiflowScheduler", "MiniMaxH3Scheduler"),
        "RFD4ProteinaScheduler",
    ),
    "it is for distilled models, which noise prediction would undo": (
        *("CMStochasticIterativeScheduler", "ConsistencyDecoderScheduler", "FlowMatchLCMScheduler", "HeliosDMDScheduler"),
        *("LCMScheduler", "SCMScheduler", "TCDScheduler"),
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
LEARNED_VARIANCES = ("learned", "learned_range")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
# Entries of a scheduler's configuration that define the process
_PROCESS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
    "rescale_betas_zero_snr",
)


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


def training_process(scheduler) -> DDPMScheduler:
    """The training process of a scheduler's model, as a scheduler that adds its noise.

    Args:
        scheduler: Scheduler of a trained pipeline.

    Returns:
        A `DDPMScheduler` with the same timesteps, betas and `prediction_type`, for `add_noise` and `get_velocity`. Some
        samplers only add noise at their current timesteps.

    Raises:
        ValueError: The scheduler is not in `TRAINABLE_SCHEDULERS`, or its configuration defines another process.
    """
    check_scheduler_class(*(kind.__name__ for kind in type(scheduler).__mro__))
    config = scheduler.config
    if config.get("use_flow_sigmas"):
        raise ValueError(f"use_flow_sigmas=True of the scheduler is not supported, {_FLOW}: it must be False")
    if config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type={config.prediction_type} of the scheduler is not supported: it must be one of "
            f"{', '.join(PREDICTION_TYPES)}"
        )
    steps = config.num_train_timesteps
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"num_train_timesteps={steps} of the scheduler must be an integer of at least 1")
    try:
        process = DDPMScheduler(**{name: config[name] for name in _PROCESS if name in config})
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"the betas of the scheduler cannot be computed: {one_line(error)}") from error
    _check_noise_levels(process, scheduler)
    return process


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


def check_variance_type(scheduler, learned_variance: bool, pipeline_splits: bool) -> None:
    """Check that a scheduler and a model agree on learned variances.

    Args:
        scheduler: Scheduler of a trained pipeline.
        learned_variance: Whether the model outputs twice the channels of its sample.
        pipeline_splits: Whether the pipeline gives the scheduler only the first half of these channels, as `DiTPipeline` does.

    Raises:
        ValueError: The scheduler needs variances that the model does not have, or cannot read its output.
    """
    kind = scheduler.config.get("variance_type")
    if kind in LEARNED_VARIANCES and not learned_variance:
        raise ValueError(
            f"variance_type={kind} of the scheduler needs a model with learned variances, whose out_channels are twice its "
            f"in_channels"
        )
    if learned_variance and not pipeline_splits and kind not in LEARNED_VARIANCES:
        raise ValueError(
            f"the model has learned variances, which variance_type={kind} of the scheduler does not read: it must be "
            f"{' or '.join(LEARNED_VARIANCES)}"
        )


def _check_noise_levels(process: DDPMScheduler, scheduler) -> None:
    """Check that betas are valid, and that the scheduler has the corresponding noise levels."""
    betas, abar, steps = process.betas, process.alphas_cumprod, process.config.num_train_timesteps
    if len(betas) != steps:
        raise ValueError(f"trained_betas of the scheduler has {len(betas)} values, not num_train_timesteps={steps}")
    if not (torch.isfinite(betas).all() and (betas > 0).all() and (betas <= 1).all()):
        ends = f"beta_start={process.config.beta_start}, beta_end={process.config.beta_end}"
        raise ValueError(f"the betas of the scheduler ({ends}) must be greater than 0 and at most 1")
    theirs = getattr(scheduler, "alphas_cumprod", None)
    if theirs is None or theirs.shape != abar.shape or not torch.allclose(theirs.cpu().float(), abar, rtol=1e-4, atol=1e-6):
        raise ValueError(f"scheduler={type(scheduler).__name__} has other noise levels than those of a DDPM with its betas")
