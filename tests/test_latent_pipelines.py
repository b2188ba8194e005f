"""trained_pipelines.py with latent pipelines: loaded with all their components, refused by name, and saved whole."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from diffusers_gfprune import GradientFlowPruner
from diffusers_gfprune.diffusion.schedulers import training_process
from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.metrics.model_size import count_parameters
from diffusers_gfprune.pipeline_parts import PipelineParts
from diffusers_gfprune.trained_pipelines import TrainedPipeline, load_pipeline
from helpers.architectures import BASE
from helpers.hub import contents
from helpers.hub_server import WRITE, HubServer
from helpers.latent_models import autoencoder, text_encoder, tokenizer
from helpers.latent_pipelines import BETAS, PIPELINES, save, sd
from helpers.pruners import one_shot

CALLS = {
    "dit": {"class_labels": [0, 1], "guidance_scale": 1},  # DiTPipeline has the null label of ImageNet built in
    "ldm": {"batch_size": 2},
    "sd": {"prompt": ["a cat", "a dog"]},
    "sdxl": {"prompt": ["a cat", "a dog"]},
    "ldm-text": {"prompt": ["a cat", "a dog"]},
    "pixart": {"prompt": ["a cat", "a dog"], "use_resolution_binning": False},
    "pixart-sigma": {"prompt": ["a cat", "a dog"], "use_resolution_binning": False},
    "sd3": {"prompt": ["a cat", "a dog"]},
}
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "projection_dim": 8}
SAFETY = CLIPConfig(vision_config={**SIZES, "image_size": 8, "patch_size": 4}, text_config=SIZES, projection_dim=8)
STOCK = """
import sys
import numpy as np
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "diffusers_gfprune.pruner" not in sys.modules
pipe.set_progress_bar_config(disable=True)
np.save(sys.argv[2], pipe(**eval(sys.argv[3]), generator=torch.Generator().manual_seed(1), output_type="np",
                          num_inference_steps=2).images)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saved pipelines by name, made once; tests only read them."""
    folder = tmp_path_factory.mktemp("pipelines")

    def get(name: str) -> Path:
        return folder / name if (folder / name).exists() else save(name, folder / name)

    return get


def pruned(pipeline: TrainedPipeline) -> torch.nn.Module:
    """Its denoiser without a third of its parameters, by magnitude."""
    config = one_shot(target="params", ratio=0.3, criterion="magnitude")
    pruner = GradientFlowPruner(pipeline.denoiser, config, pipeline.process)
    pruner.step(0, ())
    return pruner.compact()


def images(pipe: DiffusionPipeline, name: str) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return torch.from_numpy(pipe(**CALLS[name], generator=generator, output_type="np", num_inference_steps=2).images)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_loaded_with_all_that_its_training_needs(name: str, saved: Callable[[str], Path]) -> None:
    found, stock = load_pipeline(str(saved(name))), DiffusionPipeline.from_pretrained(saved(name))
    assert found.kind is type(stock)
    component = family_of(found.denoiser).component
    wanted = getattr(stock, component).state_dict()
    assert all(torch.equal(values, wanted[key]) for key, values in found.denoiser.state_dict().items())
    assert found.codec.latent_channels == found.denoiser.config.in_channels
    assert (found.prompts is not None) == (name not in ("dit", "ldm"))


@pytest.mark.parametrize("name", ["dit", "sd"])
def test_space_is_needed_for_all_that_is_saved(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    """VAE and text encoder, too; the header of the denoiser's file and its configuration are small."""
    pipeline = load_pipeline(str(saved(name)))
    pipeline.save(pipeline.denoiser, tmp_path / "again")
    written = sum(path.stat().st_size for path in (tmp_path / "again").rglob("*") if path.is_file())
    assert 0 < written - pipeline.saved_bytes() < 2**17


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pruned_pipeline_is_whole_and_loads_in_both_ways(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Everything but the denoiser is the same, byte for byte; samples do not depend on how it was loaded."""
    pipeline = load_pipeline(str(saved(name)))
    component = family_of(pipeline.denoiser).component
    pipeline.save(small := pruned(pipeline), tmp_path / "pruned")
    before, after = contents(saved(name)), contents(tmp_path / "pruned")
    unchanged = {path: data for path, data in before.items() if path.partition("/")[0] not in (component, "model_index.json")}
    assert unchanged == {path: data for path, data in after.items() if path in unchanged}
    own = {f"{component}/{file}" for file in ("config.json", "diffusers_gfprune.py", "diffusion_pytorch_model.safetensors")}
    assert set(after) == {*unchanged, *own, "model_index.json"}
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pruned")  # this package is imported, and no code is run
    assert type(pipe) is pipeline.kind and type(getattr(pipe, component)) is type(small)
    assert count_parameters(small) < 0.8 * count_parameters(pipeline.denoiser)
    again = load_pipeline(str(tmp_path / "pruned"), pruned=True)
    assert type(again.denoiser) is type(small)
    with pytest.raises(ValueError, match=f"its {component} is a GFPruned"):
        load_pipeline(str(tmp_path / "pruned"))
    command = [sys.executable, "-c", STOCK, tmp_path / "pruned", tmp_path / "images.npy", repr(CALLS[name])]
    subprocess.run(list(map(str, command)), check=True, cwd=tmp_path, capture_output=True)
    theirs = torch.from_numpy(np.load(tmp_path / "images.npy"))
    torch.testing.assert_close(images(pipe, name), theirs, rtol=0, atol=1e-5)
    assert theirs.std() > 0.01


def test_latents_of_models_from_before_scaling_factor_are_not_scaled(
    tmp_path: Path, saved: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Diffusers fills in 0.18215, with which CompVis/ldm-celebahq-256 makes noise (diffusers#6725, checked with 0.42.1)."""
    shutil.copytree(saved("ldm"), tmp_path / "old")
    path = tmp_path / "old/vqvae/config.json"
    config = json.loads(path.read_text())
    del config["scaling_factor"]
    path.write_text(json.dumps(config))
    assert DiffusionPipeline.from_pretrained(tmp_path / "old").vqvae.config.scaling_factor == 0.18215
    pipeline = load_pipeline(str(tmp_path / "old"))
    assert pipeline.codec.draw.scale.item() == pipeline.stock().vqvae.config.scaling_factor == 1
    assert "the config.json of the vqvae has no scaling_factor: 1 is taken" in caplog.text
    pipeline.save(pruned(pipeline), tmp_path / "saved")
    assert json.loads((tmp_path / "saved/vqvae/config.json").read_text()) == {**config, "scaling_factor": 1.0}
    with caplog.at_level(logging.WARNING):
        PipelineParts.of(DiffusionPipeline.from_pretrained(tmp_path / "old"))
        assert "pipe.vqvae.register_to_config(scaling_factor=1.0)" in caplog.text
        caplog.clear()
        PipelineParts.of(DiffusionPipeline.from_pretrained(tmp_path / "saved"), pruned=True)
        assert not caplog.records


def test_a_pipeline_of_one_variant_is_saved_without_it(tmp_path: Path) -> None:
    """Or the line of its card could not load it."""
    pipe = sd(tmp_path / "made")
    pipe.register_modules(safety_checker=StableDiffusionSafetyChecker(SAFETY), feature_extractor=CLIPImageProcessor())
    pipe.save_pretrained(tmp_path / "model", variant="fp16")
    pipeline = load_pipeline(str(tmp_path / "model"))
    assert type(pipeline.stock().safety_checker) is StableDiffusionSafetyChecker  # the demo samples with all components
    pipeline.save(pruned(pipeline), tmp_path / "saved")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.vae.encoder.conv_in.weight, pipeline.codec.vae.encoder.conv_in.weight)
    pipeline.copy_others(tmp_path / "settings", weights=False)
    names = {path.name for path in (tmp_path / "settings").rglob("*") if path.is_file()}
    assert {"config.json", "tokenizer_config.json"} <= names and not any(name.endswith(".safetensors") for name in names)


