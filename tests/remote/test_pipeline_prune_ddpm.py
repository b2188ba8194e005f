"""One-call pruning: a pruned pipeline from a pipeline, and a folder that every DDPM pipeline loads."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
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
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import Tensor, nn

from diffusers_gfprune import GFPrunedUNet2DModel, PruneDDPMPipeline
from diffusers_gfprune.metrics.model_size import count_macs, count_parameters
from diffusers_gfprune.pruning.channel_groups import trace_channel_groups
from diffusers_gfprune.pruning.compaction import compact, plan_compaction
from diffusers_gfprune.pruning.cost_model import CostModel
from diffusers_gfprune.pruning.masking import attach
from diffusers_gfprune.remote import pipeline_prune_ddpm as pipeline_file
from helpers.architectures import build, inputs, random_masks

SAVED_FILES = [
    "model_index.json",
    "pipeline.py",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusers_gfprune.py",
    "unet/diffusion_pytorch_model.safetensors",
]
UNEVEN = {"prediction_type": "v_prediction", "num_train_timesteps": 100}  # a scheduler that is not the default one


def pixels(channels: int = 1, count: int = 6, size: int = 8) -> np.ndarray:
    """Calibration images, uint8 with shape `(count, size, size, channels)`."""
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def tensor_images(channels: int = 1, count: int = 6, size: int = 8) -> Tensor:
    """The same in [-1, 1] with shape `(count, channels, size, size)`."""
    return torch.from_numpy(pixels(channels, count, size)).permute(0, 3, 1, 2).float() / 127.5 - 1


def pil_images(channels: int = 1, count: int = 6, size: int = 8) -> list[Image.Image]:
    """The same as PIL images."""
    return [Image.fromarray(image if channels > 1 else image[..., 0]) for image in pixels(channels, count, size)]


def dense_pipeline(name: str = "base") -> PruneDDPMPipeline:
    """A pipeline with a dense UNet."""
    return quiet(PruneDDPMPipeline(unet=build(name), scheduler=DDPMScheduler(num_train_timesteps=100)))


@functools.lru_cache
def pruned_pipeline() -> PruneDDPMPipeline:
    """A pruned pipeline, shared by tests that only read it."""
    return quiet(dense_pipeline().prune(tensor_images(), target="macs", ratio=0.4, criterion="magnitude"))


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: DiffusionPipeline, steps: int = 4) -> np.ndarray:
    """Images from a fixed seed."""
    generator = torch.Generator().manual_seed(7)
    return pipe(batch_size=2, generator=generator, num_inference_steps=steps, output_type="np").images


def files_in(folder: Path) -> list[str]:
    """Every file under a folder, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# --- prune -------------------------------------------------------------------------------------------------------------


@pytest.mark.fast_variants(1)
@pytest.mark.parametrize("target", ["macs", "params", "channels"])
def test_prune_meets_the_budget_in_one_call(target: str):
    """The share that was asked for is what is gone, counted on the model itself."""
    pipe = dense_pipeline()
    pruned = pipe.prune(tensor_images(), target=target, ratio=0.3, batch_size=3)
    assert isinstance(pruned, PruneDDPMPipeline)
    assert isinstance(pruned.unet, GFPrunedUNet2DModel)
    if target == "channels":
        groups = trace_channel_groups(pipe.unet)
        widths = dict(pruned.unet.config.layer_channels)
        kept = [widths.get(group.name, [None, group.num_channels])[1] for group in groups]
        dense, left = CostModel(pipe.unet, groups).dense.sum(), sum(kept)
    else:
        count = {"macs": count_macs, "params": count_parameters}[target]
        dense, left = count(pipe.unet), count(pruned.unet)
    assert 1 - left / dense == pytest.approx(0.3, abs=0.01)


