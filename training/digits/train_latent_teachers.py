"""Train the tiny latent models of the digits: complete pipelines of the classes that are on the Hub.

    python training/digits/train_latent_teachers.py --kind dit --autoencoder runs/digits-vae --output_dir runs/digits-dit
    python training/digits/train_latent_teachers.py --kind ldm --autoencoder runs/digits-vqvae --output_dir runs/digits-ldm
    python training/digits/train_latent_teachers.py --kind text --autoencoder runs/digits-vae --output_dir runs/digits-text

| kind | pipeline | denoiser | condition | noise levels as in |
|---|---|---|---|---|
| `dit` | `DiTPipeline` | `DiTTransformer2DModel` | labels, with a null class | DiT-XL/2 |
| `ldm` | `LDMPipeline` | `UNet2DModel` | none | LDM-4 of CelebA-HQ |
| `text` | `StableDiffusionPipeline` | `UNet2DConditionModel` | captions, with the empty one | Stable Diffusion |

The loss is the noise-prediction loss of Ho et al., https://arxiv.org/abs/2006.11239, equation 14, on latents that are drawn
anew from the autoencoder's posterior in each step. A tenth of the labels and captions are dropped, for classifier-free
guidance (Ho and Salimans, https://arxiv.org/abs/2207.12598). `dit` also learns variances (`learned_variance.py`). The text
encoder is trained along with its UNet. The exponential moving average of the weights is saved, in half precision.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from latent_training import LatentTrainArguments, load_digits, run
from learned_variance import variance_loss
from make_captions import CAPTIONED, MAX_TOKENS, make_tokenizer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, HfArgumentParser

from diffusers_gfprune.argument_fields import argument
from diffusers_gfprune.errors import one_line_errors
from diffusers_gfprune.run_folder import write_json

LABELS = 10
CONDITION_DROPOUT = 0.1  # share of dropped labels or captions
STEPS = {"dit": 7000, "ldm": 3000, "text": 3500}
UNET = {"sample_size": 8, "block_out_channels": (48, 48), "layers_per_block": 1, "norm_num_groups": 16, "dropout": 0.1}
TEXT_WIDTH = 48


@dataclass
class TeacherArguments(LatentTrainArguments):
    """Kind, length and output of a training."""

    kind: str = argument("dit", "Which model to train.", choices=tuple(STEPS))
    autoencoder: str = argument("", "Folder of the trained `AutoencoderKL`, or of the `VQModel` for ldm.")
    max_train_steps: int | None = argument(None, f"Number of optimizer steps (>= 1; default: {STEPS}).")
    train_batch_size: int = argument(64, "Number of images per step (>= 1).")

    def __post_init__(self) -> None:
        if self.max_train_steps is None:
            self.max_train_steps = STEPS[self.kind]
        super().__post_init__()
        if not (Path(self.autoencoder) / "config.json").is_file():
            raise ValueError(f"autoencoder={self.autoencoder} is not a folder that train_autoencoder.py has written")


class Batch(NamedTuple):
    """What a step trains on.

    Attributes:
        clean: Scaled latents, float32 with shape `(B, channels, 8, 8)`.
        noise: Gaussian noise of the same shape.
        noisy: The latents with noise.
        timesteps: int64 with shape `(B,)`.
        rows: int64 with shape `(B,)`: which images these are.
        dropped: bool with shape `(B,)`: whose condition is dropped.
    """

    clean: Tensor
    noise: Tensor
    noisy: Tensor
    timesteps: Tensor
    rows: Tensor
    dropped: Tensor


class Teacher(NamedTuple):
    """A model to train.

    Attributes:
        modules: Modules that are trained, by name.
        scheduler: Its noise levels.
        loss: The loss of a batch.
        pipeline: Makes the whole pipeline of the trained modules.
    """

    modules: dict[str, nn.Module]
    scheduler: DDIMScheduler
    loss: Callable[[Batch], Tensor]
    pipeline: Callable[[], DiffusionPipeline]


def noise_levels(start: float, end: float, schedule: str, **options: object) -> DDIMScheduler:
    """A DDIM scheduler of latents."""
    return DDIMScheduler(beta_start=start, beta_end=end, beta_schedule=schedule, clip_sample=False, **options)


def dit_teacher(vae: AutoencoderKL) -> Teacher:
    """A class-conditional diffusion transformer that starts as the identity (adaLN-Zero, arXiv 2212.09748, section 3.2)."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,  # noise and variances
        num_layers=6,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=LABELS,
    )
    for block in transformer.transformer_blocks:
        # In training, Diffusers drops labels by a draw for each block, so that hardly any is missing in all blocks at once
        block.norm1.emb.class_embedder.eval()
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    for layer in (transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    scheduler, labels = noise_levels(1e-4, 0.02, "linear"), load_digits("train").labels

    def loss(batch: Batch) -> Tensor:
        given = torch.where(batch.dropped, LABELS, labels[batch.rows])
        noise, variance = transformer(batch.noisy, batch.timesteps, given).sample.chunk(2, dim=1)
        error = nn.functional.mse_loss(noise, batch.noise)
        return error + variance_loss(variance, noise, batch, scheduler.alphas_cumprod)

    def pipeline() -> DiTPipeline:
        names = {label: str(label) for label in range(LABELS)}
        saved = DiTPipeline(transformer, vae, scheduler, id2label=names)
        saved.register_to_config(id2label=names)  # which the constructor does not save
        return saved

    return Teacher({"transformer": transformer}, scheduler, loss, pipeline)


def ldm_teacher(vqvae: VQModel) -> Teacher:
    """An unconditional UNet with self-attention at 4x4 latents."""
    channels = vqvae.config.latent_channels
    unet = UNet2DModel(
        **UNET,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=12,
    )

    def loss(batch: Batch) -> Tensor:
        return nn.functional.mse_loss(unet(batch.noisy, batch.timesteps).sample, batch.noise)

    scheduler = noise_levels(0.0015, 0.0195, "scaled_linear")
    return Teacher({"unet": unet}, scheduler, loss, lambda: LDMPipeline(vqvae, unet, scheduler))


def text_teacher(vae: AutoencoderKL) -> Teacher:
    """A UNet with cross-attention at 4x4 latents, and its text encoder."""
    tokenizer = make_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).train()
    unet = UNet2DConditionModel(
        **UNET,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,  # the number of heads
        cross_attention_dim=TEXT_WIDTH,
    )
    scheduler = noise_levels(0.00085, 0.012, "scaled_linear", set_alpha_to_one=False, steps_offset=1)

    def tokens(captions: list[str]) -> Tensor:
        return tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids

    captions = datasets.Dataset.from_parquet(str(CAPTIONED / "data/train.parquet"))["caption"]
    ids, empty = tokens(list(captions)), tokens([""])

    def loss(batch: Batch) -> Tensor:
        given = torch.where(batch.dropped[:, None], empty, ids[batch.rows])
        states = text_encoder(given)[0]  # (B, 16, 48)
        return nn.functional.mse_loss(unet(batch.noisy, batch.timesteps, states).sample, batch.noise)

    def pipeline() -> StableDiffusionPipeline:
        parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
        absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(**parts, **absent)

    return Teacher({"unet": unet, "text_encoder": text_encoder}, scheduler, loss, pipeline)


