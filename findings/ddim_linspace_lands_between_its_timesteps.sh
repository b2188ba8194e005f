#!/usr/bin/env bash
# DDIMScheduler with timestep_spacing="linspace" does not step to the next timestep of its own list.
#
# Versions:  diffusers 0.42.1, torch 2.13.0, Python 3.11
# Guess:     DDIMScheduler.step(model_output, t, sample) returns a sample at the noise level of the next entry of
#            scheduler.timesteps, whatever the spacing.
# Seen:      it goes down by num_train_timesteps // num_inference_steps. With linspace and 10 of 1,000 steps the list begins
#            999, 888, 777, but the first step, with the exact noise as the prediction, lands at the noise level of timestep
#            899. The model is then asked about a sample that is noisier than the timestep it is told. With leading spacing
#            (900, 800, ...) and with trailing spacing the sample lands where it should.
# Matters:   FID and similarity figures taken with linspace spacing and few steps are taken off the trajectory.
# Output seen:
#            leading: timesteps 900, 800 ...; the first step lands at 800
#            trailing: timesteps 999, 899 ...; the first step lands at 899
#            linspace: timesteps 999, 888 ...; the first step lands at 899
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 numpy
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from diffusers import DDIMScheduler

found = {}
for spacing in ("leading", "trailing", "linspace"):
    scheduler = DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(10)
    first, second = scheduler.timesteps[:2].tolist()
    abar = scheduler.alphas_cumprod.double()
    generator = torch.Generator().manual_seed(0)
    clean = torch.full((1, 1, 8, 8), 0.3, dtype=torch.float64)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    noisy = abar[first].sqrt() * clean + (1 - abar[first]).sqrt() * noise
    moved = scheduler.step(noise, first, noisy).prev_sample
    distances = [(moved - (a.sqrt() * clean + (1 - a).sqrt() * noise)).abs().max().item() for a in abar]
    lands = min(range(1000), key=distances.__getitem__)
    print(f"{spacing}: timesteps {first}, {second} ...; the first step lands at {lands}")
    found[spacing] = (second, lands)
if found != {"leading": (800, 800), "trailing": (899, 899), "linspace": (888, 899)}:
    raise SystemExit(f"the behaviour has changed: {found}")
PYTHON
