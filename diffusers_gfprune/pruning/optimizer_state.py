"""Optimizer state for the kept part of a parameter.

If a weight is scaled by a, its gradients and first moments scale by 1/a, its second moments by 1/a^2. PyTorch stores moments
as tensors of the parameter's shape. bitsandbytes' 8-bit Adam (Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
arXiv 2110.02861) stores codes in blocks of 256 along the flattened tensor, with the largest absolute value of each block:

    moment_i = qmap[state_i] absmax[i // 256]

Blocks extend over channels, so that the kept part has different blocks. Moments are dequantised, cut, and quantised again with
the same table, with an error of at most half a step of the table. Small parameters have float32 moments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["kept_state"]

# If a weight is multiplied by a, its optimizer state is multiplied by a ** power.
STATE_POWERS = {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2, "momentum_buffer": -1}
# The same for bitsandbytes, by `optimizer_name`, since all of its optimizers use the same keys. "adam" includes AdamW.
NUMBERED_STATE_POWERS = {"adam": {"state1": -1, "state2": -2}}
BLOCK_SIZE = 256  # of bitsandbytes' optimizers

Take = Callable[[Tensor, int], Tensor]


def kept_state(optimizer: torch.optim.Optimizer, parameter: Tensor, take: Take) -> dict:
    """Optimizer state for the kept part of a parameter. The optimizer is not modified.

    Args:
        optimizer: Adam, AdamW, SGD or another one with state tensors in `STATE_POWERS`, or bitsandbytes' Adam or AdamW.
        parameter: A parameter of the optimizer, with its dense shape.
        take: Returns the kept part of a tensor with the parameter's shape, given the power with which it scales with the
            parameter.

    Returns:
        New state; empty if the parameter has no state.

    Raises:
        ValueError: The optimizer has unknown state.
    """
    state = optimizer.state.get(parameter, {})
    powers = STATE_POWERS
    if "state1" in state:
        powers = NUMBERED_STATE_POWERS.get(getattr(optimizer, "optimizer_name", None), {})
    taken = {}
    for key, value in state.items():
        if key[:-1] in ("qmap", "absmax") and f"state{key[-1]}" in powers:
            continue  # handled with its codes
        if not isinstance(value, Tensor):
            taken[key] = value
        elif value.ndim == 0 or key == "unorm_vec":
            taken[key] = value.clone()
        elif key not in powers or value.shape != parameter.shape:
            raise ValueError(f"{type(optimizer).__name__} has state {key!r}, which cannot be compacted")
        elif value.dtype == torch.uint8:
            taken |= _requantised(state, key[-1], parameter, take, powers[key])
        else:
            taken[key] = take(_as_written(value) if "state1" in state else value, powers[key])
    return taken


def _as_written(state: Tensor) -> Tensor:
    """State of bitsandbytes by logical position.

    Its kernels on accelerators treat memory as contiguous, even if the state has the strides of a channels-last parameter.
    """
    if state.device.type == "cpu" or state.is_contiguous():
        return state
    return state.as_strided((state.numel(),), (1,)).view(state.shape)


def _requantised(state: Mapping, number: str, parameter: Tensor, take: Take, power: int) -> dict[str, Tensor]:
    """Codes, table and largest absolute values of the kept part of a quantised moment."""
    from bitsandbytes.functional import (
        dequantize_blockwise,
        quantize_blockwise,
    )  # installed if it made the state

    qmap, absmax = state[f"qmap{number}"], state[f"absmax{number}"]
    codes = _as_written(state[f"state{number}"]).contiguous().to(parameter.device)  # paged state may be on another device
    moments = dequantize_blockwise(codes, absmax=absmax, code=qmap, blocksize=BLOCK_SIZE).view(parameter.shape)
    kept, quantisation = quantize_blockwise(take(moments, power), code=qmap, blocksize=BLOCK_SIZE)
    return {f"state{number}": kept, f"qmap{number}": qmap, f"absmax{number}": quantisation.absmax}
