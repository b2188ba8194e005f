"""The loss of learned variances (Nichol and Dhariwal, https://arxiv.org/abs/2102.09672, section 3.1).

The model interpolates the logarithm of the variance of a reverse step between its two bounds, with v in [-1, 1]:

    log Sigma = f log beta_t + (1 - f) log beta~_t,    f = (v + 1) / 2,    beta~_t = (1 - abar_(t-1)) / (1 - abar_t) beta_t

The loss is the Kullback-Leibler divergence of the reverse step from the posterior of the forward process,

    KL = 1/2 (log Sigma - log beta~_t - 1 + beta~_t / Sigma + (mu~ - mu)^2 / Sigma),

as a mean over values, in bits. Means get no gradient from it: they learn from the noise alone. As in DiT, it is added with
weight 1 to the noise-prediction loss. beta~_0 = 0 is replaced by beta~_1, as in the paper's code; there, the first step has a
discretized likelihood of pixels instead, which latents do not have.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from train_latent_teachers import Batch

__all__ = ["variance_loss"]


def variance_loss(variance: Tensor, noise: Tensor, batch: Batch, alphas_cumprod: Tensor) -> Tensor:
    """The mean divergence in bits for each value.

    Args:
        variance: The model's v, with shape `(B, channels, height, width)`.
        noise: Its noise prediction, of the same shape; it gets no gradient.
        batch: Latents, noise and timesteps.
        alphas_cumprod: abar_t of the process, with shape `(T,)`.
    """
    before = torch.cat([torch.ones(1), alphas_cumprod[:-1]])  # abar_(t-1)
    betas = 1 - alphas_cumprod / before
    smallest = betas * (1 - before) / (1 - alphas_cumprod)
    smallest[0] = smallest[1]

    def at(values: Tensor) -> Tensor:
        return values[batch.timesteps, None, None, None]

    share = (variance + 1) / 2
    log_variance = share * at(betas.log()) + (1 - share) * at(smallest.log())
    # Both means are in x_t and the noise; x_t cancels in their difference
    gap = at(betas / (1 - alphas_cumprod).sqrt() / (1 - betas).sqrt()) * (batch.noise - noise.detach())
    log_ratio = log_variance - at(smallest.log())
    divergence = 0.5 * (log_ratio - 1 + (-log_ratio).exp() + gap.square() * (-log_variance).exp())
    return divergence.mean() / math.log(2)
