"""Optimizer state by parameter name, for checkpoints, with tensors and numbers kept separately.

Entries are named `<key>/<parameter name>`, such as `exp_avg/conv_in.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["load_optimizer_state", "load_tensors", "optimizer_numbers", "optimizer_tensors"]


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


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an optimizer's state.

    Args:
        optimizer: The PyTorch optimizer, not Accelerate's wrapper.
        parameters: All its parameters by name.
    """
    return {name: value for name, value in _entries(optimizer, parameters) if isinstance(value, Tensor)}


def optimizer_numbers(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, int | float]:
    """Numbers of an optimizer's state, such as the step count of 8-bit Adam."""
    return {name: value for name, value in _entries(optimizer, parameters) if isinstance(value, (int, float))}


def _entries(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]):
    names = {parameter: name for name, parameter in parameters.items()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            yield f"{key}/{names[parameter]}", value


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
