#!/usr/bin/env bash
# DDPMPipeline and ConsistencyModelPipeline do not sample in bfloat16, LDMPipeline neither in bfloat16 nor in float16.
#
# Versions:  diffusers 0.42.1, torch 2.13.0, Python 3.11
# Guess:     `pipe.to(torch.bfloat16)` samples in bfloat16, as it does for Stable Diffusion.
# Seen:      DDPMPipeline, DDIMPipeline and ConsistencyModelPipeline sample to the end, and then convert the images with
#            `.numpy()` in their dtype, which NumPy does not have: TypeError, with every output_type. float16 works. LDMPipeline
#            draws its first noise in float32, whatever the dtype of its model, so that the first forward raises a RuntimeError
#            in both.
# Matters:   bfloat16 is the usual precision of training and sampling on GPUs. The error comes after the last step, which is
#            after minutes for a thousand steps of a large model. Sample in float32 or float16, or in bfloat16 by a loop of your
#            own over the scheduler.
# Output seen:
#            DDPMPipeline: float16 samples, bfloat16 raises TypeError
#            DDIMPipeline: float16 samples, bfloat16 raises TypeError
#            ConsistencyModelPipeline: float16 samples, bfloat16 raises TypeError
#            LDMPipeline: float16 raises RuntimeError, bfloat16 raises RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 numpy
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
    for dtype in (torch.float16, torch.bfloat16):
        pipe = make()
        pipe.to(dtype)
        pipe.set_progress_bar_config(disable=True)
        try:
            pipe(num_inference_steps=1, generator=torch.Generator().manual_seed(0))
            said = "samples"
        except (TypeError, RuntimeError) as error:
            said = f"raises {type(error).__name__}"
        found[name, str(dtype).removeprefix("torch.")] = said
    print(f"{name}: float16 {found[name, 'float16']}, bfloat16 {found[name, 'bfloat16']}")
expected = {
    **{(name, "float16"): "samples" for name in ("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline")},
    **{(name, "bfloat16"): "raises TypeError" for name in ("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline")},
    **{("LDMPipeline", dtype): "raises RuntimeError" for dtype in ("float16", "bfloat16")},
}
if found != expected:
    raise SystemExit(f"the behaviour has changed: {found}")
PYTHON
