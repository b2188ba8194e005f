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


def test_a_copy_says_no_folder_of_this_machine(folder: Path, tmp_path: Path) -> None:
    """Diffusers writes the folder that a model was loaded from; ids on the Hub stay."""
    path = folder / "vae/config.json"
    for place, kept in (("/home/me/vae", False), ("org/vae", True)):
        path.write_text(json.dumps({**json.loads(path.read_text()), "_name_or_path": place}))
        copy_component(folder, tmp_path / "copy", "vae", {"scaling_factor": 2.0})
        copied = json.loads((tmp_path / "copy/vae/config.json").read_text())
        assert copied.get("_name_or_path") == (place if kept else None)
        assert copied["scaling_factor"] == 2.0 and copied["_class_name"] == "AutoencoderKL"


@pytest.mark.parametrize("sharded", [False, True])
def test_the_only_variant_becomes_the_default(sharded: bool, tmp_path: Path) -> None:
    """A pipeline is loaded without naming it, also where an index names the shards."""
    options = {"max_shard_size": "20KB"} if sharded else {}
    autoencoder().save_pretrained(tmp_path / "vae", variant="fp16", **options)
    assert all("fp16" in path.name for path in (tmp_path / "vae").iterdir() if path.name != "config.json")
    copy_component(tmp_path, tmp_path / "copy", "vae")
    assert not any("fp16" in path.name for path in (tmp_path / "copy/vae").iterdir())
    copied = AutoencoderKL.from_pretrained(tmp_path / "copy/vae").state_dict()
    assert all(torch.equal(values, copied[name]) for name, values in autoencoder().state_dict().items())


def test_several_variants_without_default_weights_are_not_copied(tmp_path: Path) -> None:
    for variant in ("fp16", "bf16"):
        autoencoder().save_pretrained(tmp_path / "vae", variant=variant)
    with pytest.raises(ValueError, match="its vae has weights of the variants bf16, fp16 and no default weights"):
        check_copied(tmp_path, "vae")


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": []}}', "[", "3"]
)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_malformed_index_is_one_line(content: str, variant: str | None, tmp_path: Path) -> None:
    """Whether the component would be loaded or copied."""
    autoencoder().save_pretrained(tmp_path / "vae", max_shard_size="20KB", variant=variant)
    [path] = (tmp_path / "vae").glob("*.index*.json")
    path.write_text(content)
    message = f"^its vae has {path.name}, which is no index: weight_map must be an object of file names$"
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, "vae", "AutoencoderKL", KNOWN)
    with pytest.raises(ValueError, match=message):
        check_copied(tmp_path, "vae")


def test_an_index_names_nothing_but_safetensors(tmp_path: Path) -> None:
    autoencoder().save_pretrained(tmp_path / "vae", max_shard_size="20KB")
    path = tmp_path / "vae" / f"{WEIGHTS}.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = "weights.bin"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="^its vae has .*index.json, which names weights.bin: only safetensors beside it"):
        load_model(tmp_path, "vae", "AutoencoderKL", KNOWN)
