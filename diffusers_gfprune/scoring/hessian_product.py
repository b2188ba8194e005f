"""Matrix-free Hessian-gradient products H g of the mean loss over calibration batches.

Exact (Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6, 1994), with v = g held constant:

    H g = d(g . v) / d theta

By central differences of gradients along g, which need first derivatives only, to second order in the step h:

    H g = (grad L(theta + h g) - grad L(theta - h g)) / 2h + O(h^2)

With several processes, v and H refer to the global batches: v is averaged over ranks before the product, the product after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..diffusion.batch import DiffusionBatch
from ..distributed import mean_over_ranks, world_size
from .context import ScoringContext, equal_batches

__all__ = ["HESSIAN_PRODUCTS", "difference_product", "exact_product"]


def exact_product(context: ScoringContext, batches: Sequence[DiffusionBatch]) -> dict[str, Tensor]:
    """H g by double backward: d(g . v)/dtheta with v = g held constant.

    Args:
        context: The model, in `scoring_mode`.
        batches: Batches over which H and g are averaged.

    Returns:
        New tensors by parameter name, with the shapes of the parameters.
    """
    vector = context.mean_gradient(batches) if len(batches) > 1 else None

    def directional_derivatives() -> Iterator[Tensor]:
        for batch in batches:
            gradient = context.gradients(context.loss(batch) / equal_batches(batch, batches), create_graph=True)
            # With one batch on one rank, the gradient is v itself; otherwise it is a part of v.
            along = vector or {name: g.detach() for name, g in gradient.items()}
            if vector is None and world_size() > 1:
                along = {name: g.clone() for name, g in along.items()}
                mean_over_ranks(along.values())
            products = [(g * along[name]).sum() for name, g in gradient.items()]
            del gradient, along
            yield torch.stack(products).sum()

    return context.summed_gradients(directional_derivatives())


# Length of the step relative to the weights. The loss is steep along the gradient: truncation errors dominate far below the
# textbook step eps^(1/3).
FINITE_DIFFERENCE_STEPS = {torch.float64: 1e-5, torch.float32: 1e-4}


def _halves(batches: Sequence[DiffusionBatch]) -> list[tuple[DiffusionBatch, float]]:
    """Split each batch into halves, with weights such that their losses sum to the mean loss over images.

    Finite differences hold two more copies of the weights than a training step. With half batches they need no more memory
    than training. Sums of gradients are the same.
    """
    parts = [part for batch in batches for part in batch.split((len(batch) + 1) // 2)]
    return [(part, len(part) / sum(map(len, batches))) for part in parts]


@torch.no_grad()
def difference_product(context: ScoringContext, batches: Sequence[DiffusionBatch]) -> dict[str, Tensor]:
    """H g by central differences. Weights are restored bit for bit.

    Args:
        context: The model, in `scoring_mode`.
        batches: Batches over which H and g are averaged.

    Returns:
        New tensors by parameter name, with the shapes of the parameters.
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
                    else:  # the mirrored point, including its rounding
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
