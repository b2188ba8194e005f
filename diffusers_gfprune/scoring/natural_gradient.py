"""Gradient flow in the metric of predictions: the default criterion, `gradient-flow`.

Let f be the noise predictions, J = df/dtheta, and v_c = -J theta_c their change to first order when channel c is removed. The
pruned model trains on its distance to the unpruned predictions, L = |r|^2 / 2, with r = v_c at first and gradient J^T v_c. The
rate at which a gradient flow reduces L depends on the metric:

    weights        dtheta/ds = -J^T r             -dL/ds = |J^T v_c|^2 = v_c^T K v_c       K = J J^T, the tangent kernel
    predictions    dtheta/ds = -(J^T J)^+ J^T r   -dL/ds = v_c^T P v_c = |v_c|^2           P projects on the range of J

The first is the squared gradient norm of arXiv 2501.09464. Its first-order form is theta_c . (H g) = -v_c^T K e, with the
remaining error e and the Gauss-Newton approximation H = J^T J (`hessian_product`). K weights changes by the directions that
training restores first, and predicts little of the damage within a group (benchmarks/README.md). The second is that of the
natural gradient (Amari, Neural Computation 10, 1998), which is closer to Adam, the optimizer of DDPMs. The change
v_c = -J theta_c lies in the range of J and is not changed by P, so that

    I_c = E |v_c|^2 / (values of an image)

needs neither K nor P. At a trained minimum, the gradient norm caused by a removal measures damage: channels with the lowest
values are pruned. I_c is also the Gauss-Newton estimate of the mean squared error caused by a removal, as in optimal brain
damage (LeCun et al., 1989) and Fisher pruning (Theis et al., arXiv 1801.05787; for channel groups: Liu et al., arXiv
2108.00708).

With random probes r ~ N(0, I), a few for each image, one backward computes it for all channels and images,

    E (r^T df/dm_c)^2 = |v_c|^2          r^T df/dm_c = sum over layers l that produce c, and positions, of  h_l,c dr^T f/dh_l,c

since a mask multiplies the outputs h of the layers that produce its channel (here at m_c = 1; otherwise divided by m_c).
Gradients of weights are not computed.

The score of a unit is the sum of I_c over its channels. The derivative by the single mask value of a unit would give the
square of a sum of terms that cancel: to first order, a norm undoes a common factor of its group, but not a removal. On the
digits and CIFAR-10 models of the study, the sum of squares gave the lower loss directly after pruning half of the MACs.

Removing a whole block b (`pruning.blocks`) is too large a change for a derivative: on the digits model, it predicts up to six
times less than the removal does. Blocks are few, so that their change is measured, by one forward without the branch:

    v_b = f(m_b = 1) - f(m_b = 0)          I_b = E |v_b|^2 / (values of an image)

The values r^T df/dm_u of the same probes, summed over the channels of a unit, tell what units change together: for a set R of
units, |sum_{u in R} v_u|^2 = E (sum_{u in R} r^T df/dm_u)^2 (`pruning.joint`). They are kept as rows, one for each image and
probe. Probes are independent with mean 0, also those of two rankings on the same images. Adding two rows, of different images
or rankings, therefore leaves the expected square unchanged: at most 1,024 rows are kept, and an average over rankings has as
many. Rows of blocks hold r^T v_b.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..diffusion.batch import DiffusionBatch
from ..distributed import check_identical, gather_rows, mean_over_ranks
from ..pruning.blocks import RemovableBlock
from ..pruning.channel_groups import ChannelGroup
from ..pruning.masking import MASKS_MODULE
from .context import JointScores, Scores, ScoringContext

__all__ = ["PROBES", "joint_changes", "prediction_changes"]

PROBES = 4  # per image; each costs a backward pass without weight gradients
ROWS = 1024  # of joint changes


def prediction_changes(context: ScoringContext) -> Scores:
    """Sum of I_c over the channels of every unit, averaged over the images of all ranks.

    Args:
        context: The model, in `scoring_mode`, and batches.

    Returns:
        Scores by group name, float32 with shape `(num_units,)`, >= 0.

    Raises:
        ValueError: Weights differ between ranks, which a mean over ranks would hide.
    """
    return joint_changes(context).scores


def joint_changes(context: ScoringContext) -> JointScores:
    """`prediction_changes`, and the changes of units along each probe.

    Args:
        context: The model, in `scoring_mode`, and batches.

    Returns:
        Scores, and changes with at most `ROWS` rows, from the images of all ranks.

    Raises:
        ValueError: Weights differ between ranks, which a mean over ranks would hide.
    """
    check_identical({f"values of {name}": parameter for name, parameter in context.parameters.items()})
    total = {group.name: torch.zeros(group.num_units, device=context.device) for group in context.groups}
    rows: dict[str, list[Tensor]] = {group.name: [] for group in context.groups}
    images, first = 0, PROBES * context.ranking
    with _outputs_kept(context) as outputs:
        for batch in context.batches:
            predictions = context.predictions(batch)
            produced = [output for _, output in outputs]
            for number in range(PROBES):
                probe = _probe(batch, first + number).to(predictions)
                gradients = torch.autograd.grad(predictions, produced, probe, retain_graph=number < PROBES - 1)
                along: dict[str, Tensor] = {}
                for (name, output), gradient in zip(outputs, gradients):
                    part = _over_positions(context.unet.get_submodule(name), output.detach() * gradient, len(batch))
                    along[name] = along[name] + part if name in along else part  # a layer may be called more than once
                values_of_image = predictions[0].numel()
                for group, values in _by_group(context, along):
                    total[group.name] += group.unit_sums(values.square().sum(dim=0).float()) / values_of_image
                    rows[group.name].append(gather_rows(group.unit_sums(values).float() / values_of_image**0.5))
            images += len(predictions)
            outputs.clear()
            for block in (group for group in context.groups if isinstance(group, RemovableBlock)):
                change = _change_without(context, block, batch, predictions.detach())  # (batch, ...)
                total[block.name] += PROBES * change.square().sum() / values_of_image
                for number in range(PROBES):
                    along_probe = (change * _probe(batch, first + number).to(change)).flatten(1).sum(dim=1, keepdim=True)
                    rows[block.name].append(gather_rows(along_probe / values_of_image**0.5))
    mean_over_ranks(total.values())
    scores = {name: values / (images * PROBES) for name, values in total.items()}
    return JointScores(scores, {name: _folded(torch.cat(values)) for name, values in rows.items()})


def _folded(rows: Tensor) -> Tensor:
    """At most `ROWS` rows, whose sum of squares is the mean of squares over the given rows in expectation."""
    scaled = rows / len(rows) ** 0.5
    folded = scaled[:ROWS].clone()
    for part in scaled[ROWS:].split(ROWS):
        folded[: len(part)] += part
    return folded


@contextmanager
def _outputs_kept(context: ScoringContext) -> Iterator[list[tuple[str, Tensor]]]:
    """Context that collects the outputs of all layers that produce or normalize channels, with the module's name."""
    outputs: list[tuple[str, Tensor]] = []
    names = {piece.module for group in context.groups for piece in group.slices if piece.role in ("output", "norm")}

    def keep(name: str):
        return lambda module, args, output: outputs.append((name, output)) if torch.is_grad_enabled() else None

    handles = [context.unet.get_submodule(name).register_forward_hook(keep(name)) for name in sorted(names)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _over_positions(module: nn.Module, values: Tensor, batch: int) -> Tensor:
    """Sum over all dimensions but images and channels, to shape `(batch, channels)`."""
    if isinstance(module, (nn.Linear, nn.Embedding)):  # (batch, ..., channels), or several rows of each image
        return values.reshape(batch, -1, values.shape[-1]).sum(dim=1)
    return values.flatten(2).sum(dim=2)  # (batch, channels, ...)


def _by_group(context: ScoringContext, along: dict[str, Tensor]) -> Iterator[tuple[ChannelGroup, Tensor]]:
    """r^T df/dm_c of the channels of each group, summed over its layers, with shape `(batch, num_channels)`."""
    masks = getattr(context.unet, MASKS_MODULE, None)
    for group in context.groups:
        if isinstance(group, RemovableBlock):
            continue
        # The output of a layer includes its bias
        values = sum(
            along[piece.module][:, list(piece.positions)]
            for piece in group.slices
            if piece.role != "input" and piece.parameter == "weight"
        )
        if masks is not None and not masks.all_ones:  # outputs have the factor m_c; where it is 0, so is the derivative
            mask = group.per_channel(masks[group.name]).to(values)
            values = values / torch.where(mask == 0, 1, mask)
        yield group, values


def _change_without(context: ScoringContext, block: RemovableBlock, batch: DiffusionBatch, now: Tensor) -> Tensor:
    """f(m_b = 1) - f(m_b = 0) with the other masks as they are, given the present predictions, which have their shape."""
    masks = getattr(context.unet, MASKS_MODULE, None)
    value = 1.0 if masks is None or masks.all_ones else float(masks[block.name])
    if value == 0:
        return torch.zeros_like(now)  # as for masked channels
    layers = [context.unet.get_submodule(name) for name in sorted({piece.module for piece in block.slices})]

    def predictions(factor: float) -> Tensor:
        """With the outputs of the branch multiplied by a factor."""
        handles = [layer.register_forward_hook(lambda module, args, output: factor * output) for layer in layers]
        try:
            with torch.no_grad():
                return context.predictions(batch)
        finally:
            for handle in handles:
                handle.remove()

    return (now if value == 1 else predictions(1 / value)) - predictions(0.0)


def _probe(batch: DiffusionBatch, number: int) -> Tensor:
    """Gaussian noise with the shape of a batch's images. It depends only on each image's noise, not on rank or order."""
    rows = []
    for noise in batch.noise.cpu().contiguous():
        content = noise.view(-1).view(torch.uint8).numpy()  # bytes: NumPy has no bfloat16
        generator = torch.Generator().manual_seed(zlib.crc32(content, number))
        rows.append(torch.randn(noise.shape, generator=generator))
    return torch.stack(rows)
