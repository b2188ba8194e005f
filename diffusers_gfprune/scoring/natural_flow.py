"""Gradient flow in the metric of predictions: the default criterion, `gradient-flow`.

Let f be the noise predictions, J = df/dtheta, and v_c = -J theta_c the change that removing channel c makes to them, to first
order. The pruned model trains on its distance to the unpruned predictions, L = |r|^2 / 2 with r = v_c at first and gradient
J^T v_c. How fast a gradient flow takes L down depends on what a step is measured by:

    weights        dtheta/ds = -J^T r             -dL/ds = |J^T v_c|^2 = v_c^T K v_c       K = J J^T, the tangent kernel
    predictions    dtheta/ds = -(J^T J)^+ J^T r   -dL/ds = v_c^T P v_c = |v_c|^2           P projects on the range of J

The first is the squared gradient norm of arXiv 2501.09464, whose first-order form is theta_c . (H g) = -v_c^T K e, with e the
error that is left and the Gauss-Newton H = J^T J (`hessian_product`): K weighs changes by the directions that training
restores first, and tells little of the damage within a group (benchmarks/README.md). The second is that of natural gradient
(Amari, Neural Computation 10, 1998), to which Adam, with which DDPMs are trained, is nearer. The change v_c = -J theta_c lies
in the range of J, so that P leaves it as it is, and

    I_c = E |v_c|^2 / (values of an image)

needs neither K nor P. At a trained minimum a gradient norm that removal causes is damage: the channels with the least are
pruned. I_c is also the Gauss-Newton estimate of the mean squared error that a removal makes: here gradient flow meets optimal
brain damage (LeCun et al., 1989) and Fisher pruning (Theis et al., arXiv 1801.05787; of channel groups: Liu et al., arXiv
2108.00708).

Random probes r ~ N(0, I), a few for each image, make it one backward for all channels and images,

    E (r^T df/dm_c)^2 = |v_c|^2          r^T df/dm_c = sum over layers l that produce c, and positions, of  h_l,c dr^T f/dh_l,c

since a mask multiplies outputs h of the layers that produce its channel. No gradient of a weight is computed.

The score of a unit is the sum of I_c over its channels. The derivative by the one mask value of a unit would be the square of
a sum instead, of terms that cancel: a norm undoes a common factor of its group, to first order, as no removal does. On the
digits and the CIFAR-10 model of the study, the sum of squares left the lower loss right after pruning half of the MACs.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..diffusion.batch import DiffusionBatch
from ..distributed import check_identical, mean_over_ranks
from .context import Scores, ScoringContext

__all__ = ["PROBES", "prediction_changes"]

PROBES = 4  # of each image; each costs a backward without weights


def prediction_changes(context: ScoringContext) -> Scores:
    """I_c of every unit: mean squared change of a predicted value, summed over its channels, over all images of all ranks.

    Args:
        context: The model, in `scoring_mode`, and batches.

    Returns:
        Scores by group name, float32 with shape `(num_units,)`, >= 0.

    Raises:
        ValueError: Ranks have different weights, which no mean over their images would show.
    """
    check_identical({f"values of {name}": parameter for name, parameter in context.parameters.items()})
    total = {group.name: torch.zeros(group.num_units, device=context.device) for group in context.groups}
    images = 0
    with _outputs_kept(context) as outputs:
        for batch in context.batches:
            predictions = context.predictions(batch)
            produced = list(outputs.values())
            for number in range(PROBES):
                probe = _probe(batch, number).to(predictions)
                gradients = torch.autograd.grad(predictions, produced, probe, retain_graph=number < PROBES - 1)
                along = {
                    name: _over_positions(context.unet.get_submodule(name), output.detach() * gradient)
                    for (name, output), gradient in zip(outputs.items(), gradients)
                }
                for name, values in _by_group(context, along):
                    total[name] += values / predictions[0].numel()
            images += len(predictions)
            outputs.clear()
    mean_over_ranks(total.values())
    return {name: values / (images * PROBES) for name, values in total.items()}


@contextmanager
def _outputs_kept(context: ScoringContext) -> Iterator[dict[str, Tensor]]:
    """Inside, forwards leave the outputs of all layers that produce or normalize channels, by name of the module."""
    outputs: dict[str, Tensor] = {}
    names = {piece.module for group in context.groups for piece in group.slices if piece.role != "input"}

    def keep(name: str):
        return lambda module, args, output: outputs.__setitem__(name, output) if torch.is_grad_enabled() else None

    handles = [context.unet.get_submodule(name).register_forward_hook(keep(name)) for name in sorted(names)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _over_positions(module: nn.Module, values: Tensor) -> Tensor:
    """Sums over all but images and channels, with shape `(batch, channels)`."""
    if isinstance(module, (nn.Linear, nn.Embedding)):  # (batch, ..., channels)
        return values.flatten(1, -2).sum(dim=1) if values.dim() > 2 else values
    return values.flatten(2).sum(dim=2)  # (batch, channels, ...)


def _by_group(context: ScoringContext, along: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Squares of what every layer of a group has, summed over layers, then over images and channels of a unit, with shape
    `(num_units,)`."""
    for group in context.groups:
        found = None
        for piece in group.slices:
            # A layer's bias is in its output, too
            if piece.role != "input" and piece.parameter == "weight":
                part = along[piece.module][:, list(piece.positions)]
                found = part if found is None else found + part
        yield group.name, group.unit_sums(found.square().sum(dim=0).float())


def _probe(batch: DiffusionBatch, number: int) -> Tensor:
    """Gaussian noise, of the shape of a batch's images, that depends on each image's own noise: on no rank or order."""
    rows = []
    for noise in batch.noise.cpu().contiguous():
        content = noise.view(-1).view(torch.uint8).numpy()  # bytes: NumPy has no bfloat16
        generator = torch.Generator().manual_seed(zlib.crc32(content, number))
        rows.append(torch.randn(noise.shape, generator=generator))
    return torch.stack(rows)
