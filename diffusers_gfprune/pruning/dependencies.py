"""Dependencies between the channels of a model.

A channel of a module is an *element* (module, side, index), with side `"out"` for outputs of the module and `"in"` for its
inputs. Two elements depend on each other if one cannot be removed without the other. `trace_components` returns the classes
of this relation: each class is one channel of the network, with all of its places.

Dependencies are traced in one forward pass (`tracing`), as in DepGraph (Fang et al., CVPR 2023,
https://arxiv.org/abs/2301.12900) but channel by channel. It runs on a copy on the meta device, takes a few seconds at
most for models of any size, and does not depend on the model's device, dtype or hooks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn

from ..families.base import Family
from ..families.lookup import family_of
from .tracing import FIXED, trace_labels

__all__ = ["MASKS_MODULE", "Components", "check_unhooked", "check_unmasked", "join", "meta_twin", "trace_components"]

LAYERS = (nn.Conv2d, nn.Linear, nn.Embedding, nn.GroupNorm)  # with prunable channels
MASKS_MODULE = "channel_masks"  # of a masked model (`masking`)


# --- a copy on the meta device -----------------------------------------------------------------------------------------


def _settings(module: nn.Module | None) -> dict[str, object]:
    """Settings of a module besides its parameters: its class, heads, groups, eps, strides, ..."""
    # What may be changed after loading; rates of dropout are carried over at compaction
    states = ("training", "gradient_checkpointing", "dropout_prob")
    public = {} if module is None else {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in states}
    plain = {key: value for key, value in public.items() if isinstance(value, (bool, int, float, str, tuple))}
    return {"__class__": type(module).__name__, **plain}


def _check_settings(name: str, settings: dict, expected: dict) -> None:
    """Check a module against the configuration, from which the pruned model is built."""
    for key, value in expected.items():
        if settings.get(key) != value:
            raise ValueError(f"the model does not match its config: {name}.{key}={settings.get(key)!r} must be {value!r}")


def check_unmasked(unet: nn.Module) -> None:
    """Check that a model has no masks.

    Raises:
        ValueError: It has masks, of a `GradientFlowPruner` that was made before.
    """
    if hasattr(unet, MASKS_MODULE):
        raise ValueError("the model already has channel masks: detach() its GradientFlowPruner, or load the model again")


def check_unhooked(model: nn.Module, title: str = "the model") -> None:
    """Check that a model has no hooks of Diffusers: they move or cast weights, or skip layers, and most cannot be copied.

    Args:
        model: The model.
        title: What it is called in the error.

    Raises:
        ValueError: It has hooks, such as those of `enable_group_offload` and `enable_layerwise_casting`.
    """
    for name, module in model.named_modules():
        if hooks := getattr(getattr(module, "_diffusers_hook", None), "hooks", None):
            where = f"{', '.join(hooks)} of {name or 'the whole model'}"
            raise ValueError(f"{title} has hooks of Diffusers ({where}): load it again without them")  # most have no way back


def meta_twin(unet: nn.Module) -> nn.Module:
    """A model with the same configuration on the meta device.

    Raises:
        ValueError: The model is of an unknown family, is already masked or pruned, has hooks or a block that cannot be pruned,
            or does not match its configuration.
    """
    check_unmasked(unet)
    family = family_of(unet)
    if family.is_pruned(unet):
        raise ValueError(
            f"the model is already pruned ({type(unet).__name__}): prune the dense model to the smaller budget instead"
        )
    theirs = {name: tuple(p.shape) for name, p in unet.named_parameters()}
    if getattr(unet, "peft_config", None) or any(".base_layer." in name for name in theirs):
        names = ", ".join(getattr(unet, "peft_config", None) or ()) or "without a name"
        remedy = "merge them, and load the result into a model without adapters"
        if hasattr(unet, "unload_lora"):
            remedy = "call unload_lora(), after fuse_lora() to keep their effect; of a pipeline, fuse_lora() and "
            remedy += "unload_lora_weights()"
        raise ValueError(f"the model has adapters ({names}): {remedy}")
    if small := [name for name, p in unet.named_parameters() if p.is_floating_point() and p.itemsize < 2]:
        raise ValueError(
            f"{small[0]} is {unet.get_parameter(small[0]).dtype}: load the model without layerwise casting to prune it"
        )
    check_unhooked(unet)
    family.check_supported(unet.config)
    # The pruned class checks these again at compaction
    family.check_arguments({name: value for name, value in unet.config.items() if not name.startswith("_")})
    with torch.device("meta"):
        twin = family.dense_class.from_config(unet.config)
    for name, parameter in twin.named_parameters():
        if theirs.pop(name, None) != tuple(parameter.shape):
            raise ValueError(f"the model does not match its config: {name} must have shape {tuple(parameter.shape)}")
    if theirs:
        first = next(iter(theirs))
        remedy = ": load it again without fuse_qkv_projections()" if re.search(r"\.to_(added_)?(qkv|kv)\.", first) else ""
        raise ValueError(f"the model does not match its config: it has an additional parameter {first}{remedy}")
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
        offsets: First element of each place; element `offsets[p] + i` is channel `i` at place `p`. Element `FIXED` stands for
            everything that is never pruned, such as the model's inputs and outputs.
        labels: Network channel of each element, int64 with shape `(elements,)`; -1 for none.
        together: Pairs of elements whose channels are different, but only removed together: first and second element of each,
            int64 with shape `(pairs,)`.
    """

    places: list[tuple[str, str]]
    offsets: np.ndarray
    labels: np.ndarray
    together: tuple[np.ndarray, np.ndarray]

    @property
    def fixed(self) -> int:
        """Label of all channels that are never pruned."""
        return int(self.labels[FIXED])

    def at(self, place: tuple[str, str]) -> np.ndarray:
        """Labels of the channels at one place, in order, with shape `(channels,)`."""
        index = self.places.index(place)
        return self.labels[self.offsets[index] : self.offsets[index + 1]]

    def split(self) -> list[tuple[tuple[int, ...], np.ndarray, np.ndarray]]:
        """Prunable channels of the network, split by their places.

        Returns:
            For all channels with the same places, in the order of the smallest label: the places, in the order of `places`,
            one of them several times if a channel occurs there several times; the label of each channel, with shape
            `(channels,)`; and its index at each place, with shape `(channels, places)`.
        """
        known = np.flatnonzero((self.labels >= 0) & (self.labels != self.fixed))
        order = known[np.argsort(self.labels[known], kind="stable")]
        place_of = np.searchsorted(self.offsets, order, side="right") - 1
        index_of = order - self.offsets[place_of]
        labels, starts, counts = np.unique(self.labels[order], return_index=True, return_counts=True)
        # The sum of random numbers of its places identifies the places of a channel
        numbers = np.random.default_rng(0).integers(2**63, size=len(self.places), dtype=np.uint64)
        sums = np.add.reduceat(numbers[place_of], starts)
        parts = []
        _, first, kind = np.unique(sums, return_index=True, return_inverse=True)
        members = np.split(np.argsort(kind, kind="stable"), np.cumsum(np.bincount(kind))[:-1])
        for one in np.argsort(first):
            channels = members[one]
            elements = starts[channels][:, None] + np.arange(counts[channels[0]])  # (channels, places)
            parts.append((tuple(place_of[elements[0]].tolist()), labels[channels], index_of[elements]))
        return parts


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
        ValueError: The model has an operation that cannot be traced.
    """
    modules = {name: module for name, module in twin.named_modules() if isinstance(module, LAYERS)}
    both = (nn.Conv2d, nn.Linear)  # the others have one side
    places = [(name, side) for name, layer in modules.items() for side in ("in", "out")[not isinstance(layer, both) :]]
    offsets = np.cumsum([FIXED + 1, *(_width(modules[name], side) for name, side in places)])
    inputs = family.example_inputs(twin, *family.tracing_size(twin.config), device="meta")
    twin.eval()
    starts = dict(zip(places, offsets.tolist()))
    (first, second), together = trace_labels(twin, lambda: family.predict(twin, inputs), modules, starts)
    for name in family.never_pruned & modules.keys():
        kept = offsets[places.index((name, "out"))] + np.arange(_width(modules[name], "out"))
        first, second = np.append(first, kept), np.append(second, np.full_like(kept, FIXED))
    labels = join(first, second, int(offsets[-1]))
    untouched = np.ones(int(offsets[-1]), dtype=bool)
    untouched[first] = untouched[second] = False
    return Components(places, offsets, np.where(untouched, -1, labels), together)
