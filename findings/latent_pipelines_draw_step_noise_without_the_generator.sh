#!/usr/bin/env bash
# With a scheduler that adds noise in its steps, DiTPipeline and LDMPipeline give other images for the same generator.
#
# Versions:  diffusers 0.42.1, torch 2.13.0, Python 3.11
# Guess:     As in DDPMPipeline, the images follow from `generator`, whatever the scheduler: pipelines pass it to
#            `scheduler.step`.
# Seen:      These two pipelines draw the first noise from the generator, and call `scheduler.step` without it. DDPMScheduler
#            then draws from PyTorch's global generator, and two calls with the same seed give different images. DDIMScheduler
#            adds no noise by default, and gives the same ones. LDMTextToImagePipeline has the same call.
# Matters:   Samples of two models cannot be compared pair by pair, and samples of one model cannot be drawn again, although
#            every call has a seed. The DDPMScheduler is what LDMs are trained with. Use a scheduler without noise in its steps,
#            or seed the global generator as well.
# Output seen:
#            DDPMPipeline, DDPMScheduler: the same images for the same seed
#            DiTPipeline, DDPMScheduler: other images for the same seed
#            DiTPipeline, DDIMScheduler: the same images for the same seed
#            LDMPipeline, DDPMScheduler: other images for the same seed
#            LDMPipeline, DDIMScheduler: the same images for the same seed
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 numpy
cd "$folder"
venv/bin/python - <<'PYTHON'
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)

torch.manual_seed(0)


def unet(channels):
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


transformer = DiTTransformer2DModel(
    num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=4, num_layers=1, sample_size=8, patch_size=2
).eval()
vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
vqvae = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=3, num_vq_embeddings=32).eval()
known, latent = unet(3), unet(3)
makers = {
    "DDPMPipeline": lambda scheduler: DDPMPipeline(known, scheduler),
    "DiTPipeline": lambda scheduler: DiTPipeline(transformer, vae, scheduler),
    "LDMPipeline": lambda scheduler: LDMPipeline(vqvae, latent, scheduler),
}
arguments = {"DiTPipeline": {"class_labels": [1], "guidance_scale": 1.0}}
found = {}
for name, make in makers.items():
    for kind in (DDPMScheduler, DDIMScheduler) if name != "DDPMPipeline" else (DDPMScheduler,):
        pipe = make(kind())
        pipe.set_progress_bar_config(disable=True)
        first, second = (
            pipe(
                **arguments.get(name, {}),
                generator=torch.Generator().manual_seed(0),
                num_inference_steps=5,
                output_type="np",
            ).images
            for _ in range(2)
        )
        found[name, kind.__name__] = bool(np.array_equal(first, second))
        print(f"{name}, {kind.__name__}: {'the same' if found[name, kind.__name__] else 'other'} images for the same seed")
expected = {
    ("DDPMPipeline", "DDPMScheduler"): True,
    ("DiTPipeline", "DDPMScheduler"): False,
    ("DiTPipeline", "DDIMScheduler"): True,
    ("LDMPipeline", "DDPMScheduler"): False,
    ("LDMPipeline", "DDIMScheduler"): True,
}
if found != expected:
    raise SystemExit(f"the behaviour has changed: {found}")
PYTHON
