"""A small consistency model that is trained in about two seconds, and pipelines of others with random weights."""

from __future__ import annotations

import functools

import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from torch import Tensor

from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.diffusion.process import per_image
from helpers.processes import consistency

SIZE = 8


def consistency_unet(seed: int = 0, **config) -> UNet2DModel:
    """OpenAI's blocks in small: scale-shift residual blocks that also resample, and attention."""
    torch.manual_seed(seed)
    arguments = {
        "sample_size": SIZE,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attn_norm_num_groups": 8,
        "attention_head_dim": 8,
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    }
    return UNet2DModel(**{**arguments, **config}).eval()


def consistency_pipeline(seed: int = 0, **config) -> ConsistencyModelPipeline:
    """A pipeline with random weights, all of them perturbed."""
    unet = consistency_unet(seed, **config)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    pipe = ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wanted_images(noise: Tensor) -> Tensor:
    """The images that the trained model makes from noise with shape `(n, 1, 8, 8)`: a ramp, upwards or downwards."""
    ramp = torch.linspace(-0.8, 0.8, SIZE).expand(1, 1, SIZE, SIZE)
    return (noise * ramp).sum(dim=(1, 2, 3)).sign()[:, None, None, None] * ramp


@functools.cache
def trained_unet(steps: int = 150) -> UNet2DModel:
    """A model that makes `wanted_images` in one step, from noise of any level that shows them."""
    unet, process = consistency_unet(), consistency()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        noise = torch.randn(32, 1, SIZE, SIZE, generator=generator)
        clean, timesteps = wanted_images(noise), process.random_timesteps(32, generator)
        batch = DiffusionBatch(clean, noise, timesteps)
        error = denoised(unet, batch) - clean
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
    return unet.requires_grad_(False)


def denoised(unet: UNet2DModel, batch: DiffusionBatch) -> Tensor:
    """The images f(x_t, t) of a batch, by the scheduler's own scalings."""
    process, scheduler = consistency(), CMStochasticIterativeScheduler()
    sigmas = (batch.timesteps.double() / 250).exp()
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition(sigmas)
    noisy = process.add_noise(batch.clean, batch.noise, batch.timesteps)
    output = unet(process.scale_model_input(noisy, batch.timesteps), batch.timesteps).sample
    return per_image(c_skip, noisy) * noisy + per_image(c_out, output) * output


def trained_pipeline() -> ConsistencyModelPipeline:
    """The trained model in a pipeline."""
    pipe = ConsistencyModelPipeline(trained_unet(), CMStochasticIterativeScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe
