"""What this version of PyTorch can differentiate."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.func import jvp

__all__ = ["has_forward_mode_of_norms"]


@cache
def has_forward_mode_of_norms() -> bool:
    """Whether group norms have forward-mode derivatives for inputs that are not contiguous, as stock UNets have them after
    attention. In torch 2.6 they raise an error."""
    norm, strided = nn.GroupNorm(2, 4), torch.zeros(1, 3, 3, 4).permute(0, 3, 1, 2)
    try:
        jvp(norm, (strided,), (torch.ones_like(strided),))
    except RuntimeError:
        return False
    return True