TEACHERS = {
    "dit": (AutoencoderKL, dit_teacher),
    "ldm": (VQModel, ldm_teacher),
    "text": (AutoencoderKL, text_teacher),
}


@torch.no_grad()
def moments_of(vae: AutoencoderKL | VQModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of scaled latents, each with shape `(N, channels, 8, 8)`; zeros for a `VQModel`."""
    if isinstance(vae, VQModel):
        means = torch.cat([vae.encode(part).latents for part in images.split(128)])
        deviations = torch.zeros_like(means)
    else:
        posteriors = [vae.encode(part).latent_dist for part in images.split(128)]
        means, deviations = (torch.cat([getattr(part, name) for part in posteriors]) for name in ("mean", "std"))
    return means * vae.config.scaling_factor, deviations * vae.config.scaling_factor


def save_in_half(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Save a pipeline with weights in half precision, which are loaded in single precision.

    Diffusers does so by default. Transformers takes the dtype in the config, which `save_pretrained` sets to that of the
    weights.
    """
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.half()
    pipeline.save_pretrained(folder)
    config = folder / "text_encoder/config.json"
    if config.is_file():
        write_json(config, {**json.loads(config.read_text()), "dtype": "float32"})


def main() -> None:
    args = HfArgumentParser(TeacherArguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0]
    torch.set_num_threads(args.num_threads)
    autoencoder_class, build = TEACHERS[args.kind]
    vae = autoencoder_class.from_pretrained(args.autoencoder).eval().requires_grad_(False)
    vae.register_to_config(_name_or_path="")  # its path says nothing elsewhere
    means, deviations = moments_of(vae, load_digits("train").images)
    torch.manual_seed(0)
    teacher = build(vae)

    def draw(generator: torch.Generator) -> Batch:
        size = (args.train_batch_size,)
        rows = torch.randint(len(means), size, generator=generator)
        timesteps = torch.randint(teacher.scheduler.config.num_train_timesteps, size, generator=generator)
        dropped = torch.rand(size, generator=generator) < CONDITION_DROPOUT
        posterior, noise = torch.randn((2, *size, *means.shape[1:]), generator=generator)
        clean = means[rows] + deviations[rows] * posterior
        return Batch(clean, noise, teacher.scheduler.add_noise(clean, noise, timesteps), timesteps, rows, dropped)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        return teacher.loss(draw(generator))

    run(
        args,
        teacher.modules,
        loss_of,
        lambda folder: save_in_half(teacher.pipeline(), folder),
        {"kind": args.kind, "scaling_factor": vae.config.scaling_factor},
    )


if __name__ == "__main__":
    with one_line_errors("train_latent_teachers.py"):
        main()
