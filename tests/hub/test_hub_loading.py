"""Loading a pruned repository from the Hub, with this package and (in another interpreter) without."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoModel, DDIMPipeline, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from huggingface_hub import HfApi, constants, file_download
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import _http
from safetensors.torch import load, save

from diffusers_gfprune import GFPrunedUNet2DModel, PruneDDPMPipeline
from diffusers_gfprune.hub import push_folder
from helpers.architectures import build
from helpers.hub import PUBLISHED, assert_published_output, contents, make_run, samples
from helpers.hub_server import OTHER, READ, WRITE, HubServer

REPO, DENSE, HARMFUL = "alice/digits", "alice/dense", "alice/harmful"
CODE = GFPrunedUNet2DModel.source().encode()  # the file that is saved with a pruned model


def make_server(monkeypatch: pytest.MonkeyPatch, folder: Path) -> HubServer:
    """A Hub with a pruned repository that has an fp16 variant, a private one, and a dense one."""
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda _: None))
    hub = HubServer()
    hub.use(monkeypatch, folder / "home", WRITE)
    run = make_run(folder / "run")
    GFPrunedUNet2DModel.from_pretrained(run / "unet").half().save_pretrained(run / "unet", variant="fp16")
    push_folder(run, REPO)
    push_folder(run, "alice/private", private=True)
    dense = build("one-level")
    DDPMPipeline(dense, DDPMScheduler(num_train_timesteps=100)).push_to_hub(DENSE)
    return hub


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, Path]]:
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch, make_server(patch, folder) as hub:
        yield hub, folder


@pytest.fixture
def server(world: tuple[HubServer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The Hub, with an empty cache for every test."""
    world[0].use(monkeypatch, tmp_path / "home", WRITE)
    return world[0]


@pytest.fixture(scope="module")
def known() -> torch.Tensor:
    """Samples before the push."""
    return samples(DDPMPipeline.from_pretrained(PUBLISHED))


def hub_files(server: HubServer, repo: str) -> dict[str, bytes]:
    return {name: data for name, data in server.files(repo).items() if name != ".gitattributes"}


def remote_code() -> list[Path]:
    """Code of repositories, where Diffusers copies it to before it runs it."""
    return list(Path(os.environ["HF_MODULES_CACHE"]).rglob("*.py"))


# --- with the package --------------------------------------------------------------------------------------------------

PIPELINES = [DiffusionPipeline, DDPMPipeline, DDIMPipeline, PruneDDPMPipeline]


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda c: c.__name__)
def test_pipelines_sample_as_before_the_push(server: HubServer, known: torch.Tensor, pipeline: type) -> None:
    pipe = pipeline.from_pretrained(REPO)
    assert type(pipe.unet) is GFPrunedUNet2DModel
    assert torch.equal(samples(pipe), known)
    assert not remote_code()


def test_models(server: HubServer) -> None:
    for loader in (GFPrunedUNet2DModel, AutoModel):
        unet = loader.from_pretrained(REPO, subfolder="unet")
        assert type(unet) is GFPrunedUNet2DModel
        assert_published_output(unet)


def test_auto_model_of_a_repository_of_a_model_alone(server: HubServer) -> None:
    """There is no model_index.json that names this package, and config.json names code."""
    name = "alice/unet-alone"
    GFPrunedUNet2DModel.from_pretrained(PUBLISHED, subfolder="unet").push_to_hub(name)
    files = hub_files(server, name)
    assert b"auto_map" in files["config.json"]
    server.add_repo("alice/unet-in-a-folder", {f"unet/{file}": data for file, data in files.items()})
    for repo, options in ((name, {}), ("alice/unet-in-a-folder", {"subfolder": "unet"})):
        unet = AutoModel.from_pretrained(repo, **options)
        assert type(unet) is GFPrunedUNet2DModel and not remote_code()
        assert_published_output(unet)


def test_published_format_computes_what_it_did() -> None:
    assert_published_output(GFPrunedUNet2DModel.from_pretrained(PUBLISHED, subfolder="unet"))


def test_pinned_revision(server: HubServer, known: torch.Tensor) -> None:
    first = HfApi().model_info(REPO).sha
    config = json.loads(hub_files(server, REPO)["unet/config.json"])
    server.commit(REPO, {"unet/config.json": json.dumps({**config, "layer_channels": {"conv_in": [1, 10**9]}}).encode()})
    try:
        with pytest.raises(ValueError, match="layer_channels"):
            DiffusionPipeline.from_pretrained(REPO)
        assert torch.equal(samples(DiffusionPipeline.from_pretrained(REPO, revision=first)), known)
    finally:
        server.commit(REPO, {"unet/config.json": json.dumps(config).encode()})


