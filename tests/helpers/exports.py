"""Models as functions of tensors, for exports, and the comparison with the model itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from helpers.architectures import inputs


def forward(model: nn.Module, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
    return model(sample, torch.full((len(sample),), 5) if timestep is None else timestep).sample


class Plain(nn.Module):
    """The model as a function of tensors that returns a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.model(sample, timestep, return_dict=False)[0]


def exported(model: nn.Module, **options) -> torch.export.ExportedProgram:
    return torch.export.export(Plain(model), tuple(inputs(model).values()), **options)


def dynamic(model: nn.Module) -> torch.export.ExportedProgram:
    """With a batch of any size."""
    batch = torch.export.Dim("batch", min=1, max=64)
    return exported(model, dynamic_shapes={"sample": {0: batch}, "timestep": {0: batch}})


def agrees(function: Callable[[Tensor, Tensor], object], model: nn.Module, *batch_sizes: int) -> None:
    """With the model, on batches of such sizes."""
    for batch_size in batch_sizes:
        arguments = inputs(model, batch_size)
        found = torch.as_tensor(function(*arguments.values()))
        with torch.no_grad():
            torch.testing.assert_close(found, forward(model, **arguments), rtol=1e-4, atol=1e-4)
