"""Mode of a model during scoring: float32 without TF32 or autocast, evaluation mode, eager.

Scores are small differences of large sums, and rankings depend on their last digits. Training may run in bfloat16, compiled
and with gradient checkpointing; scoring does not. All settings are restored afterwards, also after errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..metrics.eval_mode import evaluating
from ..precision import ieee_float32, own_forward
from ..pruning.masking import MASKS_MODULE
from .double_backward import LeanDoubleBackward

__all__ = ["scoring_mode"]


@contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Context without gradient checkpointing.

    With two derivatives, checkpointing does not save memory: nodes of the first backward keep the recomputed activations.
    Besides, torch recomputes them without `LeanDoubleBackward` and raises because the saved tensors differ.
    """
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True


@contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Context in which frozen parameters have gradients, too."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def scoring_mode(
    unet: nn.Module,
    parameters: Sequence[nn.Parameter],
    dense: bool = False,
    differentiate: int = 2,
    keep_activations: bool = False,
) -> Iterator[None]:
    """Run the model in evaluation mode and full precision.

    Args:
        unet: The dense or masked model, not wrapped by an engine.
        parameters: Parameters that get gradients, including frozen ones.
        dense: Whether to set all masks to 1.
        differentiate: Order of the derivatives of losses: 0, 1 or 2. For 2, fused attention and gradient checkpointing are
            disabled.
        keep_activations: Whether to disable gradient checkpointing in any case.
    """
    masks = getattr(unet, MASKS_MODULE, None)
    twice = differentiate > 1
    with (
        evaluating(unet),
        own_forward(unet),
        _trainable(parameters),
        torch.inference_mode(False),
        torch.set_grad_enabled(differentiate > 0),
        torch.autocast(next(unet.parameters()).device.type, enabled=False),
        ieee_float32(),
        torch.compiler.set_stance("force_eager"),  # compiled graphs cannot be differentiated twice
        masks.suspended() if masks is not None and dense else nullcontext(),
        _without_checkpointing(unet) if twice or keep_activations else nullcontext(),
        sdpa_kernel(SDPBackend.MATH) if twice else nullcontext(),
        LeanDoubleBackward() if twice else nullcontext(),
    ):
        yield
