"""A dense model and its masked copy, run side by side in one forward pass.

Both have the same layers with the same shapes. The dense model runs on the rows of both; at each layer with parameters, the
second half of the rows passes through the layer of the masked model instead:

    (x_dense, x_masked)   ->   (dense layer(x_dense), masked layer(x_masked))

Everything between these layers (activations, attention, sums) treats rows separately. At each layer, inputs and outputs of
both models are at hand, and need not be kept for later: memory is that of one forward pass without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..diffusion.batch import ModelInputs
from ..families.lookup import family_of
from ..metrics.eval_mode import evaluating
from .masking import MASKS_MODULE

__all__ = ["Pair", "doubled", "side_by_side"]


@dataclass(frozen=True)
class Pair:
    """What one layer reads and writes in both models.

    Attributes:
        masked_input: Input of the layer in the masked model, with the rows of the batch.
        dense_output: Output of the layer in the dense model.
        masked_output: Output of the layer in the masked model.
    """

    masked_input: Tensor
    dense_output: Tensor
    masked_output: Tensor


def doubled(inputs: ModelInputs) -> ModelInputs:
    """Inputs whose rows are there twice: first for the dense model, then for the masked one."""
    twice = {name: torch.cat([values, values]) for name, values in inputs.conditioning.items()}
    return ModelInputs(torch.cat([inputs.sample] * 2), torch.cat([inputs.timesteps] * 2), twice)


class _TableOfBoth:
    """A table of scales and shifts of both models, such as those of PixArt's blocks. A forward adds `table[None]` to rows.

    Args:
        dense: Table of the dense model.
        masked: Table of the masked model, of the same shape.
        rows: Number of rows of each model.
    """

    def __init__(self, dense: Tensor, masked: Tensor, rows: int) -> None:
        self.dense, self.masked, self.rows, self.device = dense, masked, rows, dense.device

    def __getitem__(self, index: None) -> Tensor:
        if index is not None:
            raise ValueError(f"a table of shape {tuple(self.dense.shape)} is indexed by {index}, and not by None")
        return torch.cat([table.expand(self.rows, *table.shape) for table in (self.dense, self.masked)])


@contextmanager
def side_by_side(
    dense: nn.Module, masked: nn.Module, visit: Callable[[str, nn.Module, Pair], bool]
) -> Iterator[Callable[[ModelInputs], Tensor]]:
    """Context in which a function runs both models on a batch.

    Args:
        dense: The dense model, without masks.
        masked: The masked model, or any model with the same modules.
        visit: Called in the order of execution with the name of each layer with parameters, the layer of the masked model and
            what it reads and writes. It returns whether it has changed the weights of the layer; the output of the masked
            layer is then computed again.

    Yields:
        A function of `ModelInputs` that returns the outputs of the dense model, then of the masked one, with twice the rows.
    """
    theirs = dict(masked.named_modules())
    tables: list[tuple[nn.Module, str, nn.Module]] = []
    waiting: dict[str, Tensor] = {}
    handles = []

    def split(name: str):
        def hook(_, args):
            ours, waiting[name] = args[0].chunk(2)
            return ours, *args[1:]

        return hook

    def join(name: str, layer: nn.Module):
        def hook(_, args, output):
            masked_input = waiting.pop(name)
            masked_output = layer(masked_input)
            if visit(name, layer, Pair(masked_input, output, masked_output)):
                masked_output = layer(masked_input)
            return torch.cat([output, masked_output])

        return hook

    for name, module in dense.named_modules():
        if name.startswith(MASKS_MODULE):
            continue
        if next(module.children(), None) is not None:  # no layer: its own parameters are tables
            tables += [(module, table, theirs[name]) for table, _ in module.named_parameters(recurse=False)]
        elif next(module.parameters(recurse=False), None) is not None:
            handles += [
                module.register_forward_pre_hook(split(name)),
                module.register_forward_hook(join(name, theirs[name])),
            ]

    def run(inputs: ModelInputs) -> Tensor:
        for module, table, other in tables:  # found before the module's parameters
            module.__dict__[table] = _TableOfBoth(getattr(module, table), getattr(other, table), len(inputs.sample))
        try:
            return family_of(dense).output(dense, doubled(inputs))
        finally:
            for module, table, _ in tables:
                module.__dict__.pop(table, None)

    try:
        with torch.no_grad(), evaluating(dense), evaluating(masked):
            yield run
    finally:
        for handle in handles:
            handle.remove()