def test_components_that_are_not_used_travel_unloaded(tmp_path: Path) -> None:
    """Such as a safety checker, whatever its weights are."""
    pipe = sd(tmp_path / "model")
    pipe.register_modules(safety_checker=StableDiffusionSafetyChecker(SAFETY), feature_extractor=CLIPImageProcessor())
    pipe.register_to_config(requires_safety_checker=True)
    pipe.save_pretrained(tmp_path / "model")
    pipeline = load_pipeline(str(tmp_path / "model"))
    pipeline.save(pruned(pipeline), tmp_path / "pruned")
    checker = {name: data for name, data in contents(tmp_path / "model").items() if name.startswith(("safety", "feature"))}
    assert len(checker) == 3 and checker.items() <= contents(tmp_path / "pruned").items()
    assert json.loads((tmp_path / "pruned/model_index.json").read_text())["requires_safety_checker"]
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "pruned").safety_checker) is StableDiffusionSafetyChecker
    weights = tmp_path / "model/safety_checker/model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ValueError, match="its safety_checker has pytorch_model.bin: only safetensors are copied, not pickles"):
        load_pipeline(str(tmp_path / "model"))


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_transformers_of_the_earlier_class_are_loaded(name: str, tmp_path: Path) -> None:
    """As repositories of DiT and PixArt-alpha name it; the pruned pipeline names the class of this package."""
    save(name, tmp_path / "model")
    known = load_pipeline(str(tmp_path / "model"))
    edit_json("model_index.json", transformer=["diffusers", "Transformer2DModel"])(tmp_path / "model")
    edit_json("transformer/config.json", _class_name="Transformer2DModel", num_vector_embeds=None)(tmp_path / "model")
    found = load_pipeline(str(tmp_path / "model"))
    assert type(found.denoiser) is type(known.denoiser)
    assert all(torch.equal(values, found.denoiser.state_dict()[key]) for key, values in known.denoiser.state_dict().items())
    found.save(small := pruned(found), tmp_path / "pruned")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "pruned").transformer) is type(small)


