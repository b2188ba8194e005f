"""Models that are a `UNet2DModel` by class name only, so that the family is found: small enough for known answers."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel
from torch import nn


class Toy(UNet2DModel):
    """Layers and forward come from a subclass; `config` is set by a test."""

    config = None
    dtype = torch.float32

    def __init__(self) -> None:
        nn.Module.__init__(self)
