"""loading/registration.py: Diffusers finds the classes of this package, and nothing else changes."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import diffusers
import pytest
from diffusers import AutoModel, DDIMPipeline, DiffusionPipeline, UNet2DModel

from diffusers_gfprune import GFPrunedUNet2DModel, PruneDDPMPipeline
from diffusers_gfprune.families.lookup import FAMILIES
from diffusers_gfprune.loading.registration import register
from helpers.architectures import build, pruned


def test_every_pipeline_that_takes_a_stock_model_takes_a_pruned_one() -> None:
    """A later Diffusers may write its annotations otherwise."""
    folder = Path(diffusers.__file__).parent / "pipelines"
    pattern = re.compile(r"class (\w+)\(DiffusionPipeline.*?def __init__\((.*?)\)", re.DOTALL)
    names = {
        name
        for path in folder.rglob("pipeline_*.py")
        for name, arguments in pattern.findall(path.read_text("utf-8"))
        if re.search(r"unet: .*\bUNet2DModel\b", arguments)
    }
    assert {"DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline"} <= names
    names.remove("LDMTextToImagePipeline")  # its annotation has both models, but it gives a text to what only one takes
    for name in sorted(names):
        types = getattr(diffusers, name)._get_signature_types()["unet"]
        assert UNet2DModel in types and GFPrunedUNet2DModel in types, name


def test_registering_again_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    accepted = DiffusionPipeline._get_signature_types.__func__.accepted
    monkeypatch.setattr(DiffusionPipeline._get_signature_types.__func__, "accepted", [*accepted])  # until this is over
    before = DDIMPipeline._get_signature_types()["unet"]
    method = AutoModel.from_pretrained.__func__.of_diffusers
    register([family.pruned_class for family in FAMILIES], [PruneDDPMPipeline])
    assert AutoModel.from_pretrained.__func__.of_diffusers is method
    (tmp_path / "copy.py").write_text(GFPrunedUNet2DModel.source())
    spec = importlib.util.spec_from_file_location("another_copy", tmp_path / "copy.py")
    another = importlib.util.module_from_spec(spec)
    for _ in range(2):  # a repository that is trusted runs it
        spec.loader.exec_module(another)
    types = DDIMPipeline._get_signature_types()["unet"]
    assert types[: len(before)] == before and types[-1] is another.GFPrunedUNet2DModel


def test_auto_model_leaves_everything_else_to_diffusers(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(str(tmp_path))) is UNet2DModel
    with pytest.raises(OSError):
        AutoModel.from_pretrained(tmp_path / "nothing")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Other", "auto_map": {"AutoModel": "other.Other"}}))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("trust", [False, True])
def test_auto_model_runs_no_code_of_a_folder(tmp_path: Path, trust: bool) -> None:
    """Whether it is trusted or not: the class is there."""
    pruned().save_pretrained(tmp_path)
    (tmp_path / "diffusers_gfprune.py").write_text("raise SystemExit('harm done')")
    for name in ("pretrained_model_or_path", None):
        call = {name: str(tmp_path)} if name else {}
        loaded = AutoModel.from_pretrained(*([] if name else [tmp_path]), **call, trust_remote_code=trust)
        assert type(loaded) is GFPrunedUNet2DModel
