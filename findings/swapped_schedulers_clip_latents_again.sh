#!/usr/bin/env bash
# Stable Diffusion's pipeline mends two settings of its scheduler; a scheduler that is made from its configuration loses them.
#
# Versions:  diffusers 0.42.1, transformers 5.24.0, accelerate 1.15.0, torch 2.13.0, numpy 2.4.6
# Guess:     `StableDiffusionPipeline` sets clip_sample=False and steps_offset=1 where the file of a scheduler lacks them, so that
#            `DDIMScheduler.from_config(pipe.scheduler.config)`, the documented way to swap schedulers, has them too.
# Seen:      the configuration remembers which settings were not in the file, and `from_config` leaves these out: the new
#            scheduler has clip_sample=True and steps_offset=0 again, and latents are clipped to [-1, 1] in every step. After
#            `save_pretrained` and loading, the file has both, and swapping keeps them.
# Matters:   early repositories of Stable Diffusion have such files. Samples change with a swap to the same class, without a
#            warning.
# Output seen:
#            in the pipeline: clip_sample=False, steps_offset=1
#            swapped: clip_sample=True, steps_offset=0
#            saved, loaded and swapped: clip_sample=False, steps_offset=1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 \
    accelerate==1.15.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import json
import warnings
from pathlib import Path

from diffusers import DDIMScheduler, StableDiffusionPipeline

warnings.simplefilter("ignore")
Path("early").mkdir()
betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
Path("early/scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler", **betas}))
nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor"))


def pipeline(place):
    return StableDiffusionPipeline(scheduler=DDIMScheduler.from_pretrained(place), requires_safety_checker=False, **nothing)


pipe = pipeline("early")
pipe.scheduler.save_pretrained("saved")
schedulers = {
    "in the pipeline": pipe.scheduler,
    "swapped": DDIMScheduler.from_config(pipe.scheduler.config),
    "saved, loaded and swapped": DDIMScheduler.from_config(pipeline("saved").scheduler.config),
}
found = [(scheduler.config.clip_sample, scheduler.config.steps_offset) for scheduler in schedulers.values()]
for name, (clip_sample, steps_offset) in zip(schedulers, found):
    print(f"{name}: clip_sample={clip_sample}, steps_offset={steps_offset}")
if found != [(False, 1), (True, 0), (False, 1)]:
    raise SystemExit(f"the behaviour has changed: {found}")
PYTHON
