"""Channel groups: which slices of which weights live or die together.

Removing an output channel of a layer removes the matching input channel of every layer that reads it, the matching affine
parameters of a norm in between, and, across a residual addition, the same channel of every layer that adds to the stream.
For a convolution, a norm and a linear layer in a row, with 3 channels between them:

    conv.weight  (3, in, k, k)   rows 0, 1, 2     output      group "conv": num_channels = 3
    conv.bias    (3,)            items 0, 1, 2    output
    norm.weight  (3,)            items 0, 1, 2    norm
    linear.weight (out, 3)       columns 0, 1, 2  input

A `ChannelGroup` is that table. Concatenated skips appear as positions with an offset, a scale-shift time projection as two
slices of one parameter, attention's q, k and v as one group with `heads` heads.

Torch-Pruning's DepGraph (Fang et al., CVPR 2023, https://arxiv.org/abs/2301.12900) traces the dependencies; this module is
the only one that knows it. The trace runs on a twin without memory (the meta device), so that it costs milliseconds for a
model of any size, and leaves the model alone, whatever its device, dtype or hooks.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn

from .evaluation.cost import example_inputs

__all__ = ["ChannelGroup", "GroupSlice", "trace_channel_groups"]

SUPPORTED_BLOCKS = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": ("UNetMidBlock2D", None),
}


@dataclass(frozen=True)
class GroupSlice:
    """The part of one parameter that belongs to a channel group.

    Attributes:
        module: Name of the module that owns the parameter.
        parameter: `"weight"` or `"bias"`.
        dim: Dimension of the parameter that runs over channels.
        positions: Where each channel of the group lies along `dim`, one integer per channel.
        role: `"output"` (the module produces the channels), `"norm"` (it normalizes them) or `"input"` (it reads them).
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
    """Channels that are kept or removed one by one, each with all of its slices.

    Attributes:
        name: Name of the first module that produces the channels.
        num_channels: Channels in the dense model.
        slices: Every slice of every parameter.
        heads: Attention heads that the channels are divided into, in order; 1 outside attention.
        attention: Name of the attention that the channels are inside of, if any.
    """

    name: str
    num_channels: int
    slices: tuple[GroupSlice, ...] = field(repr=False)
    heads: int = 1
    attention: str | None = None


def _check_supported(config) -> None:
    for argument, supported in SUPPORTED_BLOCKS.items():
        value = config[argument]
        for block in value if isinstance(value, (list, tuple)) else [value]:
            if (block[7:] if str(block).startswith("UNetRes") else block) not in supported:
                names = ", ".join(str(name) for name in supported)
                raise ValueError(f"{argument}={block} cannot be pruned; supported: {names}")
    if config["resnet_time_scale_shift"] not in ("default", "scale_shift"):
        raise ValueError(
            f"resnet_time_scale_shift={config['resnet_time_scale_shift']} cannot be pruned; supported: default, scale_shift"
        )


def _settings(module: nn.Module | None) -> dict[str, object]:
    """What a module computes with beside its parameters: its kind, heads, groups, eps, strides, ..."""
    states = ("training", "gradient_checkpointing")
    public = {} if module is None else {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in states}
    plain = {key: value for key, value in public.items() if isinstance(value, (bool, int, float, str, tuple))}
    return {"__class__": type(module).__name__, **plain}


def _check_settings(name: str, found: dict, wanted: dict) -> None:
    """Refuse a module that computes otherwise than its configuration says, by which the pruned model is built."""
    for key, value in wanted.items():
        if found.get(key) != value:
            raise ValueError(f"the model does not match its config: {name}.{key}={found.get(key)!r} should be {value!r}")


def _meta_twin(unet: UNet2DModel) -> UNet2DModel:
    if type(unet).__name__ == "GFPrunedUNet2DModel":
        raise ValueError(
            "the model is pruned already (GFPrunedUNet2DModel): prune the dense model to the smaller budget instead"
        )
    if not isinstance(unet, UNet2DModel):
        raise ValueError(f"a UNet2DModel can be pruned, not a {type(unet).__name__}")
    _check_supported(unet.config)
    with torch.device("meta"):
        twin = UNet2DModel.from_config(unet.config)
    theirs = {name: tuple(p.shape) for name, p in unet.named_parameters()}
    for name, parameter in twin.named_parameters():
        if theirs.pop(name, None) != tuple(parameter.shape):
            raise ValueError(f"the model does not match its config: {name} should have shape {tuple(parameter.shape)}")
    if theirs:
        raise ValueError(f"the model does not match its config: it has an additional parameter {next(iter(theirs))}")
    modules = dict(unet.named_modules())
    for name, module in twin.named_modules():
        if name and not isinstance(module, nn.Dropout):  # settings of the model itself are its config
            _check_settings(name, _settings(modules.get(name)), _settings(module))
        if isinstance(module, Attention) and module.heads < 1:
            raise ValueError(
                f"attention_head_dim={unet.config.attention_head_dim} leaves {name} ({module.query_dim} channels) no head"
            )
    return twin


Element = tuple[str, str, int]  # module, "out" or "in", channel index