def test_prune_leaves_the_pipeline_alone():
    """A copy is pruned; the original model is not changed."""
    pipe = dense_pipeline()
    unet, scheduler = pipe.unet, pipe.scheduler
    unet.train()
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    config = dict(scheduler.config)
    pruned = pipe.prune(tensor_images(), ratio=0.3)
    assert pipe.unet is unet
    assert type(unet) is UNet2DModel
    assert unet.training
    assert list(unet.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert not hasattr(unet, "channel_masks")
    assert pipe.scheduler is scheduler
    assert dict(scheduler.config) == config
    assert pruned.scheduler is not scheduler
    assert type(pruned.scheduler) is DDPMScheduler
    assert dict(pruned.scheduler.config) == config


@pytest.mark.fast_variants(1)
@pytest.mark.parametrize(("name", "channels"), [("base", 1), ("rgb", 3)])
def test_pil_images_and_tensors_prune_alike(name: str, channels: int):
    """The same pixels give the same model, whatever holds them."""
    pipe = dense_pipeline(name)
    from_tensor = pipe.prune(tensor_images(channels), ratio=0.3).unet.state_dict()
    from_pil = pipe.prune(pil_images(channels), ratio=0.3).unet.state_dict()
    assert list(from_pil) == list(from_tensor)
    assert all(torch.equal(value, from_tensor[key]) for key, value in from_pil.items())


@pytest.mark.slow
def test_greyscale_goes_with_every_model_and_colour_with_those_in_colour():
    """As in the training scripts."""
    assert dense_pipeline("rgb").prune(pil_images(1), ratio=0.3, criterion="taylor").unet.config.in_channels == 3
    in_colour = [image.convert("RGB") for image in pil_images(1)]
    assert dense_pipeline().prune(in_colour, ratio=0.3, criterion="taylor").unet.config.in_channels == 1
    with pytest.raises(ValueError, match=r"images\[0\]: mode RGB is in colour, but the model is greyscale"):
        dense_pipeline().prune(pil_images(3), ratio=0.3)


@pytest.mark.slow
def test_prune_is_reproducible_and_depends_on_the_images():
    """Noise and timesteps have their own seed; the criterion uses the images."""
    pipe = dense_pipeline()

    def kept(images: Tensor, **options) -> list[Tensor]:
        torch.manual_seed(torch.randint(1000, ()).item())
        return list(pipe.prune(images, ratio=0.5, **options).unet.state_dict().values())

    first, again = kept(tensor_images()), kept(tensor_images())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (kept(-tensor_images()), kept(tensor_images(), seed=1)):
        assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, other))


def test_prune_of_a_conditional_model():
    """Class labels go with the images."""
    pipe = dense_pipeline("class-embedding")
    labels = torch.arange(6) % 10
    pruned = pipe.prune(tensor_images(), class_labels=labels, ratio=0.3, batch_size=4)
    assert 1 - count_macs(pruned.unet) / count_macs(pipe.unet) == pytest.approx(0.3, abs=0.01)
    with pytest.raises(ValueError, match="class_labels"):
        pipe.prune(tensor_images(), ratio=0.3)


@pytest.mark.parametrize("count", [3, 8])
def test_labels_of_another_number_than_images_are_refused(count: int):
    """Zipped, they would silently drop images, or pair them with the wrong labels."""
    with pytest.raises(ValueError, match="class_labels"):
        dense_pipeline("class-embedding").prune(
            tensor_images(), class_labels=torch.zeros(count, dtype=torch.long), ratio=0.3, batch_size=3
        )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (tensor_images(channels=3), r"shape \(6, 3, 8, 8\), not \(images, 1, height, width\)"),
        (tensor_images()[0], r"shape \(1, 8, 8\)"),
        (tensor_images()[:0], r"shape \(0, 1, 8, 8\)"),
        (tensor_images() * 127.5 + 127.5, r"not floating point in \[-1, 1\]"),
        (tensor_images() * 1.1, r"not floating point in \[-1, 1\]"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.int32), r"not uint8 or floating point in \[-1, 1\]"),
        (torch.full((4, 1, 8, 8), float("nan")), "finite|NaN|nan"),
        ([], "images is empty"),
        ([*pil_images(size=8), *pil_images(size=10)], "shape|size"),
        (tensor_images(size=7), "7"),
    ],
    ids=["channels", "no-batch", "none", "bytes", "above", "int32", "nan", "empty-list", "two-sizes", "indivisible-size"],
)
def test_images_that_do_not_fit_are_refused(images: Tensor | list, message: str):
    """With what was found and what is wanted; scores of such images would mean nothing."""
    pipe = dense_pipeline()
    with pytest.raises(ValueError, match=message):
        pipe.prune(images, ratio=0.3)
    assert not hasattr(pipe.unet, "channel_masks")


