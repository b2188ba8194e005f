"""objectives/jacobian_matching.py: responses to a small step, against exact products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.objectives.jacobian_matching import default_step, sensitivity_distance, with_steps
from helpers.architectures import build
from helpers.processes import ddpm

PROCESS = ddpm(num_train_timesteps=1000)
CPU = torch.device("cpu")


def batch(size: int = 8) -> tuple[DiffusionBatch, Tensor]:
    """Images and noise, and directions; timesteps from the first to the last."""
    generator = torch.Generator().manual_seed(0)
    shape = (size, 1, 8, 8)
    clean, noise = torch.rand(shape, generator=generator) * 2 - 1, torch.randn(shape, generator=generator)
    directions = torch.randn(shape, generator=generator)
    return DiffusionBatch(clean, noise, torch.linspace(0, 999, size).long()), directions


def scaled(images: Tensor, by: float, precision: torch.dtype = torch.float32) -> Tensor:
    """A model with Jacobian `by`, which rounds its input as convolutions do under autocast."""
    return by * images.to(precision).float()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_known_answers_for_linear_models(precision):
    # Powers of two do not round: the only thing to go wrong is the length of the step, for t = 0 as for any other.
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        step = default_step(CPU)
        (images, *_), lengths = with_steps(PROCESS, *batch(), step)
    assert images.shape == (16, 1, 8, 8) and images.dtype == torch.float32
    found = sensitivity_distance(scaled(images, 2, precision), scaled(images, 0.5, precision), lengths)
    assert found.tolist() == pytest.approx([(2**2 - 0.5**2) ** 2 / 64] * 8, rel=1e-3)


def test_turning_the_response_changes_nothing():
    (images, *_), lengths = with_steps(PROCESS, *batch(), 0.01)
    assert sensitivity_distance(images.flip(-1), images, lengths).max() < 1e-8


def test_steps_are_in_standard_deviations_of_the_noise_along_the_directions():
    data, directions = batch()
    (images, doubled, _), lengths = with_steps(PROCESS, data, directions, 0.25)
    plain, stepped = images.chunk(2)
    assert torch.equal(plain, PROCESS.add_noise(data.clean, data.noise, data.timesteps))
    deviations = (1 - PROCESS.scheduler.alphas_cumprod[data.timesteps]).sqrt()
    expected = 0.25 * deviations[:, None, None, None] * directions
    torch.testing.assert_close(stepped - plain, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(lengths, expected.flatten(1).norm(dim=1), rtol=1e-3, atol=0)


def test_default_step_suits_the_precision():
    assert default_step(CPU) == 0.01
    for precision, step in ((torch.bfloat16, 0.3), (torch.float16, 0.1)):
        with torch.autocast("cpu", dtype=precision):
            assert default_step(CPU) == step


def test_differences_are_the_exact_products_of_a_unet():
    student, teacher = build(seed=0), build(seed=1)
    data, directions = batch()
    timesteps = data.timesteps
    plain = PROCESS.add_noise(data.clean, data.noise, timesteps)
    direction = directions / directions.flatten(1).norm(dim=1)[:, None, None, None]
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no forward-mode derivative
        products = [
            torch.func.jvp(lambda x, unet=unet: unet(x, timesteps).sample, (plain,), (direction,))[1].flatten(1)
            for unet in (student, teacher)
        ]
    stretches = [product.square().sum(dim=1) for product in products]
    with torch.no_grad():
        (images, doubled, _), lengths = with_steps(PROCESS, data, directions, default_step(CPU))
        assert torch.equal(doubled, torch.cat([timesteps, timesteps]))
        found = sensitivity_distance(student(images, doubled).sample, teacher(images, doubled).sample, lengths)
    expected = (stretches[0] - stretches[1]).square() / 64
    torch.testing.assert_close(found.mean(), expected.mean(), rtol=0.05, atol=0)  # some of the differences are small


def test_step_that_rounds_to_nothing_has_no_response():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (images, *_), lengths = with_steps(PROCESS, *batch(), 1e-9)
    assert lengths.max() == 0
    assert not sensitivity_distance(images, 2 * images, lengths).any()


def test_directions_are_needed():
    data, _ = batch()
    with pytest.raises(ValueError, match="directions=None: sensitivity matching needs them"):
        with_steps(PROCESS, data, None, 0.01)
