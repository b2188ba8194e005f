"""Min-SNR weights of the loss at each timestep.

    w_t = min(SNR_t, gamma),    SNR_t = abar_t / (1 - abar_t)

weighs the squared error of predicted samples x_0. The same error of x_0 is SNR_t times as large as an error of the noise eps,
and SNR_t + 1 times as large as one of v, so that their weights are

    epsilon: min(1, gamma / SNR_t)        v_prediction: min(SNR_t, gamma) / (SNR_t + 1)        sample: min(SNR_t, gamma)

Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", https://arxiv.org/abs/2303.09556; the weights are
those of `--snr_gamma` in Diffusers' `train_text_to_image.py`, where gamma = 5 is recommended.

Samples depend most on errors at high noise, which keep their weight. Their details depend on errors at low noise, which lose
it. In the study, SSIM to the dense samples rises, and so does the Fréchet distance to the data (benchmarks/FINDINGS.md).
"""

from __future__ import annotations

import torch
from diffusers.training_utils import compute_snr
from torch import Tensor

__all__ = ["min_snr_weights"]


def min_snr_weights(process, timesteps: Tensor, gamma: float) -> Tensor:
    """Weights of the squared errors of a batch.

    Args:
        process: A `DDPMProcess`.
        timesteps: Integers with shape `(batch,)`.
        gamma: Upper limit of the signal-to-noise ratio (> 0).

    Returns:
        float32 with shape `(batch,)`. They are finite at a timestep that only noise is left at, too (SNR 0).
    """
    snr = compute_snr(process.scheduler, timesteps)
    if process.prediction_type == "epsilon":
        return torch.clamp(gamma / snr, max=1)
    weights = torch.clamp(snr, max=gamma)
    return weights / (snr + 1) if process.prediction_type == "v_prediction" else weights
