#!/usr/bin/env bash
# Importing a UNet of Diffusers imports PEFT, bitsandbytes and SciPy's optimizers, if they are installed.
#
# Versions:  diffusers 0.42.1, peft 0.21.2, bitsandbytes 0.50.2, transformers 5.24.0, scipy 1.17.1, torch 2.13.0, Python 3.11
# Guess:     Diffusers imports lazily: packages for adapters and quantization are imported once a model has an adapter or a
#            quantization config.
# Seen:      All of them are imported with the class. Models are adapter and quantization mixins, whose modules import the
#            packages at the top; PEFT brings the models of transformers, and these the losses, which use SciPy.
# Matters:   Each process that loads a UNet waits for these imports. Programs that start many processes, such as tests, are
#            quicker in environments without packages that they do not use.
# Output seen:
#            from diffusers import DDPMScheduler: none
#            from diffusers import UNet2DModel: bitsandbytes, peft, scipy.optimize, transformers.modeling_utils
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 peft==0.21.2 bitsandbytes==0.50.2 scipy==1.17.1 numpy
cd "$folder"
for name in DDPMScheduler UNet2DModel; do
    venv/bin/python - "$name" <<'PYTHON'
import importlib
import sys

getattr(importlib.import_module("diffusers"), sys.argv[1])
watched = ("bitsandbytes", "peft", "scipy.optimize", "transformers.modeling_utils")
found = [name for name in watched if name in sys.modules]
print(f"from diffusers import {sys.argv[1]}: {', '.join(found) or 'none'}")
if found != (list(watched) if sys.argv[1] == "UNet2DModel" else []):
    raise SystemExit("the behaviour has changed")
PYTHON
done
