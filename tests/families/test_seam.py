"""A new architecture needs a file in `families/` and a small class in `remote/`: no other file names a model class."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import diffusers
import pytest
from diffusers import AutoencoderKL, UNet2DModel

import diffusers_gfprune
from diffusers_gfprune.families.base import Family
from diffusers_gfprune.families.lookup import FAMILIES, family_named, family_of
from helpers.architectures import ARCHITECTURES, build, pruned

PACKAGE = Path(diffusers_gfprune.__file__).parent
SCRIPTS = PACKAGE.parent / "training"
MODULES = [*PACKAGE.rglob("*.py"), *SCRIPTS.glob("*.py")]
# The one place of each architecture's names, beside the files that are shipped
OWNERS = {*(PACKAGE / "families").glob("*.py"), *(PACKAGE / "remote").glob("*.py")}
OWNERS -= {PACKAGE / f"families/{name}.py" for name in ("base", "limits", "lookup")}
BLOCKS = {"Attention", "PatchEmbed", "ResnetBlock2D", "Upsample2D", "Downsample2D", "BasicTransformerBlock", "FeedForward"}
# VQModel is an autoencoder
MODELS = {name for name in dir(diffusers) if name.endswith("Model") and name not in ("AutoModel", "EMAModel", "VQModel")}
MODELS |= {name for name in dir(diffusers) if "Transformer" in name}


def names_in(code: str) -> set[str]:
    """Every name that code uses or imports; strings, docstrings and comments are none."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update(part for alias in node.names for part in (alias.name, alias.asname) if part)
            found.update({f"{node.module}."} if isinstance(node, ast.ImportFrom) and node.module else set())
    return found


def test_names_are_seen_in_code_alone() -> None:
    code = (
        '"""Attention"""\nfrom diffusers.models.resnet import ResnetBlock2D as Block\nx: diffusers.UNet2DModel = "Upsample2D"'
    )
    assert {"ResnetBlock2D", "Block", "UNet2DModel", "diffusers.models.resnet."} <= names_in(code)
    assert not names_in(code) & {"Attention", "Upsample2D"}
    assert {"UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "AutoencoderKL"} - MODELS == {"AutoencoderKL"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_only_families_name_classes_of_models(path: Path) -> None:
    if path in OWNERS:
        return
    found = names_in(path.read_text())
    assert not found & (MODELS | BLOCKS)
    assert not [name for name in found if name.startswith("diffusers.models.") and name != "diffusers.models.modeling_utils."]


def test_noise_is_added_by_processes_only() -> None:
    """By processes, for batches; and so are targets."""
    for name in ("add_noise", "get_velocity"):
        found = {path.name for path in MODULES if name in names_in(path.read_text())}
        assert (
            found <= {"batch.py", "consistency.py", "ddpm.py", "edm.py", "flow_matching.py", "process.py"}
            and "ddpm.py" in found
        )


def test_families_are_whole() -> None:
    """Every part of the protocol is there, and the pruned class extends the dense one."""
    for family in FAMILIES:
        assert not inspect.isabstract(type(family))
        assert issubclass(family.pruned_class, family.dense_class)
        wanted = [name for name in Family.__annotations__ if not hasattr(family, name)]
        assert not wanted
        assert family_named(family.dense_class.__name__) is family_named(family.pruned_class.__name__) is family


def test_a_model_knows_its_family() -> None:
    family = family_of(build())
    assert family is family_of(pruned()) and family.dense_class is UNet2DModel
    assert family.is_pruned(pruned()) and not family.is_pruned(build())
    with pytest.raises(ValueError, match="^a AutoencoderKL cannot be pruned; supported: UNet2DModel"):
        family_of(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4))
    with pytest.raises(ValueError, match="^a UNet1DModel cannot be pruned; supported: UNet2DModel"):
        family_named("UNet1DModel")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_example_inputs_are_taken_and_checked(name: str) -> None:
    unet = build(name)
    family = family_of(unet)
    family.check_arguments({key: value for key, value in unet.config.items() if not key.startswith("_")})
    family.check_supported(unet.config)
    inputs = family.example_inputs(unet, *family.tracing_size(unet.config), batch_size=2)
    family.check_conditioning(unet, inputs.conditioning, 2)
    assert family.predict(unet, inputs).shape == inputs.sample.shape


def test_conditioning_of_another_family_is_refused() -> None:
    unet = build()
    with pytest.raises(ValueError, match="the batch has encoder_hidden_states, which a UNet2DModel does not take"):
        family_of(unet).check_conditioning(unet, {"encoder_hidden_states": unet.conv_in.bias}, 2)