def test_pil_images_for_a_model_of_other_channels_are_refused():
    """Two channels are neither greyscale nor colour: they must be passed as a tensor."""
    unet = UNet2DModel(**{**build().config, "in_channels": 2, "out_channels": 2})
    pipe = PruneDDPMPipeline(unet=unet, scheduler=DDPMScheduler())
    with pytest.raises(ValueError, match="the model has in_channels=2"):
        pipe.prune(pil_images(), ratio=0.3)
    pruned = pipe.prune(tensor_images(channels=2), ratio=0.3, criterion="taylor")
    assert pruned.unet.config.in_channels == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.999}, "cannot be removed"),
        ({"ratio": 1.5}, "ratio=1.5"),
        ({"target": "flops"}, "target=flops"),
        ({"criterion": "nonsense"}, "criterion=nonsense"),
    ],
    ids=str,
)
def test_budgets_and_options_that_cannot_be_met_are_refused(options: dict, message: str):
    """Before anything is spent on them."""
    with pytest.raises(ValueError, match=message):
        dense_pipeline().prune(tensor_images(), **options)


def test_a_pruned_pipeline_is_not_pruned_again():
    """Its channels are ragged: the dense model is to be pruned to the smaller budget."""
    with pytest.raises(ValueError, match="already pruned"):
        pruned_pipeline().prune(tensor_images(), ratio=0.3)


# --- saving ------------------------------------------------------------------------------------------------------------


def test_saved_files(tmp_path: Path):
    """Exactly what a repository holds, in the names that stock Diffusers resolves."""
    pruned_pipeline().save_pretrained(tmp_path)
    assert files_in(tmp_path) == SAVED_FILES
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {key: value for key, value in index.items() if key != "_diffusers_version"} == {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers_gfprune", "GFPrunedUNet2DModel"],
    }
    assert (tmp_path / "pipeline.py").read_bytes() == Path(pipeline_file.__file__).read_bytes()


def test_a_dense_pipeline_is_saved_as_a_stock_one(tmp_path: Path):
    """Before pruning, nothing in the index is ours: a subclass's bare name would not resolve."""
    dense_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert (index["_class_name"], index["unet"]) == ("DDPMPipeline", ["diffusers", "UNet2DModel"])
    loaded = quiet(DDPMPipeline.from_pretrained(tmp_path))
    assert np.array_equal(sample(loaded), sample(dense_pipeline()))


def test_a_stock_pipeline_saves_a_pruned_model(tmp_path: Path):
    """The training script holds a plain DDPMPipeline: the same folder, without the file of our pipeline."""
    pruned = pruned_pipeline()
    DDPMPipeline(unet=pruned.unet, scheduler=pruned.scheduler).save_pretrained(tmp_path)
    assert files_in(tmp_path) == [name for name in SAVED_FILES if name != "pipeline.py"]
    assert np.array_equal(sample(quiet(DiffusionPipeline.from_pretrained(tmp_path))), sample(pruned))


def test_saving_again_into_the_same_folder(tmp_path: Path):
    """Load, change the scheduler, save in place."""
    pruned_pipeline().save_pretrained(tmp_path)
    loaded = PruneDDPMPipeline.from_pretrained(tmp_path)
    loaded.scheduler = DDIMScheduler.from_config(loaded.scheduler.config)
    loaded.save_pretrained(tmp_path)
    assert files_in(tmp_path) == SAVED_FILES
    again = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert isinstance(again.scheduler, DDIMScheduler)
    assert np.array_equal(sample(again), sample(quiet(loaded)))