def test_variant_and_dtype(server: HubServer) -> None:
    half = DiffusionPipeline.from_pretrained(REPO, variant="fp16", dtype=torch.float16)
    assert half.unet.dtype == torch.float16
    asked = [request.path for request in server.requests if "fp16" in request.path]
    assert asked, "the variant was not what was downloaded"
    full = GFPrunedUNet2DModel.from_pretrained(REPO, subfolder="unet", dtype=torch.bfloat16)
    assert full.dtype == torch.bfloat16
    assert_published_output(DiffusionPipeline.from_pretrained(REPO, variant="fp16").unet.float(), tolerance=5e-3)


def test_device_map(server: HubServer) -> None:
    assert_published_output(GFPrunedUNet2DModel.from_pretrained(REPO, subfolder="unet", device_map={"": "cpu"}))


def test_cache_is_enough(server: HubServer, known: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError):
        DiffusionPipeline.from_pretrained(REPO, local_files_only=True)  # not there yet
    DiffusionPipeline.from_pretrained(REPO)
    count = len(server.requests)
    assert torch.equal(samples(DiffusionPipeline.from_pretrained(REPO, local_files_only=True)), known)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(samples(DiffusionPipeline.from_pretrained(REPO)), known)
    assert len(server.requests) == count


@pytest.mark.parametrize("token", [READ, OTHER, None], ids=["owner", "another", "nobody"])
def test_private_repository(
    server: HubServer, known: torch.Tensor, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    if token == READ:
        assert torch.equal(samples(DiffusionPipeline.from_pretrained("alice/private", token=token)), known)
        return
    with pytest.raises((RepositoryNotFoundError, OSError), match="alice/private"):
        DiffusionPipeline.from_pretrained("alice/private", token=token or False)


def test_dense_repository(server: HubServer) -> None:
    pipe = PruneDDPMPipeline.from_pretrained(DENSE)
    assert type(pipe.unet) is UNet2DModel and samples(pipe).shape == (2, 8, 8, 1)


@pytest.mark.parametrize("pipeline", [DiffusionPipeline, PruneDDPMPipeline], ids=lambda c: c.__name__)
def test_saving_and_pushing_again(server: HubServer, known: torch.Tensor, tmp_path: Path, pipeline: type) -> None:
    pipe = pipeline.from_pretrained(REPO)
    pipe.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again")["unet/diffusers_gfprune.py"] == CODE
    assert torch.equal(samples(DiffusionPipeline.from_pretrained(tmp_path / "again")), known)
    name = f"alice/again-{pipeline.__name__}"
    pipe.push_to_hub(name)
    files = hub_files(server, name)
    assert files["unet/diffusers_gfprune.py"] == CODE
    assert json.loads(files["model_index.json"])["unet"] == ["diffusers_gfprune", "GFPrunedUNet2DModel"]
    assert json.loads(files["model_index.json"])["_class_name"] == "DDPMPipeline"
    assert torch.equal(samples(DiffusionPipeline.from_pretrained(name)), known)


# --- code in repositories ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [*PIPELINES, "AutoModel", "GFPrunedUNet2DModel"], ids=lambda c: getattr(c, "__name__", c))
def test_harmful_code_does_not_run(server: HubServer, tmp_path: Path, loader) -> None:
    """Nothing in the shipped files is executed where the package is installed."""
    trace = tmp_path / "harm"
    harm = f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nraise SystemExit('harm done')\n".encode()
    files = hub_files(server, REPO)
    server.add_repo(HARMFUL, {**files, "unet/diffusers_gfprune.py": harm, "pipeline.py": harm, "__init__.py": harm})
    if isinstance(loader, str):
        loader = {"AutoModel": AutoModel, "GFPrunedUNet2DModel": GFPrunedUNet2DModel}[loader]
        unet = loader.from_pretrained(HARMFUL, subfolder="unet")
    else:
        unet = loader.from_pretrained(HARMFUL).unet
    assert_published_output(unet)
    assert not trace.exists() and not remote_code()


# --- hostile and broken repositories -----------------------------------------------------------------------------------


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def config_with(**changes: object) -> Callable[[dict[str, bytes], Path], None]:
    def change(files: dict[str, bytes], _: Path) -> None:
        config = json.loads(files["unet/config.json"])
        for key, value in changes.items():
            table, _, entry = key.partition("__")
            if entry:
                config[table][entry] = value
            else:
                config[table] = value
        files["unet/config.json"] = json.dumps(config).encode()

    return change


def index_with(unet: list[str]) -> Callable[[dict[str, bytes], Path], None]:
    def change(files: dict[str, bytes], _: Path) -> None:
        index = json.loads(files["model_index.json"])
        files["model_index.json"] = json.dumps({**index, "unet": unet}).encode()

    return change


def pickled_weights(files: dict[str, bytes], trace: Path) -> None:
    for name in [name for name in files if name.endswith(".safetensors")]:
        del files[name]
    files["unet/diffusion_pytorch_model.bin"] = pickle.dumps(Bomb(trace))


def truncated(files: dict[str, bytes], _: Path) -> None:
    files["unet/diffusion_pytorch_model.safetensors"] = files["unet/diffusion_pytorch_model.safetensors"][:-1000]


def pickled_shard(files: dict[str, bytes], trace: Path) -> None:
    names = load(files.pop("unet/diffusion_pytorch_model.safetensors"))
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "weights.pth")}
    files["unet/diffusion_pytorch_model.safetensors.index.json"] = json.dumps(index).encode()
    files["unet/weights.pth"] = pickle.dumps(Bomb(trace))


