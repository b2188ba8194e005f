"""Loading a pruned repository in separate interpreters: with the package, and with Diffusers alone."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline
from huggingface_hub import HfApi

from diffusers_gfprune import GFPrunedUNet2DModel
from diffusers_gfprune.hub import push_folder
from helpers.hub import PUBLISHED, make_run, samples
from helpers.hub_server import READ, WRITE, HubServer

SCRIPT = """
import json, os, sys
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffusers_gfprune":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

if WITH:
    import diffusers_gfprune
    options = {}
else:
    sys.meta_path.insert(0, Absent())
    options = {"trust_remote_code": True}
import torch
torch.set_num_threads(1)
from diffusers import AutoModel, DDIMPipeline, DDPMPipeline, DiffusionPipeline
from helpers.hub import samples

found = {}
for name, pipeline in {"any": DiffusionPipeline, "ddpm": DDPMPipeline, "ddim": DDIMPipeline}.items():
    found[name] = samples(pipeline.from_pretrained("alice/digits", **options)).tolist()
found["revision"] = samples(DiffusionPipeline.from_pretrained("alice/digits", revision=FIRST, **options)).tolist()
found["device_map"] = samples(DiffusionPipeline.from_pretrained("alice/digits", device_map="cpu", **options)).tolist()
try:
    DiffusionPipeline.from_pretrained("alice/private", token=False, **options)
except Exception as error:
    found["refused"] = type(error).__name__
found["private"] = samples(DiffusionPipeline.from_pretrained("alice/private", token=TOKEN, **options)).tolist()
found["cached"] = samples(DiffusionPipeline.from_pretrained("alice/digits", local_files_only=True, **options)).tolist()
half = DiffusionPipeline.from_pretrained("alice/digits", variant="fp16", dtype=torch.float16, **options)
found["half"] = str(half.unet.dtype)
if WITH:
    from diffusers_gfprune import GFPrunedUNet2DModel, PruneDDPMPipeline
    found["ours"] = samples(PruneDDPMPipeline.from_pretrained("alice/digits")).tolist()
    for name, loader in {"auto": AutoModel, "model": GFPrunedUNet2DModel}.items():
        pipe = DDPMPipeline.from_pretrained("alice/digits", unet=loader.from_pretrained("alice/digits", subfolder="unet"))
        found[name] = samples(pipe).tolist()
copies = Path(os.environ["HF_MODULES_CACHE"]).rglob("diffusers_gfprune.py")  # Diffusers runs code of repositories from there
found["remote_code"] = bool(list(copies))
print(json.dumps(found))
"""
OFFLINE = """
from diffusers import DiffusionPipeline
DiffusionPipeline.from_pretrained("alice/digits", **({} if WITH else {"trust_remote_code": True}))
"""
SAME = ("any", "ddpm", "ddim", "revision", "device_map", "private", "cached")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, str]]:
    """A Hub with a pruned repository that has an fp16 variant, and a private one."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch, HubServer() as server:
        server.use(patch, folder / "home", WRITE)
        run = make_run(folder / "run")
        push_folder(run, "alice/digits")
        first = HfApi().model_info("alice/digits").sha
        GFPrunedUNet2DModel.from_pretrained(run / "unet").half().save_pretrained(run / "unet", variant="fp16")
        push_folder(run, "alice/digits")
        push_folder(run, "alice/private", private=True)
        yield server, first


@pytest.fixture(
    scope="module",
    params=[pytest.param(True, id="with the package", marks=pytest.mark.slow), pytest.param(False, id="without")],
)
def finder(request, hub: tuple[HubServer, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, dict]:
    """What the script found, online and then from the cache alone."""
    server, first = hub
    folder = tmp_path_factory.mktemp("finder")
    names = {"WITH": request.param, "FIRST": first, "TOKEN": READ}
    head = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    environment = {**os.environ, **server.environment(folder), "OMP_NUM_THREADS": "1"}

    def start(script: str, **variables: str) -> str:
        command = [sys.executable, "-c", head + script]
        run = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, cwd=folder)
        assert run.returncode == 0, run.stderr
        return run.stdout

    found = json.loads(start(SCRIPT, HF_HUB_OFFLINE="0").splitlines()[-1])
    count = len(server.requests)
    package = "import diffusers_gfprune\n" if request.param else ""
    start(package + OFFLINE, HF_HUB_OFFLINE="1")
    assert len(server.requests) == count
    return request.param, found


def samples_by_the_file_of(folder: Path) -> torch.Tensor:
    """Samples by the model file that lies in a pipeline's folder, which may be older than the package."""
    spec = importlib.util.spec_from_file_location("file_of_a_revision", folder / "unet/diffusers_gfprune.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    unet = module.GFPrunedUNet2DModel.from_pretrained(folder / "unet")
    return samples(DDPMPipeline.from_pretrained(folder, unet=unet))


@pytest.mark.slow
def test_samples_are_those_before_the_push(finder: tuple[bool, dict]) -> None:
    """Bit for bit; without the package, a revision runs the file that it came with."""
    with_package, found = finder
    known = samples(DDPMPipeline.from_pretrained(PUBLISHED))
    of_file = samples_by_the_file_of(PUBLISHED)
    torch.testing.assert_close(of_file, known, rtol=0, atol=1e-5)
    for name in (*SAME, *(("ours", "auto", "model") if with_package else ())):
        expected = of_file if name == "revision" and not with_package else known
        assert torch.equal(torch.tensor(found[name], dtype=known.dtype), expected), name


@pytest.mark.slow
def test_private_variant_and_code(finder: tuple[bool, dict]) -> None:
    with_package, found = finder
    assert found["refused"] in ("OSError", "RepositoryNotFoundError", "HfHubHTTPError")
    assert found["half"] == "torch.float16"
    assert found["remote_code"] is not with_package
