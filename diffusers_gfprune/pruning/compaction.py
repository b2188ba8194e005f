"""Compaction: convert a model with binary masks to a smaller model of its family's pruned class.

Every parameter is indexed along its channel dimensions. Norms lose whole groups and compute the others as before
(`channel_groups`); `norm_group_sizes` lists the sizes of the remaining groups. Attention needs a correction: if `d'` of `d`
channels in a head are kept, scaled dot-product attention divides by sqrt(d'), but the dense model divides by sqrt(d). The
factor sqrt(d'/d) is therefore folded into `to_q`, and into `add_q_proj` of joint attention, the queries of text:

    q k^T / sqrt(d) = (sqrt(d'/d) q) k^T / sqrt(d')

A `CompactionPlan` holds the indices and factors by parameter name. It also converts optimizer state (`optimizer_state`) and
averaged weights.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..families.lookup import family_of
from ..precision import usual_modes
from .blocks import removed_blocks
from .channel_groups import ChannelGroup, slices_by_dimension
from .masking import MASKS_MODULE, check_mask, dense_name, dense_parameters
from .optimizer_state import kept_state

__all__ = ["CompactionPlan", "carry_ema", "carry_optimizer", "check_ema", "compact", "plan_compaction"]

# Settings of modules that are not in the configuration: rates of dropout of layers and labels, and FreeU
CARRIED = ("p", "dropout_prob", "s1", "s2", "b1", "b2")


@dataclass
class CompactionPlan:
    """The kept part of every parameter.

    Attributes:
        kept: Kept indices, int64, by parameter name and dimension; without an entry, all are kept.
        factors: Factor of a parameter, by name; without an entry, it is 1.
        layer_channels: Table of the small model's configuration.
        norm_group_sizes: Table of the small model's configuration.
        attention_heads: Table of the small model's configuration.
        removed_blocks: Names of removed blocks, sorted; likewise.
        dropped: Names of parameters that are removed with them.
    """

    kept: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    layer_channels: dict[str, list[int]] = field(default_factory=dict)
    norm_group_sizes: dict[str, list[int]] = field(default_factory=dict)
    attention_heads: dict[str, int] = field(default_factory=dict)
    removed_blocks: list[str] = field(default_factory=list)
    dropped: frozenset[str] = frozenset()

    def take(self, name: str, tensor: Tensor, power: int = 1) -> Tensor:
        """The kept part of `tensor`, which belongs to parameter `name` and has its dense shape.

        Args:
            name: Name of the parameter in the dense model.
            tensor: The parameter, or a tensor of the same shape such as its optimizer state.
            power: Power with which the tensor scales with the parameter: 1 for weights, -1 for gradients, ...

        Returns:
            A new, contiguous tensor.
        """
        for dim in range(min(2, tensor.ndim)):
            index = self.kept.get((name, dim))
            if index is not None:
                tensor = tensor.index_select(dim, index.to(tensor.device))
        return (tensor * self.factors.get(name, 1.0) ** power).contiguous() if name in self.factors else tensor.clone()


def plan_compaction(unet: nn.Module, groups: Sequence[ChannelGroup], masks: Mapping[str, Tensor]) -> CompactionPlan:
    """Compute the compaction plan from binary masks.

    Args:
        unet: The dense or masked model.
        groups: Its channel groups.
        masks: A mask for each group, values 0 or 1, with shape `(num_units,)`.

    Returns:
        The plan.

    Raises:
        ValueError: A mask is not binary or cannot be compacted (see `check_mask`).
    """
    plan = CompactionPlan()
    modules = dict(unet.named_modules())
    blocks = removed_blocks(groups, masks)
    gone = frozenset().union(*(block.inside for block in blocks))  # names of modules
    plan.removed_blocks = sorted(block.name for block in blocks)
    plan.dropped = frozenset(name for name in dense_parameters(unet) if name.rpartition(".")[0] in gone)
    keep: dict[str, Tensor] = {}  # by group, for each channel
    for group in groups:
        mask = masks[group.name].detach().cpu()
        check_mask(group, mask)
        if not ((mask == 0) | (mask == 1)).all():
            between = mask[(mask != 0) & (mask != 1)][0]
            raise ValueError(
                f"mask of {group.name} has the value {between:g}: only binary masks can be compacted, so call step() of the "
                f"pruner until it has finished"
            )
        keep[group.name] = group.per_channel(mask).bool()
        if group.attention is not None and group.attention not in gone:
            now = modules[group.attention].heads
            if now != group.heads:
                raise ValueError(f"{group.attention}.heads={now} must be {group.heads}, as when its channels were traced")
            per_head = mask.view(group.heads, -1).sum(dim=1)  # (heads,)
            heads, kept_dim = int((per_head > 0).sum()), int(per_head.max())
            head_dim = group.num_units // group.heads
            if heads < group.heads:
                plan.attention_heads[group.attention] = heads
            if kept_dim < head_dim:
                attention = unet.get_submodule(group.attention)
                queries = [layer for layer in ("to_q", "add_q_proj") if getattr(attention, layer, None) is not None]
                for layer, name in itertools.product(queries, ("weight", "bias")):
                    plan.factors[f"{group.attention}.{layer}.{name}"] = math.sqrt(kept_dim / head_dim)

    alive: dict[tuple[str, str, int], Tensor] = {}
    for (module, parameter, dim), pieces in slices_by_dimension(groups).items():
        if module in gone:
            continue
        flags = torch.ones(getattr(modules[module], parameter).shape[dim], dtype=torch.bool)
        for group, piece in pieces:
            flags[list(piece.positions)] = keep[group.name]
        alive[module, parameter, dim] = flags
        if not flags.all():
            plan.kept[f"{module}.{parameter}", dim] = flags.nonzero().squeeze(1)
    for name, module in modules.items():
        if isinstance(module, nn.GroupNorm):
            flags = alive.get((name, "weight", 0))
            if flags is not None and not flags.all():
                sizes = flags.view(module.num_groups, -1).sum(dim=1)
                plan.norm_group_sizes[name] = sizes[sizes > 0].tolist()
        elif isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
            out_dim, in_dim = (1, 0) if isinstance(module, nn.Embedding) else (0, 1)
            shape = list(module.weight.shape[:2])
            for dim in (0, 1):
                if (f"{name}.weight", dim) in plan.kept:
                    shape[dim] = len(plan.kept[f"{name}.weight", dim])
            if shape != list(module.weight.shape[:2]):
                plan.layer_channels[name] = [shape[in_dim], shape[out_dim]]
    return plan


@usual_modes()
def compact(unet: nn.Module, plan: CompactionPlan) -> nn.Module:
    """Build the small model. The masked model is not modified.

    Args:
        unet: The masked model.
        plan: Output of `plan_compaction` for this model.

    Returns:
        A model with the same outputs, device, dtypes, mode, gradient checkpointing and rates of dropout as the masked one.
        FreeU has the same factors, but scales the first half of the channels that are left.
    """
    tables = {
        "layer_channels": plan.layer_channels,
        "norm_group_sizes": plan.norm_group_sizes,
        "attention_heads": plan.attention_heads,
        "removed_blocks": plan.removed_blocks,
    }
    family = family_of(unet)
    known = inspect.signature(family.dense_class.__init__).parameters
    # Diffusers keeps arguments of an earlier class, and would warn of them whenever the small model is loaded
    config = {name: value for name, value in unet.config.items() if name in known or name.startswith("_")}
    with torch.device("meta"):
        small = family.pruned_class.from_config({**config, **tables})
    parameters = dense_parameters(unet)
    kept = {name: parameter for name, parameter in parameters.items() if name not in plan.dropped}
    weights = {name: plan.take(name, parameter.detach()) for name, parameter in kept.items()}
    buffers = {
        n: b for n, b in unet.state_dict().items() if dense_name(n) not in parameters and not n.startswith(MASKS_MODULE)
    }
    small.load_state_dict({**weights, **buffers}, assign=True)
    for name, _ in [*small.named_buffers()]:
        if name not in buffers:  # not saved with the weights
            owner, _, leaf = name.rpartition(".")
            setattr(small.get_submodule(owner), leaf, unet.get_buffer(name).clone())
    for name, parameter in kept.items():
        small.get_parameter(name).requires_grad_(parameter.requires_grad)
    modules = dict(unet.named_modules())
    for name, module in small.named_modules():
        for setting in CARRIED:
            if hasattr(modules.get(name), setting) and (setting != "p" or isinstance(module, nn.Dropout)):
                setattr(module, setting, getattr(modules[name], setting))
    if unet.is_gradient_checkpointing:
        small.enable_gradient_checkpointing()
    return small.train(unet.training)


def unwrapped(optimizer) -> torch.optim.Optimizer:
    """The optimizer inside of a wrapper, such as Accelerate's.

    Raises:
        ValueError: It is no optimizer.
    """
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer is a {type(optimizer).__name__}: it must be one optimizer of PyTorch")
    return optimizer


def carry_optimizer(optimizer: torch.optim.Optimizer, unet: nn.Module, small: nn.Module, plan: CompactionPlan) -> None:
    """Move an optimizer from the masked model to the small one, with its state, in place.

    Args:
        optimizer: Adam, AdamW, SGD, or bitsandbytes' 8-bit Adam or AdamW (see `optimizer_state`), also wrapped by Accelerate.
        unet: The masked model, whose parameters the optimizer holds.
        small: The compacted model.
        plan: The plan of the compaction.

    Raises:
        ValueError: The optimizer holds other parameters or unknown state.
    """
    optimizer = unwrapped(optimizer)
    names = {parameter: name for name, parameter in dense_parameters(unet).items()}
    state, param_groups = {}, []
    for param_group in optimizer.param_groups:
        moved = []
        for old in param_group["params"]:
            if old not in names:
                raise ValueError(f"the optimizer holds a parameter of shape {tuple(old.shape)} that is not in the model")
            name = names[old]
            if name in plan.dropped:
                continue
            new = small.get_parameter(name)
            moved.append(new)
            kept = kept_state(optimizer, old, functools.partial(plan.take, name))
            if kept:
                state[new] = kept
        param_groups.append(moved)
    # The optimizer is changed only now, so that an error above leaves it intact.
    for param_group, moved in zip(optimizer.param_groups, param_groups):
        param_group["params"] = moved
    optimizer.state.clear()
    optimizer.state.update(state)


def check_ema(ema, unet: nn.Module) -> None:
    """Check that an `EMAModel` belongs to the model: its methods match tensors by position and broadcast shapes.

    Raises:
        ValueError: It is another kind of average, or the number of parameters or a shape differs from the model.
    """
    if not hasattr(ema, "shadow_params"):
        raise ValueError(f"ema is a {type(ema).__name__}: it must be an EMAModel of Diffusers")
    parameters = dense_parameters(unet)
    if len(ema.shadow_params) != len(parameters):
        raise ValueError(f"ema has {len(ema.shadow_params)} parameters, but the model has {len(parameters)}")
    for (name, parameter), shadow in zip(parameters.items(), ema.shadow_params):
        if shadow.shape != parameter.shape:
            shapes = f"shape {tuple(shadow.shape)} in ema, and {tuple(parameter.shape)} in the model"
            raise ValueError(f"{name} has {shapes}: ema must be an average of this model's parameters, in their order")


def carry_ema(ema, unet: nn.Module, small: nn.Module, plan: CompactionPlan) -> None:
    """Move a Diffusers `EMAModel` from the masked model to the small one, in place.

    `EMAModel` stores parameters by position; here they are matched by name.

    Args:
        ema: The average, with `shadow_params` in the order of `unet.parameters()`.
        unet: The masked model.
        small: The compacted model.
        plan: The plan of the compaction.

    Raises:
        ValueError: The average belongs to another model.
    """
    check_ema(ema, unet)
    names = list(dense_parameters(unet))
    averaged = {name: plan.take(name, shadow) for name, shadow in zip(names, ema.shadow_params) if name not in plan.dropped}
    ema.shadow_params = [averaged[name] for name, _ in small.named_parameters()]
    if ema.model_cls is not None:  # used by its save_pretrained
        ema.model_cls, ema.model_config = type(small), small.config
