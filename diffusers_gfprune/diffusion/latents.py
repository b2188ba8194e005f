"""Latents of a frozen VAE: encoding, drawing from the posterior, and decoding.

The encoder of an `AutoencoderKL` maps an image to a Gaussian with mean m and standard deviation s for each value of the
latent. A denoiser is trained on

    z = ((m + s u) - shift) scale,    u ~ N(0, 1)          (Rombach et al., arXiv 2112.10752, section 3.1)

so an image has a new latent in every epoch, although it is encoded only once: m and s, the *moments*, are what is kept. In the
VAE's configuration, `scaling_factor` is the scale, and `shift_factor` is the shift. Some VAEs have `latents_mean` and
`latents_std` for each channel: the mean is the shift, and the scale is divided by the standard deviation.

The encoder of a `VQModel` has no randomness. Its moments are the latent before quantization, which the decoder quantizes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from ..fingerprints import model_fingerprint
from .placement import moved

__all__ = ["LatentCodec", "LatentDraw"]

# Images of one forward pass: at most so many, and so many pixels in all (8 images of 512x512 pixels)
MAX_IMAGES, MAX_PIXELS = 64, 2**21


@dataclass(frozen=True)
class LatentDraw:
    """Latents as a denoiser takes them, from the moments of images. It does not need the VAE.

    Attributes:
        is_random: Whether the moments are means and standard deviations.
        shift: Subtracted from latents: `(channels, 1, 1)` or `(1, 1, 1)`.
        scale: Factor of the result, of the same shape.
    """

    is_random: bool
    shift: Tensor
    scale: Tensor

    def __call__(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw latents.

        Args:
            moments: Moments, with shape `(..., moment_channels, height, width)`.
            noise: Gaussian noise u with shape `(..., latent_channels, height, width)`; None: zeros, which gives the means. A
                `VQModel` needs none.

        Returns:
            Latents with the shape of `noise`, and the dtype and device of `moments`.
        """
        latents = moments
        if self.is_random:
            latents, std = moments.chunk(2, dim=-3)
            latents = latents if noise is None else latents + std * noise
        return (latents - self.shift.to(latents)) * self.scale.to(latents)


