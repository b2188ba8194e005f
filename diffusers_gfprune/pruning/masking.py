"""Masks held as torch parametrizations.

Every weight and bias `w` that produces a masked channel is read as

    w_eff = m ⊙ w          m in [0, 1], one value per unit of channels, broadcast over the other dimensions of w

through `torch.nn.utils.parametrize`. With m = 1 nothing changes. With m = 0 the channels of a unit are zero everywhere. Layers
that read them need no mask, since their input is zero. Values in between interpolate continuously.

Norms remain `nn.GroupNorm`, since a unit consists of whole norm groups (`channel_groups`). For such a group x,

    GN(m x) = gamma (m x - m mean) / sqrt(m^2 var + eps) + beta          -> GN(x) for eps -> 0

so that a mask does not change the output of other groups, and scales its own groups through gamma and beta only.

The mask of a removable block (`blocks`) multiplies the last layers of its branch. They also have masks of their channels, so
that two parametrizations follow one another.

Each channel group has one stored mask, a buffer of the `ChannelMasks` module that `attach` adds to the model as
`channel_masks`; parametrizations hold a reference to it. Weights keep their order, and their names with
`.parametrizations.<weight>.original` inserted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..precision import usual_modes
from .blocks import RemovableBlock
from .channel_groups import ChannelGroup, slices_by_dimension
from .dependencies import MASKS_MODULE, check_unmasked

__all__ = ["MASKS_MODULE", "ChannelMasks", "attach", "check_mask", "dense_name", "dense_parameters", "detach"]


def check_mask(group: ChannelGroup, mask: Tensor) -> None:
    """Check that a mask corresponds to a smaller model.

    Args:
        group: The channel group.
        mask: Values in [0, 1] with shape `(num_units,)`.

    Raises:
        ValueError: The shape is wrong, values are outside [0, 1], no channel is left, or heads have different sizes.
    """
    if mask.shape != (group.num_units,):
        raise ValueError(f"mask of {group.name} has shape {tuple(mask.shape)}, not ({group.num_units},)")
    if group.num_units == 0:
        return
    if not torch.isfinite(mask).all() or mask.min() < 0 or mask.max() > 1:
        raise ValueError(f"mask of {group.name} has values from {mask.min():g} to {mask.max():g}, outside [0, 1]")
    left = (mask > 0).view(group.heads, -1).sum(dim=1)  # (heads,); units of attention are channels or heads
    if left.sum() == 0 and not group.fixed and not isinstance(group, RemovableBlock):
        raise ValueError(f"mask of {group.name} leaves none of its {group.num_channels} channels")
    widths = left[left > 0].unique().tolist()
    if group.attention is not None and len(widths) > 1:
        raise ValueError(f"mask of {group.name} leaves heads with {widths} channels: all heads must have the same size")


class ChannelMasks(nn.Module):
    """The masks of a model, one buffer per channel group.

    Args:
        groups: The channel groups; all masks are initialized to 1.
    """

    def __init__(self, groups: Sequence[ChannelGroup]) -> None:
        super().__init__()
        self.groups = {group.name: group for group in groups}
        for group in groups:  # empty masks have nothing to save, and Accelerate takes several of them for shared tensors
            self.register_buffer(self._key(group.name), torch.ones(group.num_units), persistent=group.num_units > 0)
        self.version = 0  # of the values, for caches
        self._suspended = False
        self._refresh()
        self.register_load_state_dict_post_hook(lambda module, _: module._refresh())

    @staticmethod
    def _key(name: str) -> str:
        return name.replace(".", "/")  # names of buffers must not contain dots

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[self._key(name)]

    def as_dict(self) -> dict[str, Tensor]:
        """Copies of the masks by group name, each with shape `(num_units,)`."""
        return {name: self[name].detach().clone() for name in self.groups}

    def set(self, masks: Mapping[str, Tensor], check: bool = True) -> None:
        """Replace some or all masks.

        Args:
            masks: Masks by group name, each with shape `(num_units,)`.
            check: Whether to check that masks can be compacted (see `check_mask`).

        Raises:
            ValueError: A group does not exist or a check fails. No mask is changed.
        """
        for name, mask in masks.items() if check else ():
            if name not in self.groups:
                raise ValueError(f"{name} is not a channel group; groups are {', '.join(list(self.groups)[:3])}, ...")
            check_mask(self.groups[name], torch.as_tensor(mask))
        with torch.no_grad():
            for name, mask in masks.items():
                self[name].copy_(torch.as_tensor(mask))
        self._refresh()

    def _refresh(self) -> None:
        self.version += 1
        self._ones = all(bool((self[name] == 1).all()) for name in self.groups)
        self._written = {name: self[name]._version for name in self.groups}

    @property
    def all_ones(self) -> bool:
        """Whether the model runs with all masks set to 1, which skips the products."""
        return self._suspended or self._ones

    def look(self, names: Sequence[str]) -> None:
        """Notice masks that were written in place by others, such as an average of models that copies buffers."""
        if not self._suspended and any(self[name]._version != self._written[name] for name in names):
            self._refresh()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Context in which the model runs with all masks set to 1."""
        before, self._suspended = self._suspended, True
        try:
            yield
        finally:
            self._suspended = before

    @contextmanager
    def replaced(self, masks: Mapping[str, Tensor]) -> Iterator[None]:
        """Context in which the model runs with other masks by group name, each with shape `(num_units,)`, also if masks are
        suspended."""
        before, suspended = self.as_dict(), self._suspended
        self._suspended = False
        self.set(masks, check=False)
        try:
            yield
        finally:
            self.set(before, check=False)
            self._suspended = suspended


