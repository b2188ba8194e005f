"""Dependencies between the channels of a UNet, traced with Torch-Pruning.

A channel of a module is an *element* (module, side, index), with side `"out"` for outputs of the module and `"in"` for its
inputs. Two elements depend on each other if one cannot be removed without the other. `trace_components` returns the classes
of this relation: each class is one channel of the network, with all of its places.

Torch-Pruning's DepGraph (Fang et al., CVPR 2023, https://arxiv.org/abs/2301.12900) traces the relation; only this module uses
it. The trace runs on a copy on the meta device. It takes a fraction of a second for models of any size and does not depend on
the model's device, dtype or hooks.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn

from ..families.base import Family
from ..families.lookup import family_of

__all__ = ["Components", "join", "meta_twin", "trace_components"]


# --- a copy on the meta device -----------------------------------------------------------------------------------------


def _settings(module: nn.Module | None) -> dict[str, object]:
    """Settings of a module besides its parameters: its class, heads, groups, eps, strides, ..."""
    states = ("training", "gradient_checkpointing")
    public = {} if module is None else {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in states}
    plain = {key: value for key, value in public.items() if isinstance(value, (bool, int, float, str, tuple))}
    return {"__class__": type(module).__name__, **plain}


def _check_settings(name: str, found: dict, wanted: dict) -> None:
    """Check a module against the configuration, from which the pruned model is built."""
    for key, value in wanted.items():
        if found.get(key) != value:
            raise ValueError(f"the model does not match its config: {name}.{key}={found.get(key)!r} must be {value!r}")


def meta_twin(unet: nn.Module) -> nn.Module:
    """A model with the same configuration on the meta device.

    Raises:
        ValueError: The model is of an unknown family, is already pruned, has a block that cannot be pruned, or does not match
            its configuration.
    """
    family = family_of(unet)
    if family.is_pruned(unet):
        raise ValueError(
            f"the model is already pruned ({type(unet).__name__}): prune the dense model to the smaller budget instead"
        )
    family.check_supported(unet.config)
    with torch.device("meta"):
        twin = family.dense_class.from_config(unet.config)
    theirs = {name: tuple(p.shape) for name, p in unet.named_parameters()}
    for name, parameter in twin.named_parameters():
        if theirs.pop(name, None) != tuple(parameter.shape):
            raise ValueError(f"the model does not match its config: {name} must have shape {tuple(parameter.shape)}")
    if theirs:
        raise ValueError(f"the model does not match its config: it has an additional parameter {next(iter(theirs))}")
    modules = dict(unet.named_modules())
    for name, module in twin.named_modules():
        if name and not isinstance(module, nn.Dropout):  # the model itself is described by its config
            _check_settings(name, _settings(modules.get(name)), _settings(module))
    for name, module in family.attentions(twin).items():
        if module.heads < 1:
            raise ValueError(
                f"attention_head_dim={unet.config.attention_head_dim} gives {name} ({module.query_dim} channels) zero heads"
            )
    return twin


# --- the trace ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Components:
    """Channels of a network, each with all of its places.

    Attributes:
        places: All pairs of module and side, in the order of the model's modules.
        offsets: First element of each place; element `offsets[p] + i` is channel `i` at place `p`.
        labels: Network channel of each element, int64 with shape `(elements,)`; -1 for none.
    """

    places: list[tuple[str, str]]
    offsets: np.ndarray
    labels: np.ndarray

    def at(self, place: tuple[str, str]) -> np.ndarray:
        """Labels of the channels at one place, in order, with shape `(channels,)`."""
        index = self.places.index(place)
        return self.labels[self.offsets[index] : self.offsets[index + 1]]

    def split(self) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
        """Label, places, and index at each place, for every channel of the network.

        Places are sorted in the order of `places`, then by index: a channel may occur at a place more than once.
        """
        known = np.flatnonzero(self.labels >= 0)
        order = known[np.argsort(self.labels[known], kind="stable")]
        place_of = np.repeat(np.arange(len(self.places)), np.diff(self.offsets))[order]
        index_of = order - self.offsets[place_of]
        starts = np.flatnonzero(np.diff(self.labels[order], prepend=-1))
        ends = [*starts[1:], len(order)]
        return [
            (int(self.labels[order[start]]), tuple(place_of[start:end].tolist()), tuple(index_of[start:end].tolist()))
            for start, end in zip(starts, ends)
        ]


def join(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    """Connected components of a graph with nodes `0 ... count - 1` and an edge from `first[i]` to `second[i]`.

    Returns:
        The component of each node, with shape `(count,)`.
    """
    edges = coo_array((np.ones(len(first), dtype=bool), (first, second)), shape=(count, count))
    return connected_components(edges, directed=False)[1].astype(np.int64)


def _width(module: nn.Module, side: str) -> int:
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if isinstance(module, nn.Conv2d):
        return module.out_channels if side == "out" else module.in_channels
    return module.out_features if side == "out" else module.in_features


def trace_components(family: Family, twin: nn.Module) -> Components:
    """Trace the channels of a network.

    Args:
        family: Family of the model.
        twin: A dense model on the meta device (`meta_twin`).

    Raises:
        ValueError: A module has a type that cannot be pruned.
    """
    import torch_pruning as tp
    from torch_pruning.dependency import index_mapping

    names = {module: name for name, module in twin.named_modules()}
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(
            twin.eval(),
            family.example_inputs(twin, *family.tracing_size(twin.config), device="meta"),
            forward_fn=family.predict,
            ignored_params=[p for p in twin.parameters() if not p.requires_grad],
            verbose=False,
        )
    order = {name: index for index, name in enumerate(names.values())}
    pairs: list[tuple[str, tuple[str, str], list[int], list[int]]] = []  # root module, target place, roots, indices
    seen: dict[str, set[int]] = {}
    # Torch-Pruning recomputes the offsets of concatenations and splits for every group, since pruning changes them. This takes
    # most of the time. Nothing is pruned here, so that once is enough.
    index_mapping.update_index_mapping(graph)
    with mock.patch.object(index_mapping, "update_index_mapping"):
        for module in graph.module2node:
            if not isinstance(module, (nn.Conv2d, nn.Linear)):
                continue
            width = _width(module, "out")
            if len(seen.get(names[module], ())) == width:  # its group has been traced from a coupled module
                continue
            pruner = graph.get_pruner_of_module(module)
            for item in graph.get_pruning_group(module, pruner.prune_out_channels, list(range(width))):
                target = item.dep.target.module
                if target not in names:  # an operation without parameters
                    continue
                if not isinstance(target, (nn.Conv2d, nn.Linear, nn.Embedding, nn.GroupNorm)):
                    raise ValueError(f"{names[target]} is a {type(target).__name__}, which cannot be pruned")
                kind = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
                if kind == "out" and item.idxs == item.root_idxs:
                    seen.setdefault(names[target], set()).update(item.idxs)
                pairs.append((names[module], (names[target], kind), item.root_idxs, item.idxs))

    modules = {name: module for module, name in names.items()}
    found = {(root, "out") for root, *_ in pairs} | {place for _, place, *_ in pairs}
    places = sorted(found, key=lambda place: (order[place[0]], place[1]))
    offsets = np.cumsum([0, *(_width(modules[name], kind) for name, kind in places)])
    start = dict(zip(places, offsets))
    first = np.concatenate([start[root, "out"] + np.asarray(roots) for root, _, roots, _ in pairs])
    second = np.concatenate([start[place] + np.asarray(indices) for _, place, _, indices in pairs])
    labels = join(first, second, int(offsets[-1]))
    untouched = np.ones(int(offsets[-1]), dtype=bool)
    untouched[first] = untouched[second] = False
    return Components(places, offsets, np.where(untouched, -1, labels))
