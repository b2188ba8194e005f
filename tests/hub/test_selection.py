"""hub/selection.py: results that are pushed are those of the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import ModelMixin

from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.fingerprints import tensors_fingerprint
from diffusers_gfprune.hub.selection import check_measured
from helpers.architectures import pruned as pruned_unet
from helpers.families import BASES, pruned
from helpers.hub import CARD


def write_run(folder: Path, model: ModelMixin, weights: str | None, dtype: str = "float32") -> Path:
    """What is checked of a run, with results of the given fingerprint; returns the folder of the model."""
    component = family_of(model).component
    model.save_pretrained(folder / component)
    (folder / "model_index.json").write_text(json.dumps({component: ["diffusers_gfprune", type(model).__name__]}))
    results = json.loads((CARD / "results.json").read_text())
    results["pruned"]["weights"], results["evaluation"]["dtype"] = weights, dtype
    (folder / "results.json").write_text(json.dumps(results))
    return folder / component


@pytest.mark.parametrize("family", ["unet", *BASES])
def test_results_of_other_weights_are_refused(family: str, tmp_path: Path) -> None:
    """Whole or in shards; not if only the precision was changed."""
    model = pruned_unet("base") if family == "unet" else pruned(family)
    folder = write_run(tmp_path, model, tensors_fingerprint(model.state_dict()))
    check_measured(tmp_path)
    model.save_pretrained(folder, max_shard_size="40KB")
    check_measured(tmp_path)
    loaded = type(model).from_pretrained(folder)
    loaded.half().save_pretrained(folder)
    check_measured(tmp_path)
    loaded = loaded.float()
    with torch.no_grad():
        next(loaded.parameters()).add_(1e-3)
    for options in ({}, {"max_shard_size": "40KB"}):
        loaded.save_pretrained(folder, **options)
        with pytest.raises(ValueError, match=f"its results.json is of other weights than those in {folder.name}: ") as error:
            check_measured(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("weights", "dtype"), [(None, "float32"), ("00000000", "bfloat16")])
def test_what_cannot_be_compared_passes(weights: str | None, dtype: str, tmp_path: Path) -> None:
    """Results of earlier versions, and of an evaluation in another precision."""
    write_run(tmp_path, pruned_unet("base"), weights, dtype)
    check_measured(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path, pruned_unet("base"), "00000000")
    pruned_unet("base").save_pretrained(folder, max_shard_size="40KB")
    shard = next(folder.glob("*-00001-of-*"))
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} cannot be read"):
        check_measured(tmp_path)