def without_a_tensor(files: dict[str, bytes], _: Path) -> None:
    tensors = load(files["unet/diffusion_pytorch_model.safetensors"])
    del tensors["conv_in.bias"]
    files["unet/diffusion_pytorch_model.safetensors"] = save(tensors, {"format": "pt"})


NO_CLASS = "is not a model class of diffusers_gfprune"
HOSTILE = {
    "pickled weights": (pickled_weights, "file named diffusion_pytorch_model.safetensors"),
    "huge width": (config_with(layer_channels__conv_in=[1, 10**9]), "must be from 1 to the dense [1, 8]"),
    "huge dense width": (config_with(block_out_channels=[10**9, 10**9]), "block_out_channels=1000000000"),
    "negative width": (config_with(layer_channels__conv_in=[1, -3]), "layer_channels['conv_in']=[1, -3]"),
    "width as a string": (config_with(layer_channels__conv_in=[1, "3"]), "must be two integers"),
    "width that is no number": (config_with(layer_channels__conv_in=[1, float("nan")]), "must be two integers"),
    "no widths": (config_with(layer_channels=None), "attention_heads['down_blocks.1.attentions.0']=3"),
    "unknown layer": (config_with(layer_channels__nothing=[1, 1]), "layer_channels names 'nothing'"),
    "width of no tensor": (config_with(layer_channels__conv_in=[1, 4]), "do not fit together"),
    "path for a name": (config_with(**{"layer_channels__../../conv_in": [1, 3]}), "layer_channels names '../../conv_in'"),
    "heads": (config_with(attention_heads={"mid_block.attentions.0": 10**6}), "must be from 1 to 4"),
    "group sizes": (config_with(norm_group_sizes={"conv_norm_out": [10**9]}), "sizes from 1 to 2"),
    "truncated weights": (truncated, "Unable to load weights"),
    "a shard that is a pickle": (pickled_shard, "safetensors"),
    "missing tensor": (without_a_tensor, "1 missing keys"),
    "another class": (index_with(["diffusers_gfprune", "GradientFlowPruner"]), NO_CLASS),
    "no such class": (index_with(["diffusers_gfprune", "Nothing"]), NO_CLASS),
    "another library": (index_with(["os", "system"]), "unet/os.py"),
}


PIPELINES_ONLY = ("another class", "no such class", "another library")


@pytest.mark.parametrize(
    ("what", "alone"),
    [(what, alone) for what in HOSTILE for alone in (False, True) if not (alone and what in PIPELINES_ONLY)],
    ids=lambda value: {True: "model", False: "pipeline"}.get(value, value),
)
def test_hostile_repositories_are_refused(server: HubServer, tmp_path: Path, what: str, alone: bool) -> None:
    files, trace = hub_files(server, REPO), tmp_path / "harm"
    HOSTILE[what][0](files, trace)
    repo = f"alice/{'-'.join(what.split())}"
    server.add_repo(repo, files)
    with pytest.raises((ValueError, OSError)) as error:
        if alone:
            GFPrunedUNet2DModel.from_pretrained(repo, subfolder="unet")
        else:
            DiffusionPipeline.from_pretrained(repo)
    assert HOSTILE[what][1] in str(error.value)
    assert "\n" not in str(error.value) and not trace.exists()


# --- without the package -----------------------------------------------------------------------------------------------

