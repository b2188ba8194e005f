#!/usr/bin/env bash
# After `delete_adapters`, a model of Diffusers is saved under names that do not load: layers become random again.
#
# Versions:  diffusers 0.42.1, peft 0.21.2, transformers 5.24.0, accelerate 1.15.0, torch 2.13.0, numpy 2.4.6
# Guess:     a model without its last adapter is the plain model again, and `save_pretrained` writes the plain names.
# Seen:      `delete_adapters` removes the LoRA weights and keeps PEFT's wrappers around the layers. The model computes what it
#            did before, and is saved with names such as `to_q.base_layer.weight`. `from_pretrained` warns that these are not used
#            and that `to_q.weight` is newly initialized, and returns a model with random layers. `unload_lora` removes the
#            wrappers as well.
# Matters:   a model that is saved after an experiment with an adapter is damaged, and only a warning at loading says so.
# Output seen:
#            delete_adapters: the same in memory, 8 wrapped names, another model after loading
#            unload_lora: the same in memory, 0 wrapped names, the same after loading
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import copy

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors import safe_open

torch.manual_seed(0)
plain = UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=12,
    attention_head_dim=4,
).eval()
sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 12)


@torch.no_grad()
def same(model):
    return torch.allclose(model.eval()(sample, 3, text).sample, plain(sample, 3, text).sample, atol=1e-5)


found = {}
for way in ("delete_adapters", "unload_lora"):
    model = copy.deepcopy(plain)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    model.delete_adapters("style") if way == "delete_adapters" else model.unload_lora()
    in_memory = same(model)
    model.save_pretrained(way)
    with safe_open(f"{way}/diffusion_pytorch_model.safetensors", "pt") as file:
        wrapped = sum(".base_layer." in name for name in file.keys())
    loaded = same(UNet2DConditionModel.from_pretrained(way))
    found[way] = (in_memory, wrapped, loaded)
    words = ("the same" if in_memory else "another model", "the same" if loaded else "another model")
    print(f"{way}: {words[0]} in memory, {wrapped} wrapped names, {words[1]} after loading")
if found != {"delete_adapters": (True, 8, False), "unload_lora": (True, 0, True)}:
    raise SystemExit(f"the behaviour has changed: {found}")
PYTHON
