"""metrics/sampling.py: image i is a function of model, seed and i."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from diffusers_gfprune.metrics.conditions import SampleConditions
from diffusers_gfprune.metrics.sampling import denoised, image_generators, sample_images, to_uint8
from helpers.architectures import build
from helpers.zero_model import Zero


def draw(unet: nn.Module, num_images: int = 5, **options) -> Tensor:
    """A few samples in three DDIM steps."""
    return sample_images(unet, DDPMScheduler(), num_images, (8, 8), num_inference_steps=3, **options)


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    """A small UNet that no test changes."""
    return build("base")


def test_samples_are_images_and_repeat_exactly(unet: UNet2DModel) -> None:
    """The same seed, the same images, whatever the state of the global generator."""
    images = draw(unet)
    assert images.shape == (5, 1, 8, 8)
    assert images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert images.std() > 0.05
    torch.rand(10)
    assert torch.equal(draw(unet), images)


def test_samples_do_not_depend_on_the_batch_size_or_on_their_number(unet: UNet2DModel) -> None:
    """Image i depends on the seed and on i; kernels may round differently by batch size."""
    images = draw(unet)
    for options in ({"batch_size": 1}, {"batch_size": 2}, {"num_images": 3}):
        other = draw(unet, **options)
        torch.testing.assert_close(other, images[: len(other)], rtol=0, atol=1.001 / 255)


def test_samples_depend_on_seed_and_index(unet: UNet2DModel) -> None:
    """No two images start from the same noise."""
    images, other = draw(unet), draw(unet, seed=1)
    assert (images - other).abs().flatten(1).max(dim=1).values.min() > 0.01
    assert (images[0] - images[1]).abs().max() > 0.01


@pytest.mark.parametrize("clip_sample", [True, False])
def test_samples_of_a_zero_prediction_are_the_noise(clip_sample: bool) -> None:
    """With eps_theta = 0, a DDIM step from t gives x_0 = x_t / sqrt(abar_t); pixels end in [0, 1] with any scheduler.

    A single step with trailing spacing starts at the last timestep.
    """
    model, scheduler = Zero().train(), DDPMScheduler(clip_sample=clip_sample)
    model.config = SimpleNamespace(in_channels=1)
    images = sample_images(model, scheduler, 3, (8, 8), num_inference_steps=1, seed=4, timestep_spacing="trailing")
    noise = torch.stack([torch.randn(1, 8, 8, generator=generator) for generator in image_generators(4, range(3))])
    x = noise / scheduler.alphas_cumprod[-1].sqrt()
    torch.testing.assert_close(images, x.clamp(-1, 1) / 2 + 0.5, rtol=0, atol=0.5001 / 255)
    assert model.training and model.modes == {False}


def test_each_sample_gets_its_label() -> None:
    """Conditional models, in batches."""
    model = Zero()
    model.config = SimpleNamespace(in_channels=1)
    labels = torch.tensor([3, 1, 4, 1, 5])
    sample_images(
        model,
        DDPMScheduler(),
        5,
        (4, 4),
        num_inference_steps=1,
        timestep_spacing="trailing",
        batch_size=2,
        conditions=SampleConditions({"class_labels": labels}),
    )
    assert model.seen(2).tolist() == labels.tolist()
    assert [len(call[0]) for call in model.calls] == [2, 2, 1]


def test_an_image_is_the_same_wherever_sampling_starts(unet: UNet2DModel) -> None:
    """Several processes sample the same shards of images as one."""
    torch.testing.assert_close(draw(unet, 2, first=3), draw(unet)[3:], rtol=0, atol=1.001 / 255)


def test_samples_hold_8_bits(unet: UNet2DModel) -> None:
    images = draw(unet)
    assert torch.equal(to_uint8(images).float() / 255, images)
    assert to_uint8(torch.tensor([0.0, 0.5, 0.999, 1.0])).tolist() == [0, 128, 255, 255]


def test_noise_of_images_is_gaussian_and_independent() -> None:
    """Over 400 images of 64 values: mean 0 and variance 1 within four standard errors, no correlation of neighbours."""
    noise = torch.stack([torch.randn(64, generator=generator) for generator in image_generators(0, range(400))])
    assert abs(noise.mean().item()) < 4 / np.sqrt(noise.numel())
    assert abs(noise.var().item() - 1) < 4 * np.sqrt(2 / noise.numel())
    assert abs((noise[:-1] * noise[1:]).mean().item()) < 4 / np.sqrt(noise.numel())


def test_spacing_and_eta_change_samples_and_repeat(unet: UNet2DModel) -> None:
    images = draw(unet)
    for options in ({"timestep_spacing": "quadratic"}, {"timestep_spacing": "trailing"}, {"eta": 1.0}):
        other = draw(unet, **options)
        assert (other - images).abs().max() > 0.01
        assert torch.equal(draw(unet, **options), other)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"timestep_spacing": "cubic"}, "timestep_spacing=cubic must be one of leading"), ({"eta": 1.5}, "eta=1.5 must be in")],
)
def test_bad_arguments_are_refused(unet: UNet2DModel, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(unet, **options)


def test_samples_that_are_not_finite_are_refused() -> None:
    model = Zero()
    model.config, model.forward = SimpleNamespace(in_channels=1), lambda x, *args, **kw: SimpleNamespace(sample=x * torch.nan)
    options = {"num_inference_steps": 1, "timestep_spacing": "trailing"}
    with pytest.raises(ValueError, match="samples 2 to 3 are not finite"):
        sample_images(model, DDPMScheduler(), 3, (4, 4), **options, batch_size=2, first=2)


def test_denoised_samples_are_images_before_rounding(unet: UNet2DModel) -> None:
    images = draw(unet, 5, seed=3)
    parts = list(denoised(unet, DDPMScheduler(), range(1, 5), (8, 8), 3, 3, batch_size=3))
    assert [len(part) for part in parts] == [3, 1]
    assert torch.equal(to_uint8(torch.cat(parts) / 2 + 0.5), to_uint8(images[1:]))
