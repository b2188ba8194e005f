"""Tracing of channels through a forward pass.

Every tensor of the forward gets a second tensor of the same shape with *labels*: integers that say which channel each value
belongs to. Operations act on both:

    reshape, permute, chunk, cat, ...     the same operation on the labels
    a + b, a * b, silu(a), ...            labels of the operands are equal: the channels live or die together
    linear, convolution, embedding        labels of the input equal those of the layer's inputs; the output gets the labels
                                          of the layer's outputs
    group norm                            labels of the input equal those of the norm, which are also those of the output
    attention                             labels of q, k and v are equal, head by head and channel by channel, for all tokens
    RMS norm of heads                     labels stay; the channels of a head go together, since the root mean square depends
                                          on each of them
    layer norm                            all labels are fixed, since the statistics depend on every channel

Inputs and outputs of the model and other tensors without labels, such as position embeddings, have the label `FIXED`. Channels
with an equal label are never pruned. Operations outside these lists raise an error. Numbers have no labels: a forward that
adds one to channels must multiply the sum by others, as in `x * (1 + scale)`, since removed channels would not be zero.

For example, GEGLU computes `value * gelu(gate)` with the halves of a linear layer of 2 n outputs: the product makes the labels
of rows i and i + n equal, and the linear layer that follows makes them equal to that of its input channel i.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..precision import usual_modes

__all__ = ["FIXED", "trace_labels"]

FIXED = 0
Place = tuple[str, str]  # module, and "in" or "out"
Pairs = tuple[np.ndarray, np.ndarray]

# Names of functions and methods without underscores at their ends: `__radd__` and `add_` are here as radd and add
RESHAPING = frozenset(
    {
        *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "unsqueeze", "squeeze", "expand"),
        *("chunk", "split", "unbind", "getitem", "cat", "concat", "stack", "repeat", "contiguous", "clone", "einsum"),
    }
)
ELEMENTWISE = frozenset(
    {
        *("add", "radd", "iadd", "sub", "rsub", "mul", "rmul", "imul", "div", "truediv", "rtruediv", "neg"),
        *("silu", "gelu", "relu", "mish", "sigmoid", "dropout", "to", "type", "float", "half", "detach"),
    }
)
# The spatial size changes; channels stay along dimension 1
RESIZING = frozenset({"interpolate", "pad", "avg_pool2d"})
LAYERS = {"linear": -1, "conv2d": 1}  # and the dimension of input channels


class _Labels(TorchFunctionMode):
    """Context in which labels follow the operations.

    Args:
        modules: Convolutions, linear layers, embeddings and group norms by name.
        starts: First label of each side of these layers.
    """

    def __init__(self, modules: Mapping[str, nn.Module], starts: Mapping[Place, int]) -> None:
        super().__init__()
        self.names = {id(module.weight): name for name, module in modules.items()}
        self.modules, self.starts = modules, starts
        self.equal: list[tuple[Tensor, Tensor]] = []
        self.together: list[tuple[Tensor, Tensor]] = []
        self.is_paused = False
        self.labels: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the tensor, which is kept so that its id stays unique

    def of(self, x: Tensor) -> Tensor:
        """Labels of a tensor."""
        return self.labels[id(x)][1] if id(x) in self.labels else torch.full((1,), FIXED).expand(x.shape)

    def fix(self, x: Tensor) -> None:
        """Fix all channels of a tensor."""
        labels = _without_repeats(self.of(x))[0].unique()
        self._join(labels, torch.full_like(labels, FIXED))

    def _join(self, first: Tensor, second: Tensor) -> None:
        first, second = _without_repeats(first, second)
        different = first != second
        self.equal.append((first[different], second[different]))

    def _channels(self, x: Tensor, dim: int) -> Tensor:
        """Labels along one dimension, with shape `(channels,)`; they must be the same at all positions and for all samples."""
        labels = _without_repeats(self.of(x), but=dim)[0].movedim(dim, 0).flatten(1)  # (channels, positions)
        if (labels != labels[:, :1]).any():
            raise ValueError(f"a layer mixes channels and positions in a tensor of shape {tuple(x.shape)}")
        return labels[:, 0]

    def _of_all_tokens(self, x: Tensor) -> Tensor:
        """Labels of one token of `(batch, heads, tokens, channels)`. Attention sums over tokens, so that those of all tokens
        are equal, such as tokens of an image and of its text that other layers write."""
        labels = _without_repeats(self.of(x))[0]
        differs = (labels[:, :, 1:] != labels[:, :, :-1]).any(dim=3).any(dim=1).any(dim=0)  # from the token before
        if differs.any():
            tokens = labels[:, :, 1:][:, :, differs]
            self._join(labels[:, :, :1].expand_as(tokens), tokens)
        return self.of(x)[:, :, :1]

    def normalize_heads(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Call an RMS norm of the channels of each head, `(batch, heads, tokens, channels)`. All heads have the same weights,
        so that a whole head may be removed."""
        if x.ndim != 4:
            raise ValueError(f"an RMS norm of a tensor of shape {tuple(x.shape)}, without heads, cannot be traced")
        self.is_paused = True
        try:
            result = forward(x)
            labels = _without_repeats(self.of(x), but=3)[0]
            self.together.append((labels[..., :1].expand_as(labels).flatten(), labels.flatten()))
            self.labels[id(result)] = (result, self.of(x))
        finally:
            self.is_paused = False
        return result

    def _side(self, weight: Tensor, side: str, width: int) -> Tensor:
        """Labels of one side of a layer, with shape `(width,)`."""
        if id(weight) not in self.names:
            raise ValueError(f"a weight of shape {tuple(weight.shape)} is used outside of its layer, which cannot be traced")
        return self.starts[self.names[id(weight)], side] + torch.arange(width)

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func)).strip("_")
        # A group norm keeps the shape, and on the meta device it takes a third of the forward's time
        if name == "group_norm":
            result = torch.empty_like(args[0] if args else kwargs["input"])
        else:
            result = func(*args, **kwargs)
        if self.is_paused:
            return result
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = result if isinstance(result, (tuple, list)) else [result]
        outputs = [x for x in outputs if isinstance(x, Tensor)]
        if outputs and (name in (*LAYERS, "embedding") or any(id(x) in self.labels for x in tensors)):
            labels = self._follow(name, func, args, kwargs, tensors, outputs[0])
            for x, label in zip(outputs, labels if isinstance(labels, (tuple, list)) else [labels]):
                self.labels[id(x)] = (x, label)
        return result

    def _follow(self, name: str, func: Callable, args: tuple, kwargs: dict, tensors: list[Tensor], out: Tensor) -> Any:
        """Labels of the outputs of a function."""
        if name in LAYERS:
            x, weight, dim = tensors[0], tensors[1], LAYERS[name]
            self._join(self._channels(x, dim), self._side(weight, "in", x.shape[dim]))
            return _along(self._side(weight, "out", out.shape[dim]), dim, out)
        if name == "embedding":
            return _along(self._side(tensors[1], "out", out.shape[-1]), -1, out)
        if name == "group_norm":
            norm = self._side(kwargs.get("weight", args[2] if len(args) > 2 else None), "out", out.shape[1])
            self._join(self._channels(tensors[0], 1), norm)
            return _along(norm, 1, out)
        if name == "layer_norm":
            self.fix(tensors[0])
            return self.of(tensors[0])
        if name == "scaled_dot_product_attention":
            heads = [self._of_all_tokens(x) for x in tensors[:3]]  # q, k, v, each (batch, heads, 1, channels)
            self._join(heads[0], heads[1])
            self._join(heads[0], heads[2])
            return heads[2].expand(out.shape)
        if name in RESHAPING:
            if name == "einsum" and (len(tensors) > 1 or out.numel() != tensors[0].numel()):
                raise ValueError("a product or sum by einsum cannot be traced")
            return func(*_mapped(self.of, args), **_mapped(self.of, kwargs))
        if name in ELEMENTWISE:
            operands = [self.of(x).expand(out.shape) for x in tensors if x.numel() > 1 or id(x) in self.labels]
            for other in operands[1:]:
                self._join(operands[0], other)
            return operands[0]
        if name in RESIZING:
            return _along(self._channels(tensors[0], 1), 1, out)
        raise ValueError(f"the operation {name} on channels cannot be traced")


