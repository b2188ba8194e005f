"""Pruned models of all families in an interpreter that has Diffusers but not this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from safetensors.torch import save_file

from helpers.families import BASES, inputs, pruned, run

WITHOUT = """
import json, sys
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffusers_gfprune":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
torch.set_num_threads(1)
from diffusers import AutoModel, DiffusionPipeline
from safetensors.torch import load_file

folder, found = Path(sys.argv[1]), {}
for family in sys.argv[2:]:
    values = {name: value.clone() for name, value in load_file(folder / f"{family}.safetensors").items()}  # aligned, as before
    wanted = values.pop("wanted")
    try:
        AutoModel.from_pretrained(str(folder / family))
        found[family] = ["loaded without trust"]
        continue
    except ValueError as error:
        untrusted = "trust_remote_code=True" in str(error)
    model = AutoModel.from_pretrained(str(folder / family), trust_remote_code=True)
    with torch.no_grad():
        same = torch.equal(model(values.pop("sample"), **values).sample, wanted)
    model.save_pretrained(folder / f"{family}-again")
    files = [(folder / name / "diffusers_gfprune.py").read_bytes() for name in (family, f"{family}-again")]
    found[family] = [untrusted, type(model).__name__, same, files[0] == files[1]]
pipe = DiffusionPipeline.from_pretrained(folder / "pipeline", trust_remote_code=True)
found["pipeline"] = type(pipe.transformer).__name__
print(json.dumps(found))
"""


def test_stock_diffusers_loads_them_if_the_repository_is_trusted(tmp_path: Path) -> None:
    """From the one file beside the weights, to the same outputs."""
    for family in BASES:
        model = pruned(family)
        model.save_pretrained(tmp_path / family)
        sample, timestep, conditioning = inputs(model)
        values = {"sample": sample, "timestep": timestep, **conditioning, "wanted": run(model)}
        save_file({name: value.contiguous() for name, value in values.items()}, tmp_path / f"{family}.safetensors")
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    DiTPipeline(pruned("dit"), vae, DDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    command = [sys.executable, "-c", WITHOUT, str(tmp_path), *BASES]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "code")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    names = {family: type(pruned(family)).__name__ for family in BASES}
    wanted = {family: [True, name, True, True] for family, name in names.items()}
    assert json.loads(done.stdout.splitlines()[-1]) == {**wanted, "pipeline": names["dit"]}