WITHOUT = """
import json, sys, warnings

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffusers_gfprune":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
torch.set_num_threads(1)
from diffusers import AutoModel, DiffusionPipeline
from helpers.hub import samples
from pathlib import Path

try:
    import diffusers_gfprune
    raise SystemExit("the package can be imported, so this shows nothing")
except ModuleNotFoundError:
    pass

found = {}
try:
    DiffusionPipeline.from_pretrained(REPO)
except ValueError as error:
    found["untrusted"] = str(error)
pipe = DiffusionPipeline.from_pretrained(REPO, trust_remote_code=True)
found["samples"] = samples(pipe).tolist()
for load, words in ((DiffusionPipeline, {"device_map": "balanced"}), (AutoModel, {"subfolder": "unet"})):
    try:
        load.from_pretrained(REPO, trust_remote_code=True, **words)
    except ValueError as error:
        found[load.__name__] = str(error)
pipe.save_pretrained(OUT)
again = DiffusionPipeline.from_pretrained(OUT, trust_remote_code=True)
found["again"] = samples(again).tolist()
again.push_to_hub("alice/found")
found["pushed"] = samples(DiffusionPipeline.from_pretrained("alice/found", trust_remote_code=True)).tolist()
found["custom"] = type(
    DiffusionPipeline.from_pretrained(REPO, custom_pipeline=REPO, trust_remote_code=True)
).__name__
pipe.unet.push_to_hub("alice/unet-found")
try:
    AutoModel.from_pretrained("alice/unet-found")
except ValueError as error:
    found["auto untrusted"] = str(error)
unet = AutoModel.from_pretrained("alice/unet-found", trust_remote_code=True)
found["auto"] = type(unet).__name__
from diffusers import DDIMPipeline
switched = DDIMPipeline.from_pipe(pipe)
found["switched"] = type(switched).__name__ if switched.unet is pipe.unet else None
try:
    DiffusionPipeline.from_pretrained(HARMFUL, trust_remote_code=True)
except SystemExit as error:
    found["harm"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def stranger(world: tuple[HubServer, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """What an interpreter without the package found, and the folder it saved to."""
    hub, _ = world
    folder = tmp_path_factory.mktemp("stranger")
    files = hub_files(hub, REPO)
    hub.add_repo("alice/harm", {**files, "unet/diffusers_gfprune.py": b"raise SystemExit('harm done')"})
    names = {"REPO": REPO, "HARMFUL": "alice/harm", "OUT": str(folder / "saved")}
    script = "".join(f"{name} = {value!r}\n" for name, value in names.items()) + WITHOUT
    environment = {**os.environ, **hub.environment(folder / "home", WRITE), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1]), folder / "saved"


def test_without_trust_the_error_says_what_to_do(stranger: tuple[dict, Path]) -> None:
    message = stranger[0]["untrusted"]
    assert "unet" in message and "diffusers_gfprune.py" in message and "trust_remote_code=True" in message


def test_what_diffusers_refuses_though_trusted(stranger: tuple[dict, Path]) -> None:
    """As of Diffusers 0.42; docs/guides/sharing.md says so."""
    assert "contains custom code" in stranger[0]["DiffusionPipeline"]
    assert "does not appear to have any custom code" in stranger[0]["AutoModel"]


def test_with_trust_the_code_is_run(stranger: tuple[dict, Path]) -> None:
    """So that the tests in which it is not run show something."""
    assert stranger[0]["harm"] == "harm done"


@pytest.mark.parametrize("which", ["samples", "again", "pushed"])
def test_with_trust_samples_are_those_before_the_push(stranger: tuple[dict, Path], known: torch.Tensor, which: str) -> None:
    assert torch.equal(torch.tensor(stranger[0][which], dtype=known.dtype), known)


def test_stranger_keeps_the_code_and_the_layout(stranger: tuple[dict, Path], server: HubServer) -> None:
    code = hub_files(server, REPO)["unet/diffusers_gfprune.py"]
    saved = contents(stranger[1])
    assert saved["unet/diffusers_gfprune.py"] == code
    assert json.loads(saved["model_index.json"])["unet"] == ["diffusers_gfprune", "GFPrunedUNet2DModel"]
    pushed = hub_files(server, "alice/found")
    assert pushed["unet/diffusers_gfprune.py"] == code
    # With the package, a stranger's repository is loaded without running its code
    pipe = DiffusionPipeline.from_pretrained("alice/found")
    assert type(pipe.unet) is GFPrunedUNet2DModel


def test_stranger_uses_our_pipeline_and_auto_model(stranger: tuple[dict, Path]) -> None:
    assert stranger[0]["custom"] == "PruneDDPMPipeline"
    assert stranger[0]["auto"] == "GFPrunedUNet2DModel"
    assert "trust_remote_code=True" in stranger[0]["auto untrusted"]
    assert stranger[0]["switched"] == "DDIMPipeline"


def test_folder_of_a_stranger_is_one_of_ours(stranger: tuple[dict, Path], tmp_path: Path, known: torch.Tensor) -> None:
    shutil.copytree(stranger[1], tmp_path / "copy")
    assert torch.equal(samples(DiffusionPipeline.from_pretrained(tmp_path / "copy")), known)