def _along(labels: Tensor, dim: int, x: Tensor) -> Tensor:
    """Labels along one dimension, expanded to the shape of a tensor."""
    shape = [1] * x.ndim
    shape[dim] = -1
    return labels.view(shape).expand(x.shape)


def _without_repeats(*labels: Tensor, but: int | None = None) -> list[Tensor]:
    """Labels of equal shape without dimensions (but one) along which all are expanded, such as most positions."""
    ndim = labels[0].ndim
    whole = ndim if but is None else but % ndim
    index = tuple(slice(1 if dim != whole and all(x.stride(dim) == 0 for x in labels) else None) for dim in range(ndim))
    return [x[index] for x in labels]


def _mapped(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    """Nested arguments with all tensors replaced."""
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, dict):
        return {key: _mapped(function, value) for key, value in values.items()}
    if isinstance(values, (tuple, list)):
        return type(values)(_mapped(function, value) for value in values)
    return values


@usual_modes()
def trace_labels(
    model: nn.Module, forward: Callable[[], object], modules: Mapping[str, nn.Module], starts: Mapping[Place, int]
) -> tuple[Pairs, Pairs]:
    """Pairs of labels in a forward pass: those that are equal, and those of channels that are only removed together.

    Args:
        model: The model, on the meta device in evaluation mode.
        forward: Calls the model. Everything that the model returns is fixed.
        modules: Its convolutions, linear layers, embeddings and group norms, by name.
        starts: First label of each side of these layers, > 0, by `(name, "in" or "out")`. The label of channel `i` is
            `starts[place] + i`.

    Returns:
        Equal labels, then labels of channels that an RMS norm of heads ties together. For both: first and second label of
        each pair, each int64 with shape `(pairs,)`.

    Raises:
        ValueError: The forward has an operation that cannot be traced.
    """
    trace = _Labels(modules, starts)
    handle = model.register_forward_hook(lambda module, args, result: [*map(trace.fix, _tensors(result))] and None)
    norms = [module for module in model.modules() if type(module).__name__ == "RMSNorm"]  # Diffusers' or PyTorch's
    for norm in norms:
        norm.forward = functools.partial(trace.normalize_heads, norm.forward)
    try:
        with torch.no_grad(), trace:
            forward()
    finally:
        handle.remove()
        for norm in norms:
            del norm.forward
    return _pairs(trace.equal), _pairs(trace.together)


def _pairs(tensors: list[tuple[Tensor, Tensor]]) -> Pairs:
    none = torch.zeros(0, dtype=torch.long)
    first, second = (torch.cat([none, *ends]).numpy() for ends in (zip(*tensors) if tensors else ((), ())))
    return first, second


def _tensors(result: object) -> list[Tensor]:
    return [x for x in tree_leaves(result) if isinstance(x, Tensor)]
