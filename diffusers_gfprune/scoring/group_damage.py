"""Damage of narrowing single groups of channels, with the layers that read them mended: points of damage curves.

A group g is narrowed to a width k: the units with the lowest scores are removed, all other groups stay dense. The layers that
read the group make up for it by least squares, and the damage D_g(k) is what is left in the samples (`sample_damage`).

Without mending, damage says how much a network relies on channels that it could do without, and training removes most of it in
a few steps. What linear layers cannot restore from the channels that stay is closer to what training will have to pay for.

A layer reads rows x of features, with x_R those of removed channels, and writes W x + b. With P = (E x x^T + lambda I)^-1,
where x is extended by a 1 for the bias, the weights W' with W'_R = 0 that bring W' x nearest to W x, with a penalty
lambda |W' - W|^2, are those of Optimal Brain Surgeon for a set of weights (Hassibi and Stork, 1993):

    W' = W - W_R (P_RR)^-1 P_R,:

so that one sum of products serves all widths of all groups that a layer reads. Inputs x are those of the dense model, on
images of the ranking with further noise. Of convolutions with more than 8,192 features, only the weights at the centre of the
kernel are mended, for what the centre of the kernel read. Damage of groups that are narrowed together is not measured:
`pruning.curve_allocation` adds up that of single groups.

The slightly narrower model of `sample_damage`, by which steps are weighed, has all its blocks, and every group of channels at
its first measured width. If only blocks may go, the branches of all blocks are multiplied by 3/4 instead, which
does not depend on scores, nor on one block that may change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..configuration import GFPruneConfig
from ..diffusion.batch import DiffusionBatch
from ..diffusion.repeats import repeated_batches
from ..distributed import mean_over_ranks, world_size
from ..pruning.blocks import RemovableBlock
from ..pruning.budget import select_units
from ..pruning.channel_groups import ChannelGroup
from ..pruning.damage_curves import SHARES, DamageCurve, measured_widths
from ..pruning.least_squares import MAX_FEATURES, drawn_rows, features
from ..pruning.masking import dense_parameters
from .context import ScoringContext
from .importance import scoring_context
from .sample_damage import MEASURED_SAMPLES, SAMPLES, SAMPLING_STEPS, SampleDamage

__all__ = ["curve_bytes", "curve_macs", "damage_curves"]

RIDGE = 0.03  # lambda, relative to the mean squared feature, as in recovery
FIT_SAMPLES = 256  # noisy images that layers are fitted to, over all processes
ROWS = 2**14  # that a layer reads at most, over all of them
SUM_BYTES = 2**31  # of the sums that are kept at a time
Reader = tuple[str, Tensor]  # name of a layer, and input channels of a group


def damage_curves(
    unet: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[DiffusionBatch],
    process,
    config: GFPruneConfig,
    scores: Mapping[str, Tensor],
    ladders: Sequence[Sequence[int]],
    seed: int = 0,
) -> dict[str, DamageCurve]:
    """Measure the damage curve of every group. Weights, masks and mode of the model are not changed.

    Args:
        unet: The masked model; masks count as 1 but for the group that is measured.
        groups: Its channel groups.
        batches: Calibration batches, at least one; with several processes, the rows of this rank.
        process: Scheduler of the model, or its process.
        config: All options.
        scores: Scores by group name, each with shape `(num_units,)`; the lowest are removed first.
        ladders: Possible widths of each group.
        seed: Seed for further noise.

    Returns:
        Curves by group name, the same on every rank; those of removable blocks have the widths 1 and 0. Groups with one width
        have no measured point.

    Raises:
        ValueError: As `importance.score_units`, or there is no batch.
    """
    if not batches:
        raise ValueError("damage curves need at least one calibration batch")
    with scoring_context(unet, groups, batches, process, config) as (_, context), torch.no_grad():
        points = {
            group.name: [
                (width, ~select_units(group, scores[group.name], width, config.attention_unit))
                for width in measured_widths(ladder)
            ]
            for group, ladder in zip(groups, ladders)
        }
        masks = context.unet.channel_masks
        ones = {group.name: torch.ones(group.num_units) for group in groups}
        blocks = {group.name for group in groups if isinstance(group, RemovableBlock)}  # they cannot be a little narrower
        narrower = {name: (~w[0][1]).float() for name, w in points.items() if w and name not in blocks}
        if not narrower:  # only blocks may go; a part of all of them does not depend on scores
            narrower = {name: torch.full((1,), 1 - SHARES[0]) for name in blocks}
        start = _at_most(context.batches, max(1, SAMPLES // world_size()))
        in_samples = SampleDamage(
            context, start, ones, ones | narrower, max(1, MEASURED_SAMPLES // world_size()), max(map(len, context.batches))
        )
        fitted = world_size() * sum(len(batch) for batch in context.batches) + FIT_SAMPLES
        fit = repeated_batches(context.batches, context.process, fitted, seed)[len(context.batches) :]
        damages: dict[str, list[float]] = {}
        for part in _parts(context.unet, [group for group in groups if points[group.name]]):
            with masks.replaced(ones):
                sums = _sums_of_readers(context, part, fit)
            for group in part:
                measured = []
                for _, removed in points[group.name]:
                    with _mended(context, group, removed, sums), masks.replaced(ones | {group.name: (~removed).float()}):
                        measured.append(in_samples.of_present())
                damages[group.name] = measured
    measured = torch.tensor([value for values in damages.values() for value in values], dtype=torch.float64)
    mean_over_ranks([measured])
    found = iter(measured.tolist())
    return {
        group.name: DamageCurve(
            group.num_channels, tuple(width for width, _ in points[group.name]), tuple(next(found) for _ in points[group.name])
        )
        for group in groups
    }


def _at_most(batches: Sequence[DiffusionBatch], count: int) -> DiffusionBatch:
    """The first `count` images of all batches."""
    tensors = [torch.cat(parts)[:count] for parts in zip(*(batch.tensors() for batch in batches))]
    return DiffusionBatch(*tensors[:3], dict(zip(batches[0].conditioning, tensors[3:])))


def curve_macs(macs: float, unet: nn.Module, ladders: Sequence[Sequence[int]]) -> int:
    """MACs of `damage_curves`, at most: a forward for each point, and the sums of all layers.

    Args:
        macs: MACs of a forward of the dense model for one image.
        unet: The dense or masked model.
        ladders: Possible widths of each group.
    """
    points = sum(len(measured_widths(ladder)) for ladder in ladders)
    weights = SAMPLES * SAMPLING_STEPS * (SAMPLING_STEPS + 5) // 2
    layers = [layer for layer in unet.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    sums = sum(ROWS * _size(layer) ** 2 + _size(layer) ** 3 for layer in layers)
    return int((MEASURED_SAMPLES * SAMPLING_STEPS * points + weights + FIT_SAMPLES) * macs + sums)


def curve_bytes(unet: nn.Module, groups: Sequence[ChannelGroup]) -> int:
    """Memory in bytes of the sums that `damage_curves` keeps at a time, at most.

    Args:
        unet: The dense or masked model.
        groups: Its channel groups.
    """
    sums = (
        {name: _sum_bytes(unet, name) for group in part for name, _ in _readers(unet, group)} for part in _parts(unet, groups)
    )
    return max((sum(part.values()) for part in sums), default=0)


def _readers(unet: nn.Module, group: ChannelGroup) -> list[Reader]:
    """Linear and convolutional layers that read a group, with the input channels they read it from."""
    channels: dict[str, list[int]] = {}
    for piece in () if isinstance(group, RemovableBlock) else group.slices:
        layer = unet.get_submodule(piece.module)
        usual = isinstance(layer, nn.Linear) or (
            isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"
        )
        if piece.role == "input" and usual:
            channels.setdefault(piece.module, []).extend(piece.positions)
    return [(name, torch.tensor(positions)) for name, positions in channels.items()]


def _at_centre(layer: nn.Module) -> bool:
    """Whether only the centre of the kernel is mended."""
    return layer.weight[0].numel() > MAX_FEATURES


def _size(layer: nn.Module) -> int:
    """Number of features that are used."""
    return layer.weight.shape[1] if _at_centre(layer) else layer.weight[0].numel()


def _sum_bytes(unet: nn.Module, name: str) -> int:
    """Bytes of the sums of a layer: two float64 matrices."""
    return 16 * _size(unet.get_submodule(name)) ** 2


def _parts(unet: nn.Module, groups: Sequence[ChannelGroup]) -> Iterator[list[ChannelGroup]]:
    """Groups in turn, as many at a time as the sums of their readers fit into `SUM_BYTES`, at least one."""
    part: list[ChannelGroup] = []
    layers: dict[str, int] = {}
    for group in groups:
        more = {name: _sum_bytes(unet, name) for name, _ in _readers(unet, group)}
        if part and sum((layers | more).values()) > SUM_BYTES:
            yield part
            part, layers = [], {}
        part.append(group)
        layers |= more
    if part:
        yield part


class _Sums:
    """E x x^T of one layer, and its inverse.

    Args:
        layer: The layer.
        rows: Number of rows of each sample to use at most.
    """

    def __init__(self, layer: nn.Module, rows: int) -> None:
        self.layer, self.rows = layer, rows
        self.bias = layer.bias is not None
        size = _size(layer) + self.bias
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=layer.weight.device)
        self.inverse: Tensor | None = None

    def add(self, x: Tensor, seeds: tuple[int, ...]) -> None:
        """Add inputs of the layer, with a seed for each image to draw rows."""
        chunk = max(1, 2**22 // x[0].numel())
        for first in range(0, len(x), chunk):
            images = slice(first, first + chunk)
            rows = features(self.layer, x[images], _at_centre(self.layer))
            if self.rows < rows.shape[1]:
                drawn = drawn_rows(seeds, rows.shape[1], self.rows)[images].to(rows.device)
                rows = rows[torch.arange(len(rows), device=rows.device)[:, None], drawn]
            rows = rows.flatten(0, 1).float()
            if self.bias:
                rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
            self.gram += rows.T @ rows

    def invert(self) -> None:
        """Compute P; to be called once after all inputs were added."""
        mean_over_ranks([self.gram])  # the scale of all sums is free
        size = _size(self.layer)
        diagonal = self.gram.diagonal()
        mean = diagonal[:size].mean()
        diagonal[:size] += RIDGE * mean if mean > 0 else 1.0
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.gram))

    def change(self, weight: Tensor, channels: Tensor) -> list[Tensor]:
        """Changes of the weight and, if there is one, of the bias that make up for removed input channels.

        Args:
            weight: The weight of the layer.
            channels: Indices of removed input channels.

        Returns:
            Float64: the change of the weight, which leads to zeros where removed channels are read, and that of the bias.
        """
        shape, centre = weight.shape, tuple(k // 2 for k in weight.shape[2:])
        weight = (weight[(..., *centre)] if _at_centre(self.layer) else weight).double()
        per_channel = weight[0, 0].numel()
        removed = (channels[:, None] * per_channel + torch.arange(per_channel)).flatten().to(weight.device)
        flat = weight.flatten(1)
        solved = torch.linalg.solve(self.inverse[removed][:, removed], self.inverse[removed])
        change = -flat[:, removed] @ solved
        size = flat.shape[1]
        whole = change[:, :size].reshape(weight.shape)
        if _at_centre(self.layer):
            whole = flat.new_zeros(shape)
            whole[(..., *centre)] = change[:, :size]
        return [whole, *change[:, size:].T]


def _sums_of_readers(
    context: ScoringContext, groups: Sequence[ChannelGroup], batches: Sequence[DiffusionBatch]
) -> dict[str, _Sums]:
    """Sums of all layers that read some groups, by name of the layer."""
    samples = world_size() * sum(len(batch) for batch in batches)
    names = sorted({name for group in groups for name, _ in _readers(context.unet, group)})
    sums = {name: _Sums(context.unet.get_submodule(name), max(1, ROWS // samples)) for name in names}

    def keep(name: str):
        return lambda module, args: sums[name].add(args[0], seeds)

    handles = [context.unet.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        for batch in batches:
            seeds = batch.seeds()
            context.predictions(batch)
    finally:
        for handle in handles:
            handle.remove()
    for layer in sums.values():
        layer.invert()
    return sums


@contextmanager
def _mended(context: ScoringContext, group: ChannelGroup, removed: Tensor, sums: Mapping[str, _Sums]) -> Iterator[None]:
    """Context in which the layers that read a group make up for removed units (bool with shape `(num_units,)`)."""
    parameters = dense_parameters(context.unet)
    is_removed = group.per_channel((~removed).float()) == 0
    before: dict[str, Tensor] = {}
    try:
        for name, channels in _readers(context.unet, group):
            repeats = len(channels) // len(is_removed)
            changes = sums[name].change(parameters[f"{name}.weight"].data, channels[is_removed.repeat(repeats)])
            for parameter, change in zip((f"{name}.weight", f"{name}.bias"), changes):
                data = parameters[parameter].data
                before[parameter] = data.clone()
                data += change.to(data.dtype)
        yield
    finally:
        for name, data in before.items():
            parameters[name].data.copy_(data)