def _dependent_elements(twin: UNet2DModel) -> list[tuple[Element, Element]]:
    """Pairs of channels that depend on each other, as Torch-Pruning traces them."""
    import torch_pruning as tp

    side = 2 ** len(twin.config.block_out_channels)
    names = {module: name for name, module in twin.named_modules()}
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(
            twin.eval(),
            example_inputs(twin, side, side, device="meta"),
            output_transform=lambda output: output.sample,
            ignored_params=[p for p in twin.parameters() if not p.requires_grad],
            verbose=False,
        )
    pairs = []
    for module in graph.module2node:
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        pruner = graph.get_pruner_of_module(module)
        channels = list(range(pruner.get_out_channels(module)))
        for item in graph.get_pruning_group(module, pruner.prune_out_channels, channels):
            target = item.dep.target.module
            if target not in names:  # an operation without parameters
                continue
            kind = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            for index, root in zip(item.idxs, item.root_idxs):
                pairs.append(((names[module], "out", int(root)), (names[target], kind, int(index))))
    return pairs


def _components(pairs: list[tuple[Element, Element]]) -> list[list[Element]]:
    """Connected components of the pairs (union-find)."""
    parent: dict[Element, Element] = {}

    def find(element: Element) -> Element:
        parent.setdefault(element, element)
        while parent[element] != element:
            parent[element] = parent[parent[element]]
            element = parent[element]
        return element

    for first, second in pairs:
        parent[find(first)] = find(second)
    members = defaultdict(list)
    for element in parent:
        members[find(element)].append(element)
    return list(members.values())


def _slices(module_name: str, module: nn.Module, kind: str, positions: tuple[int, ...]) -> list[GroupSlice]:
    if isinstance(module, nn.GroupNorm):
        return [GroupSlice(module_name, name, 0, positions, "norm") for name in ("weight", "bias")]
    if isinstance(module, nn.Embedding):
        return [GroupSlice(module_name, "weight", 1, positions, "output")]
    if not isinstance(module, (nn.Conv2d, nn.Linear)):
        raise ValueError(f"{module_name} is a {type(module).__name__}, which cannot be pruned")
    if kind == "in":
        return [GroupSlice(module_name, "weight", 1, positions, "input")]
    slices = [GroupSlice(module_name, "weight", 0, positions, "output")]
    if module.bias is not None:
        slices.append(GroupSlice(module_name, "bias", 0, positions, "output"))
    return slices


def trace_channel_groups(unet: UNet2DModel) -> list[ChannelGroup]:
    """Find every group of prunable channels of a dense UNet.

    Output channels of the model are in no group, nor are channels that outside values are added to (the time embedding
    with `class_embed_type="identity"`). Input channels, and the sinusoids of the time projection, are never pruned.

    Args:
        unet: The dense model; its weights are neither read nor changed.

    Returns:
        The groups, in the order of the model's modules.

    Raises:
        ValueError: The configuration has a block that cannot be pruned, the model is no plain `UNet2DModel`, or its
            parameters are not those of its configuration.
    """
    twin = _meta_twin(unet)
    modules = dict(twin.named_modules())
    order = {name: index for index, name in enumerate(modules)}
    fixed = {"conv_out"}
    if twin.config.class_embed_type == "identity":
        fixed.add("time_embedding.linear_2")

    # Channels with the same modules behind them, in the same multiplicity, form a group.
    channels_of: dict[tuple, list[list[Element]]] = defaultdict(list)
    for component in _components(_dependent_elements(twin)):
        component.sort(key=lambda element: (order[element[0]], element[1], element[2]))
        if any(module in fixed and kind == "out" for module, kind, _ in component):
            continue
        channels_of[tuple((module, kind) for module, kind, _ in component)].append(component)

    groups = []
    for signature, channels in channels_of.items():
        producers = [(name, kind) for name, kind in signature if kind == "out" and not isinstance(modules[name], nn.GroupNorm)]
        first = signature.index(producers[0])
        channels.sort(key=lambda component: component[first][2])
        slices: list[GroupSlice] = []
        for column, (module, kind) in enumerate(signature):
            positions = tuple(component[column][2] for component in channels)
            slices.extend(_slices(module, modules[module], kind, positions))
        name = producers[0][0]
        attention_name = name.rpartition(".")[0]
        attention = modules.get(attention_name) if name.endswith((".to_q", ".to_k", ".to_v")) else None
        groups.append(
            ChannelGroup(
                name=name,
                num_channels=len(channels),
                slices=tuple(slices),
                heads=attention.heads if isinstance(attention, Attention) else 1,
                attention=attention_name if isinstance(attention, Attention) else None,
            )
        )
    groups.sort(key=lambda group: order[group.name])
    # Two groups that start in one module (a residual over a concatenation) need two names.
    seen: dict[str, int] = defaultdict(int)
    unique = []
    for group in groups:
        seen[group.name] += 1
        suffix = "" if seen[group.name] == 1 else f"#{seen[group.name]}"
        unique.append(ChannelGroup(group.name + suffix, group.num_channels, group.slices, group.heads, group.attention))
    return unique
