"""Masks held as torch parametrizations.

Every weight and bias `w` that produces a masked channel is read as

    w_eff = m ⊙ w          m in [0, 1], one value per unit of channels, broadcast over the other dimensions of w

through `torch.nn.utils.parametrize`. With m = 1 nothing changes. With m = 0 the channels of a unit are zero everywhere, and
readers of them need no mask: their input is zero. Every value between is a continuous path from the one to the other.

Norms stay what they are, `nn.GroupNorm`, since a unit is made of whole norm groups (`channel_groups`): for such a group x,

    GN(m x) = gamma (m x - m mean) / sqrt(m^2 var + eps) + beta          -> GN(x) for eps -> 0

so that a mask changes what other groups compute not at all, and what its own groups compute by its factor on gamma and beta.

There is one stored mask per channel group, a buffer of the `ChannelMasks` module that `attach` adds to the model as
`channel_masks`; parametrizations hold a reference to it. Weights keep their names with
`.parametrizations.<weight>.original` in between, and their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .channel_groups import ChannelGroup, slices_by_dimension

__all__ = ["ChannelMasks", "attach", "check_mask", "dense_name", "dense_parameters", "detach"]

MASKS_MODULE = "channel_masks"


def check_mask(group: ChannelGroup, mask: Tensor) -> None:
    """Refuse a mask that no smaller model could have.

    Args:
        group: The channel group.
        mask: Values in [0, 1] with shape `(num_units,)`.

    Raises:
        ValueError: Wrong shape, values outside [0, 1], no channel left, or heads left with different numbers of channels.
    """
    if mask.shape != (group.num_units,):
        raise ValueError(f"mask of {group.name} has shape {tuple(mask.shape)}, not ({group.num_units},)")
    if group.num_units == 0:
        return
    if not torch.isfinite(mask).all() or mask.min() < 0 or mask.max() > 1:
        raise ValueError(f"mask of {group.name} has values from {mask.min():g} to {mask.max():g}, outside [0, 1]")
    left = (mask > 0).view(group.heads, -1).sum(dim=1)  # (heads,); units of attention are single channels
    if left.sum() == 0 and not group.fixed:
        raise ValueError(f"mask of {group.name} leaves none of its {group.num_channels} channels")
    widths = left[left > 0].unique().tolist()
    if group.attention is not None and len(widths) > 1:
        raise ValueError(f"mask of {group.name} leaves heads with {widths} channels: heads are removed whole or shrunk alike")


class ChannelMasks(nn.Module):
    """The masks of a model, one buffer per channel group.

    Args:
        groups: The channel groups; all masks start as ones.
    """

    def __init__(self, groups: Sequence[ChannelGroup]) -> None:
        super().__init__()
        self.groups = {group.name: group for group in groups}
        for group in groups:
            self.register_buffer(self._key(group.name), torch.ones(group.num_units))
        self.version = 0  # of the values, for what is computed from them
        self.all_ones = True  # spares a model without a masked channel the products
        self.register_load_state_dict_post_hook(lambda module, _: module._refresh())

    @staticmethod
    def _key(name: str) -> str:
        return name.replace(".", "/")  # buffers may not have dots in their names

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[self._key(name)]

    def as_dict(self) -> dict[str, Tensor]:
        """Copies of the masks by group name, each with shape `(num_units,)`."""
        return {name: self[name].detach().clone() for name in self.groups}

    def set(self, masks: Mapping[str, Tensor], check: bool = True) -> None:
        """Replace some or all masks; nothing changes if one of them is refused.

        Args:
            masks: By group name.
            check: Whether to refuse what could not be compacted (see `check_mask`).
        """
        for name, mask in masks.items() if check else ():
            if name not in self.groups:
                raise ValueError(f"{name} is no channel group; groups are {', '.join(list(self.groups)[:3])}, ...")
            check_mask(self.groups[name], torch.as_tensor(mask))
        with torch.no_grad():
            for name, mask in masks.items():
                self[name].copy_(torch.as_tensor(mask))
        self._refresh()

    def _refresh(self) -> None:
        self.version += 1
        self.all_ones = all(bool((self[name] == 1).all()) for name in self.groups)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, the model runs as if every mask were one."""
        before, self.all_ones = self.all_ones, True
        try:
            yield
        finally:
            self.all_ones = before


