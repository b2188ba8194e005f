"""Trials before long work: one sampling step, features of two images, one timed forward pass, a compiled function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from ..diffusion.latents import LatentCodec
from ..diffusion.schedulers import training_process
from ..errors import first_line, portable_error
from ..families.lookup import family_of
from ..metrics.conditions import guided
from ..metrics.eval_mode import evaluating
from ..metrics.features import FeatureNetwork
from ..metrics.model_size import spatial_size
from ..metrics.quality import SamplingSettings, extract_features
from ..metrics.speed import SpeedSetting, compilation_error, measure_speed, seconds_of
from ..runtimes.forwards import ConversionError, model_call

__all__ = ["describe_speed", "try_features", "try_sampling", "try_speed"]

# Maximum number of pixel values in a trial on a CPU, where larger trials only take longer
TRIAL_VALUES = 2**14


def _trial_batch(unet: nn.Module, batch_size: int) -> int:
    """Batch size of a trial: the full one on a GPU, to test its memory."""
    if next(unet.parameters()).device.type != "cpu":
        return batch_size
    values = unet.config.in_channels * math.prod(spatial_size(unet))
    return min(batch_size, max(1, TRIAL_VALUES // values))


@torch.no_grad()
def try_sampling(
    argument: str, unet: nn.Module, scheduler, settings: SamplingSettings, codec: LatentCodec | None = None
) -> float:
    """Run the first sampling step, and time its forward pass. Latents are also decoded.

    Args:
        argument: Argument that named the model, for messages.
        unet: The model, on its device and in its dtype.
        scheduler: Scheduler of the model.
        settings: Settings of the sampler.
        codec: Decodes latents; None: samples are pixels.

    Returns:
        Seconds per image of a sampling step: one forward pass, or two with guidance.

    Raises:
        ValueError: The sampler cannot be created, the forward pass fails (for example, out of memory or because of the
            dtype), or the model or the sampler's step gives values that are not finite.
    """
    parameter = next(unet.parameters())
    sampler = training_process(scheduler).sampler(
        settings.num_inference_steps, settings.timestep_spacing, settings.eta, latents=codec is not None
    )
    batch_size = _trial_batch(unet, min(settings.batch_size, settings.num_images))
    dtype = str(parameter.dtype).removeprefix("torch.")
    family = family_of(unet)
    inputs = family.example_inputs(unet, *spatial_size(unet), batch_size, parameter.device, parameter.dtype)
    noise = torch.randn(inputs.sample.shape, generator=torch.Generator().manual_seed(0)).to(parameter.device)
    noise, timestep = noise * sampler.init_noise_sigma, sampler.timesteps[0]
    timesteps = timestep.to(parameter.device).expand(batch_size)
    scaled = sampler.scale_model_input(noise, timestep)
    inputs = inputs._replace(sample=scaled.to(parameter.dtype), timesteps=timesteps)

    def predict() -> torch.Tensor:
        forward = partial(family.predict, unet)
        return guided(forward, inputs, inputs.conditioning, settings.guidance_scale).float()

    try:
        with evaluating(unet):
            predictions: list[torch.Tensor] = []
            for _ in range(2):  # the first one warms up
                seconds = seconds_of(lambda: predictions.append(predict()), parameter.device)
            prediction = predictions[-1]
            finite = bool(prediction.isfinite().all())
    except RuntimeError as error:
        where = f"of {batch_size} images in {dtype} on {parameter.device.type}"
        raise ValueError(f"{argument}: a forward pass {where} fails: {first_line(error)}") from error
    if not finite:
        raise ValueError(f"{argument} predicts values that are not finite in {dtype}")
    sample = sampler.step(prediction, timestep, noise, [torch.Generator().manual_seed(0) for _ in range(batch_size)])
    if not sample.isfinite().all():
        raise ValueError(f"{argument}: a {settings.sampler} step from timestep {timestep:g} gives values that are not finite")
    if codec is not None:
        with codec.on(parameter.device):
            if not codec.decode(sample[:1]).isfinite().all():
                raise ValueError(f"{argument}: its autoencoder decodes latents to values that are not finite")
    return seconds / batch_size


def try_features(networks: Sequence[FeatureNetwork], shape: tuple[int, int, int]) -> None:
    """Extract features of two random images of a shape `(channels, height, width)` with every network.

    Raises:
        ValueError: A network fails.
    """
    images = torch.randint(0, 256, (2, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for network in networks:
        try:
            extract_features(network, images)
        except RuntimeError as error:
            raise ValueError(f"features={network.name} of images of shape {shape} fail: {first_line(error)}") from error


def try_speed(unet: nn.Module, settings: Sequence[SpeedSetting]) -> tuple[list[dict], list[str]]:
    """Time a forward pass in every dtype and memory format, and compile or export a function if models are to be.

    A failure does not stop the run: the measurement at the end reports it in a row, too.

    Args:
        unet: The dense model, on its device.
        settings: Settings in which speed is measured at the end.

    Returns:
        Rows as in `measure_speed`, and a description of each trial.

    Raises:
        ValueError: Speed cannot be measured on the model's device.
    """
    batch_size = _trial_batch(unet, max(setting.batch_size for setting in settings))
    kinds = dict.fromkeys((setting.dtype, setting.channels_last) for setting in settings)
    trials = [SpeedSetting(batch_size, dtype, channels_last=channels_last) for dtype, channels_last in kinds]
    try:
        rows = measure_speed({"dense": unet}, trials, repeats=1, warmup=1)
    except ValueError as error:
        raise ValueError(f"speed cannot be measured ({error}): pass --speed_batch_sizes 0 to skip it") from error
    tried = [f"a timed forward pass{_failure(row.get('error'))}" for row in rows]
    if any(setting.mode == "compiled" for setting in settings):
        tried.append(f"a compiled function{_failure(compilation_error(next(unet.parameters()).device))}")
    for runtime in dict.fromkeys(setting.runtime for setting in settings if setting.runtime is not None):
        tried.append(f"a function in {runtime}{_failure(_runtime_error(runtime))}")
    return rows, tried


def _failure(error: str | None) -> str:
    return "" if error is None else f" (fails and will not be measured: {error})"


def _runtime_error(runtime: str) -> str | None:
    """Why exports to a runtime fail on this machine, in one line. A linear layer is exported."""
    try:
        model_call(nn.Linear(2, 2), {"x": torch.ones(1, 2)}, runtime)()
    except (RuntimeError, ImportError, ConversionError) as error:
        return portable_error(error)
    return None


def describe_speed(settings: Sequence[SpeedSetting]) -> str:
    """Line of the plan about the timings at the end."""
    lists = [
        ("batch", dict.fromkeys(str(setting.batch_size) for setting in settings)),
        *(("", dict.fromkeys(getattr(s, name) for s in settings)) for name in ("dtype", "mode", "memory_format")),
    ]
    words = "; ".join(f"{title} {', '.join(values)}".strip() for title, values in lists)
    compilations = 2 * sum(setting.mode == "compiled" for setting in settings)
    exports = 2 * sum(setting.runtime is not None for setting in settings)
    pauses = [f"{compilations} compilations, of half a minute or more each"] if compilations else []
    pauses += [f"{exports} exports, of seconds to minutes each"] if exports else []
    pause = f" ({'; '.join(pauses)})" if pauses else ""
    return f"{'speed':10} of both models at the end: {words}{pause}"