def test_files_of_the_working_directory_are_not_taken_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A pipeline made in memory has no folder, and "" is the one that Python runs in."""
    (tmp_path / "run").mkdir()
    for name in ("pruning_report.json", "results.json", "README.md"):
        (tmp_path / "run" / name).write_text("{}")
    monkeypatch.chdir(tmp_path / "run")
    pruned_pipeline().save_pretrained(tmp_path / "saved")
    assert files_in(tmp_path / "saved") == SAVED_FILES


def test_the_shipped_pipeline_saves_into_its_own_folder(tmp_path: Path):
    """With pipeline.py, that very file is running, and must not be copied onto itself."""
    pruned_pipeline().save_pretrained(tmp_path)
    spec = importlib.util.spec_from_file_location("shipped_pipeline", tmp_path / "pipeline.py")
    shipped = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shipped)
    loaded = quiet(shipped.PruneDDPMPipeline.from_pretrained(tmp_path))
    loaded.save_pretrained(tmp_path)
    assert files_in(tmp_path) == SAVED_FILES
    assert (tmp_path / "pipeline.py").read_bytes() == Path(pipeline_file.__file__).read_bytes()
    assert np.array_equal(sample(loaded), sample(pruned_pipeline()))


def test_variants_lie_side_by_side(tmp_path: Path):
    """A half-precision variant neither overwrites the main weights nor keeps them from loading, and is not deleted by them."""
    pruned = pruned_pipeline()
    pruned.save_pretrained(tmp_path)
    half = PruneDDPMPipeline(unet=copy.deepcopy(pruned.unet).half(), scheduler=pruned.scheduler)
    half.save_pretrained(tmp_path, variant="fp16")
    assert files_in(tmp_path) == sorted([*SAVED_FILES, "unet/diffusion_pytorch_model.fp16.safetensors"])
    assert np.array_equal(sample(quiet(DiffusionPipeline.from_pretrained(tmp_path))), sample(pruned))
    half.save_pretrained(tmp_path / "sharded", variant="fp16", max_shard_size="30KB")
    pruned.save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded/unet").glob("*.fp16-*.safetensors"))) > 2
    assert not list((tmp_path / "sharded").glob(".*"))
    for folder in (tmp_path, tmp_path / "sharded"):
        loaded = DiffusionPipeline.from_pretrained(folder, variant="fp16", dtype=torch.float16)
        assert all(torch.equal(value, half.unet.state_dict()[name]) for name, value in loaded.unet.state_dict().items())
    assert torch.equal(DiffusionPipeline.from_pretrained(tmp_path / "sharded").unet.conv_in.weight, pruned.unet.conv_in.weight)


# --- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline_class", [DiffusionPipeline, DDPMPipeline, PruneDDPMPipeline])
def test_loaded_pipelines_sample_bit_for_bit_the_same(pipeline_class: type, tmp_path: Path):
    """Invariant 5: what is saved is what was measured; no remote code is trusted here."""
    pruned_pipeline().save_pretrained(tmp_path)
    loaded = quiet(pipeline_class.from_pretrained(tmp_path))
    assert type(loaded) is (DDPMPipeline if pipeline_class is DiffusionPipeline else pipeline_class)
    assert type(loaded.unet) is GFPrunedUNet2DModel
    expected = sample(pruned_pipeline())
    assert expected.std() > 0.01
    assert np.array_equal(sample(loaded), expected)


def test_ddim_pipeline_loads_the_folder(tmp_path: Path):
    """The deterministic sampler of the paper, by its own pipeline class."""
    pruned = pruned_pipeline()
    pruned.save_pretrained(tmp_path)
    loaded = quiet(DDIMPipeline.from_pretrained(tmp_path))
    in_memory = quiet(DDIMPipeline(unet=pruned.unet, scheduler=pruned.scheduler))
    assert np.array_equal(sample(loaded), sample(in_memory))
    assert not np.array_equal(sample(loaded), sample(pruned))


def test_scheduler_settings_are_kept(tmp_path: Path):
    """A model that predicts velocities, pruned and saved, is still sampled as one."""
    pipe = quiet(PruneDDPMPipeline(unet=build(), scheduler=DDPMScheduler(**UNEVEN)))
    pruned = quiet(pipe.prune(tensor_images(), ratio=0.3, criterion="taylor"))
    pruned.save_pretrained(tmp_path)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert {key: loaded.scheduler.config[key] for key in UNEVEN} == UNEVEN
    assert np.array_equal(sample(loaded), sample(pruned))


def test_a_dense_folder_is_loaded_and_pruned(tmp_path: Path):
    """The way in: any DDPM that somebody trained and pushed."""
    dense = quiet(DDPMPipeline(unet=build(), scheduler=DDPMScheduler(num_train_timesteps=100)))
    dense.save_pretrained(tmp_path)
    loaded = quiet(PruneDDPMPipeline.from_pretrained(tmp_path))
    assert type(loaded) is PruneDDPMPipeline
    assert type(loaded.unet) is UNet2DModel
    assert np.array_equal(sample(loaded), sample(dense))
    pruned = loaded.prune(tensor_images(), target="params", ratio=0.3)
    assert 1 - count_parameters(pruned.unet) / count_parameters(loaded.unet) == pytest.approx(0.3, abs=0.01)


class _CreatesAFile:
    """Unpickling an instance creates a file: code that a weights file must never run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(("options", "error"), [({}, OSError), ({"use_safetensors": False}, ValueError)], ids=str)