class MaskVector(nn.Module):
    """The mask along one dimension of a parameter, put together from the masks of its groups.

    Args:
        masks: The stored masks.
        parts: A group, and the position of each of its channels, for every slice of the parameter.
        length: Size of the dimension; positions that no group has count as 1, as fixed channels do.
    """

    def __init__(self, masks: ChannelMasks, parts: Sequence[tuple[ChannelGroup, tuple[int, ...]]], length: int) -> None:
        super().__init__()
        self.owner = (masks,)  # a tuple, so that the masks are not registered (and saved) once per parameter
        self.names = [group.name for group, _ in parts]
        units = sum(group.num_units for group, _ in parts)
        source = torch.full((length,), units)  # where in the masks of all parts, and a 1 after them, each value is
        offset = 0
        for group, positions in parts:
            source[list(positions)] = torch.where(group.unit_of < group.num_units, group.unit_of + offset, units)
            offset += group.num_units
        self.padded = bool((source == units).any())
        in_order = torch.equal(source, torch.arange(length))
        self.register_buffer("source", None if in_order else source, persistent=False)

    @property
    def all_ones(self) -> bool:
        """Whether the model runs as if nothing were masked."""
        return self.owner[0].all_ones

    @property
    def version(self) -> int:
        """Of the values."""
        return self.owner[0].version

    def forward(self) -> Tensor:
        """The mask with shape `(length,)`."""
        masks = self.owner[0]
        pieces = [masks[name] for name in self.names]
        if self.padded:
            pieces.append(pieces[0].new_ones(1))
        vector = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return vector if self.source is None else vector[self.source]


class ChannelMask(nn.Module):
    """Parametrization `w -> m ⊙ w`.

    Args:
        vector: The mask along `dim`.
        dim: Dimension of the parameter that runs over channels.
        ndim: Dimensions of the parameter.
    """

    def __init__(self, vector: MaskVector, dim: int, ndim: int) -> None:
        super().__init__()
        self.vector = vector
        self.shape = [-1 if axis == dim else 1 for axis in range(ndim)]
        self.kept: tuple | None = None

    def forward(self, weight: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # one graph for all masks: what is computed of them is part of it
            return weight * self._factor(weight)
        if self.vector.all_ones:
            return weight
        key = self.vector.version, weight.dtype, weight.device
        if self.kept is None or self.kept[0] != key:
            with torch.inference_mode(False):
                self.kept = (key, self._factor(weight))
        return weight * self.kept[1]

    def _factor(self, weight: Tensor) -> Tensor:
        return self.vector().view(self.shape).to(weight.dtype)


def _refuse_to_save(*args, **kwargs):
    raise ValueError("the model is masked, and would be saved under names that do not load: compact() or detach() it first")


def dense_name(name: str) -> str:
    """Name of a parameter of the masked model in the dense one."""
    parts = name.split(".")
    if "parametrizations" not in parts:
        return name
    at = parts.index("parametrizations")
    return ".".join(parts[:at] + parts[at + 1 : at + 2])


def dense_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters of a masked (or dense) model under their dense names, in the model's order."""
    return {dense_name(name): parameter for name, parameter in unet.named_parameters()}


def attach(unet: nn.Module, groups: Sequence[ChannelGroup]) -> ChannelMasks:
    """Put masks, all ones, on a dense model in place. Parameters stay the same objects.

    Args:
        unet: The dense model.
        groups: Its channel groups.

    Returns:
        The masks, which the model now holds as `unet.channel_masks`.

    Raises:
        ValueError: The model has masks already.
    """
    if hasattr(unet, MASKS_MODULE):
        raise ValueError("the model has channel masks already: detach them first")
    masks = ChannelMasks(groups)
    modules = dict(unet.named_modules())
    for (module_name, parameter_name, dim), pieces in slices_by_dimension(groups).items():
        parts = [(group, piece.positions) for group, piece in pieces if piece.role != "input"]
        if not parts:
            continue
        module = modules[module_name]
        parameter = getattr(module, parameter_name)
        vector = MaskVector(masks, parts, parameter.shape[dim])
        mask = ChannelMask(vector, dim, parameter.ndim).to(parameter.device)
        parametrize.register_parametrization(module, parameter_name, mask)
    parameter = next(unet.parameters())
    unet.add_module(MASKS_MODULE, masks.to(parameter.device))
    unet.save_pretrained = _refuse_to_save
    return masks


def detach(unet: nn.Module) -> None:
    """Take masks off again: the same model, parameter objects, names and order as before `attach`."""
    for module in list(unet.modules()):
        if not parametrize.is_parametrized(module):
            continue
        for name in list(module.parametrizations):
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    if hasattr(unet, MASKS_MODULE):
        delattr(unet, MASKS_MODULE)
        del unet.save_pretrained
