#!/usr/bin/env bash
# DDPMPipeline and ConsistencyModelPipeline make no pictures in bfloat16, LDMPipeline neither in bfloat16 nor in float16.
#
# Versions:  diffusers 0.42.1, torch 2.13.0, numpy 2.3.5
# Guess:     `pipe.to(torch.bfloat16)` samples in bfloat16, as it does for Stable Diffusion.
# Seen:      DDPMPipeline, DDIMPipeline and ConsistencyModelPipeline sample to the end, and then convert the images with
#            `.numpy()` in their dtype, which NumPy does not have: TypeError with the default output_type="pil" and with "np".
#            With "pt" they return a tensor in bfloat16. float16 works. LDMPipeline draws its first noise in float32, whatever
#            the dtype of its model, so that the first forward raises a RuntimeError in both.
# Matters:   bfloat16 is the usual precision of training and sampling on GPUs. The error comes after the last step, which is
#            after minutes for a thousand steps of a large model. Pass output_type="pt" and convert the tensor to float32, or
#            sample in float32 or float16.
# Output seen:
#            DDPMPipeline: float16 samples, bfloat16 raises TypeError, as tensors samples
#            DDIMPipeline: float16 samples, bfloat16 raises TypeError, as tensors samples
#            ConsistencyModelPipeline: float16 samples, bfloat16 raises TypeError, as tensors samples
#            LDMPipeline: float16 raises RuntimeError, bfloat16 raises RuntimeError, as tensors raises RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 numpy==2.3.5
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)


def unet():
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


makers = {
    "DDPMPipeline": lambda: DDPMPipeline(unet(), DDPMScheduler()),
    "DDIMPipeline": lambda: DDIMPipeline(unet(), DDIMScheduler()),
    "ConsistencyModelPipeline": lambda: ConsistencyModelPipeline(unet(), CMStochasticIterativeScheduler()),
    "LDMPipeline": lambda: LDMPipeline(
        VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=32).eval(), unet(), DDIMScheduler()
    ),
}
found = {}
for name, make in makers.items():
    for dtype, kind in ((torch.float16, "pil"), (torch.bfloat16, "pil"), (torch.bfloat16, "np"), (torch.bfloat16, "pt")):
        pipe = make()
        pipe.to(dtype)
        pipe.set_progress_bar_config(disable=True)
        try:
            pipe(num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type=kind)
            said = "samples"
        except (TypeError, RuntimeError) as error:
            said = f"raises {type(error).__name__}"
        found[name, str(dtype).removeprefix("torch."), kind] = said
    half, pictures, tensors = (found[name, *words] for words in (("float16", "pil"), ("bfloat16", "pil"), ("bfloat16", "pt")))
    print(f"{name}: float16 {half}, bfloat16 {pictures}, as tensors {tensors}")
pixels = ("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline")
expected = {
    **{(name, "float16", "pil"): "samples" for name in pixels},
    **{(name, "bfloat16", kind): "raises TypeError" for name in pixels for kind in ("pil", "np")},
    **{(name, "bfloat16", "pt"): "samples" for name in pixels},
    ("LDMPipeline", "float16", "pil"): "raises RuntimeError",
    **{("LDMPipeline", "bfloat16", kind): "raises RuntimeError" for kind in ("pil", "np", "pt")},
}
if found != expected:
    raise SystemExit(f"the behaviour has changed: {found}")
PYTHON
