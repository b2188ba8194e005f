"""The recipes of latent models run from the Hub to the third step: pipelines of the real layout under the recipe's ids, with
the real sizes of images, latents and condition, and a fraction of the width."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
from diffusers import DiffusionPipeline

from helpers.hub import contents
from helpers.hub_server import HubServer
from helpers.latent_models import autoencoder, vq_model
from helpers.latent_pipelines import PIPELINES
from helpers.recipes import run_recipe, settings

LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
VAE = {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, **LEVELS}  # eight pixels for one latent
VQ = {"block_out_channels": (4, 4, 8), **{name: kinds[:3] for name, kinds in LEVELS.items()}}  # four
# A fourteenth to a seventieth of the real widths, with the real blocks
MODELS = {
    "dit_imagenet": ("dit", {"num_attention_heads": 4, "attention_head_dim": 4, "num_layers": 4, "sample_size": 32}),
    "ldm_celebahq": (
        "ldm",
        {
            "sample_size": 64,
            "block_out_channels": (16, 32, 48, 64),
            "layers_per_block": 2,
            "norm_num_groups": 8,
            "down_block_types": ("DownBlock2D", *("AttnDownBlock2D",) * 3),
            "up_block_types": (*("AttnUpBlock2D",) * 3, "UpBlock2D"),
        },
    ),
    "sd15": (
        "sd",
        {
            "sample_size": 64,
            "block_out_channels": (8, 16, 32, 32),
            "layers_per_block": 2,
            "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        },
    ),
}
FILES = {  # of the real data sets, less the hashes in some of their names
    "ILSVRC/imagenet-1k": ("data/train-00000-of-00294.parquet", "data/validation-00000-of-00014.parquet"),
    "mattymchen/celeba-hq": ("data/train-00000-of-00006.parquet", "data/validation-00000-of-00001.parquet"),
    "lambdalabs/naruto-blip-captions": ("data/train-00000-of-00001.parquet",),
}


def table(recipe: str, count: int, size: int) -> bytes:
    """A parquet file with the columns of the real data set and random images."""
    generator = np.random.default_rng(count)
    pixels = generator.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    rows: dict = {"image": [PIL.Image.fromarray(image) for image in pixels]}
    features: dict = {"image": datasets.Image()}
    if recipe == "sd15":
        rows["text"], features["text"] = [f"number {index}" for index in range(count)], datasets.Value("string")
    else:
        classes = 1000 if recipe == "dit_imagenet" else 2
        rows["label"], features["label"] = list(range(min(count, 2))) * (count // 2), datasets.ClassLabel(num_classes=classes)
    file = io.BytesIO()
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(file)
    return file.getvalue()


def add_model(hub: HubServer, recipe: str, folder: Path) -> None:
    """The pipeline, with an autoencoder of the real factor."""
    kind, config = MODELS[recipe]
    if recipe == "dit_imagenet":
        config = {**config, "num_embeds_ada_norm": 1000}
    pipe: DiffusionPipeline = PIPELINES[kind](folder / "model", **config)
    if recipe == "ldm_celebahq":
        pipe.register_modules(vqvae=vq_model(**VQ))
    else:
        pipe.register_modules(vae=autoencoder(**VAE))
    pipe.save_pretrained(folder / "model")
    hub.add_repo(settings(recipe)["pretrained_model_name_or_path"], contents(folder / "model"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", MODELS)
def test_recipes_of_latent_models(recipe: str, tmp_path: Path) -> None:
    values = settings(recipe)
    with HubServer() as hub:
        add_model(hub, recipe, tmp_path)
        name = values["dataset_name"]
        hub.add_repo(name, {path: table(recipe, 4, values["resolution"]) for path in FILES[name]}, repo_type="dataset")
        environment = hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
        done = run_recipe(recipe, tmp_path, environment, "--encoding_cache_dir", str(tmp_path / "encoded"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run/pruning_report.json").read_text())
    results = json.loads((tmp_path / "run/results.json").read_text())
    phases = report["phases"]
    assert (phases["soft_end_step"], phases["hard_end_step"], phases["total_steps"]) == (1, 2, 3)
    assert report["curves"]["compaction"]["step"] == 2 and report["curves"]["validation_steps"][-1] == 3
    removed = 1 - results["pruned"]["macs"] / results["dense"]["macs"]
    assert removed == pytest.approx(values["ratio"], abs=0.05)
    assert results["evaluation"]["sample_size"] == [values["resolution"]] * 2
    assert report["arguments"]["guidance_scale"] == values.get("guidance_scale", 1)
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "run")).__name__ == report["pipeline"]["class_name"]
