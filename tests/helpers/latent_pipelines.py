"""Tiny random pipelines of all supported kinds in latents, as stock Diffusers saves them, and images for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    LDMTextToImagePipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from transformers import BertTokenizer

from helpers.images import encode
from helpers.latent_models import (
    autoencoder,
    perturbed,
    projecting_text_encoder,
    t5_encoder,
    t5_tokenizer,
    text_encoder,
    three_text_encoders,
    tokenizer,
    vq_model,
)

# Pixels of images and of their latents, along each side; the VAEs halve images
SIZE, LATENT_SIZE = 16, 8
CLASSES = 4
LDM_TOKENS = 77  # LDMTextToImagePipeline pads prompts to this length
CAPTIONS = ("a cat", "a dog", "two", "red")
BETAS = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "clip_sample": False}

DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": LATENT_SIZE,
    "patch_size": 2,
    "num_embeds_ada_norm": CLASSES,
}
PIXART = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": LATENT_SIZE,
    "patch_size": 2,
    "cross_attention_dim": 24,
    "caption_channels": 16,
}
SD3 = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "sample_size": LATENT_SIZE,
    "patch_size": 2,
    "joint_attention_dim": 44,
    "caption_projection_dim": 24,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 8,
}
BLOCKS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": LATENT_SIZE}
UNCONDITIONAL = {
    **BLOCKS,
    "in_channels": 3,
    "out_channels": 3,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
TEXT = {
    **BLOCKS,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
# SDXL: states of two text encoders side by side, 16 + 24; pooled states of 12 values and six sizes
TEXT_TIME = {
    "cross_attention_dim": 40,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 12 + 6 * 8,
}


def _model(kind: type, config: dict) -> torch.nn.Module:
    torch.manual_seed(2)
    return perturbed(kind(**config))


def dit(folder: Path, **config) -> DiffusionPipeline:
    """A `DiTPipeline` with learned variances."""
    transformer = _model(DiTTransformer2DModel, {**DIT, **config})
    return DiTPipeline(transformer, autoencoder(), DDIMScheduler(**BETAS))


def ldm(folder: Path, **config) -> DiffusionPipeline:
    """An `LDMPipeline`."""
    return LDMPipeline(vq_model(), _model(UNet2DModel, {**UNCONDITIONAL, **config}), DDIMScheduler(**BETAS))


def sd(folder: Path, **config) -> DiffusionPipeline:
    """A `StableDiffusionPipeline`."""
    tokens = tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(tokens),
        tokenizer=tokens,
        unet=_model(UNet2DConditionModel, {**TEXT, **config}),
        scheduler=PNDMScheduler(**{k: v for k, v in BETAS.items() if k != "clip_sample"}, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(folder: Path, **config) -> DiffusionPipeline:
    """A `StableDiffusionXLPipeline`."""
    tokens = tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    return StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(tokens),
        text_encoder_2=projecting_text_encoder(tokens),
        tokenizer=tokens,
        tokenizer_2=tokens,
        unet=_model(UNet2DConditionModel, {**TEXT, **TEXT_TIME, **config}),
        scheduler=DDPMScheduler(**BETAS),
    )


def ldm_text(folder: Path, **config) -> DiffusionPipeline:
    """An `LDMTextToImagePipeline`."""
    words = folder.with_name(f"{folder.name}-words.txt")
    words.parent.mkdir(parents=True, exist_ok=True)
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(" ".join(CAPTIONS).split())]
    words.write_text("\n".join(known) + "\n")
    tokens = BertTokenizer(str(words), model_max_length=LDM_TOKENS)
    sizes = {"encoder_layers": 2, "encoder_ffn_dim": 32, "encoder_attention_heads": 2, "head_dim": 8, "d_model": 16}
    torch.manual_seed(1)
    bert = LDMBertModel(LDMBertConfig(vocab_size=len(tokens), max_position_embeddings=LDM_TOKENS, **sizes))
    unet = _model(UNet2DConditionModel, {**TEXT, **config})
    return LDMTextToImagePipeline(autoencoder(), perturbed(bert), tokens, unet, DDIMScheduler(**BETAS))


def pixart(folder: Path, kind: type[DiffusionPipeline] = PixArtAlphaPipeline, **config) -> DiffusionPipeline:
    """A `PixArtAlphaPipeline` with learned variances, or a `PixArtSigmaPipeline`."""
    transformer, tokens = _model(PixArtTransformer2DModel, {**PIXART, **config}), t5_tokenizer()
    scheduler = DPMSolverMultistepScheduler(**{k: v for k, v in BETAS.items() if k != "clip_sample"})
    return kind(tokens, t5_encoder(tokens), autoencoder(), transformer, scheduler)


def pixart_sigma(folder: Path, **config) -> DiffusionPipeline:
    """A `PixArtSigmaPipeline` with learned variances."""
    return pixart(folder, PixArtSigmaPipeline, **config)


def sd3(folder: Path, has_t5: bool = True, **config) -> DiffusionPipeline:
    """A `StableDiffusion3Pipeline`, with or without the third text encoder."""
    text = three_text_encoders(folder.with_name(f"{folder.name}-tokenizer"))
    text |= {} if has_t5 else {"tokenizer_3": None, "text_encoder_3": None}
    vae = autoencoder(shift_factor=0.1)
    return StableDiffusion3Pipeline(
        _model(SD3Transformer2DModel, {**SD3, **config}), FlowMatchEulerDiscreteScheduler(shift=3.0), vae, **text
    )


PIPELINES: dict[str, Callable[..., DiffusionPipeline]] = {
    "dit": dit,
    "ldm": ldm,
    "sd": sd,
    "sdxl": sdxl,
    "ldm-text": ldm_text,
    "pixart": pixart,
    "pixart-sigma": pixart_sigma,
    "sd3": sd3,
}


def save(name: str, folder: Path, **config) -> Path:
    """A saved pipeline by its name in `PIPELINES`, with arguments of its denoiser."""
    PIPELINES[name](folder, **config).save_pretrained(folder)
    return folder


def write_data(folder: Path, count: int = 96, size: int = SIZE, captions: Sequence[str] | None = CAPTIONS) -> Path:
    """A data set of coloured noise, brighter at the top, with labels 0 to 3 and captions in turn, if there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    columns: dict = {"image": [], "label": [number % CLASSES for number in range(count)]}
    for _ in range(count):
        pixels = generator.integers(0, 128, (size, size, 3))
        pixels[: size // 2] += 100
        columns["image"].append({"bytes": encode(pixels.astype(np.uint8)), "path": None})
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=CLASSES)}
    if captions is not None:
        columns["text"] = [captions[number % len(captions)] for number in range(count)]
        features["text"] = datasets.Value("string")
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.to_parquet(folder / "train-00000-of-00001.parquet")
    return folder
