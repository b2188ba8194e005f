"""Second-order Jacobian matching: responses of student and teacher to a small change of their noisy input.

    D_s = 1/d  E (|J v|^2 - |J_T v|^2)^2

J is the Jacobian of the student's prediction e with respect to its input x, J_T that of the teacher, v = u / |u| with
u ~ N(0, 1) a random direction, d = channels x height x width.

D_s is the second-order Jacobian matching of Zheng and Shlizerman, https://arxiv.org/abs/2506.05398 (version 1: "IGSM", version
2: "2ndMatch", equation 9): |J v| is the factor by which one sampling step stretches v, as in finite-time Lyapunov exponents.
First-order matching, E |J v - J_T v|^2, is not implemented. Distillation with noisy inputs already matches J, and first-order
matching made their FID on CIFAR-10 worse (5.14, from 5.05 with noise and teacher alone), D_s better (4.58). The equation is
taken from the code of version 1 and from summaries of version 2, not from the full paper.

Differences to the paper and its code:
- Weights. Their code (`FATE4869/IGSM-Official`, its CIFAR-10 command) adds noise : teacher : D_s as 1 : 1 : 0.1, all as sums
  over an image of 32 x 32 RGB pixels. In means, up to a common factor, this is w = 0.5 and 0.05 for D_s. Smaller images need a
  smaller weight: on 8 x 8 greyscale digits, 0.05 dominates the other terms.
- The product. The paper has J v; the code computes v J by reverse mode and differentiates it again. They agree if J is
  symmetric, as that of a score is. Here it is a forward difference,

      J v = (e(x + h s_t u) - e(x)) / |h s_t u|         s_t: standard deviation of the noise in x, h: the step

  whose two halves run as one batch, with the same dropout. It needs only first derivatives and supports any attention kernel,
  precision, compiler or wrapper. On the digits model, h = 0.01 is within 0.5 % of the exact product at every timestep in
  float32. In half precision, inputs are rounded before the step is measured, and h is larger: in bfloat16, 0.3 is within 5 %
  for t >= 100; for the smallest t, rounding changes the direction, equally for both models.
- Not implemented: the code's options to turn v towards the fastest growing directions, and to add sliced score matching,
  v J v. The published command uses neither.

|J v|^2 is proportional to 1 / s_t^2 (1,800 at t = 0 and 1 at t = 999 on the digits model), so that the smallest timesteps
dominate D_s, as in the paper.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..diffusion.batch import DiffusionBatch, ModelInputs

__all__ = ["default_step", "sensitivity_distance", "with_steps"]

# In standard deviations of the noise: large compared to rounding, but small enough for a linear response.
STEPS = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.3}


def _precision(device: torch.device) -> torch.dtype:
    """Dtype of convolutions on a device: that of the active autocast, else float32."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else torch.float32


def default_step(device: torch.device) -> float:
    """Default step for the current precision."""
    return STEPS[_precision(device)]


def with_steps(process, batch: DiffusionBatch, directions: Tensor | None, step: float) -> tuple[ModelInputs, Tensor]:
    """Noisy images, followed by the same images after a step.

    Args:
        process: The `DiffusionProcess` of the model.
        batch: The images.
        directions: Gaussian noise with the shape of the batch's noise.
        step: Length of the step along `directions`, in standard deviations of the noise (> 0).

    Returns:
        Inputs for both, with shape `(2 * batch, channels, height, width)`, and the length of each step, with shape
        `(batch,)`.

    Raises:
        ValueError: `directions` is None.
    """
    if directions is None:
        raise ValueError("directions=None: sensitivity matching needs them")
    plain = batch.inputs(process)
    stepped = replace(batch, noise=batch.noise + step * directions).inputs(process)
    # The model rounds its input to its precision. With rounding here, the length of the actual step is known.
    both = torch.cat([plain.sample, stepped.sample]).to(_precision(batch.clean.device)).float()
    first, second = both.chunk(2)
    conditioning = {name: torch.cat([values, values]) for name, values in batch.conditioning.items()}
    inputs = ModelInputs(both, torch.cat([batch.timesteps, batch.timesteps]), conditioning)
    return inputs, (second - first).flatten(1).norm(dim=1)


def _product(predictions: Tensor, step_lengths: Tensor) -> Tensor:
    """`J v` with shape `(batch, d)`, from predictions for the inputs of `with_steps`."""
    plain, stepped = predictions.flatten(1).chunk(2)
    return (stepped - plain) / step_lengths.clamp_min(torch.finfo(torch.float32).tiny)[:, None]


def sensitivity_distance(predictions: Tensor, teacher_predictions: Tensor, step_lengths: Tensor) -> Tensor:
    """Compute D_s.

    Args:
        predictions: Predictions of the student for the inputs of `with_steps`, float32 with shape `(2 * batch, ...)`.
        teacher_predictions: Predictions of the teacher.
        step_lengths: As returned by `with_steps`.

    Returns:
        The distance of each image, float32 with shape `(batch,)`, >= 0.
    """
    products = [_product(pairs, step_lengths) for pairs in (predictions, teacher_predictions)]
    stretch, teacher_stretch = (product.square().sum(dim=1) for product in products)  # (batch,)
    return (stretch - teacher_stretch).square() / products[0].shape[1]
