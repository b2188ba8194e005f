"""Optimizer state by parameter name, for checkpoints, with tensors and numbers kept separately.

Entries are named `<key>/<parameter name>`, such as `exp_avg/conv_in.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["load_optimizer_state", "load_tensors", "optimizer_state"]


@torch.no_grad()
def load_tensors(source: object, part: str, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Copy tensors into parameters of the same names and shapes, in place, which keeps their memory alignment.

    Args:
        source: Origin of the tensors, for the error.
        part: Description of the tensors, for the error.
        tensors: Tensors by name.
        parameters: Parameters by name.

    Raises:
        ValueError: Names or shapes differ.
    """
    if tensors.keys() != parameters.keys():
        odd = sorted(tensors.keys() ^ parameters.keys())
        raise ValueError(f"{source} holds {part} of another configuration: {len(odd)} names, first {odd[0]}")
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:  # copying would silently broadcast
            shapes = f"{tuple(tensors[name].shape)}, and the model's {tuple(parameter.shape)}"
            raise ValueError(f"{source} holds {part} of another configuration: {name} has shape {shapes}")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, int | float]]:
    """Tensors of an optimizer's state, and its numbers, such as the step count of 8-bit Adam.

    Args:
        optimizer: The PyTorch optimizer, not Accelerate's wrapper.
        parameters: All its parameters by name.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    state = {f"{key}/{names[of]}": value for of, entries in optimizer.state.items() for key, value in entries.items()}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if isinstance(value, (int, float))}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, int | float],
) -> None:
    """Replace an optimizer's state.

    Raises:
        KeyError: An entry does not belong to any of `parameters`.
    """
    optimizer.state.clear()
    for source in (tensors, numbers):
        for name, value in source.items():
            key, _, parameter = name.partition("/")
            optimizer.state[parameters[parameter]][key] = value.clone() if isinstance(value, Tensor) else value
