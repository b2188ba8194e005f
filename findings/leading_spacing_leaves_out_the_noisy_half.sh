#!/usr/bin/env bash
# DDIMScheduler and DDPMScheduler with leading spacing, their default, never meet the noisy timesteps between half and all steps.
#
# Versions:  diffusers 0.42.1, torch 2.13.0, Python 3.11
# Guess:     more inference steps visit the whole range of timesteps more densely, or set_timesteps says that it cannot.
# Seen:      the gap is num_train_timesteps // num_inference_steps, which is 1 from 501 to 1,000 of 1,000 steps: 501 steps visit
#            timesteps 500 to 0, and 750 steps visit 749 to 0. Sampling starts from pure noise, of which the model is told
#            that it is at timestep 500. There is no error and no warning.
# Matters:   samples and figures made with 501 to 999 steps are worse than those of 500, for a reason that nothing shows.
# Output seen:
#            DDIMScheduler, first timestep by number of steps: {500: 998, 501: 500, 750: 749, 1000: 999}
#            DDPMScheduler, first timestep by number of steps: {500: 998, 501: 500, 750: 749, 1000: 999}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 numpy
cd "$folder"
venv/bin/python -W error - <<'PYTHON'
from diffusers import DDIMScheduler, DDPMScheduler

for kind in (DDIMScheduler, DDPMScheduler):
    first = {}
    for steps in (500, 501, 750, 1000):
        scheduler = kind()
        scheduler.set_timesteps(steps)
        first[steps] = int(scheduler.timesteps[0])
    print(f"{kind.__name__}, first timestep by number of steps: {first}")
    if first != {500: 998, 501: 500, 750: 749, 1000: 999}:
        raise SystemExit(f"the behaviour has changed: {first}")
PYTHON
