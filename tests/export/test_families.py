"""Exports of every kind of pipeline, and of every precision (slow: conversions take seconds)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, DiTPipeline
from torch import Tensor

import diffusers_gfprune  # noqa: F401  (pipelines with pruned denoisers load with its classes)
from diffusers_gfprune import prune_pipeline
from diffusers_gfprune.export import ExportedModel, export_pipeline, load_exported
from diffusers_gfprune.export.writers import has_compiler
from diffusers_gfprune.pipeline_parts import PipelineParts
from helpers.latent_pipelines import CAPTIONS, LATENT_SIZE, PIPELINES, SIZE
from helpers.scripts import ROOT

pytestmark = pytest.mark.slow
TEACHER = ROOT / "training/digits/teacher"
# Images are in [0, 1]; decoders of random weights enlarge differences
TOLERANCE = 1e-3


def given(name: str) -> dict:
    """Conditions of calibration images."""
    prompts = [CAPTIONS[number % len(CAPTIONS)] for number in range(8)]
    return {"dit": {"class_labels": torch.arange(8) % 4}, "ldm": {}}.get(name, {"prompts": prompts})


def sample(pipe: DiffusionPipeline) -> Tensor:
    """Two images of a stock pipeline, with guidance for prompts (DiTPipeline takes 1000 for the null label of any model)."""
    pipe.set_progress_bar_config(disable=True)
    conditions = {"ldm": ((), {"batch_size": 2}), "dit": (([0, 3],), {"guidance_scale": 1})}
    kind = "ldm" if type(pipe).__name__ == "LDMPipeline" else "dit" if isinstance(pipe, DiTPipeline) else "text"
    positional, named = conditions.get(kind, ((["a cat", "two"],), {}))
    if kind == "text":
        # LDMTextToImagePipeline takes every VAE for one that divides sides by eight
        side = 8 * LATENT_SIZE if type(pipe).__name__ == "LDMTextToImagePipeline" else SIZE
        named = {"height": side, "width": side}
        named |= {"use_resolution_binning": False} if type(pipe).__name__.startswith("PixArt") else {}
    generator = torch.Generator().manual_seed(0)
    images = pipe(*positional, **named, num_inference_steps=3, generator=generator, output_type="np").images
    return torch.as_tensor(images)


@pytest.mark.parametrize("format", ["onnx", "openvino", "torch"])
@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_samples_with_an_export_of_its_pruned_denoiser(name: str, format: str, tmp_path: Path) -> None:
    pipe = PIPELINES[name](tmp_path / name)
    images = torch.rand(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    small = prune_pipeline(pipe, images, **given(name), target="macs", ratio=0.3, criterion="magnitude", ranking="group")
    small.save_pretrained(tmp_path / "small")
    description = export_pipeline(small, tmp_path / "export", format=format)
    assert description.model_class.startswith("GFPruned") and description.max_relative_error < 1e-4
    component = PipelineParts.of(small, pruned=True).family.component
    wanted = sample(small)
    exported = load_exported(tmp_path / "export", trust_remote_code=True)
    loaded = type(pipe).from_pretrained(tmp_path / "small", **{component: exported})
    assert isinstance(getattr(loaded, component), ExportedModel)
    torch.testing.assert_close(sample(loaded), wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("format", "dtype", "batch", "least"),
    [
        ("onnx", "fp16", "dynamic", 0.999),
        ("openvino", "fp16", 16, 0.99),
        ("torch", "fp16", "dynamic", 0.999),
        ("onnx", "int8", "dynamic", 0.95),
        ("openvino", "int8", 16, 0.95),
    ],
)
def test_the_digits_in_lower_precision(format: str, dtype: str, batch: str | int, least: float, tmp_path: Path) -> None:
    pipe = DDIMPipeline.from_pretrained(TEACHER)
    description = export_pipeline(pipe, tmp_path / "export", format=format, dtype=dtype, batch=batch)
    assert least < description.similarity["ssim_to_fp32"] < 1
    fp32 = export_pipeline(pipe, tmp_path / "fp32", format=format, batch=batch)
    assert fp32.max_relative_error < 1e-5 < description.max_relative_error

    def size(folder: str) -> int:
        return sum(path.stat().st_size for path in (tmp_path / folder).iterdir() if path.suffix in (".bin", ".onnx", ".pt2"))

    assert size("export") < (0.6 if dtype == "fp16" else 0.45) * size("fp32")  # the graph keeps its size


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_compiled_programs(tmp_path: Path) -> None:
    pipe = DDIMPipeline.from_pretrained(TEACHER)
    description = export_pipeline(pipe, tmp_path / "export", format="torch", compile=True)
    assert {row["file"] for row in description.checks} == {"model.pt2", "compiled.pt2"}
    compiled = load_exported(tmp_path / "export", trust_remote_code=True, compiled=True)
    values = torch.randn(65, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(values, 7).sample, pipe.unet(values, 7).sample, rtol=1e-4, atol=1e-4)
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "export", subfolder="scheduler")
    assert len(DDIMPipeline(unet=compiled, scheduler=scheduler)(batch_size=2, num_inference_steps=2).images) == 2
