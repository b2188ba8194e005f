"""model_spec.py: what a model takes, and VAEs and text encoders of other models."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

from diffusers_gfprune.diffusion.class_labels import ClassLabels
from diffusers_gfprune.diffusion.latents import LatentCodec
from diffusers_gfprune.model_spec import ModelSpec
from helpers.architectures import BASE
from helpers.latent_data import prompt_encoder
from helpers.latent_models import autoencoder, vq_model

TEXT = {
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 8,
}
SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 60}


def unet(**config) -> UNet2DModel:
    return UNet2DModel(**{**BASE, **config})


def dit(**config) -> DiTTransformer2DModel:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 8, "norm_num_groups": 4}
    return DiTTransformer2DModel(**{**sizes, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 10, **config})


def text_unet(width: int = 16, **config) -> UNet2DConditionModel:
    return UNet2DConditionModel(**{**TEXT, "cross_attention_dim": width, **config})


def test_pixel_models() -> None:
    assert ModelSpec.of(unet(sample_size=(8, 16), in_channels=3, out_channels=3)) == ModelSpec((8, 16), 3)
    assert ModelSpec.of(unet(num_class_embeds=10)) == ModelSpec((8, 8), 1, ClassLabels(10))


def test_latent_models(tmp_path: Path) -> None:
    codec = LatentCodec(autoencoder())
    spec = ModelSpec.of(dit(), codec)
    assert spec == ModelSpec((16, 16), 3, ClassLabels(10, 10, "num_embeds_ada_norm"), codec)
    quantized = LatentCodec(vq_model())
    assert ModelSpec.of(unet(in_channels=3, out_channels=3), quantized) == ModelSpec((16, 16), 3, None, quantized)
    prompts = prompt_encoder(tmp_path)
    assert ModelSpec.of(text_unet(), codec, prompts) == ModelSpec((16, 16), 3, None, codec, prompts)
    pooled = prompt_encoder(tmp_path, pooled=True)
    assert ModelSpec.of(text_unet(40, **SDXL), codec, pooled).prompts is pooled


def test_other_combinations_are_one_line(tmp_path: Path) -> None:
    codec, prompts = LatentCodec(autoencoder()), prompt_encoder(tmp_path)
    for make, message in (
        (lambda: ModelSpec.of(dit()), "in_channels=4 of the model must be 1 .greyscale. or 3 .RGB."),
        (lambda: ModelSpec.of(unet(in_channels=3, out_channels=3), codec), "of 4 channels, but the model has in_channels=3"),
        (lambda: ModelSpec.of(text_unet(), codec), "the model takes captions, but its pipeline has no text encoder"),
        (lambda: ModelSpec.of(text_unet(), None, prompts), "its pipeline has no VAE: text needs a latent model"),
        (
            lambda: ModelSpec.of(text_unet(32), codec, prompts),
            "width 16, but the model needs 32: it is the text encoder of another",
        ),
        (lambda: ModelSpec.of(dit(), codec, prompts), "the model needs class_labels, which the text encoder does not make"),
        (lambda: ModelSpec.of(text_unet(40, **SDXL), codec, prompts), "the model needs text_embeds, which the text encoder"),
        (lambda: ModelSpec.of(unet(class_embed_type="timestep")), "class_embed_type=timestep must be None"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
