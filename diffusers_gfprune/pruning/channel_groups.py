"""Channel groups and their units: slices of weights that are kept or removed together.

Removing an output channel of a layer removes the matching input channel of every layer that reads it, the matching affine
parameters of a norm in between, and, across a residual addition, the same channel of every layer that adds to the stream.
For example, for a convolution, a norm and a linear layer with 4 channels between them:

    conv.weight  (4, in, k, k)   rows 0, 1, 2, 3     output      group "conv": num_channels = 4
    conv.bias    (4,)            items 0, 1, 2, 3    output
    norm.weight  (4,)            items 0, 1, 2, 3    norm        nn.GroupNorm(2, 4): units = ((0, 1), (2, 3))
    linear.weight (out, 4)       columns 0, 1, 2, 3  input

A `ChannelGroup` holds this table. Concatenated skips appear as positions with an offset, a scale-shift time projection as two
slices of one parameter, and attention's q, k and v as one group with `heads` heads.

Pruning removes **units**. Two channels are connected if a norm has them in the same group; the connected components are the
units. Removing a unit removes whole groups of every norm. The remaining norms are native, and the statistics of the other
groups do not change. The same holds while a unit is masked, since a factor on a whole norm group cancels in its normalization.
Channels without a norm are units of one channel. In the configurations of google/ddpm-cifar10-32 and of the 256-pixel LSUN and
CelebA-HQ models, units have 4 to 48 channels. Likewise, an RMS norm of each attention head connects the channels of the head,
so that whole heads are units.

A group of a norm over a concatenation may contain channels of both branches. Such channels belong to two channel groups that
could only be pruned together. They are few (0.3 % of the channels of google/ddpm-cifar10-32, 0.4 % of those of the LSUN
models) and are always kept (`fixed`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from ..families.lookup import family_of
from .dependencies import Components, join, meta_twin, trace_components

__all__ = ["ChannelGroup", "GroupSlice", "slices_by_dimension", "trace_channel_groups"]


@dataclass(frozen=True)
class GroupSlice:
    """The part of one parameter that belongs to a channel group.

    Attributes:
        module: Name of the module that owns the parameter.
        parameter: `"weight"` or `"bias"`.
        dim: Dimension of the parameter that runs over channels.
        positions: Index of each channel of the group along `dim`.
        role: `"output"` (the module produces the channels), `"norm"` (it normalizes them) or `"input"` (it reads them). The
            slices of a removable block (`blocks`) have the role `"branch"`: all rows of a layer belong to its only unit.
    """

    module: str
    parameter: str
    dim: int
    positions: tuple[int, ...]
    role: str

    @property
    def name(self) -> str:
        """Name of the parameter in the dense model's `state_dict`."""
        return f"{self.module}.{self.parameter}"


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that occur at the same places in the network, and are kept or removed unit by unit.

    Attributes:
        name: Name of the first module that produces the channels.
        num_channels: Number of channels in the dense model.
        slices: All slices of parameters.
        units: The channels of each unit, in ascending order.
        fixed: Channels outside all units, which are always kept.
        heads: Number of attention heads that the channels are divided into, in order; 1 outside attention.
        attention: Name of the attention block that contains the channels, if any. Its units are single channels, or whole
            heads if norms connect their channels.
    """

    name: str
    num_channels: int
    slices: tuple[GroupSlice, ...] = field(repr=False)
    units: tuple[tuple[int, ...], ...] = field(repr=False)
    fixed: tuple[int, ...] = ()
    heads: int = 1
    attention: str | None = None

    @property
    def num_units(self) -> int:
        """Number of units in the dense model."""
        return len(self.units)

    @property
    def whole_heads(self) -> bool:
        """Whether the units are heads of several channels, which cannot be narrower."""
        return self.attention is not None and self.num_units == self.heads < self.num_channels

    @cached_property
    def unit_sizes(self) -> Tensor:
        """Number of channels in each unit, int64 with shape `(num_units,)`."""
        return torch.tensor([len(unit) for unit in self.units], dtype=torch.int64)

    @cached_property
    def unit_of(self) -> Tensor:
        """Index of the unit of each channel, int64 with shape `(num_channels,)`; `num_units` for fixed channels."""
        index = torch.full((self.num_channels,), self.num_units)
        for number, unit in enumerate(self.units):
            index[list(unit)] = number
        return index

    def per_channel(self, values: Tensor) -> Tensor:
        """Expand values of units, with shape `(num_units,)`, to channels, with shape `(num_channels,)`; 1 for fixed ones."""
        return torch.cat([values, values.new_ones(1)])[self.unit_of.to(values.device)]

    def unit_sums(self, values: Tensor) -> Tensor:
        """Sums over the channels of each unit: from shape `(..., num_channels)` to `(..., num_units)`."""
        sums = values.new_zeros(*values.shape[:-1], self.num_units + 1)
        return sums.index_add_(-1, self.unit_of.to(values.device), values)[..., :-1]

    def per_unit(self, values: Tensor) -> Tensor:
        """Reduce values of channels, with shape `(num_channels,)`, to units, with shape `(num_units,)`.

        Raises:
            ValueError: Values have a wrong shape, are NaN, differ within a unit, or are not 1 for a fixed channel.
        """
        if values.shape != (self.num_channels,):
            raise ValueError(f"mask of {self.name} has shape {tuple(values.shape)}, not ({self.num_channels},)")
        if values.isnan().any():
            raise ValueError(f"mask of {self.name} has values that are NaN, outside [0, 1]")
        by_unit = values[[unit[0] for unit in self.units]]
        if not torch.equal(self.per_channel(by_unit), values):
            for unit in self.units:
                different = values[list(unit)].unique().tolist()
                if len(different) > 1:
                    raise ValueError(
                        f"mask of {self.name} has {different} for channels {list(unit)}, which share a norm group: they "
                        f"must be equal"
                    )
            raise ValueError(f"mask of {self.name} must be 1 for channels {list(self.fixed)}, which are never pruned")
        return by_unit


def slices_by_dimension(
    groups: Sequence[ChannelGroup],
) -> dict[tuple[str, str, int], list[tuple[ChannelGroup, GroupSlice]]]:
    """Channel groups and their slices by `(module, parameter, dim)`, in the order of the groups; blocks are left out."""
    table: dict[tuple[str, str, int], list[tuple[ChannelGroup, GroupSlice]]] = defaultdict(list)
    for group in groups:
        for piece in group.slices:
            if piece.role != "branch":
                table[piece.module, piece.parameter, piece.dim].append((group, piece))
    return dict(table)


def _slices(module_name: str, module: nn.Module, kind: str, positions: tuple[int, ...]) -> list[GroupSlice]:
    if isinstance(module, nn.GroupNorm):
        return [GroupSlice(module_name, name, 0, positions, "norm") for name in ("weight", "bias")]
    if isinstance(module, nn.Embedding):
        return [GroupSlice(module_name, "weight", 1, positions, "output")]
    if kind == "in":
        return [GroupSlice(module_name, "weight", 1, positions, "input")]
    slices = [GroupSlice(module_name, "weight", 0, positions, "output")]
    if module.bias is not None:
        slices.append(GroupSlice(module_name, "bias", 0, positions, "output"))
    return slices


def _unit_labels(components: Components, modules: dict[str, nn.Module]) -> np.ndarray:
    """The unit of each channel of the network, indexed by the channel's label."""
    first, second = ([components.labels[elements]] for elements in components.together)
    for place in components.places:
        module = modules[place[0]]
        if isinstance(module, nn.GroupNorm):
            rows = components.at(place).reshape(module.num_groups, -1)  # (groups, channels of a group)
            first.append(np.repeat(rows[:, :1], rows.shape[1] - 1, axis=1).ravel())
            second.append(rows[:, 1:].ravel())
    return join(np.concatenate(first), np.concatenate(second), int(components.labels.max()) + 1)


