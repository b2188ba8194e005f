"""objectives/snr_weights.py: min-SNR weights are those of Diffusers' train_text_to_image.py, and finite everywhere."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import compute_snr

from diffusers_gfprune.diffusion.ddpm import DDPMProcess
from diffusers_gfprune.objectives.snr_weights import min_snr_weights
from helpers.processes import ddpm

TIMESTEPS = torch.tensor([0, 100, 500, 999])


def theirs(process: DDPMProcess, gamma: float) -> torch.Tensor:
    """As `train_text_to_image.py` computes them; it has no weights for predicted samples."""
    snr = compute_snr(process.scheduler, TIMESTEPS)
    weights = torch.stack([snr, gamma * torch.ones_like(TIMESTEPS)], dim=1).min(dim=1)[0]
    return weights / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[process.prediction_type]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_weights_are_those_of_diffusers(prediction_type: str) -> None:
    process = ddpm(prediction_type=prediction_type)
    found = min_snr_weights(process, TIMESTEPS, 5.0)
    torch.testing.assert_close(found, theirs(process, 5.0))
    assert found.max() > 10 * found.min()


def test_errors_of_one_sample_have_one_weight_in_all_predictions() -> None:
    """An error d of x_0 is an error of eps of d^2 SNR, and one of v of d^2 (SNR + 1), where x_t is fixed."""
    snr = compute_snr(ddpm().scheduler, TIMESTEPS)
    kinds = ("epsilon", "v_prediction", "sample")
    epsilon, velocity, sample = (min_snr_weights(ddpm(prediction_type=kind), TIMESTEPS, 5.0) for kind in kinds)
    torch.testing.assert_close(epsilon * snr, sample)
    torch.testing.assert_close(velocity * (snr + 1), sample)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_weights_are_finite_where_only_noise_is_left(prediction_type: str) -> None:
    process = ddpm(rescale_betas_zero_snr=True, prediction_type=prediction_type)
    weights = min_snr_weights(process, TIMESTEPS, 5.0)
    assert process.scheduler.alphas_cumprod[-1] == 0
    assert torch.isfinite(weights).all()
    assert weights[-1] == (1 if prediction_type == "epsilon" else 0)
