"""Checks of config.json: it must be a JSON object with valid tables of a pruned model.

A config may come from an untrusted repository. Tables that do not make the dense model smaller are rejected before memory is
allocated. Arguments of the dense model are checked by its family (`families`).
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping

from torch import nn

from ..families.base import Family
from ..families.limits import is_int, refuse

__all__ = ["check_config_file", "check_removed_blocks", "check_tables"]

MAX_PARAMETERS = 2**33  # of the dense model
MAX_DEPTH = 32  # of config.json; Python's own limit depends on its version


def check_config_file(path: str | os.PathLike) -> None:
    """Raise a ValueError if a config.json is not a JSON object. Invalid JSON is left to Diffusers' own error."""
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except RecursionError:
        config = None
    except ValueError:
        return
    if not isinstance(config, dict) or _is_deeper(
        config, MAX_DEPTH
    ):  # Diffusers would treat a string as the name of another repository
        raise ValueError("config.json must hold a JSON object that is not nested too deeply")
    if not isinstance(config.get("quantization_config", {}), (dict, type(None))):
        refuse("quantization_config", config["quantization_config"], "a JSON object")


def _is_deeper(value: object, levels: int) -> bool:
    """Whether a JSON value has more than a number of levels of objects and lists."""
    level = [value]
    for _ in range(levels + 1):
        containers = [entry for entry in level if isinstance(entry, (dict, list))]
        if not containers:
            return False
        level = [entry for outer in containers for entry in (outer.values() if isinstance(outer, dict) else outer)]
    return True


def check_removed_blocks(family: Family, skeleton: nn.Module, names: object) -> None:
    """Check that removed blocks can be removed from the dense model.

    Args:
        family: Family of the model.
        skeleton: The dense model, on the meta device.
        names: The table `removed_blocks`.

    Raises:
        ValueError: The table is not a list of different names of removable blocks.
    """
    _check_size(skeleton)
    removable = family.removable_blocks(skeleton)
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"removed_blocks must be a list of module names, got {reprlib.repr(names)}")
    for name in names:
        if name not in removable:
            raise ValueError(f"removed_blocks names {reprlib.repr(name)}, which is not a block that can be removed")
    if len(set(names)) != len(names):
        raise ValueError(f"removed_blocks must name each block once, got {len(names)} names of {len(set(names))} blocks")


def _check_size(skeleton: nn.Module) -> None:
    weights = (getattr(module, name, None) for module in skeleton.modules() for name in ("weight", "bias"))
    count = sum(tensor.numel() for tensor in weights if tensor is not None)
    if count > MAX_PARAMETERS:
        raise ValueError(f"the config describes {count:,} parameters, but must not have more than {MAX_PARAMETERS:,}")


def check_tables(family: Family, skeleton: nn.Module, tables: Mapping[str, object]) -> None:
    """Check that tables narrow the dense model. The pruned model itself checks that the widths fit together.

    Args:
        family: Family of the model.
        skeleton: The dense model without removed blocks, on the meta device.
        tables: `layer_channels`, `norm_group_sizes` and `attention_heads`, by name.

    Raises:
        ValueError: An entry is wrong; the message has the name and value of the first one.
    """
    modules = dict(skeleton.named_modules())
    for table, entries in tables.items():
        if not isinstance(entries, Mapping) or not all(isinstance(key, str) for key in entries):
            raise ValueError(f"{table} must map module names to numbers, got {type(entries).__name__}")
    layers = tables["layer_channels"]
    for name, channels in layers.items():
        _check_layer(name, modules.get(name), channels, family.boundary.get(name))
    for name, sizes in tables["norm_group_sizes"].items():
        _check_norm(name, modules.get(name), sizes)
    attentions = family.attentions(skeleton)
    for name in tables["attention_heads"]:
        if name not in attentions:
            raise ValueError(f"attention_heads names {name!r}, which is not an attention")
    for name, module in attentions.items():
        _, inner = layers.get(f"{name}.to_q", (None, module.to_q.out_features))
        _check_heads(name, module, inner, tables["attention_heads"].get(name, module.heads))


def _dense_channels(module: nn.Module | None) -> tuple[int, int] | None:
    """Input and output channels of a layer that the table can narrow, else None."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return None


def _check_layer(name: str, module: nn.Module | None, channels, fixed: int | None) -> None:
    """`fixed` is the side that is never narrowed (0: input, 1: output), if there is one."""
    dense = _dense_channels(module)
    if dense is None:
        raise ValueError(f"layer_channels names {name!r}, which is not a convolution, linear layer or embedding")
    if not isinstance(channels, (list, tuple)) or len(channels) != 2 or not all(map(is_int, channels)):
        raise ValueError(f"layer_channels[{name!r}]={channels!r} must be two integers: input and output channels")
    for value, bound in zip(channels, dense):
        if not 1 <= value <= bound:
            raise ValueError(f"layer_channels[{name!r}]={list(channels)} must be from 1 to the dense {list(dense)}")
    fixed = 0 if isinstance(module, nn.Embedding) else fixed
    if fixed is not None and channels[fixed] != dense[fixed]:
        raise ValueError(f"layer_channels[{name!r}]={list(channels)} changes {dense[fixed]} channels that are never pruned")


def _check_norm(name: str, module: nn.Module | None, sizes) -> None:
    if not isinstance(module, nn.GroupNorm):
        raise ValueError(f"norm_group_sizes names {name!r}, which is not a group norm")
    if not isinstance(sizes, (list, tuple)) or not sizes or not all(map(is_int, sizes)):
        raise ValueError(f"norm_group_sizes[{name!r}]={sizes!r} must be a list of integers")
    largest = module.num_channels // module.num_groups
    if len(sizes) > module.num_groups or not all(1 <= size <= largest for size in sizes):
        raise ValueError(
            f"norm_group_sizes[{name!r}]={list(sizes)} must be up to {module.num_groups} sizes from 1 to {largest}"
        )


def _check_heads(name: str, attention: nn.Module, inner: int, heads) -> None:
    """`inner` is the number of kept query channels."""
    if attention.heads < 1:
        raise ValueError(f"attention_head_dim leaves no head for {name} ({attention.query_dim} channels)")
    head_dim = attention.inner_dim // attention.heads
    if not is_int(heads) or not 1 <= heads <= attention.heads or inner % heads or inner // heads > head_dim:
        raise ValueError(
            f"attention_heads[{name!r}]={heads!r} must be from 1 to {attention.heads} and divide {inner} channels "
            f"into heads of at most {head_dim}"
        )
