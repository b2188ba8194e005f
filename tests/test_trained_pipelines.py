"""trained_pipelines.py: pipelines load in every layout, or are refused by name; saving preserves them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMPipeline,
    PNDMScheduler,
)

from diffusers_gfprune import GFPrunedUNet2DModel, PruneDDPMPipeline
from diffusers_gfprune.trained_pipelines import load_pipeline
from helpers.architectures import build, pruned
from helpers.hub_server import WRITE, HubServer
from helpers.latent_pipelines import save

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "training/digits/teacher"


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "abc"}),
        ("unet/config.json", {"block_out_channels": None}),
        ("unet/config.json", {"norm_num_groups": 0}),
        ("model_index.json", {"unet": None}),
        ("model_index.json", {"scheduler": None}),
        ("model_index.json", {"_class_name": None}),
        ("model_index.json", {"scheduler": ["diffusers", "NoSuchScheduler"]}),
        ("scheduler/scheduler_config.json", {"beta_end": 20}),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2]}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "cubic"}),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}),
        ("scheduler/scheduler_config.json", {"variance_type": "learned"}),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
        ("unet/config.json", {"sample_size": None}),
        ("unet/config.json", {"time_embedding_type": "learned", "num_train_timesteps": 10}),
        ("unet/config.json", {"out_channels": 2}),
    ],
)
def test_broken_configurations_are_refused(file: str, change: dict, tmp_path: Path) -> None:
    shutil.copytree(TEACHER, tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match="pretrained_model_name_or_path="):
        load_pipeline(str(tmp_path / "model"))


def test_a_model_without_its_scheduler_is_refused(tmp_path: Path) -> None:
    build("base").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="it has no model_index.json: a denoiser without its scheduler is not enough"):
        load_pipeline(str(tmp_path / "model"))


def test_components_at_the_root(tmp_path: Path) -> None:
    """Old repositories, such as google/ddpm-cifar10-32, have no subfolders."""
    for source in (TEACHER / "unet", TEACHER / "scheduler", TEACHER):
        for path in source.iterdir():
            if path.is_file():
                shutil.copy(path, tmp_path / path.name)
    found, expected = load_pipeline(str(tmp_path)), load_pipeline(str(TEACHER))
    assert found.scheduler.config.num_train_timesteps == 1000
    assert all(torch.equal(a, b) for a, b in zip(found.denoiser.parameters(), expected.denoiser.parameters()))


def test_another_kind_of_pipeline_is_refused(tmp_path: Path) -> None:
    shutil.copytree(TEACHER, tmp_path / "model")
    index = tmp_path / "model/model_index.json"
    index.write_text(index.read_text().replace("UNet2DModel", "UNet2DConditionModel"))
    with pytest.raises(ValueError, match="its unet is a UNet2DConditionModel"):
        load_pipeline(str(tmp_path / "model"))


def test_a_broken_index_is_refused(tmp_path: Path) -> None:
    shutil.copytree(TEACHER, tmp_path / "model")
    (tmp_path / "model/model_index.json").write_text("{not json")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_pipeline(str(tmp_path / "model"))


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    """The revision would have no effect, and results would name an unused commit."""
    with pytest.raises(ValueError, match=f"={tmp_path} is a folder: revision=v9 applies to Hub repositories only"):
        load_pipeline(str(tmp_path), "v9")


def test_what_is_neither_a_folder_nor_a_repository_may_be_mistyped() -> None:
    with pytest.raises(ValueError, match="=runs/no-model cannot be loaded: there is no such folder, and as a repository: C"):
        load_pipeline("runs/no-model")


def test_a_pruned_model_is_not_pruned_again(tmp_path: Path) -> None:
    PruneDDPMPipeline(pruned("base"), DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its unet is a GFPrunedUNet2DModel: it has been pruned already, take the dense mod"):
        load_pipeline(str(tmp_path))
    assert load_pipeline(str(tmp_path), pruned=True).scheduler.config.num_train_timesteps == 1000


def write(kind: type, folder: Path, scheduler, **components) -> Path:
    """A pipeline of random weights."""
    kind(unet=build("base"), scheduler=scheduler, **components).save_pretrained(folder)
    return folder


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    unet = build("base")
    with torch.no_grad():
        unet.conv_in.bias[3] = torch.inf
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match="model cannot be loaded: the weight conv_in.bias of its unet holds values that are not finite"
    ):
        load_pipeline(str(tmp_path / "model"))


def test_a_pipeline_of_pixels_has_no_autoencoder(tmp_path: Path) -> None:
    """Its UNet would be trained on pixels, and its decoder dropped."""
    save("ldm", tmp_path / "model")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    (tmp_path / "model/model_index.json").write_text(json.dumps({**index, "_class_name": "DDPMPipeline"}))
    with pytest.raises(ValueError, match="its DDPMPipeline has a component vqvae; only unet and scheduler are supported"):
        load_pipeline(str(tmp_path / "model"))
    for name in ("LDMPipeline", "DDPMPipeline"):
        (tmp_path / "model/model_index.json").write_text(json.dumps({**index, "_class_name": name}))
        with pytest.raises(ValueError, match="LDMPipeline, which is not supported|has a component vqvae"):
            PruneDDPMPipeline.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", ["KandinskyPipeline", None, ["code", "MyPipeline"]])
def test_another_pipeline_is_refused(name: object, tmp_path: Path) -> None:
    shutil.copytree(TEACHER, tmp_path / "model")
    path = tmp_path / "model/model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": name}))
    with pytest.raises(
        ValueError, match=r"its pipeline is a .*, which is not supported; supported: DDPMPipeline, .*DiTPipeline"
    ):
        load_pipeline(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("scheduler", "reason"), [(FlowMatchHeunDiscreteScheduler, "flow matching"), (EulerDiscreteScheduler, "noise levels")]
)
def test_other_processes_are_refused(scheduler: type, reason: str, tmp_path: Path) -> None:
    """Their configuration would be poured into a DDPM's."""
    write(DDPMPipeline, tmp_path / "model", scheduler())
    with pytest.raises(ValueError, match=f"cannot be loaded: scheduler={scheduler.__name__} is not supported, .*{reason}"):
        load_pipeline(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        (DDPMPipeline, DDPMScheduler(num_train_timesteps=50, beta_schedule="sigmoid", clip_sample=False)),
        (DDPMPipeline, DPMSolverMultistepScheduler(num_train_timesteps=50, solver_order=3, use_karras_sigmas=True)),
        (DDIMPipeline, DDIMScheduler(num_train_timesteps=50, set_alpha_to_one=False, steps_offset=1)),
        (PNDMPipeline, PNDMScheduler(num_train_timesteps=50, skip_prk_steps=True)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else type(value).__name__,
)
def test_pipelines_are_saved_as_what_they_were(kind: type, scheduler, tmp_path: Path) -> None:
    """Class, scheduler and its configuration; and stock Diffusers loads and samples them."""
    loaded = load_pipeline(str(write(kind, tmp_path / "model", scheduler)))
    loaded.save(pruned("base"), tmp_path / "pruned")
    found = DiffusionPipeline.from_pretrained(tmp_path / "pruned")
    assert type(found) is kind and type(found.scheduler) is type(scheduler)
    assert type(found.unet) is GFPrunedUNet2DModel
    configs = [json.loads((tmp_path / name / "scheduler/scheduler_config.json").read_text()) for name in ("model", "pruned")]
    assert configs[0] == configs[1]
    indices = [json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("model", "pruned")]
    assert indices[1] == {**indices[0], "unet": ["diffusers_gfprune", "GFPrunedUNet2DModel"]}
    found.set_progress_bar_config(disable=True)
    images = found(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (1, 8, 8, 1) and (images >= 0).all()


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_of_one_variant_are_found_and_said(sharded: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As repositories with fp16 files only have them; they are trained in float32."""
    options = {"variant": "fp16", **({"max_shard_size": "30KB"} if sharded else {})}
    DDPMPipeline(build("base").half(), DDPMScheduler()).save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model/unet")
    build("base").half().save_pretrained(tmp_path / "model/unet", **options)
    assert (len(list((tmp_path / "model/unet").glob("*.safetensors"))) > 1) == sharded
    found = load_pipeline(str(tmp_path / "model")).denoiser
    assert "the unet has weights of the variant fp16 only" in caplog.text
    for mine, other in zip(found.parameters(), build("base").parameters()):
        assert mine.dtype == torch.float32 and torch.equal(mine, other.half().float())


def test_default_weights_are_taken_where_there_are_variants(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(DDPMPipeline, tmp_path / "model", DDPMScheduler())
    build("base", seed=1).save_pretrained(folder / "unet", variant="non_ema")
    found = load_pipeline(str(folder)).denoiser
    assert torch.equal(next(found.parameters()), next(build("base").parameters())) and not caplog.text
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(ValueError, match="weights of the variants fp16, non_ema and no default weights: keep one"):
        load_pipeline(str(folder))


def test_a_repository_with_a_variant_only_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers leaves out files of variants that it is not asked for."""
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "home", WRITE)
        DDPMPipeline(build("base").half(), DDPMScheduler()).push_to_hub("alice/half", variant="fp16")
        found = load_pipeline("alice/half")
    assert torch.equal(next(found.denoiser.parameters()), next(build("base").parameters()).half().float())