class LatentCodec:
    """A frozen VAE, in float32 and in evaluation mode.

    Args:
        vae: The VAE, which is frozen, and converted to float32.

    Attributes:
        vae: The VAE.
        draw: Draws latents from moments, see `LatentDraw`.
        latent_channels: Channels of a latent, as a denoiser takes it.
        moment_channels: Channels of the moments of an image.
        downscale: Pixels of an image for one of its latent, along each side.

    Raises:
        ValueError: The class or the configuration of the VAE is not supported.
    """

    def __init__(self, vae: nn.Module) -> None:
        if not isinstance(vae, (AutoencoderKL, VQModel)):
            raise ValueError(f"the VAE is a {type(vae).__name__}, but must be an AutoencoderKL or a VQModel")
        config = vae.config
        if config.in_channels not in (1, 3) or config.out_channels != config.in_channels:
            raise ValueError(
                f"the VAE has in_channels={config.in_channels} and out_channels={config.out_channels}, which must both be 1 "
                f"(greyscale) or 3 (RGB)"
            )
        self.vae = vae.float().eval().requires_grad_(False)
        self.is_random = isinstance(vae, AutoencoderKL)
        vq_channels = None if self.is_random else config.vq_embed_dim
        self.latent_channels = config.latent_channels if vq_channels is None else vq_channels
        self.moment_channels = (2 if self.is_random else 1) * self.latent_channels
        self.downscale = 2 ** (len(config.block_out_channels) - 1)
        self.draw = LatentDraw(self.is_random, *_normalization(config, self.latent_channels))

    @property
    def pixel_channels(self) -> int:
        """Channels of images: 1 (greyscale) or 3 (RGB)."""
        return self.vae.config.in_channels

    @property
    def device(self) -> torch.device:
        """Device of the VAE."""
        return next(self.vae.parameters()).device

    # --- sizes ---

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape `(channels, height, width)` of the latent of an image.

        Raises:
            ValueError: A side of the image is not a multiple of the VAE's factor.
        """
        if height % self.downscale or width % self.downscale:
            raise ValueError(f"images of {height}x{width} pixels must have sides that are multiples of {self.downscale}")
        return self.latent_channels, height // self.downscale, width // self.downscale

    def image_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape `(channels, height, width)` of the image of a latent with a given height and width."""
        return self.pixel_channels, height * self.downscale, width * self.downscale

    def check_fits(self, in_channels: int) -> None:
        """Check that a denoiser takes latents of this VAE.

        Args:
            in_channels: Channels of the denoiser's samples.

        Raises:
            ValueError: The VAE belongs to another model.
        """
        if in_channels != self.latent_channels:
            raise ValueError(
                f"the VAE makes latents of {self.latent_channels} channels, but the model has in_channels={in_channels}: it "
                f"is the VAE of another model"
            )

    # --- images and latents ---

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Moments of images. The result is a function of the images: nothing is drawn.

        Args:
            pixels: Images in [-1, 1] with shape `(n, channels, height, width)`. Greyscale images are repeated for a VAE of
                RGB images.

        Returns:
            Means and standard deviations of an `AutoencoderKL`, one after the other, or latents of a `VQModel`: float32 with
            shape `(n, moment_channels, height / downscale, width / downscale)`, on the device of `pixels`.

        Raises:
            ValueError: The VAE does not take images of this shape.
        """
        if pixels.ndim != 4 or pixels.shape[1] not in (1, self.pixel_channels):
            raise ValueError(f"images have shape {tuple(pixels.shape)}, but the VAE has in_channels={self.pixel_channels}")
        shape = self.latent_shape(*pixels.shape[2:])
        if len(pixels) == 0:
            return pixels.new_zeros(0, self.moment_channels, *shape[1:], dtype=torch.float32)
        return torch.cat([self._encode(part) for part in pixels.split(self._batch_size(*pixels.shape[2:]))])

    def _encode(self, pixels: Tensor) -> Tensor:
        images = pixels.to(self.device, torch.float32).expand(-1, self.pixel_channels, -1, -1)
        if self.is_random:
            posterior = self.vae.encode(images).latent_dist
            return torch.cat([posterior.mean, posterior.std], dim=1).to(pixels.device)
        return self.vae.encode(images).latents.to(pixels.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents.

        Args:
            latents: Latents as a denoiser makes them, floating point with shape `(n, latent_channels, height, width)`.

        Returns:
            Images in [-1, 1], float32 with shape `(n, pixel_channels, height * downscale, width * downscale)`, on the device
            of `latents`.
        """
        size = self.image_shape(*latents.shape[2:])
        if len(latents) == 0:
            return latents.new_zeros(0, *size, dtype=torch.float32)
        return torch.cat([self._decode(part) for part in latents.split(self._batch_size(*size[1:]))])

    def _decode(self, latents: Tensor) -> Tensor:
        given = latents.to(self.device, torch.float32)
        images = self.vae.decode(given / self.draw.scale.to(given) + self.draw.shift.to(given)).sample
        return images.clamp(-1, 1).to(latents.device)

    @staticmethod
    def _batch_size(height: int, width: int) -> int:
        return max(1, min(MAX_IMAGES, MAX_PIXELS // (height * width)))

    # --- place and identity ---

    def to(self, device: torch.device | str) -> LatentCodec:
        """Move the VAE to a device."""
        self.vae.to(device)
        return self

    @contextmanager
    def on(self, device: torch.device | str) -> Iterator[LatentCodec]:
        """Context in which the VAE is on a device; then it returns to where it was."""
        with moved([self.vae], device):
            yield self

    @functools.cached_property
    def _identity(self) -> dict[str, str]:
        return model_fingerprint(self.vae)

    def identity(self) -> dict[str, str]:
        """Everything that moments and images depend on, as JSON values for cache keys."""
        return dict(self._identity)


def _normalization(config, channels: int) -> tuple[Tensor, Tensor]:
    """Shift and scale of latents, each with shape `(channels, 1, 1)` or `(1, 1, 1)`.

    Raises:
        ValueError: They are not finite, not positive, or for another number of channels.
    """
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    shift = getattr(config, "shift_factor", None)
    if (mean is None) != (std is None):
        raise ValueError(f"the VAE has latents_mean={mean} and latents_std={std}: it must have both or none")
    if mean is not None and shift is not None:
        raise ValueError(f"the VAE has shift_factor={shift} and latents_mean={mean}: it must have one of them at most")
    shifts, stds = ([shift or 0.0], [1.0]) if mean is None else (list(mean), list(std))
    for name, values in (("latents_mean", shifts), ("latents_std", stds)):
        if len(values) not in (1, channels):
            raise ValueError(f"{name} of the VAE has {len(values)} values, but its latents have {channels} channels")
    scales = [config.scaling_factor / value if value and config.scaling_factor else math.nan for value in stds]
    if not all(map(math.isfinite, (*shifts, *scales))) or min(scales) <= 0:
        given = f"scaling_factor={config.scaling_factor}, shift_factor={shift}, latents_mean={mean} and latents_std={std}"
        raise ValueError(f"the VAE has {given}: they must be finite, and scales positive")
    return torch.tensor(shifts).view(-1, 1, 1), torch.tensor(scales).view(-1, 1, 1)
