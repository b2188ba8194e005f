"""How student and teacher respond to a small change of their noisy input: the term of IGSM.

    D_s = 1/d  E (|J v|^2 - |J_T v|^2)^2

J is the Jacobian of the student's prediction e by its input x, J_T the teacher's, v = u / |u| with u ~ N(0, 1) a random
direction, d = channels x height x width.

D_s is the second-order Jacobian matching of Zheng and Shlizerman, https://arxiv.org/abs/2506.05398 (version 1: "IGSM", version
2: "2ndMatch", there equation 9): |J v| is how much one step of sampling stretches v, as finite-time Lyapunov exponents measure
it. First-order matching, E |J v - J_T v|^2, is left out: inputs are noisy, so that distillation matches J already, and it
made their FID on CIFAR-10 worse (5.14, from 5.05 with noise and teacher alone), D_s better (4.58). The equation was read from
the code of version 1 and from summaries of version 2, not from the paper's body.

What differs, or is left open:
- Weights. Their code (`FATE4869/IGSM-Official`, its CIFAR-10 command) adds noise : teacher : D_s as 1 : 1 : 0.1, all as sums
  over an image of 32 x 32 RGB pixels. In means, and up to one factor for all, that is w = 0.5 and 0.05 for D_s. Smaller images
  need less: on 8 x 8 greyscale digits 0.05 outweighs everything else.
- The product. The paper writes J v, the code takes v J by reverse mode and differentiates that again; the two agree where J is
  symmetric, as that of a score is. Here it is a forward difference,

      J v = (e(x + h s_t u) - e(x)) / |h s_t u|         s_t: standard deviation of the noise in x, h: the step

  whose two halves run as one batch, with the same dropout: no second derivative, so any attention kernel, precision, compiler
  or wrapper will do. On the digits model h = 0.01 is within 0.5 % of the exact product at every timestep in float32. In half
  precision inputs are rounded before the step is measured, and h is larger: 0.3 is within 5 % in bfloat16 for t >= 100, and
  comes to another direction for the smallest t, the same for both models.
- Left out: the code's options to turn v towards the directions that grow fastest, and to add sliced score matching, v J v.
  Its published command has both off.

|J v|^2 goes like 1 / s_t^2 (1,800 at t = 0 and 1 at t = 999 on the digits model), so that the smallest timesteps make most of
D_s, there as here.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..diffusion.batch import DiffusionBatch, ModelInputs

__all__ = ["default_step", "sensitivity_distance", "with_steps"]

# Large enough to stand out from rounding, small enough to stay linear; in standard deviations of the noise.
STEPS = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.3}


def _precision(device: torch.device) -> torch.dtype:
    """The dtype that convolutions run in on a device: that of the autocast around, if there is one."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else torch.float32


def default_step(device: torch.device) -> float:
    """The step that suits the precision which models run in at the moment."""
    return STEPS[_precision(device)]


def with_steps(noise_scheduler, batch: DiffusionBatch, directions: Tensor | None, step: float) -> tuple[ModelInputs, Tensor]:
    """Noisy images, followed by the same ones a step away.

    Args:
        noise_scheduler: A Diffusers scheduler with `add_noise`.
        batch: The images.
        directions: Gaussian noise of the shape of the batch's noise.
        step: Length of the step along `directions`, in standard deviations of the noise (> 0).

    Returns:
        Inputs for both, with shape `(2 * batch, channels, height, width)`, and the length of each step, with shape
        `(batch,)`.

    Raises:
        ValueError: There are no directions.
    """
    if directions is None:
        raise ValueError("directions=None: sensitivity matching needs them")
    plain = batch.inputs(noise_scheduler)
    stepped = replace(batch, noise=batch.noise + step * directions).inputs(noise_scheduler)
    # The model rounds its input to the precision it runs in. Rounded here already, the step that it sees is known.
    both = torch.cat([plain.sample, stepped.sample]).to(_precision(batch.clean.device)).float()
    first, second = both.chunk(2)
    conditioning = {name: torch.cat([values, values]) for name, values in batch.conditioning.items()}
    inputs = ModelInputs(both, torch.cat([batch.timesteps, batch.timesteps]), conditioning)
    return inputs, (second - first).flatten(1).norm(dim=1)


def _product(predictions: Tensor, step_lengths: Tensor) -> Tensor:
    """`J v` with shape `(batch, d)`, of predictions for the inputs that `with_steps` makes."""
    plain, stepped = predictions.flatten(1).chunk(2)
    return (stepped - plain) / step_lengths.clamp_min(torch.finfo(torch.float32).tiny)[:, None]


def sensitivity_distance(predictions: Tensor, teacher_predictions: Tensor, step_lengths: Tensor) -> Tensor:
    """D_s.

    Args:
        predictions: The student's, for the inputs that `with_steps` makes, float32 with shape `(2 * batch, ...)`.
        teacher_predictions: The teacher's.
        step_lengths: As returned by `with_steps`.

    Returns:
        A float32 scalar, >= 0.
    """
    products = [_product(found, step_lengths) for found in (predictions, teacher_predictions)]
    stretch, teacher_stretch = (product.square().sum(dim=1) for product in products)  # (batch,)
    return mse_loss(stretch, teacher_stretch) / products[0].shape[1]
