"""The smallest pipeline of pixels, for what is slow on any other."""

from __future__ import annotations

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import Tensor

from diffusers_gfprune import PruneDDPMPipeline

SIZE = 8


def tiny_pipeline(seed: int = 0, **config) -> PruneDDPMPipeline:
    """Two levels of eight channels without attention, with all weights perturbed."""
    torch.manual_seed(seed)
    arguments = {
        "sample_size": SIZE,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "mid_block_type": None,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    unet = UNet2DModel(**{**arguments, **config})
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return PruneDDPMPipeline(unet=unet.eval(), scheduler=DDPMScheduler())


def stock_samples(unet, scheduler) -> Tensor:
    """Three samples of a stock pipeline in two steps."""
    pipe = DDIMPipeline(unet=unet, scheduler=DDIMScheduler.from_config(scheduler.config))
    pipe.set_progress_bar_config(disable=True)
    found = pipe(batch_size=3, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    return torch.from_numpy(found)
