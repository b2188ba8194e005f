"""loading/components.py and loading/pipeline_layouts.py: what is loaded, copied and refused."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from diffusers_gfprune.families.lookup import FAMILIES
from diffusers_gfprune.loading.components import check_copied, copy_component, load_model, variant_of
from diffusers_gfprune.loading.pipeline_layouts import LAYOUTS, check_index
from diffusers_gfprune.remote.pipeline_prune_ddpm import PIPELINES, PruneDDPMPipeline
from helpers.latent_models import autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"
KNOWN = {"AutoencoderKL": AutoencoderKL}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline with an autoencoder and nothing else."""
    autoencoder().save_pretrained(tmp_path / "vae")
    return tmp_path


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of a file, or remove them."""
    changed = {**load_file(path), **tensors}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path, metadata={"format": "pt"})


def test_every_pipeline_of_a_family_has_its_layout() -> None:
    """And each layout names all components that the pipeline takes."""
    assert {name for family in FAMILIES for name in family.pipelines} == set(LAYOUTS)
    for family in FAMILIES:
        for name in set(family.pipelines) - {PruneDDPMPipeline.__name__}:
            layout, taken = LAYOUTS[name], inspect.signature(getattr(diffusers, name)).parameters.values()
            components = {parameter.name for parameter in taken if parameter.annotation not in (bool, "bool | None")}
            components -= {"id2label", "requires_safety_checker", "force_zeros_for_empty_prompt", "add_watermarker"}
            assert components == {family.component, "scheduler", *layout.loaded, *layout.carried}, name
    assert {name for name, layout in LAYOUTS.items() if layout.autoencoder is None} == {
        *PIPELINES,
        "ConsistencyModelPipeline",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vae": None}, "its DiTPipeline has no component vae"),
        ({"vae": [None, None]}, "its DiTPipeline has no component vae"),
        ({"extra": ["diffusers", "UNet2DModel"]}, "its DiTPipeline has a component extra; supported are transformer, "),
        ({"vae": ["diffusers"]}, r"vae=\['diffusers'\] of its model_index.json must be the names of a library and a class"),
        ({"_module": ["a", "b"]}, "is code of the repository, which is not run"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(change: dict, message: str) -> None:
    index = {
        "_class_name": "DiTPipeline",
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    assert check_index(index, "transformer").autoencoder == "vae"
    with pytest.raises(ValueError, match=message):
        check_index({**index, **change}, "transformer")


@pytest.mark.parametrize(
    ("file", "variant"),
    [
        (WEIGHTS, ""),
        ("model.safetensors", ""),
        ("model.fp16.safetensors", "fp16"),
        ("model-00001-of-00002.safetensors", ""),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", "fp16"),
        ("model_index.json", None),
        ("pytorch_model.bin", None),
        ("other.safetensors", None),
    ],
)
def test_variants_of_files(file: str, variant: str | None) -> None:
    assert variant_of(file) == variant


def test_models_are_loaded_in_float32(folder: Path) -> None:
    AutoencoderKL.from_pretrained(folder / "vae").half().save_pretrained(folder / "vae")
    model = load_model(folder, "vae", "AutoencoderKL", KNOWN)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"decoder.conv_in.bias": None}, "1 weights of its vae do not fit its config, first decoder.conv_in.bias"),
        ({"more": torch.zeros(1)}, "1 weights of its vae do not fit its config, first more"),
        (
            {"decoder.conv_in.bias": torch.full((16,), torch.nan)},
            r"the weight decoder.conv_in.bias of its vae holds values that are not finite \(NaN or infinity\)",
        ),
    ],
)
def test_wrong_weights_are_refused(folder: Path, tensors: dict, message: str) -> None:
    change(folder / "vae" / WEIGHTS, **tensors)
    with pytest.raises(ValueError, match=f"^{message}$"):
        load_model(folder, "vae", "AutoencoderKL", KNOWN)


def test_pickles_and_other_classes_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="^its vae is a VQModel, not a AutoencoderKL$"):
        load_model(folder, "vae", "VQModel", KNOWN)
    (folder / "vae" / WEIGHTS).rename(folder / "vae/diffusion_pytorch_model.bin")
    with pytest.raises(
        ValueError, match="^its vae has diffusion_pytorch_model.bin: only safetensors are loaded, not pickles$"
    ):
        load_model(folder, "vae", "AutoencoderKL", KNOWN)
    with pytest.raises(
        ValueError, match="^its vae has diffusion_pytorch_model.bin: only safetensors are copied, not pickles$"
    ):
        check_copied(folder, "vae")
    with pytest.raises(ValueError, match="^its safety_checker has no folder$"):
        check_copied(folder, "safety_checker")


def test_components_are_copied_without_pickles_and_code(folder: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "code.py", "vocab.txt"):
        (folder / "vae" / name).write_text("x")
    check_copied(folder, "vae")
    copy_component(folder, tmp_path / "copy", "vae")
    copied = tmp_path / "copy/vae"
    assert {path.name for path in copied.iterdir()} == {"config.json", WEIGHTS, "vocab.txt"}
    assert all(path.read_bytes() == (folder / "vae" / path.name).read_bytes() for path in copied.iterdir())
    assert json.loads((copied / "config.json").read_text())["_class_name"] == "AutoencoderKL"
