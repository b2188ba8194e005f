"""Data sets of latent models for tests: images of noise with labels and captions, and tiny models to encode them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np

from diffusers_gfprune.data.images import DataArguments, load_images
from diffusers_gfprune.diffusion.class_labels import ClassLabels
from diffusers_gfprune.diffusion.latents import LatentCodec
from diffusers_gfprune.diffusion.prompts import PromptEncoder
from diffusers_gfprune.model_spec import ModelSpec
from helpers.images import encode
from helpers.latent_models import autoencoder, projecting_text_encoder, text_encoder, tokenizer

SIZE = 16  # of images in pixels
DIT_LABELS = ClassLabels(4, null_label=4, argument="num_embeds_ada_norm")


def noise_image(seed: int, height: int = SIZE, width: int = SIZE) -> bytes:
    """An image file of noise."""
    return encode(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_images(folder: Path, images: Sequence[bytes], captions: Sequence | None = None, split: str = "train") -> Path:
    """A data set of a parquet file, with labels from 0 to 3 in turn, and captions."""
    folder.mkdir(parents=True, exist_ok=True)
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)}
    columns = {
        "image": [{"bytes": image, "path": None} for image in images],
        "label": [number % 4 for number in range(len(images))],
    }
    if captions is not None:
        features["text"], columns["text"] = datasets.Dataset.from_dict({"text": captions}).features["text"], captions
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    rows.to_parquet(folder / f"{split}.parquet")
    return folder


def latent_spec(codec: LatentCodec | None = None, size: tuple[int, int] = (SIZE, SIZE), **options) -> ModelSpec:
    """A model of latents from images with this height and width in pixels, which are halved."""
    codec = codec or LatentCodec(autoencoder())
    return ModelSpec(size, codec.pixel_channels, codec=codec, **options)


def prompt_encoder(folder: Path, pooled: bool = False) -> PromptEncoder:
    """Text encoders of Stable Diffusion, or of SDXL."""
    tokens = tokenizer(folder)
    components = {"tokenizer": tokens, "text_encoder": text_encoder(tokens)}
    if pooled:
        components |= {"tokenizer_2": tokens, "text_encoder_2": projecting_text_encoder(tokens)}
    return PromptEncoder.of_pipeline(components, image_size=(SIZE, SIZE))


def load_latents(folder: Path, spec: ModelSpec, prepare: bool = True, **arguments):
    """`load_images` of a latent model, with a cache beside the data; encoded unless `prepare` is False."""
    caches = {"cache_dir": str(folder.parent / "cache"), "encoding_cache_dir": str(folder.parent / "encoded")}
    given = {"dataset_name": str(folder), "validation_images": 2, **caches, **arguments}
    train, held_out = load_images(DataArguments(**given), spec)
    if prepare:
        train.prepare()
    return train, held_out
