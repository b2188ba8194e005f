"""Hessian-gradient products H g, matrix-free, of the mean loss over calibration batches.

Exact (Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6, 1994), with v = g held constant:

    H g = d(g . v) / d theta

By central differences of gradients along g, which needs first derivatives only, to second order in the step h:

    H g = (grad L(theta + h g) - grad L(theta - h g)) / 2h + O(h^2)

Over several processes v and H are those of the global batches: v is reduced before it is multiplied by, the product after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..diffusion.batch import DiffusionBatch
from ..distributed import mean_over_ranks, world_size
from .context import ScoringContext

__all__ = ["HESSIAN_PRODUCTS", "difference_product", "exact_product"]


def exact_product(context: ScoringContext, batches: Sequence[DiffusionBatch]) -> dict[str, Tensor]:
    """H g by double backward: d(g . v)/dtheta with v = g held constant.

    Args:
        context: The model, in `scoring_mode`.
        batches: Those that H and g are means over.

    Returns:
        A new tensor of its parameter's shape by name.
    """
    vector = context.mean_gradient(batches) if len(batches) > 1 else None

    def directional_derivatives() -> Iterator[Tensor]:
        for batch in batches:
            gradient = context.gradients(context.loss(batch) / len(batches), create_graph=True)
            # The gradient of one batch on one rank is v itself; elsewhere it is one part of it.
            along = vector or {name: g.detach() for name, g in gradient.items()}
            if vector is None and world_size() > 1:
                along = {name: g.clone() for name, g in along.items()}
                mean_over_ranks(along.values())
            products = [(g * along[name]).sum() for name, g in gradient.items()]
            del gradient, along
            yield torch.stack(products).sum()

    return context.summed_gradients(directional_derivatives())


# Length of the step relative to the weights. The gradient is a steep direction: truncation errors show long before eps^(1/3),
# the textbook step.
FINITE_DIFFERENCE_STEPS = {torch.float64: 1e-5, torch.float32: 1e-4}


def _halves(batches: Sequence[DiffusionBatch]) -> list[tuple[DiffusionBatch, float]]:
    """Each batch in two parts, with the weights that make their losses sum to the mean loss.

    Differences hold two more copies of the weights than a training step does; half a batch at a time, they fit where
    training fits, and sums of gradients do not notice.
    """
    return [
        (part, len(part) / (len(batch) * len(batches))) for batch in batches for part in batch.split((len(batch) + 1) // 2)
    ]


@torch.no_grad()
def difference_product(context: ScoringContext, batches: Sequence[DiffusionBatch]) -> dict[str, Tensor]:
    """H g by central differences. Weights are put back bit for bit.

    Args:
        context: The model, in `scoring_mode`.
        batches: Those that H and g are means over.

    Returns:
        A new tensor of its parameter's shape by name.
    """
    with torch.enable_grad():
        vector = context.mean_gradient(batches)
    size = torch.sqrt(sum((p.double() ** 2).sum() for p in context.parameters.values()))
    length = torch.sqrt(sum((v.double() ** 2).sum() for v in vector.values()))
    if length == 0:
        return vector
    relative = max(FINITE_DIFFERENCE_STEPS[parameter.dtype] for parameter in context.parameters.values())
    step = float(relative * size / length)
    saved = {name: parameter.detach().clone() for name, parameter in context.parameters.items()}

    def scaled_losses() -> Iterator[Tensor]:
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for name, parameter in context.parameters.items():
                    if sign > 0:
                        parameter.data.add_(vector.pop(name), alpha=step)
                    else:  # the mirror image, rounding included
                        parameter.data.copy_(2 * saved[name] - parameter.data)
            for part, weight in _halves(batches):
                yield context.loss(part) * (sign * weight / (2 * step))

    try:
        with torch.enable_grad():
            return context.summed_gradients(scaled_losses())
    finally:
        for name, parameter in context.parameters.items():
            parameter.data.copy_(saved[name])


HESSIAN_PRODUCTS: dict[str, Callable[[ScoringContext, Sequence[DiffusionBatch]], dict[str, Tensor]]] = {
    "exact": exact_product,
    "finite-difference": difference_product,
}
