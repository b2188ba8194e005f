"""Train the tiny autoencoders of the latent digits models: 32x32 pixels to 8x8 latents.

    python training/digits/train_autoencoder.py --kind kl --output_dir runs/digits-vae
    python training/digits/train_autoencoder.py --kind vq --output_dir runs/digits-vqvae

`kl` is an `AutoencoderKL` with four latent channels, as in Stable Diffusion. Its loss is the squared error of what is decoded
from a sample of the posterior, plus a small Kullback-Leibler divergence to a normal distribution.

`vq` is a `VQModel` with three latent channels, as in LDM-4 of CelebA-HQ. For the first third of the training, nothing is
quantized. Then the codebook starts as the cluster centres of the latents of all training images, which keeps it from
collapsing, and the loss gets the codebook's own terms.

Both are from Rombach et al., https://arxiv.org/abs/2112.10752. There is neither a discriminator nor a perceptual loss: digits
are simple enough. `scaling_factor` is one over the standard deviation of the latents of all training images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ModelMixin, VQModel
from latent_training import IMAGE_SIZE, LatentTrainArguments, load_digits, run
from sklearn.cluster import KMeans
from torch import Tensor
from transformers import HfArgumentParser

from diffusers_gfprune.argument_fields import argument
from diffusers_gfprune.errors import one_line_errors

KINDS = ("kl", "vq")
KL_WEIGHT = 1e-5  # of the mean over latent values, beside a mean over pixels
VQ_PLAIN_SHARE = 1 / 3  # of the steps without a codebook
VQ_LATENT_WEIGHT = 1e-3  # of the mean square of latents while there is no codebook
COMMON = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": IMAGE_SIZE,
    "mid_block_add_attention": False,
}


@dataclass
class AutoencoderArguments(LatentTrainArguments):
    """Kind, length and output of a training."""

    kind: str = argument("kl", "kl: AutoencoderKL; vq: VQModel.", choices=KINDS)
    max_train_steps: int = argument(1000, "Number of optimizer steps (>= 1).")
    train_batch_size: int = argument(32, "Number of images per step (>= 1).")
    learning_rate: float = argument(2e-3, "Peak learning rate of AdamW, with cosine decay (> 0).")


def build(kind: str) -> AutoencoderKL | VQModel:
    """An untrained autoencoder with seeded weights."""
    torch.manual_seed(0)
    if kind == "kl":
        return AutoencoderKL(**COMMON, latent_channels=4)
    return VQModel(**COMMON, latent_channels=3, num_vq_embeddings=512)


def kl_loss(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """Squared error from a sample of the posterior, and its divergence to N(0, 1).

    Args:
        vae: The autoencoder.
        images: float32 with shape `(B, 3, 32, 32)` in [-1, 1].
        generator: Draws from the posterior.
    """
    posterior = vae.encode(images).latent_dist
    reconstructed = vae.decode(posterior.sample(generator)).sample
    divergence = posterior.kl().mean() / posterior.mean[0].numel()
    return (reconstructed - images).square().mean() + KL_WEIGHT * divergence


def vq_loss(vqvae: VQModel, images: Tensor, quantized: bool) -> Tensor:
    """Squared error, with the codebook's terms or, as long as there is none, a penalty of large latents."""
    latents = vqvae.encode(images).latents
    decoded = vqvae.decode(latents, force_not_quantize=not quantized)
    error = (decoded.sample - images).square().mean()
    return error + decoded.commit_loss.mean() if quantized else error + VQ_LATENT_WEIGHT * latents.square().mean()


@torch.no_grad()
def latents_of(model: AutoencoderKL | VQModel, images: Tensor) -> Tensor:
    """Latents before scaling and quantization (means of posteriors), with shape `(N, channels, 8, 8)`."""
    parts = images.split(128)
    if isinstance(model, AutoencoderKL):
        return torch.cat([model.encode(part).latent_dist.mean for part in parts])
    return torch.cat([model.encode(part).latents for part in parts])


@torch.no_grad()
def start_codebook(vqvae: VQModel, images: Tensor) -> None:
    """Set the codebook to cluster centres of the latents of all images (k-means)."""
    vectors = latents_of(vqvae, images).permute(0, 2, 3, 1).flatten(0, 2)  # (N * 8 * 8, channels)
    draw = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:20_000]
    clusters = KMeans(vqvae.config.num_vq_embeddings, n_init=1, max_iter=20, random_state=0).fit(vectors[draw].numpy())
    vqvae.quantize.embedding.weight.copy_(torch.from_numpy(clusters.cluster_centers_))


def set_scaling_factor(model: ModelMixin, images: Tensor) -> None:
    """Store one over the standard deviation of latents in the config, rounded to five digits."""
    model.register_to_config(scaling_factor=round(1 / latents_of(model, images).std().item(), 5))


def main() -> None:
    args = HfArgumentParser(AutoencoderArguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0]
    torch.set_num_threads(args.num_threads)
    images = load_digits("train").images
    model = build(args.kind)
    first_quantized = int(VQ_PLAIN_SHARE * args.max_train_steps)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        batch = images[torch.randint(len(images), (args.train_batch_size,), generator=generator)]
        if args.kind == "kl":
            return kl_loss(model, batch, generator)
        if step == first_quantized:
            start_codebook(model, images)
        return vq_loss(model, batch, quantized=step >= first_quantized)

    def save(folder: Path) -> None:
        set_scaling_factor(model, images)
        model.half().save_pretrained(folder)

    run(args, {"model": model}, loss_of, save, {"kind": args.kind, **COMMON})


if __name__ == "__main__":
    with one_line_errors("train_autoencoder.py"):
        main()
