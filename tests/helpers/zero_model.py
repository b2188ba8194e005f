"""A model with known outputs."""

from __future__ import annotations

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from helpers.toy import Toy


class Zero(Toy):
    """Predicts zero, and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.modes: set[bool] = set()

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> UNet2DOutput:
        self.calls.append((sample, timestep, class_labels))
        self.modes.add(self.training)
        return UNet2DOutput(sample=torch.zeros_like(sample))

    def seen(self, index: int) -> Tensor:
        """One of the arguments (sample, timestep, class labels) of all calls together."""
        return torch.cat([call[index] for call in self.calls])
