"""One batch: what a model is trained, scored and measured on, what it sees of it, and what it should predict.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps          (Ho et al., arXiv 2006.11239, equation 4)

The target is eps, x_0 or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans and Ho, arXiv 2202.00512), as the
`prediction_type` of the process says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ModelInputs", "check_integers"]


class ModelInputs(NamedTuple):
    """What a model is called with.

    Attributes:
        sample: Noisy images, floating point with shape `(batch, channels, height, width)`.
        timesteps: Integers with shape `(batch,)`, or one for all.
        conditioning: By name of the forward's argument, such as `class_labels` with shape `(batch,)`; empty for
            unconditional models.
    """

    sample: Tensor
    timesteps: Tensor
    conditioning: Mapping[str, Tensor] = {}


def check_integers(name: str, values: Tensor, size: int, count: int, because: str = "") -> None:
    """Refuse values that are not integers from 0 to `count - 1` with shape `(size,)`, by their name; `because` says why."""
    wanted = f"{because}they must be integers from 0 to {count - 1}"
    if values.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} have dtype {values.dtype}; {wanted}")
    if values.shape != (size,):
        raise ValueError(f"{name} have shape {tuple(values.shape)}, not {(size,)}; {wanted}")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= count:
        raise ValueError(f"{name} are from {low} to {high}; {wanted}")
