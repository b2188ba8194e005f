"""Every recipe runs, from the Hub to the saved pipeline: the real architecture under the recipe's ids, with random weights and
a few images. Only batches, steps and measurements are smaller."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import save

from diffusers_gfprune import GFPrunedUNet2DModel
from helpers.architectures import CIFAR10
from helpers.hub import contents
from helpers.hub_server import HubServer
from helpers.recipes import SMALL, run_recipe, settings, words_of
from helpers.scripts import RUN_FILES, run_script

# google/ddpm-ema-church-256, and the others of this size
LARGE = {
    **CIFAR10,
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
}
CLASSES = {  # names of the labels in the real data sets
    "uoft-cs/cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split(),
    "mattymchen/celeba-hq": ["female", "male"],
    "tglcourse/lsun_church_train": list("0123456789abcdef"),
    "pcuenq/lsun-bedrooms": None,
}
SPLITS = {  # files of the real data sets, less the hashes in some of their names
    "uoft-cs/cifar10": {"train": "plain_text/train-00000-of-00001.parquet", "test": "plain_text/test-00000-of-00001.parquet"},
    "mattymchen/celeba-hq": {
        "train": "data/train-00000-of-00006.parquet",
        "validation": "data/validation-00000-of-00001.parquet",
    },
    "tglcourse/lsun_church_train": {"train": "data/train-00000-of-00004.parquet", "test": "data/test-00000-of-00001.parquet"},
    "pcuenq/lsun-bedrooms": {"train": "data/train-00000-of-00009.parquet", "test": "data/test-00000-of-00001.parquet"},
}


def parquet(count: int, size: tuple[int, int], column: str, classes: list[str] | None) -> bytes:
    """A parquet file of random images, `size` is (width, height)."""
    generator = np.random.default_rng(count)
    pixels = generator.integers(0, 256, (count, *size[::-1], 3), dtype=np.uint8)
    rows = {column: [PIL.Image.fromarray(image) for image in pixels]}
    features = {column: datasets.Image()}
    if classes is not None:
        rows["label"] = [index % len(classes) for index in range(count)]
        features["label"] = datasets.ClassLabel(names=classes)
    file = io.BytesIO()
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(file)
    return file.getvalue()


def add_images(server: HubServer, name: str, column: str, size: tuple[int, int]) -> None:
    """A data set with the columns and splits of the real one."""
    files = {path: parquet(4, size, column, CLASSES[name]) for path in SPLITS[name].values()}
    server.add_repo(name, files, repo_type="dataset")


def add_model(server: HubServer, name: str, config: dict) -> None:
    """A DDPM laid out as those of 2022 are, with random weights in half precision: they take half the memory."""
    torch.manual_seed(0)
    unet = UNet2DModel(**config)
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    files = {
        "model_index.json": json.dumps(index).encode(),
        "config.json": json.dumps({"_class_name": "UNet2DModel", **config}).encode(),
        "scheduler_config.json": DDPMScheduler(clip_sample=True, variance_type="fixed_large").to_json_string().encode(),
        "diffusion_pytorch_model.safetensors": save({key: value.half() for key, value in unet.state_dict().items()}),
    }
    server.add_repo(name, files)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def check_run(folder: Path, recipe: str, dense_parameters: int) -> None:
    """The run went through all three phases, and what it saved is a smaller model of the wanted widths."""
    logs = {name for name in contents(folder) if name.startswith("logs/")}
    assert set(contents(folder)) - logs == RUN_FILES - {"samples.png"}
    assert any("tfevents" in name for name in logs) == (settings(recipe).get("report_to") == "tensorboard")
    report = json.loads((folder / "pruning_report.json").read_text())
    results = json.loads((folder / "results.json").read_text())
    assert f"--recipe {recipe}" in report["command"]
    phases = report["phases"]
    assert (phases["soft_end_step"], phases["hard_end_step"], phases["total_steps"]) == (1, 2, 3)
    assert report["curves"]["compaction"]["step"] == 2
    assert report["curves"]["validation_steps"][-1] == 3
    # What was not made smaller is the recipe's.
    wanted = {key: value for key, value in settings(recipe).items() if f"--{key}" not in SMALL and key != "output_dir"}
    arguments = report["arguments"]
    given = {key: type(arguments[key])(value) if isinstance(arguments[key], float) else value for key, value in wanted.items()}
    assert {key: arguments[key] for key in wanted} == given
    assert results["dense"]["parameters"] == dense_parameters
    assert results["pruned"]["macs"] / results["dense"]["macs"] == pytest.approx(0.5, abs=0.05)
    assert sum(group["kept_units"] < group["dense_units"] for group in report["channel_groups"]) > 1
    unet = GFPrunedUNet2DModel.from_pretrained(folder / "unet")
    assert sum(parameter.numel() for parameter in unet.parameters()) == results["pruned"]["parameters"] < dense_parameters
    assert unet.dtype == torch.float32


def run_from_hub(hub: HubServer, recipe: str, config: dict, size: tuple[int, int], folder: Path, threads: int) -> None:
    """Run a recipe with its model and data on the Hub, and check that they came from there."""
    values = settings(recipe)
    model, images = values["pretrained_model_name_or_path"], values["dataset_name"]
    add_model(hub, model, config)
    add_images(hub, images, values["image_column"], size)
    environment = hub.environment(folder / "home") | {"OMP_NUM_THREADS": str(threads)}
    run = run_recipe(recipe, folder, environment)
    assert run.returncode == 0, run.stderr
    weights = f"/storage/models/{model}/"
    assert [r.status for r in hub.requests if r.method == "GET" and r.path.startswith(weights)] == [200]
    rows = [r for r in hub.requests if r.method == "GET" and r.path.startswith(f"/storage/datasets/{images}/")]
    assert len(rows) >= 1 and {r.status for r in rows} <= {200, 206}


@pytest.mark.slow
def test_digits(tmp_path: Path) -> None:
    run = run_script("training/prune_ddpm.py", *words_of("digits", tmp_path))
    assert run.returncode == 0, run.stderr
    check_run(tmp_path / "run", "digits", 1_201_761)


@pytest.mark.slow
def test_cifar10(hub: HubServer, tmp_path: Path) -> None:
    run_from_hub(hub, "cifar10", CIFAR10, (32, 32), tmp_path, threads=1)
    check_run(tmp_path / "run", "cifar10", 35_746_307)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "size"), [("celeba_hq", (256, 256)), ("lsun_church", (256, 341)), ("lsun_bedroom", (341, 256))]
)
def test_models_of_256_pixels(recipe: str, size: tuple[int, int], hub: HubServer, tmp_path: Path) -> None:
    run_from_hub(hub, recipe, LARGE, size, tmp_path, threads=os.cpu_count() or 1)
    check_run(tmp_path / "run", recipe, 113_673_219)


@pytest.mark.slow
def test_digits_run_as_a_module_anywhere(tmp_path: Path) -> None:
    """As after `pip install`, without a clone: recipe, model and images come with the package."""
    done = run_script("diffusers_gfprune.scripts.prune_ddpm", "--recipe", "digits", "--dry_run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plan: remove 50.0% of macs" in done.stdout and not list(tmp_path.iterdir())
