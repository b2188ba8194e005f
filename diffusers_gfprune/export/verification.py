"""How far an export is from the model in PyTorch.

On random inputs at several timesteps and batch sizes, with f the model and g the export,

    error = max |g(x, t) - f(x, t)| / max |f(x, t)|

In float32, only the order of additions differs, and an error above `LIMIT` is a mistake. At fp16 and int8, what counts is
what a user sees: the similarity of samples from the same noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..diffusion.batch import ModelInputs
from ..diffusion.consistency import ConsistencyProcess
from ..diffusion.schedulers import training_process
from ..metrics.conditions import text_conditions, vector_conditions
from ..metrics.fidelity import SSIM_WINDOW, psnr_to_reference, ssim_to_reference
from ..metrics.quality import SamplingSettings
from ..pipeline_parts import PipelineParts
from ..runtimes.program import to_tensors
from .program import random_inputs

__all__ = ["LIMIT", "Reference", "relative_errors", "sampled_reference"]

LIMIT = 1e-3
BATCH_SIZES = (1, 3)  # of exports that take any
TIMESTEPS = 4


@torch.no_grad()
def relative_errors(parts: PipelineParts, exported: nn.Module, batch_size: int | None) -> list[dict]:
    """Errors of an export on random inputs.

    Args:
        parts: Parts of the pipeline, with the denoiser in float32 on the CPU, in evaluation mode.
        exported: The export.
        batch_size: Number of samples of every forward pass; None for any number.

    Returns:
        A dict for each batch size and timestep: `batch_size`, `timestep` and `max_relative_error`.
    """
    process = training_process(parts.scheduler)
    low, high = process.timestep_range
    timesteps = sorted({low + (high - low) * step / (TIMESTEPS - 1) for step in range(TIMESTEPS)})
    if process.has_integer_timesteps:
        timesteps = sorted({round(timestep) for timestep in timesteps})
    rows = []
    for size in BATCH_SIZES if batch_size is None else (batch_size,):
        for timestep in timesteps:
            inputs = random_inputs(parts, size, timestep, seed=timesteps.index(timestep))
            wanted = parts.family.output(parts.denoiser, inputs)
            error = (parts.family.output(exported, inputs) - wanted).abs().max() / wanted.abs().max()
            rows.append({"batch_size": size, "timestep": timestep, "max_relative_error": error.item()})
    return rows


@dataclass(frozen=True)
class Reference:
    """Samples of the model in float32, and the inputs that it had meanwhile.

    Attributes:
        samples: Images in [0, 1] with shape `(images, channels, height, width)`.
        recorded: Inputs by name, one entry for each forward pass: noisy samples at several timesteps.
        sample: Samples another model of the same pipeline from the same noise.
        settings: What the samples depend on, as JSON values.
    """

    samples: Tensor
    recorded: list[dict[str, Tensor]]
    sample: Callable[[nn.Module], Tensor]
    settings: dict

    def similarity(self, exported: nn.Module) -> dict:
        """SSIM and PSNR in dB of samples of an export, and the settings. SSIM is left out below 7 pixels, PSNR is None for
        equal images."""
        samples = self.sample(exported)
        found = {"psnr_to_fp32": psnr_to_reference(samples, self.samples)}
        if min(samples.shape[-2:]) >= SSIM_WINDOW:
            found["ssim_to_fp32"] = ssim_to_reference(samples, self.samples)
        return {**found, **self.settings}


def sampled_reference(
    parts: PipelineParts, batch_size: int | None, num_images: int, num_inference_steps: int, prompts: tuple[str, ...]
) -> Reference:
    """Sample the model, and record its inputs.

    Args:
        parts: Parts of the pipeline.
        batch_size: Number of samples of every forward pass; None for all at once.
        num_images: Number of samples (>= 1), rounded up to whole batches.
        num_inference_steps: Number of sampling steps (>= 1); consistency models are sampled in one.
        prompts: Prompts of the samples in turn, for models of text.
    """
    batch = num_images if batch_size is None else batch_size
    steps = None if isinstance(training_process(parts.scheduler), ConsistencyProcess) else num_inference_steps
    settings = SamplingSettings(-(-num_images // batch) * batch, steps, batch_size=batch)
    settings, _ = settings.fitted(parts.scheduler)
    conditions, vector_size = None, parts.family.vector_size(parts.denoiser.config)
    if vector_size is not None:
        generator = torch.Generator().manual_seed(settings.seed)
        conditions = vector_conditions(torch.randn(settings.num_images, vector_size, generator=generator))
    elif parts.prompts is not None:
        conditions = text_conditions(parts.prompts.encode(prompts), parts.prompts.null())
    recorded: list[dict[str, Tensor]] = []

    def sample(model: nn.Module) -> Tensor:
        return settings.sample(model, parts.scheduler, codec=parts.codec, conditions=conditions)

    def record(model: nn.Module, positional: tuple, named: dict) -> None:
        given = {**dict(zip(("sample", "timestep"), positional)), **named, **named.get("added_cond_kwargs", {})}
        given.pop("added_cond_kwargs", None)
        recorded.append(to_tensors(ModelInputs(given.pop("sample"), given.pop("timestep"), given)))

    handle = parts.denoiser.register_forward_pre_hook(record, with_kwargs=True)
    try:
        samples = sample(parts.denoiser)
    finally:
        handle.remove()
    described = settings.identity() | ({} if conditions is None else dict(conditions.description))
    return Reference(samples, recorded, sample, described)
