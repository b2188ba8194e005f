"""diffusion/latents.py: moments, draws and images of a frozen VAE agree with Diffusers' pipelines."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel, VQModel

from diffusers_gfprune.diffusion.latents import LatentCodec
from helpers.latent_models import autoencoder, vq_model


def images(count: int = 3, channels: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_moments_are_those_of_the_posterior() -> None:
    vae = autoencoder()
    moments = LatentCodec(vae).encode(images())
    posterior = vae.encode(images()).latent_dist
    assert moments.shape == (3, 8, 8, 8) and moments.dtype == torch.float32 and not moments.requires_grad
    torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.std], dim=1))
    assert moments[:, 4:].min() > 0


def test_draws_are_scaled_samples_of_the_posterior() -> None:
    codec = LatentCodec(autoencoder(shift_factor=0.25))
    moments, noise = codec.encode(images()), torch.randn(3, 4, 8, 8)
    mean, std = moments.chunk(2, dim=1)
    assert torch.equal(codec.draw(moments, torch.zeros_like(noise)), (mean - 0.25) * 0.5)
    assert torch.equal(codec.draw(moments), codec.draw(moments, torch.zeros_like(noise)))
    torch.testing.assert_close(codec.draw(moments, noise), (mean + std * noise - 0.25) * 0.5)
    assert torch.equal(codec.draw(moments, noise)[1], codec.draw(moments[1], noise[1]))


def test_channels_may_have_a_mean_and_a_deviation_each() -> None:
    """As in StableDiffusionXLPipeline: images of latents z are those of z std / scaling_factor + mean."""
    mean, std = [0.5, -1.0, 0.0, 2.0], [1.0, 2.0, 4.0, 0.5]
    vae = autoencoder(latents_mean=mean, latents_std=std)
    codec = LatentCodec(vae)
    latents = torch.randn(2, 4, 8, 8)
    given = latents * torch.tensor(std).view(1, 4, 1, 1) / 0.5 + torch.tensor(mean).view(1, 4, 1, 1)
    torch.testing.assert_close(codec.decode(latents), vae.decode(given).sample.clamp(-1, 1))
    torch.testing.assert_close(codec.draw(torch.cat([given, torch.ones_like(given)], dim=1)), latents)


@pytest.mark.parametrize("vae", [autoencoder(), vq_model(), vq_model(vq_embed_dim=5)], ids=["kl", "vq", "vq-embed-dim"])
def test_images_are_those_of_the_pipelines(vae: AutoencoderKL | VQModel) -> None:
    """DiTPipeline, StableDiffusionPipeline and LDMPipeline decode latents / scaling_factor."""
    codec = LatentCodec(vae)
    latents = torch.randn(2, *codec.latent_shape(16, 16))
    expected = vae.decode(latents / vae.config.scaling_factor).sample
    torch.testing.assert_close(codec.decode(latents), expected.clamp(-1, 1))
    assert codec.image_shape(8, 8) == expected.shape[1:] == (3, 16, 16)


def test_latents_of_a_vq_model_are_not_quantized_yet() -> None:
    vae = vq_model()
    codec = LatentCodec(vae)
    moments = codec.encode(images())
    assert moments.shape == (3, 3, 8, 8) == (3, *codec.latent_shape(16, 16))
    torch.testing.assert_close(codec.draw(moments, torch.randn(3, 3, 8, 8)), vae.encode(images()).latents * 2)
    assert LatentCodec(vq_model(vq_embed_dim=5)).encode(images()).shape == (3, 5, 8, 8)


def test_greyscale_images_are_repeated() -> None:
    grey = images(channels=1)
    assert torch.equal(LatentCodec(autoencoder()).encode(grey), LatentCodec(autoencoder()).encode(grey.repeat(1, 3, 1, 1)))
    codec = LatentCodec(autoencoder(channels=1))
    assert codec.decode(codec.draw(codec.encode(grey))).shape == grey.shape
    with pytest.raises(ValueError, match=r"images have shape \(3, 3, 16, 16\), but the VAE has in_channels=1"):
        codec.encode(images())


@pytest.mark.parametrize("make", [autoencoder, vq_model])
def test_many_images_are_encoded_in_parts(make, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = LatentCodec(make())
    whole = codec.encode(images(5))
    decoded = codec.decode(codec.draw(whole))
    monkeypatch.setattr("diffusers_gfprune.diffusion.latents.MAX_PIXELS", 2 * 16 * 16)
    torch.testing.assert_close(codec.encode(images(5)), whole)
    torch.testing.assert_close(codec.decode(codec.draw(whole)), decoded)
    assert codec.encode(images(0)).shape == (0, *whole.shape[1:]) and codec.decode(codec.draw(whole[:0])).shape[0] == 0


def test_the_vae_is_frozen_in_single_precision() -> None:
    codec = LatentCodec(autoencoder().half().train())
    assert not codec.vae.training and codec.vae.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in codec.vae.parameters())


def test_identity_follows_weights_and_configuration() -> None:
    identities = [
        LatentCodec(vae).identity() for vae in (autoencoder(), autoencoder(seed=1), autoencoder(shift_factor=1.0), vq_model())
    ]
    assert len({str(identity) for identity in identities}) == 4
    assert LatentCodec(autoencoder()).identity() == identities[0]


def test_sizes() -> None:
    codec = LatentCodec(autoencoder())
    assert codec.downscale == 2 and codec.latent_shape(16, 24) == (4, 8, 12)
    with pytest.raises(ValueError, match="images of 16x23 pixels must have sides that are multiples of 2"):
        codec.latent_shape(16, 23)
    codec.check_fits(4)
    with pytest.raises(ValueError, match="makes latents of 4 channels, but the model has in_channels=3: it is the VAE of ano"):
        codec.check_fits(3)


@pytest.mark.parametrize(
    ("vae", "message"),
    [
        (
            lambda: UNet2DModel(sample_size=8, block_out_channels=(32,) * 4),
            "a UNet2DModel, but must be an AutoencoderKL or a VQ",
        ),
        (lambda: autoencoder(channels=4), "in_channels=4 and out_channels=4, which must both be 1 .* or 3"),
        (lambda: autoencoder(scaling_factor=0.0), "scaling_factor=0.0, .*: they must be finite, and scales positive"),
        (lambda: autoencoder(scaling_factor=-1.0), "scaling_factor=-1.0"),
        (lambda: autoencoder(latents_mean=[0.0] * 4), r"latents_mean=\[.*\] and latents_std=None: it must have both or none"),
        (lambda: autoencoder(latents_mean=[0.0] * 3, latents_std=[1.0] * 3), "latents_mean of the VAE has 3 values"),
        (lambda: autoencoder(latents_mean=[0.0], latents_std=[1.0], shift_factor=1.0), "it must have one of them at most"),
    ],
)
def test_other_vaes_are_refused(vae, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        LatentCodec(vae())
    assert "\n" not in str(error.value)
