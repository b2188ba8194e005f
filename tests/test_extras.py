"""extras.py: a plain install loads and prunes; missing packages are reported in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.hub import PUBLISHED

ABSENT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        absent = {"accelerate", "peft", "cleanfid", "datasets", "matplotlib", "psutil", "skimage", "torchvision"}
        return None if name.partition(".")[0] in absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def run(code: str) -> subprocess.CompletedProcess:
    """Code in a process in which the extra is not installed."""
    return subprocess.run([sys.executable, "-c", ABSENT + code], capture_output=True, text=True)


@pytest.mark.slow  # test_import_rules.py follows the imports without a new process
def test_pruned_repositories_load_without_the_extra() -> None:
    code = f"""
import diffusers_gfprune
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(PUBLISHED)!r}, low_cpu_mem_usage=False)
print(type(pipe.unet).__name__)
"""
    done = run(code)
    assert done.stdout.split()[-1:] == ["GFPrunedUNet2DModel"], done.stderr


@pytest.mark.slow
def test_one_call_prunes_without_the_extra() -> None:
    code = """
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers_gfprune import PruneDDPMPipeline
unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 32), layers_per_block=1,
                   norm_num_groups=8, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
pipe = PruneDDPMPipeline(unet=unet, scheduler=DDPMScheduler())
print(type(pipe.prune(torch.rand(4, 1, 8, 8) * 2 - 1, ratio=0.3).unet).__name__)
"""
    done = run(code)
    assert done.stdout.split()[-1:] == ["GFPrunedUNet2DModel"], done.stderr


@pytest.mark.slow
def test_training_says_what_to_install() -> None:
    done = run("import diffusers_gfprune.training.run_setup")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("ImportError: accelerate, ")
    assert done.stderr.splitlines()[-1].endswith("not installed: pip install 'diffusers-gfprune[training]'")


@pytest.mark.slow
def test_scripts_say_what_to_install_in_one_line() -> None:
    done = run("import runpy; runpy.run_module('diffusers_gfprune.scripts.prune_ddpm', run_name='__main__')")
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("diffusers_gfprune.scripts: error: accelerate, ") and "Traceback" not in done.stderr
    assert error.endswith("not installed: pip install 'diffusers-gfprune[training]'")
