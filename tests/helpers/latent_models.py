"""Tiny random VAEs, tokenizers and text encoders of the real classes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, VQModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

MAX_TOKENS = 8  # of a prompt, with its start and its end
LETTERS = "abcdefghijklmnopqrstuvwxyz"
START, END = "<|startoftext|>", "<|endoftext|>"

VAE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 16,
}


def perturbed(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with all parameters moved: none is a constant that would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def autoencoder(seed: int = 0, channels: int = 3, **config) -> AutoencoderKL:
    """An `AutoencoderKL` that halves images, with latents of four channels, and small standard deviations as usual."""
    torch.manual_seed(seed)
    vae = perturbed(AutoencoderKL(in_channels=channels, out_channels=channels, **{**VAE, "scaling_factor": 0.5, **config}))
    with torch.no_grad():
        vae.quant_conv.bias[vae.config.latent_channels :] -= 6  # of the logarithms of the variances
    return vae


def vq_model(seed: int = 0, channels: int = 3, **config) -> VQModel:
    """A `VQModel` that halves images, with latents of three channels."""
    torch.manual_seed(seed)
    sizes = {"in_channels": channels, "out_channels": channels, "num_vq_embeddings": 8}
    return perturbed(VQModel(**sizes, **{**VAE, "scaling_factor": 2.0, **config}))


def tokenizer(folder: Path, max_length: int = MAX_TOKENS, words: tuple[str, ...] = ()) -> CLIPTokenizer:
    """A CLIP tokenizer of single letters, read from files: a word of n letters has n tokens. `words` have one token each."""
    if not (folder / "tokenizer_config.json").exists():
        write_tokenizer(folder, max_length, words)
    return CLIPTokenizer.from_pretrained(folder)


def write_tokenizer(folder: Path, max_length: int, words: tuple[str, ...]) -> None:
    """The files of a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    merges = []
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts[:2] = [parts[0] + parts[1]]
            tokens.append(parts[0])
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": max_length, "pad_token": END}))


def text_config(tokens: CLIPTokenizer, width: int = 16, **config) -> CLIPTextConfig:
    """Configuration of a text encoder of two layers."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2, "num_hidden_layers": 2}
    ids = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
    return CLIPTextConfig(vocab_size=len(tokens), max_position_embeddings=MAX_TOKENS, **{**sizes, **ids, **config})


def text_encoder(tokens: CLIPTokenizer, width: int = 16, seed: int = 0, **config) -> CLIPTextModel:
    """A `CLIPTextModel`."""
    torch.manual_seed(seed)
    return perturbed(CLIPTextModel(text_config(tokens, width, **config)))


def projecting_text_encoder(tokens: CLIPTokenizer, width: int = 24, seed: int = 1, **config) -> CLIPTextModelWithProjection:
    """A `CLIPTextModelWithProjection`, with embeddings of 12 values."""
    torch.manual_seed(seed)
    return perturbed(CLIPTextModelWithProjection(text_config(tokens, width, projection_dim=12, **config)))


def three_text_encoders(folder: Path, width: int = 44) -> dict[str, object]:
    """Components of text of Stable Diffusion 3: embeddings of 24 + 16 values side by side, and those of T5."""
    tokens, pieces = tokenizer(folder), t5_tokenizer()
    return {
        **{"tokenizer": tokens, "text_encoder": projecting_text_encoder(tokens)},
        **{"tokenizer_2": tokens, "text_encoder_2": projecting_text_encoder(tokens, 16, seed=2)},
        **{"tokenizer_3": pieces, "text_encoder_3": t5_encoder(pieces, width)},
    }


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer of single letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def t5_encoder(tokens: T5Tokenizer, width: int = 16, seed: int = 0) -> T5EncoderModel:
    """A `T5EncoderModel` of version 1.1, with two layers."""
    torch.manual_seed(seed)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_heads": 2, "num_layers": 2}
    return perturbed(T5EncoderModel(T5Config(vocab_size=len(tokens), feed_forward_proj="gated-gelu", **sizes)))