def test_a_latent_pipeline_is_downloaded(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "home", WRITE)
        DiffusionPipeline.from_pretrained(saved("sd")).push_to_hub("alice/sd")
        found = load_pipeline("alice/sd")
    assert found.prompts is not None and found.codec is not None
    found.save(found.denoiser, tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {
        *("model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"),
    }


def edit_json(file: str, **changes: object) -> Callable[[Path], None]:
    """Change values of a JSON file of the pipeline."""

    def edit(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def without_weight(file: str) -> Callable[[Path], None]:
    """Remove a weight of a component."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / file)
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return edit


def another_vae(folder: Path) -> None:
    autoencoder(latent_channels=3).save_pretrained(folder / "vae")


def another_text_encoder(folder: Path) -> None:
    text_encoder(tokenizer(folder / "tokenizer"), width=24).save_pretrained(folder / "text_encoder")


def pieces_alone(folder: Path) -> None:
    """As published repositories of T5 are."""
    (folder / "tokenizer/tokenizer.json").rename(folder / "tokenizer/spiece.model")


MISFITS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "vae": ("dit", another_vae, "the VAE makes latents of 3 channels, but the model has in_channels=4"),
    "text encoder": ("sd", another_text_encoder, "have width 24, but the model needs 16"),
    "vae weights": ("dit", without_weight("vae/diffusion_pytorch_model.safetensors"), "1 weights of its vae do not fit its"),
    "text weights": ("sd", without_weight("text_encoder/model.safetensors"), "1 weights of its text_encoder do not fit"),
    "vae class": (
        *("dit", edit_json("model_index.json", vae=["diffusers", "AutoencoderTiny"])),
        "its vae is a AutoencoderTiny, not a AutoencoderKL or VQModel",
    ),
    "tokenizer class": (
        *("sd", edit_json("model_index.json", tokenizer=["transformers", "T5Tokenizer"])),
        "its tokenizer is a T5Tokenizer, not a CLIPTokenizer",
    ),
    "missing component": ("sd", edit_json("model_index.json", text_encoder=[None, None]), "has no component text_encoder"),
    "scheduler": (
        *("dit", edit_json("scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")),
        "scheduler_config.json is of a FlowMatchEulerDiscreteScheduler",
    ),
    "pieces": ("pixart", pieces_alone, "has spiece.model, which the package sentencepiece reads: pip install sentencepiece"),
    "size": ("sd", edit_json("unet/config.json", sample_size=None), "sample_size=None"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_components_that_do_not_fit_are_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers_gfprune.trained_pipelines.importlib.util.find_spec", lambda name: None)  # not installed
    pipeline, change, message = MISFITS[name]
    change(save(pipeline, tmp_path / "model"))
    with pytest.raises(ValueError, match=f"^pretrained_model_name_or_path=.*{message}") as error:
        load_pipeline(str(tmp_path / "model"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            *("pixart-sigma", {"use_additional_conditions": True}),
            "use_additional_conditions=True must be False: the PixArtSigmaPipeline passes no resolution",
        ),
        ("sd", {"in_channels": 9}, "in_channels=9 and out_channels=4: UNets that read a mask or an image beside the sample"),
        ("sd", {"num_class_embeds": 3}, "num_class_embeds=3: UNets with conditions other than text cannot be trained"),
        ("sd", {"time_cond_proj_dim": 8}, "time_cond_proj_dim=8: UNets with conditions other than text cannot be trained"),
    ],
)
def test_denoisers_with_other_inputs_are_refused(name: str, config: dict, message: str, tmp_path: Path) -> None:
    save(name, tmp_path / "model", **config)
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(tmp_path / "model"))


def test_a_pipeline_that_is_sampled_by_euler_is_trained_as_a_ddpm(tmp_path: Path) -> None:
    """As SDXL is saved. The scheduler travels as it is; that of distilled models is refused."""
    pipe = PIPELINES["sdxl"](tmp_path / "model")
    for spacing in ("leading", "trailing"):
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
        pipe.save_pretrained(tmp_path / spacing)
    found = load_pipeline(str(tmp_path / "leading"))
    assert torch.equal(found.process.scheduler.betas, DDPMScheduler(**BETAS).betas) and not found.scheduler.config.clip_sample
    found.save(found.denoiser, tmp_path / "saved")
    files = [(tmp_path / name / "scheduler/scheduler_config.json").read_bytes() for name in ("leading", "saved")]
    assert files[0] == files[1]
    with pytest.raises(ValueError, match="scheduler=EulerDiscreteScheduler is not supported"):
        load_pipeline(str(tmp_path / "trailing"))


def test_stable_diffusion_never_clips_latents(tmp_path: Path) -> None:
    """Its pipeline changes two settings that files of early repositories lack; others keep what theirs says."""
    for name, clips in (("sd", False), ("ldm", True)):
        pipe = PIPELINES[name](tmp_path / name)
        pipe.scheduler = DDIMScheduler(**BETAS)
        pipe.save_pretrained(tmp_path / name)
        file = tmp_path / name / "scheduler/scheduler_config.json"
        kept = json.loads(file.read_text())
        file.write_text(json.dumps({key: kept[key] for key in kept if key not in ("clip_sample", "steps_offset")}))
        found = load_pipeline(str(tmp_path / name))
        sampler, stock = found.process.sampler(10, latents=True).ddim, found.stock().scheduler
        assert sampler.config.clip_sample == stock.config.clip_sample == clips
        assert sampler.config.steps_offset == stock.config.steps_offset == (name == "sd")
        # What is saved keeps them in schedulers that users make from its scheduler
        found.save(found.denoiser, tmp_path / f"{name} pruned")
        swapped = DDIMScheduler.from_config(DDIMScheduler.from_pretrained(tmp_path / f"{name} pruned/scheduler").config)
        assert (swapped.config.clip_sample, swapped.config.steps_offset) == (clips, name == "sd")
        # As do samples of a pipeline that Diffusers has loaded
        pipe = DiffusionPipeline.from_pretrained(tmp_path / name)
        sampler = training_process(PipelineParts.of(pipe).scheduler).sampler(10, latents=True).ddim
        assert (sampler.config.clip_sample, sampler.config.steps_offset) == (clips, name == "sd")


def test_learned_variances_need_a_scheduler_that_fits(tmp_path: Path) -> None:
    """With fixed variances, `DDPMPipeline` could not sample; with learned ones, it can."""
    unet = UNet2DModel(**{**BASE, "out_channels": 2 * BASE["in_channels"]})
    for kind in ("fixed_small", "learned_range"):
        DDPMPipeline(unet, DDPMScheduler(variance_type=kind)).save_pretrained(tmp_path / kind)
    assert load_pipeline(str(tmp_path / "learned_range")).process.scheduler.config.variance_type == "fixed_small"
    with pytest.raises(ValueError, match="the model has learned variances, which variance_type=fixed_small"):
        load_pipeline(str(tmp_path / "fixed_small"))
