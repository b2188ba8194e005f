"""Layer calls of a forward pass, with their workloads.

A workload is a layer without its widths: a 3x3 convolution over 16x16 positions, or a linear layer over 256 tokens. Layers
with the same workload and widths take the same time, so that one surface t(in, out) of measured times covers all of them. The
four kinds are convolutions, linear layers (also those of attention), norms with the SiLU that follows, and the two products of
attention with the softmax between them. Additions, concatenations and activations of the time embedding are not workloads.

The calls are recorded in one forward pass of a copy on the meta device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..families.lookup import family_of
from ..metrics.model_size import tokens_of_attention, trace_forward
from ..runtimes.forwards import Layer

__all__ = [
    "AttentionProducts",
    "Convolution",
    "CrossAttentionProducts",
    "Inputs",
    "LayerCall",
    "LinearLayer",
    "Norm",
    "Workload",
    "trace_layer_calls",
]


class Inputs:
    """Random inputs of layers in one shared buffer, since thousands of layers are timed.

    Args:
        batch: Batch size (>= 1).
        device: Device of the layers.
        dtype: Dtype of inputs and weights.
    """

    def __init__(self, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        self.batch = batch
        self.options = {"device": device, "dtype": dtype}
        self._memory = torch.empty(0, **self.options)

    def values(self, *shape: int) -> Tensor:
        """Normal random values with shape `(batch, *shape)`. They are shared and must not be modified."""
        count = self.batch * math.prod(shape)
        if count > len(self._memory):
            self._memory = torch.randn(count, **self.options)
        return self._memory[:count].view(self.batch, *shape)


class _Transposed(nn.Module):
    """(batch, features, tokens) -> (batch, tokens, features)"""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class _Products(nn.Module):
    """Products of attention on queries and keys of shape `(batch, tokens, heads, width)`. Values are the keys."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Convolution:
    """An `nn.Conv2d` with `groups=1`.

    Attributes:
        side: Height and width of the input in pixels.
        kernel: Height and width of the kernel.
        stride: Vertical and horizontal stride.
        padding: Vertical and horizontal padding.
        bias: Whether the layer has a bias.
    """

    side: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    bias: bool

    two_sided = True

    def layer(self, wide_in: int, wide_out: int, inputs: Inputs) -> Layer:
        """A layer with random weights, from `wide_in` to `wide_out` channels."""
        module = nn.Conv2d(wide_in, wide_out, self.kernel, self.stride, self.padding, bias=self.bias, **inputs.options)
        return Layer(module, (inputs.values(wide_in, *self.side),))


@dataclass(frozen=True)
class LinearLayer:
    """An `nn.Linear`.

    Attributes:
        tokens: Number of tokens per sample; 0 if the input has shape `(batch, features)`.
        transposed: Whether features come before tokens in memory, which requires a copy.
        bias: Whether the layer has a bias.
    """

    tokens: int
    transposed: bool
    bias: bool

    two_sided = True

    def layer(self, wide_in: int, wide_out: int, inputs: Inputs) -> Layer:
        """A layer with random weights, from `wide_in` to `wide_out` features."""
        module = nn.Linear(wide_in, wide_out, bias=self.bias, **inputs.options)
        if self.transposed:
            return Layer(nn.Sequential(_Transposed(), module), (inputs.values(wide_in, self.tokens),))
        return Layer(module, (inputs.values(self.tokens, wide_in) if self.tokens else inputs.values(wide_in),))


@dataclass(frozen=True)
class Norm:
    """An `nn.GroupNorm`, whose groups keep their size when channels are pruned.

    Attributes:
        shape: Shape of the input without batch and channels: `(height, width)`, or `(tokens,)`.
        group_size: Number of channels per group.
        silu: Whether a SiLU follows.
    """

    shape: tuple[int, ...]
    group_size: int
    silu: bool

    two_sided = False

    def layer(self, wide_in: int, wide_out: int, inputs: Inputs) -> Layer:
        """A layer with the multiple of the group size nearest to `wide_out` channels; `wide_in` is not used."""
        groups = max(1, round(wide_out / self.group_size))
        module = nn.GroupNorm(groups, groups * self.group_size, **inputs.options)
        x = inputs.values(groups * self.group_size, *self.shape)
        return Layer(nn.Sequential(module, nn.SiLU()) if self.silu else module, (x,))