def test_a_folder_with_a_pickle_is_not_unpickled(options: dict, error: type, tmp_path: Path):
    """Through the pipeline as through the model."""
    folder, marker = tmp_path / "repository", tmp_path / "marker"
    pruned_pipeline().save_pretrained(folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    payload = {**pruned_pipeline().unet.state_dict(), "payload": _CreatesAFile(marker)}
    torch.save(payload, folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(error, match="safetensors"):
        DiffusionPipeline.from_pretrained(folder, **options)
    assert not marker.exists()


# --- schedulers --------------------------------------------------------------------------------------------------------


@functools.lru_cache
def masked_and_compacted() -> tuple[UNet2DModel, GFPrunedUNet2DModel]:
    """A masked model, and the small one that it compacts to."""
    unet = build()
    groups = trace_channel_groups(unet)
    masks = random_masks(groups, seed=0)
    attach(unet, groups).set(masks)
    return unet, compact(unet, plan_compaction(unet, groups, masks))


@torch.no_grad()
def sample_with(unet: nn.Module, scheduler, steps: int = 8) -> Tensor:
    """The sampling loop that every scheduler documents."""
    torch.manual_seed(3)
    scheduler.set_timesteps(steps)
    x = inputs(unet)["sample"] * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        prediction = unet(scheduler.scale_model_input(x, timestep), timestep).sample
        x = scheduler.step(prediction, timestep, x).prev_sample
    return x


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize(
    "scheduler_class",
    [
        DDPMScheduler,
        DDIMScheduler,
        PNDMScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
    ],
)
def test_any_scheduler_samples_the_compacted_model_as_the_masked_one(scheduler_class: type):
    """Integer, fractional and repeated timesteps: the small model takes the dense one's place in every sampler."""
    masked, compacted = masked_and_compacted()
    expected = sample_with(masked, scheduler_class())
    found = sample_with(compacted, scheduler_class())
    assert torch.isfinite(found).all()
    assert expected.std() > 0.01
    assert (found - expected).norm() / expected.norm() <= 1e-3


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_a_loaded_pipeline_takes_another_scheduler(scheduler_class: type, tmp_path: Path):
    """`pipe.scheduler = X.from_config(pipe.scheduler.config)`, the idiom of the documentation."""
    pruned_pipeline().save_pretrained(tmp_path)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    loaded.scheduler = scheduler_class.from_config(loaded.scheduler.config)
    images = sample(loaded, steps=8)
    assert images.shape == (2, 8, 8, 1)
    assert np.isfinite(images).all()
    assert images.std() > 0.01
    assert not np.array_equal(images, sample(pruned_pipeline(), steps=8))
