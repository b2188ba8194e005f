"""State of an optimizer by parameter name, as checkpoints hold it: tensors apart from numbers.

An entry is called `<key>/<parameter name>`, such as `exp_avg/conv_in.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["load_optimizer_state", "optimizer_numbers", "optimizer_tensors"]


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an optimizer's state.

    Args:
        optimizer: Bare, not as Accelerate wraps it.
        parameters: All that it holds, by name.
    """
    return {name: value for name, value in _entries(optimizer, parameters) if isinstance(value, Tensor)}


def optimizer_numbers(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, int | float]:
    """Numbers of an optimizer's state (8-bit Adam counts steps in one)."""
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
        KeyError: An entry is of no parameter in `parameters`.
    """
    optimizer.state.clear()
    for source in (tensors, numbers):
        for name, value in source.items():
            key, _, parameter = name.partition("/")
            optimizer.state[parameters[parameter]][key] = value.clone() if isinstance(value, Tensor) else value