class MaskVector(nn.Module):
    """The mask along one dimension of a parameter, concatenated from the masks of its groups.

    Args:
        masks: The stored masks.
        parts: For every slice of the parameter, its group and the position of each channel.
        length: Size of the dimension. Positions outside all groups, and fixed channels, have mask 1.
    """

    def __init__(self, masks: ChannelMasks, parts: Sequence[tuple[ChannelGroup, tuple[int, ...]]], length: int) -> None:
        super().__init__()
        self.owner = (masks,)  # a tuple, so that the masks are not registered as a submodule of every parameter
        self.names = [group.name for group, _ in parts]
        units = sum(group.num_units for group, _ in parts)
        source = torch.full((length,), units)  # index of each value in the masks of all parts, followed by a 1
        offset = 0
        for group, positions in parts:
            source[list(positions)] = torch.where(group.unit_of < group.num_units, group.unit_of + offset, units)
            offset += group.num_units
        self.padded = bool((source == units).any())
        in_order = torch.equal(source, torch.arange(length))
        self.register_buffer("source", None if in_order else source, persistent=False)

    @property
    def all_ones(self) -> bool:
        """Whether the model runs with all masks set to 1."""
        return self.owner[0].all_ones

    @property
    def version(self) -> int:
        """Version of the mask values."""
        return self.owner[0].version

    def look(self) -> None:
        """Notice values that were written by others (`ChannelMasks.look`)."""
        self.owner[0].look(self.names)

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
        ndim: Number of dimensions of the parameter.
    """

    def __init__(self, vector: MaskVector, dim: int, ndim: int) -> None:
        super().__init__()
        self.vector = vector
        self.shape = [-1 if axis == dim else 1 for axis in range(ndim)]
        self.kept: tuple | None = None

    def forward(self, weight: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # one graph for all mask values, including the factor
            return weight * self._factor(weight)
        self.vector.look()
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
    raise ValueError("a masked model cannot be saved, since its parameter names do not load: compact() or detach() it first")


def dense_name(name: str) -> str:
    """Convert the name of a parameter of the masked model to its name in the dense model."""
    parts = name.split(".")
    if "parametrizations" not in parts:
        return name
    at = parts.index("parametrizations")
    return ".".join(parts[:at] + parts[at + 1 : at + 2])


def dense_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a masked (or dense) model by their dense names, in the model's order."""
    return {dense_name(name): parameter for name, parameter in unet.named_parameters()}


@usual_modes()
def attach(unet: nn.Module, groups: Sequence[ChannelGroup]) -> ChannelMasks:
    """Attach masks of ones to a dense model in place. Parameters stay the same objects.

    Args:
        unet: The dense model.
        groups: Its channel groups.

    Returns:
        The masks, which are also `unet.channel_masks`.

    Raises:
        ValueError: The model already has masks.
    """
    check_unmasked(unet)
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
    for block in (group for group in groups if isinstance(group, RemovableBlock)):
        for piece in block.slices:  # one value for the whole parameter, besides the masks of its channels
            module = modules[piece.module]
            parameter = getattr(module, piece.parameter)
            mask = ChannelMask(MaskVector(masks, [(block, (0,))], 1), 0, parameter.ndim).to(parameter.device)
            parametrize.register_parametrization(module, piece.parameter, mask)
    parameter = next(unet.parameters())
    unet.add_module(MASKS_MODULE, masks.to(parameter.device))
    unet.save_pretrained = _refuse_to_save
    return masks


def detach(unet: nn.Module) -> None:
    """Remove the masks. Parameter objects, names and order are the same as before `attach`."""
    for module in list(unet.modules()):
        if not parametrize.is_parametrized(module):
            continue
        for name in list(module.parametrizations):
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    if hasattr(unet, MASKS_MODULE):
        delattr(unet, MASKS_MODULE)
        del unet.save_pretrained
