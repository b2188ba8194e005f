"""The part of an optimizer's state that goes with the kept part of a parameter.

A weight scaled by a has gradients scaled by 1/a, hence first moments scaled by 1/a and second moments scaled by 1/a^2. Torch
keeps moments as tensors of the parameter's shape. bitsandbytes' 8-bit Adam (Dettmers et al., "8-bit Optimizers via Block-wise
Quantization", arXiv 2110.02861) keeps codes, in blocks of 256 along the flattened tensor, each with the largest absolute value
of its block:

    moment_i = qmap[state_i] absmax[i // 256]

Blocks run across channels, so that a kept part has other blocks: moments are dequantised, cut, and quantised again with the
same table, to within half a gap of the table. Small parameters have float32 moments there, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["kept_state"]

# How optimizer state of a weight scales when the weight is multiplied by a: a ** power.
STATE_POWERS = {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2, "momentum_buffer": -1}
# The same for bitsandbytes, whose optimizers call their state alike: by `optimizer_name`, in which Adam is AdamW, too.
NUMBERED_STATE_POWERS = {"adam": {"state1": -1, "state2": -2}}
BLOCK_SIZE = 256  # of bitsandbytes' optimizers

Take = Callable[[Tensor, int], Tensor]


def kept_state(optimizer: torch.optim.Optimizer, parameter: Tensor, take: Take) -> dict:
    """State of an optimizer for what is kept of a parameter. The optimizer is left as it is.

    Args:
        optimizer: Adam, AdamW, SGD or another whose state tensors `STATE_POWERS` names, or bitsandbytes' Adam or AdamW.
        parameter: One of its parameters, of dense shape.
        take: From a tensor of the parameter's shape and the power by which it scales with the parameter, to its kept part.

    Returns:
        New state, empty if there was none.

    Raises:
        ValueError: The optimizer has state that is not known to carry over.
    """
    state = optimizer.state.get(parameter, {})
    powers = STATE_POWERS
    if "state1" in state:
        powers = NUMBERED_STATE_POWERS.get(getattr(optimizer, "optimizer_name", None), {})
    found = {}
    for key, value in state.items():
        if key[:-1] in ("qmap", "absmax") and f"state{key[-1]}" in powers:
            continue  # goes with its codes
        if not isinstance(value, Tensor):
            found[key] = value
        elif value.ndim == 0 or key == "unorm_vec":
            found[key] = value.clone()
        elif key not in powers or value.shape != parameter.shape:
            raise ValueError(f"{type(optimizer).__name__} has state {key!r}, which cannot be compacted")
        elif value.dtype == torch.uint8:
            found |= _requantised(state, key[-1], parameter, take, powers[key])
        else:
            found[key] = take(_as_written(value) if "state1" in state else value, powers[key])
    return found


def _as_written(state: Tensor) -> Tensor:
    """State of bitsandbytes by logical position.

    Its kernels on accelerators take memory as it lies for that of a contiguous tensor, also where a parameter in
    channels-last format gave the state other strides.
    """
    if state.device.type == "cpu" or state.is_contiguous():
        return state
    return state.as_strided((state.numel(),), (1,)).view(state.shape)


def _requantised(state: Mapping, number: str, parameter: Tensor, take: Take, power: int) -> dict[str, Tensor]:
    """Codes, table and largest absolute values for the kept part of a quantised moment."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise  # optional, and there if it made the state

    qmap, absmax = state[f"qmap{number}"], state[f"absmax{number}"]
    codes = _as_written(state[f"state{number}"]).contiguous().to(parameter.device)  # paged state may lie elsewhere
    moments = dequantize_blockwise(codes, absmax=absmax, code=qmap, blocksize=BLOCK_SIZE).view(parameter.shape)
    kept, quantisation = quantize_blockwise(take(moments, power), code=qmap, blocksize=BLOCK_SIZE)
    return {f"state{number}": kept, f"qmap{number}": qmap, f"absmax{number}": quantisation.absmax}