@dataclass(frozen=True)
class AttentionProducts:
    """softmax(q k^T / sqrt(d)) v between the linear layers of an attention.

    Attributes:
        tokens: Number of tokens per sample.
        heads: Number of heads; with fewer channels, heads are narrower.
    """

    tokens: int
    heads: int

    two_sided = False

    @property
    def key_tokens(self) -> int:
        """Number of tokens of keys and values."""
        return self.tokens

    def layer(self, wide_in: int, wide_out: int, inputs: Inputs) -> Layer:
        """Products with `wide_out` channels in all heads together, at least one per head; `wide_in` is not used."""
        width = max(1, round(wide_out / self.heads))
        q, k = (inputs.values(tokens, self.heads, width) for tokens in (self.tokens, self.key_tokens))
        return Layer(_Products(), (q, k))


@dataclass(frozen=True)
class CrossAttentionProducts(AttentionProducts):
    """`AttentionProducts` with keys and values of other tokens.

    Attributes:
        keys: Number of these tokens per sample.
    """

    keys: int

    @property
    def key_tokens(self) -> int:
        return self.keys


Workload = Convolution | LinearLayer | Norm | AttentionProducts


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer in a forward pass.

    Attributes:
        module: Name of the module whose weight has the widths: output channels along dimension 0, and input channels along
            dimension 1 if the workload is two-sided. For the products of attention, it is `to_q`.
        workload: The workload.
        wide_in: Number of input channels in the dense model; 0 if the workload is not two-sided.
        wide_out: Number of output channels in the dense model.
        positions: Number of output pixels or tokens per sample.
    """

    module: str
    workload: Workload
    wide_in: int
    wide_out: int
    positions: int


def trace_layer_calls(unet: nn.Module, sample_size: int | tuple[int, int] | None = None) -> list[LayerCall]:
    """Record the layer calls of one forward pass, in order.

    Args:
        unet: A model of any family; only its configuration is read.
        sample_size: Height and width in pixels (default: the model's).
    """
    attentions = family_of(unet).attentions(unet)
    calls: list[LayerCall] = []
    last_norm: dict = {"shape": None}

    def record(name: str, module: nn.Module, x: Tensor | None, output) -> None:
        if isinstance(module, nn.Conv2d):
            work = Convolution(tuple(x.shape[2:]), module.kernel_size, module.stride, module.padding, module.bias is not None)
            calls.append(LayerCall(name, work, module.in_channels, module.out_channels, output[0, 0].numel()))
        elif isinstance(module, nn.Linear):
            tokens = x.shape[1] if x.ndim == 3 else 0
            work = LinearLayer(tokens, not x.is_contiguous(), module.bias is not None)
            calls.append(LayerCall(name, work, module.in_features, module.out_features, max(tokens, 1)))
        elif isinstance(module, nn.GroupNorm):
            work = Norm(tuple(x.shape[2:]), module.num_channels // module.num_groups, silu=False)
            calls.append(LayerCall(name, work, 0, module.num_channels, x[0, 0].numel()))
            last_norm.update(shape=x.shape, index=len(calls) - 1)
        elif isinstance(module, nn.SiLU) and x.shape == last_norm["shape"]:
            # Scale and shift by the time embedding may come in between
            norm = calls[last_norm["index"]]
            calls[last_norm["index"]] = replace(norm, workload=replace(norm.workload, silu=True))
            last_norm["shape"] = None
        elif name in attentions:
            tokens, keys = tokens_of_attention(name, {call.module: call.positions for call in calls})
            kind, more = (AttentionProducts, ()) if keys == tokens else (CrossAttentionProducts, (keys,))
            work = kind(tokens, module.heads, *more)
            calls.append(LayerCall(f"{name}.to_q", work, 0, module.to_q.out_features, tokens))

    trace_forward(unet, sample_size, record)
    return calls