def trace_channel_groups(unet: nn.Module) -> list[ChannelGroup]:
    """Find every group of prunable channels of a dense model.

    Output channels of the model, and channels to which external values are added (`Family.never_pruned`), are in no group.
    Input channels and the sinusoids of the time projection are never pruned.

    Args:
        unet: The dense model; its weights are neither read nor changed.

    Returns:
        The groups, in the order of the model's modules.

    Raises:
        ValueError: The configuration has a block that cannot be pruned, the model is of an unknown family, already masked or
            already pruned, or its parameters do not match its configuration.
    """
    family, twin = family_of(unet), meta_twin(unet)
    modules, attentions = dict(twin.named_modules()), family.attentions(twin)
    components = trace_components(family, twin)

    # Channels with the same places, with the same multiplicity, form a group.
    parts = components.split()
    unit_of = _unit_labels(components, modules)
    groups_of_unit: dict[int, set] = defaultdict(set, {int(unit_of[components.fixed]): {-1}})
    for number, (_, labels, _) in enumerate(parts):
        for unit in np.unique(unit_of[labels]).tolist():
            groups_of_unit[unit].add(number)

    groups = []
    for places, labels, indices in parts:
        named = [components.places[place] for place in places]
        produces = (side == "out" and not isinstance(modules[name], nn.GroupNorm) for name, side in named)
        producer = next(column for column, does in enumerate(produces) if does)
        order = np.argsort(indices[:, producer], kind="stable")
        slices: list[GroupSlice] = []
        for column, (name, side) in enumerate(named):
            slices.extend(_slices(name, modules[name], side, tuple(indices[order, column].tolist())))
        units: dict[int, list[int]] = defaultdict(list)
        for channel, unit in enumerate(unit_of[labels[order]].tolist()):
            units[unit].append(channel)
        own = {unit for unit in units if len(groups_of_unit[unit]) == 1}
        name = named[producer][0]
        inside, _, layer = name.rpartition(".")
        attention = attentions.get(inside) if layer in ("to_q", "to_k", "to_v") else None
        groups.append(
            ChannelGroup(
                name=name,
                num_channels=len(labels),
                slices=tuple(slices),
                units=tuple(tuple(members) for unit, members in units.items() if unit in own),
                fixed=tuple(sorted(c for unit, members in units.items() if unit not in own for c in members)),
                heads=1 if attention is None else attention.heads,
                attention=None if attention is None else inside,
            )
        )
    order = {name: index for index, name in enumerate(modules)}
    groups.sort(key=lambda group: order[group.name])
    # Two groups may start in the same module (a residual over a concatenation): their names are numbered.
    seen: dict[str, int] = defaultdict(int)
    unique = []
    for group in groups:
        seen[group.name] += 1
        unique.append(group if seen[group.name] == 1 else replace(group, name=f"{group.name}#{seen[group.name]}"))
    return unique
