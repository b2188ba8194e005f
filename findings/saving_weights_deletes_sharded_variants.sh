#!/usr/bin/env bash
# Saving a model in Diffusers deletes the sharded weights of its variants in the same folder, and leaves their index.
#
# Versions:  diffusers 0.42.1, torch 2.13.0, safetensors 0.8.0, numpy 2.4.6
# Guess:     `save_pretrained(folder, variant="fp16")` and `save_pretrained(folder)` lie side by side, as in repositories on the
#            Hub; the second call touches only its own weights.
# Seen:      before it writes, it deletes all shards whose names begin with `diffusion_pytorch_model`, those of variants too, but
#            not `diffusion_pytorch_model.safetensors.index.fp16.json`. The variant can no longer be loaded. The other order, the
#            variant last, keeps both. Variants in one file are kept.
# Matters:   models of more than 10 GB are sharded by default. The weights of the variant are gone, without a warning. Save
#            variants last.
# Output seen:
#            default weights last: 0 of 13 shards left, FileNotFoundError
#            variant last: 13 of 13 shards left, loads
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 safetensors==0.8.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
from pathlib import Path

from diffusers import UNet2DModel

model = UNet2DModel(
    sample_size=8,
    block_out_channels=(16, 16),
    layers_per_block=1,
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
)
found = {}
for order in (("fp16", None), (None, "fp16")):
    place = Path("default-last" if order[1] is None else "variant-last")
    for variant in order:
        model.save_pretrained(place, variant=variant, max_shard_size="30KB" if variant else "5GB")
        if variant:
            written = len(list(place.glob("*.fp16-*.safetensors")))
    left = len(list(place.glob("*.fp16-*.safetensors")))
    try:
        UNet2DModel.from_pretrained(place, variant="fp16")
        said = "loads"
    except OSError as error:
        said = type(error).__name__
    title = place.name.replace("-", " ").replace("default", "default weights")
    print(f"{title}: {left} of {written} shards left, {said}")
    found[place.name] = (left == written, left, said)
if found != {"default-last": (False, 0, "FileNotFoundError"), "variant-last": (True, written, "loads")}:
    raise SystemExit(f"the behaviour has changed: {found}")
PYTHON
