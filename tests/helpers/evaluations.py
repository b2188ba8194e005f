"""Helpers for tests of evaluate.py: small models, images of noise, and the script in this process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMPipeline, DDPMScheduler

from diffusers_gfprune import PruneDDPMPipeline
from diffusers_gfprune.scripts import evaluate
from helpers.architectures import build, pruned
from helpers.images import encode, model_spec, write_parquet

ROOT = Path(__file__).resolve().parents[2]


# A short evaluation without speed; an image of 8x8 pixels wants more than 64 others for distances on pixels
SHORT = ("--features", "pixels", "--num_inference_steps", "2", "--speed_batch_sizes", "0", "--step_loss_timesteps", "4")
FILES = {"results.json", "samples.png", "samples.safetensors", "step_loss.png", "table.md"}
COUNT = 300  # in two shards


def save_dense(folder: Path, architecture: str = "base") -> Path:
    """A small dense pipeline."""
    DDPMPipeline(build(architecture), DDPMScheduler(clip_sample=True)).save_pretrained(folder)
    return folder


def save_pruned(folder: Path, architecture: str = "base") -> Path:
    """A small pruned one."""
    PruneDDPMPipeline(unet=pruned(architecture), scheduler=DDPMScheduler(clip_sample=True)).save_pretrained(folder)
    return folder


def write_images(folder: Path, channels: int = 1, train: int = 120, size: int = 8, seed: int = 0) -> Path:
    """A data set of noise, brighter at the top, with labels 0 to 3."""
    generator = np.random.default_rng(channels + 10 * seed)
    shape = (train + 8, size, size) if channels == 1 else (train + 8, size, size, channels)
    pixels = generator.integers(0, 128, shape)
    pixels[:, : size // 2] += 100
    encoded = [encode(image.astype(np.uint8)) for image in pixels]
    write_parquet(folder, [encoded[8:]])
    return write_parquet(folder, [encoded[:8]], split="validation")


def run(folder: Path, *arguments: object, out: str = "out", short: tuple[str, ...] = SHORT) -> dict:
    """The script in this process; its results."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    datasets = folder.parent / "datasets"  # one for all tests
    common = ("--evaluation_cache_dir", folder / "cache", "--output_dir", folder / out, "--cache_dir", datasets)
    evaluate.main([str(word) for word in (*short, *common, *arguments)])
    results = folder / out / "results.json"
    return json.loads(results.read_text()) if results.exists() else {}


def make_world(folder: Path) -> Path:
    """A dense and a pruned model, and greyscale images."""
    save_dense(folder / "dense")
    save_pruned(folder / "pruned")
    write_images(folder / "images")
    return folder


def fail_to_sample(*arguments, **options) -> None:
    """In place of `SamplingSettings.sample`, where nothing may be sampled."""
    raise AssertionError("samples were made again")


def real_images(folder: Path) -> torch.Tensor:
    """The training images of a data set as `load_images` gives them, in [0, 1]."""
    from helpers.images import load

    return load(folder, model_spec(), validation_images=256)[0].head(10_000) / 2 + 0.5
