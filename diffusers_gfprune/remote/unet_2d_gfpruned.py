"""GFPrunedUNet2DModel: a `UNet2DModel` whose layers have the widths that pruning left.

The configuration is that of the dense model plus three tables, so that `from_pretrained` builds the small model straight
from `config.json`:

    layer_channels     {"down_blocks.0.resnets.0.conv1": [48, 21], ...}    input and output channels of a layer
    norm_group_sizes   {"down_blocks.0.resnets.0.norm2": [3, 2, 4, ...]}   channels in each norm group
    attention_heads    {"down_blocks.1.attentions.0": 3}                   heads that are left

A layer that a table does not name is as wide as in the dense model. Pruned norm groups may differ in size, because a kept
channel stays in the group it was trained in; for weights `W[c, g] = 1 / size_g` (channel `c` in group `g`)

    mean_g = sum_c W[c, g] mean_c        var_g = sum_c W[c, g] (var_c + (mean_c - mean_g)^2)        (law of total variance)
    y_c = gamma_c (x_c - mean_g) / sqrt(var_g + eps) + beta_c                                       (Wu and He, 2018)

which is group normalization (https://arxiv.org/abs/1803.08494) with groups of any size, and, with other weights, over a
masked set of channels. On a GPU, where every small operation costs as much as a large one, Triton kernels take one launch for
what takes a dozen elsewhere.

This one file is the whole model: it travels inside saved folders as `diffusers_gfprune.py`, and imports nothing but the
standard library, torch and Diffusers (and Triton, where torch brought it).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import logging
import math
import os
import pathlib
import reprlib
import shutil
import typing
from collections.abc import Mapping, Sequence

import diffusers
import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import GaussianFourierProjection
from diffusers.models.model_loading_utils import load_state_dict
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

try:  # by name: Diffusers complains of a file that has an import statement of a package that is not there
    triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
except Exception:  # of any type: it may be there, and broken
    triton = tl = None

logger = logging.getLogger(__name__)

__all__ = ["GFPrunedUNet2DModel", "RaggedGroupNorm", "norm_tables", "weighted_group_norm"]

MODULE_FILE = "diffusers_gfprune.py"
MAX_WIDTH = 2**16  # channels of a layer: refuses a hostile config before anything is allocated
MAX_LAYERS_PER_BLOCK = 64
MAX_LAYERS = 256  # of all blocks on the way down
MAX_PARAMETERS = 2**33
MAX_SIDE = 2**14  # pixels of an image
MAX_SAMPLE_VALUES = 2**30  # of an image, in all


# --- group normalization with weighted channels ------------------------------------------------------------------------


def _normalize(x: Tensor, weights: Tensor, membership: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """The equations of the module docstring as plain, differentiable operations; `x` has shape `(B, C, N)`."""
    mean, var = x.mean(dim=2), x.var(dim=2, correction=0)  # (B, C)
    group_mean, _, inverse_std = _group_statistics(mean, var + eps, weights, membership, eps)
    scale = gamma * inverse_std
    return torch.addcmul((beta - group_mean * scale)[:, :, None], x, scale[:, :, None])


def _group_statistics(mean, var_eps, weights, membership, eps):
    """From means and variances + eps of channels, `(B, C)`: the mean of their groups, their distance from it, and 1/std of
    their groups."""
    members = membership.t()
    group_mean = _product(_product(mean, weights), members)  # (B, G), then each channel gets its group's
    offset = mean - group_mean
    # Weights of a group sum to 1, so that eps comes along; to 0 in one that is masked whole, which nobody reads
    group_var_eps = _product(torch.addcmul(var_eps, offset, offset), weights).clamp_min(eps / 2)
    return group_mean, offset, _product(group_var_eps.rsqrt(), members)


def _product(values: Tensor, table: Tensor) -> Tensor:
    """`values @ table`, which a compiler gets in a form that it fuses with what is around it, in place of four calls of a
    library in every norm."""
    return (values[:, :, None] * table).sum(dim=1) if torch.compiler.is_compiling() else values @ table


def norm_forward(x, weights, group_sizes, gamma, beta, eps):
    """`_normalize` in two passes over `x`, and the statistics `(B, C)`: mean and 1/std of channels (or others, from which
    `channel_sums` may start as well), scale, mean and 1/std of their groups."""
    if _has_kernels(x):
        return _launch_forward(x, weights, group_sizes, gamma, beta, eps)
    membership = _membership(group_sizes, weights)
    batch, channels, positions = x.shape
    # Instance statistics by the native kernel: Welford, vectorized; torch.var_mean is many times slower on CPU.
    normalized, mean, rstd = torch.native_group_norm(x, None, None, batch, channels, positions, channels, eps)
    mean, rstd = mean.view(batch, channels), rstd.view(batch, channels)
    group_mean, offset, inverse_std = _group_statistics(mean, rstd.pow(-2), weights, membership, eps)
    scale = gamma * inverse_std
    # From (x - mean) * rstd to (x - mean_g) * scale + beta, in place: that tensor is in the cache, and nobody else's.
    # Kernels with one broadcast operand are vectorized, those with two are not.
    shift = torch.addcmul(beta, offset, scale)
    output = normalized.mul_((scale / rstd)[:, :, None]).add_(shift[:, :, None])
    return output, (mean, rstd, scale, group_mean, inverse_std)


def channel_sums(grad, x, mean, rstd, group_mean):
    """Sums of `grad` and of `grad * (x - group_mean)` over positions, each `(B, C)`, in one pass."""
    batch, channels, positions = x.shape
    rows = batch * channels
    # The native kernel takes samples and channels together for the channels of a single sample. Its sums do not depend on
    # gamma, but older PyTorch (2.11 is one) takes their shape and device from it.
    _, grad_x_sum, grad_sum = torch.ops.aten.native_group_norm_backward(
        *(grad.to(rstd.dtype), x.to(rstd.dtype), mean.view(1, rows), rstd.view(1, rows), rstd.view(rows)),
        *(1, rows, positions, rows, [False, True, True]),
    )
    grad_sum = grad_sum.view(batch, channels)
    return grad_sum, torch.addcmul(grad_x_sum.view(batch, channels) / rstd, mean - group_mean, grad_sum)


def norm_backward(grad, x, weights, group_sizes, gamma, mean, rstd, scale, group_mean, inverse_std):
    """Gradients of `x`, `gamma` and `beta`; those of the latter for each sample, too, `(B, C)`. That of `x` is an affine
    function of `grad` and `x` with coefficients per channel, dx = g * scale + x * p + q."""
    if _has_kernels(x):
        dx, sums = _launch_backward(grad, x, weights, group_sizes, scale, group_mean, inverse_std)
        return dx, *sums.sum(dim=1), *sums
    membership = _membership(group_sizes, weights)
    grad_sum, centred = channel_sums(grad, x, mean, rstd, group_mean)
    # d loss / d mean_g and d loss / d var_g, and from there to the channels that each statistic is made of
    d_both = torch.cat([centred * scale * inverse_std.square(), scale * grad_sum])  # (2 B, C)
    p, q = ((d_both @ membership) @ weights.t()).mul_(-1 / x.shape[2]).chunk(2)  # p: coefficient of (x - mean_g)
    q = torch.addcmul(q, p, group_mean, value=-1)
    dx = torch.mul(x, p[:, :, None]).add_(q[:, :, None]).addcmul_(grad, scale[:, :, None])
    normalized = centred * inverse_std
    return dx, normalized.sum(dim=0), grad_sum.sum(dim=0), normalized, grad_sum


# --- the same in one launch, on a GPU ----------------------------------------------------------------------------------

# A program has one group of one sample, whose channels lie side by side in memory, and goes over it tile by tile, a few times:
# it is in the cache.


def _kernel(**options):
    """`triton.jit`, where it can."""

    def decorate(function):
        try:
            return function if triton is None else triton.jit(**options)(function)
        except OSError:  # no source file
            return function

    return decorate


@_kernel()
def _tile(row, c, end, offset, positions, TILE_N: tl.constexpr):
    """Places in memory of channels `c` at positions from `offset` on, and which of them are in the group."""
    n = offset + tl.arange(0, TILE_N)
    return (row + c)[:, None] * positions + n[None, :], (c < end)[:, None] & (n < positions)[None, :]


@_kernel(do_not_specialize=["channels", "groups"])  # for fewer variants of it: one for each size of images, not of layers
def _forward_kernel(
    x_ptr, y_ptr, weights_ptr, first_ptr, gamma_ptr, beta_ptr, scale_ptr, mean_ptr, inverse_ptr,
    eps, channels, groups, positions, TILE_C: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """`norm_forward`: mean, then variance around it, then the output."""
    sample, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    row = sample.to(tl.int64) * channels
    first, end = tl.load(first_ptr + group), tl.load(first_ptr + group + 1)
    total = tl.zeros([TILE_C, TILE_N], weights_ptr.dtype.element_ty)
    weight_sum = tl.zeros([TILE_C], weights_ptr.dtype.element_ty)
    for start in range(first, end, TILE_C):
        c = start + tl.arange(0, TILE_C)
        weight = tl.load(weights_ptr + c * groups + group, mask=c < end, other=0.0)
        weight_sum += weight
        for offset in range(0, positions, TILE_N):
            at, inside = _tile(row, c, end, offset, positions, TILE_N)
            total += tl.load(x_ptr + at, mask=inside, other=0.0).to(total.dtype) * weight[:, None]
    mean = tl.sum(total) / positions
    total = tl.zeros([TILE_C, TILE_N], weights_ptr.dtype.element_ty)
    for start in range(first, end, TILE_C):
        c = start + tl.arange(0, TILE_C)
        weight = tl.load(weights_ptr + c * groups + group, mask=c < end, other=0.0)
        for offset in range(0, positions, TILE_N):
            at, inside = _tile(row, c, end, offset, positions, TILE_N)
            distance = tl.where(inside, tl.load(x_ptr + at, mask=inside, other=0.0).to(total.dtype) - mean, 0.0)
            total += distance * distance * weight[:, None]
    variance = tl.sum(total) / positions + eps * tl.sum(weight_sum)  # as in _group_statistics
    inverse_std = 1 / tl.sqrt(tl.maximum(variance, eps / 2, propagate_nan=tl.PropagateNan.ALL))
    for start in range(first, end, TILE_C):
        c = start + tl.arange(0, TILE_C)
        scale = tl.load(gamma_ptr + c, mask=c < end, other=0.0).to(total.dtype) * inverse_std
        beta = tl.load(beta_ptr + c, mask=c < end, other=0.0).to(total.dtype)
        tl.store(scale_ptr + row + c, scale, mask=c < end)
        tl.store(mean_ptr + row + c, tl.zeros_like(scale) + mean, mask=c < end)
        tl.store(inverse_ptr + row + c, tl.zeros_like(scale) + inverse_std, mask=c < end)
        for offset in range(0, positions, TILE_N):
            at, inside = _tile(row, c, end, offset, positions, TILE_N)
            value = tl.load(x_ptr + at, mask=inside, other=0.0).to(total.dtype)
            tl.store(y_ptr + at, (value - mean) * scale[:, None] + beta[:, None], mask=inside)


@_kernel(do_not_specialize=["channels", "groups"])
def _backward_kernel(
    grad_ptr, x_ptr, dx_ptr, weights_ptr, first_ptr, scale_ptr, mean_ptr, inverse_ptr, d_gamma_ptr, d_beta_ptr,
    channels, groups, positions, TILE_C: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """`norm_backward`: sums over each channel, and of these over the group, then the gradient of `x`."""
    sample, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    row = sample.to(tl.int64) * channels
    first, end = tl.load(first_ptr + group), tl.load(first_ptr + group + 1)
    mean, inverse_std = tl.load(mean_ptr + row + first), tl.load(inverse_ptr + row + first)
    d_mean = tl.zeros([TILE_C], weights_ptr.dtype.element_ty)  # of the loss by the mean of the group, and by its variance
    d_variance = tl.zeros([TILE_C], weights_ptr.dtype.element_ty)
    for start in range(first, end, TILE_C):
        c = start + tl.arange(0, TILE_C)
        plain = tl.zeros([TILE_C, TILE_N], weights_ptr.dtype.element_ty)
        centred = tl.zeros([TILE_C, TILE_N], weights_ptr.dtype.element_ty)
        for offset in range(0, positions, TILE_N):
            at, inside = _tile(row, c, end, offset, positions, TILE_N)
            grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(plain.dtype)
            plain += grad
            centred += grad * (tl.load(x_ptr + at, mask=inside, other=0.0).to(plain.dtype) - mean)
        scale = tl.load(scale_ptr + row + c, mask=c < end, other=0.0)
        d_gamma, d_beta = tl.sum(centred, axis=1) * inverse_std, tl.sum(plain, axis=1)
        tl.store(d_gamma_ptr + row + c, d_gamma, mask=c < end)
        tl.store(d_beta_ptr + row + c, d_beta, mask=c < end)
        d_mean += scale * d_beta
        d_variance += scale * d_gamma
    by_mean = tl.sum(d_mean) / positions
    by_variance = tl.sum(d_variance) * inverse_std / positions
    for start in range(first, end, TILE_C):
        c = start + tl.arange(0, TILE_C)
        weight = tl.load(weights_ptr + c * groups + group, mask=c < end, other=0.0)
        scale = tl.load(scale_ptr + row + c, mask=c < end, other=0.0)
        for offset in range(0, positions, TILE_N):
            at, inside = _tile(row, c, end, offset, positions, TILE_N)
            grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(d_mean.dtype)
            distance = tl.load(x_ptr + at, mask=inside, other=0.0).to(d_mean.dtype) - mean
            dx = grad * scale[:, None] - weight[:, None] * (by_mean + distance * by_variance)
            tl.store(dx_ptr + at, dx, mask=inside)


def _launch(kernel, x: Tensor, groups: int, *arguments) -> None:
    batch, channels, positions = x.shape
    tile_n = min(triton.next_power_of_2(positions), 1024)
    tile_c = min(2048 // tile_n, 16)
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()  # Triton launches on the current device
    with torch.cuda.device(x.device) if elsewhere else contextlib.nullcontext():
        kernel[(batch * groups,)](*arguments, channels, groups, positions, TILE_C=tile_c, TILE_N=tile_n)


def _launch_forward(x, weights, group_sizes, gamma, beta, eps):
    """`norm_forward`. Half precision is read as it is; statistics are of the dtype of `weights`."""
    output, first = torch.empty_like(x), _first_channels(group_sizes, x.device)
    scale, mean, inverse_std = weights.new_empty(3, *x.shape[:2])
    tensors = x, output, weights.contiguous(), first, gamma.contiguous(), beta.contiguous(), scale, mean, inverse_std
    _launch(_forward_kernel, x, len(group_sizes), *tensors, eps)
    return output, (mean, inverse_std, scale, mean, inverse_std)  # any mean and 1/std serve channel_sums


def _launch_backward(grad, x, weights, group_sizes, scale, group_mean, inverse_std):
    """The gradient of `x`, and those of `gamma` and `beta` for each sample, `(2, B, C)`."""
    dx, first, sums = torch.empty_like(x), _first_channels(group_sizes, x.device), scale.new_empty(2, *scale.shape)
    _launch(
        *(_backward_kernel, x, len(group_sizes)),
        *(grad, x, dx, weights.contiguous(), first, scale, group_mean, inverse_std, *sums),
    )
    return dx, sums


@functools.lru_cache
def _kernels_work(device: torch.device, dtype: torch.dtype) -> bool:
    """Tried once: Triton wants a C compiler, and a card that is not too old for it and for the dtype."""
    if triton is None:
        return False
    x, ones = torch.zeros(1, 1, 1, device=device, dtype=dtype), torch.ones(1, 1, device=device)
    try:
        _, (*_, scale, mean, inverse_std) = _launch_forward(x, ones, (1,), ones[0], ones[0], 1e-5)
        _launch_backward(x, x, ones, (1,), scale, mean, inverse_std)
    except Exception as error:  # of many types: of Triton, of the C compiler, of the driver
        logger.warning(f"Triton does not work on {device} with {dtype}; norms of pruned models are slower without it: {error}")
        return False
    return True


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and type(x) is Tensor and _kernels_work(x.device, x.dtype)


class _WeightedGroupNorm(torch.autograd.Function):
    """`_normalize` with few passes over `x`: autograd would keep and re-read five tensors of its size."""

    @staticmethod
    def forward(ctx, x, weights, group_sizes, gamma, beta, eps):
        output, statistics = norm_forward(x, weights, group_sizes, gamma, beta, eps)
        ctx.save_for_backward(x, weights, gamma, *statistics, beta)
        ctx.group_sizes, ctx.eps = group_sizes, eps
        return output

    @staticmethod
    def backward(ctx, grad):
        x, weights, gamma, *statistics, beta = ctx.saved_tensors
        if torch.is_grad_enabled():  # a double backward: let autograd differentiate the plain form
            membership = _membership(ctx.group_sizes, weights)
            needed = ctx.needs_input_grad
            wanted = [t for t, need in ((x, needed[0]), (gamma, needed[3]), (beta, needed[4])) if need]
            y = _normalize(x.to(gamma.dtype), weights, membership, gamma, beta, ctx.eps).to(x.dtype)
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            return tuple(next(found) if need else None for need in needed)
        dx, dgamma, dbeta, *_ = norm_backward(grad.contiguous(), x, weights, ctx.group_sizes, gamma, *statistics)
        return dx, None, None, dgamma, dbeta, None


def weighted_group_norm(
    x: Tensor,
    weights: Tensor,
    group_sizes: tuple[int, ...],
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    function=_WeightedGroupNorm,
) -> Tensor:
    """Group normalization whose statistics weigh channels (see the module docstring).

    Args:
        x: Input with shape `(batch, channels, *)`, any floating dtype; statistics are taken in float32.
        weights: Weights of channels in groups with shape `(channels, groups)`, float32; the column of a group sums to 1,
            or to 0 where all of its channels are masked, and is 0 outside of the group.
        group_sizes: Channels in each group, in order (each >= 1).
        gamma: Scale with shape `(channels,)`.
        beta: Shift with shape `(channels,)`.
        eps: Added to the variance (> 0).
        function: The autograd function that computes it where gradients are wanted.

    Returns:
        The normalized tensor, of the shape and dtype of `x`.

    Raises:
        ValueError: Channels or groups of the arguments differ, or they are not on one device.
    """
    channels = x.shape[1]
    if not channels == len(gamma) == len(beta) == sum(group_sizes) or weights.shape != (channels, len(group_sizes)):
        raise ValueError(
            f"group_sizes={group_sizes} must be those of the {channels} channels of x, got weights of shape "
            f"{tuple(weights.shape)}, {len(gamma)} values of gamma and {len(beta)} of beta"
        )
    if not x.device == weights.device == gamma.device == beta.device:
        raise ValueError(f"x is on {x.device}, which is not where all of weights, gamma and beta are: {gamma.device}")
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):  # the small matrix products must not run in half precision
            return weighted_group_norm(x, weights, group_sizes, gamma, beta, eps, function)
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    weights, kernels = weights.to(dtype), not torch.compiler.is_compiling() and _has_kernels(x)
    if not kernels or torch.is_grad_enabled():
        gamma, beta = gamma.to(dtype), beta.to(dtype)
    # A compiler fuses the plain form by itself, whatever the memory format; native kernels refuse an empty batch
    if torch.compiler.is_compiling() or x.numel() == 0:
        output = _normalize(x.flatten(2).to(dtype), weights, _membership(group_sizes, weights), gamma, beta, eps)
        return output.to(x.dtype).view(x.shape)
    flat = x.flatten(2).to(x.dtype if kernels else dtype).contiguous()
    if torch.is_grad_enabled():
        output = function.apply(flat, weights, group_sizes, gamma, beta, eps)
    else:
        output = norm_forward(flat, weights, group_sizes, gamma, beta, eps)[0]
    return output.to(x.dtype).view(x.shape)


@functools.lru_cache(maxsize=4096)
def _norm_tables(group_sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # or training after sampling would meet an inference tensor
        sizes = torch.tensor(group_sizes, device=device)
        groups = torch.arange(len(group_sizes), device=device)
        group_of = groups.repeat_interleave(sizes, output_size=sum(group_sizes))
        membership = (group_of[:, None] == groups).float()
        return membership, membership / sizes


@torch.compiler.assume_constant_result  # or compiled models would make the tables in every forward
def norm_tables(group_sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which channel is in which norm group, and its weight there if all count alike.

    Cached tables, not buffers of the modules: a buffer that is not saved stays on the meta device when weights are loaded
    into an empty model.

    Returns:
        1 where a channel is in a group, else 0, and `weights` of `weighted_group_norm`, each with shape `(channels, groups)`,
        float32.
    """
    # While a model is exported, tensors are fakes, and while it is traced, parts of a graph: they must not be kept
    watched = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return (_norm_tables.__wrapped__ if watched else _norm_tables)(group_sizes, device)


def _membership(group_sizes: tuple[int, ...], weights: Tensor) -> Tensor:
    return norm_tables(group_sizes, weights.device)[0].to(weights.dtype)


@functools.lru_cache(maxsize=4096)
def _first_channels(group_sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each group begins, and where the last ends, with shape `(groups + 1,)`, int32."""
    with torch.inference_mode(False):
        return torch.tensor([0, *group_sizes], device=device).cumsum(0).int()


class RaggedGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` whose groups may differ in size.

    Args:
        group_sizes: Channels in each group, in order (each >= 1).
        eps: Added to the variance (> 0).
    """

    def __init__(self, group_sizes: Sequence[int], eps: float = 1e-5, device=None, dtype=None) -> None:
        # One group while the base class checks divisibility; the real sizes follow.
        super().__init__(1, sum(group_sizes), eps, affine=True, device=device, dtype=dtype)
        self.num_groups = len(group_sizes)
        self.group_sizes = tuple(group_sizes)

    def forward(self, input: Tensor) -> Tensor:
        _, weights = norm_tables(self.group_sizes, input.device)
        return weighted_group_norm(input, weights, self.group_sizes, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"group_sizes={list(self.group_sizes)}, eps={self.eps}"


# --- configuration -----------------------------------------------------------------------------------------------------


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_integer(name: str, value, low: int, high: int) -> None:
    if not _is_int(value) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} must be an integer from {low} to {high}")


# What each argument of `UNet2DModel` may be: the smallest and the largest value, or one of these. Blocks are those that can be
# pruned.
_INTEGERS = {
    "in_channels": (1, MAX_WIDTH),
    "out_channels": (1, MAX_WIDTH),
    "block_out_channels": (1, MAX_WIDTH),
    "layers_per_block": (1, MAX_LAYERS_PER_BLOCK),
    "downsample_padding": (0, 1),  # anything else changes the size of images
    "attention_head_dim": (1, MAX_WIDTH),
    "norm_num_groups": (1, MAX_WIDTH),
    "attn_norm_num_groups": (1, MAX_WIDTH),
    "time_embedding_dim": (1, MAX_WIDTH),
    "num_class_embeds": (1, 10**7),
    "num_train_timesteps": (1, 10**7),
}
_NUMBERS = {
    "freq_shift": (0, MAX_WIDTH),
    "mid_block_scale_factor": (1e-3, 1e3),  # of a division
    "dropout": (0, 1),
    "norm_eps": (1e-12, 1),  # added to a variance, in single precision
}
_CHOICES = {
    "center_input_sample": (False, True),
    "flip_sin_to_cos": (False, True),
    "add_attention": (False, True),
    "time_embedding_type": ("positional", "fourier", "learned"),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "mid_block_type": ("UNetMidBlock2D",),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": ("silu", "swish", "mish", "gelu", "relu"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": ("timestep", "identity"),
}
_LISTS = {"block_out_channels", "down_block_types", "up_block_types"}
_OPTIONAL = {
    *("sample_size", "attention_head_dim", "attn_norm_num_groups", "time_embedding_dim", "num_class_embeds"),
    *("num_train_timesteps", "mid_block_type", "downsample_type", "upsample_type", "class_embed_type"),
}


def _refuse(name: str, value, wanted: str) -> None:
    raise ValueError(f"{name}={reprlib.repr(value)} must be {wanted}")


def _check_value(name: str, value) -> None:
    """Refuse a value that is not in the tables above; one that they do not know, of a later Diffusers, must be plain JSON."""
    if name in _INTEGERS:
        _check_integer(name, value, *_INTEGERS[name])
    elif name in _NUMBERS:
        low, high = _NUMBERS[name]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            _refuse(name, value, f"a number from {low:g} to {high:g}")
    elif name in _CHOICES:
        prefix = "UNetRes" if name in _LISTS and isinstance(value, str) else ""  # as Diffusers once named its blocks
        plain = value.removeprefix(prefix) if prefix else value
        if not any(type(plain) is type(choice) and plain == choice for choice in _CHOICES[name]):
            _refuse(name, value, f"one of {', '.join(map(str, _CHOICES[name]))}")
    else:
        entries = value if isinstance(value, (list, tuple)) else [value]
        plain = all(entry is None or isinstance(entry, (bool, str, int, float)) for entry in entries)
        if not plain or len(entries) > 64 or not all(math.isfinite(entry) for entry in entries if isinstance(entry, float)):
            _refuse(name, value, "a finite number, a string, a boolean, or a list of up to 64 of them")


def _check_dense_config(config: Mapping) -> None:
    """Refuse dense arguments that could not be built, would compute no number, or would allocate without bound."""
    for name, value in config.items():
        if name in _LISTS:
            if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= 16:
                _refuse(name, value, "a list with 1 to 16 entries")
            for entry in value:
                _check_value(name, entry)
        elif name != "sample_size" and not (value is None and name in _OPTIONAL):
            _check_value(name, value)
    widths, groups, shift = config["block_out_channels"], config["norm_num_groups"], config["freq_shift"]
    for name in ("down_block_types", "up_block_types"):
        if len(config[name]) != len(widths):
            _refuse(name, config[name], f"as many as block_out_channels, {len(widths)}")
    if len(widths) * config["layers_per_block"] > MAX_LAYERS:
        _refuse("layers_per_block", config["layers_per_block"], f"at most {MAX_LAYERS // len(widths)} in {len(widths)} blocks")
    if any(width % groups for width in widths):
        _refuse("norm_num_groups", groups, f"a divisor of all of block_out_channels={list(widths)}")
    groups = config["attn_norm_num_groups"]
    if groups is not None and config["add_attention"] and config["mid_block_type"] is not None and widths[-1] % groups:
        _refuse("attn_norm_num_groups", groups, f"a divisor of {widths[-1]}, the last of block_out_channels")
    last = max(widths[0] // 2 - 1, 0)
    if config["time_embedding_type"] == "positional" and shift > last:  # frequencies are divided by the difference
        _refuse("freq_shift", shift, f"a number from 0 to {last}, for block_out_channels that start with {widths[0]}")
    if config["time_embedding_type"] == "learned" and config["num_train_timesteps"] is None:
        _refuse("num_train_timesteps", None, 'an integer where time_embedding_type="learned"')
    _check_sample_size(config["sample_size"], config["in_channels"], 2 ** (len(widths) - 1))


def _check_sample_size(size, channels: int, multiple: int) -> None:
    sides = size if isinstance(size, (list, tuple)) else [size, size]
    fits = len(sides) == 2 and all(_is_int(side) and 1 <= side <= MAX_SIDE and side % multiple == 0 for side in sides)
    if size is not None and not (fits and channels * sides[0] * sides[1] <= MAX_SAMPLE_VALUES):
        most = f"{MAX_SAMPLE_VALUES // channels} pixels in all"
        _refuse("sample_size", size, f"one or two multiples of {multiple}, up to {MAX_SIDE} and with at most {most}")


def _checked_table(name: str, table) -> Mapping:
    if table is None:
        return {}
    if not isinstance(table, Mapping) or not all(isinstance(key, str) for key in table):
        raise ValueError(f"{name} must map module names to numbers, got {type(table).__name__}")
    return table


def _dense_channels(module: nn.Module) -> tuple[int, int] | None:
    """Input and output channels of a layer that the table may narrow."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return None


# --- tensors in files --------------------------------------------------------------------------------------------------

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SMALL_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)


def _largest(tensor: Tensor) -> float:
    """The largest absolute value, NaN where there is one, in one pass (`isfinite` takes ten times as long)."""
    if tensor.numel() == 0:
        return 0.0
    low, high = (tensor.float() if tensor.dtype in _SMALL_FLOATS else tensor).aminmax()
    return float(torch.maximum(-low, high))


def _check_tensors(tensors: Mapping[str, Tensor], dtype: torch.dtype, quantized: bool = False) -> None:
    """Refuse weights that are not floating point (unless they are quantized), or not finite, as they are or in `dtype`."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (*_FLOATS, *_SMALL_FLOATS):
            if not quantized:
                raise ValueError(f"the weight {name} is {tensor.dtype}, and must be floating point")
        elif not math.isfinite(largest := _largest(tensor)):
            raise ValueError(f"the weight {name} holds values that are not finite (NaN or infinity)")
        elif largest > torch.finfo(dtype).max:
            raise ValueError(f"the weight {name} holds a value of size {largest:g}, which {dtype} does not have")
        if name.endswith((".to_qkv.weight", ".to_qkv.bias")):
            sources = [tensors.get(name.replace(".to_qkv.", f".to_{letter}.")) for letter in "qkv"]
            if all(source is not None for source in sources) and not torch.equal(torch.cat(sources), tensor):
                raise ValueError(f"the weight {name} is not that of to_q, to_k and to_v: unfuse projections before training")


# --- narrowing ---------------------------------------------------------------------------------------------------------


def _narrow_layer(module: nn.Module, in_channels: int, out_channels: int) -> nn.Module:
    if isinstance(module, nn.Conv2d):
        return nn.Conv2d(
            in_channels, out_channels, module.kernel_size, module.stride, module.padding, bias=module.bias is not None
        )
    if isinstance(module, nn.Linear):
        return nn.Linear(in_channels, out_channels, bias=module.bias is not None)
    return nn.Embedding(in_channels, out_channels)


def _narrow_norm(module: nn.GroupNorm, sizes: Sequence[int]) -> nn.GroupNorm:
    if len(set(sizes)) == 1:
        return nn.GroupNorm(len(sizes), sum(sizes), eps=module.eps)
    return RaggedGroupNorm(sizes, eps=module.eps)


def _checked_layer(name: str, module: nn.Module | None, channels) -> nn.Module:
    dense = None if module is None else _dense_channels(module)
    if dense is None:
        raise ValueError(f"layer_channels names {name!r}, which is no convolution, linear layer or embedding")
    if not isinstance(channels, (list, tuple)) or len(channels) != 2 or not all(map(_is_int, channels)):
        raise ValueError(f"layer_channels[{name!r}]={channels!r} must be two integers: input and output channels")
    for value, bound in zip(channels, dense):
        if not 1 <= value <= bound:
            raise ValueError(f"layer_channels[{name!r}]={list(channels)} must be from 1 to the dense {list(dense)}")
    fixed = {"conv_in": 0, "conv_out": 1}.get(name, 0 if isinstance(module, nn.Embedding) else None)
    if fixed is not None and channels[fixed] != dense[fixed]:
        raise ValueError(f"layer_channels[{name!r}]={list(channels)} changes {dense[fixed]} channels that are never pruned")
    return _narrow_layer(module, *channels)


def _checked_norm(name: str, module: nn.Module | None, sizes) -> nn.Module:
    if not isinstance(module, nn.GroupNorm):
        raise ValueError(f"norm_group_sizes names {name!r}, which is no group norm")
    if not isinstance(sizes, (list, tuple)) or not sizes or not all(map(_is_int, sizes)):
        raise ValueError(f"norm_group_sizes[{name!r}]={sizes!r} must be a list of integers")
    largest = module.num_channels // module.num_groups
    if len(sizes) > module.num_groups or not all(1 <= size <= largest for size in sizes):
        raise ValueError(
            f"norm_group_sizes[{name!r}]={list(sizes)} must be up to {module.num_groups} sizes from 1 to {largest}"
        )
    return _narrow_norm(module, sizes)


def _set_static_attributes(unet: nn.Module, attention_heads: Mapping[str, int]) -> None:
    """Make the widths that Diffusers' blocks remember follow their layers."""
    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlock2D):
            module.in_channels, module.out_channels = module.conv1.in_channels, module.conv2.out_channels
            for sampler in (module.upsample, module.downsample):
                if isinstance(sampler, (Upsample2D, Downsample2D)):
                    sampler.channels = sampler.out_channels = module.conv1.in_channels
        elif isinstance(module, (Upsample2D, Downsample2D)) and isinstance(getattr(module, "conv", None), nn.Conv2d):
            module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels
        elif isinstance(module, Attention):
            if module.heads < 1:
                raise ValueError(f"attention_head_dim leaves {name} ({module.query_dim} channels) no head")
            heads = attention_heads.get(name, module.heads)
            inner, head_dim = module.to_q.out_features, module.inner_dim // module.heads
            if not _is_int(heads) or not 1 <= heads <= module.heads or inner % heads or inner // heads > head_dim:
                raise ValueError(
                    f"attention_heads[{name!r}]={heads!r} must be from 1 to {module.heads} and divide {inner} channels "
                    f"into heads of at most {head_dim}"
                )
            module.heads = module.sliceable_head_dim = heads
            module.inner_dim = module.inner_kv_dim = inner
            module.query_dim = module.cross_attention_dim = module.to_q.in_features
            module.out_dim = module.out_context_dim = module.to_out[0].out_features
            module.scale = (inner // heads) ** -0.5


def _materialize(unet: nn.Module, device: torch.device) -> None:
    """Give a model on the meta device freshly initialized weights on `device`."""
    for module in unet.modules():
        if isinstance(module, GaussianFourierProjection):
            weight = torch.randn(module.weight.shape, device=device) * 16  # the scale that UNet2DModel passes
            module.weight = nn.Parameter(weight, requires_grad=False)
        elif next(module.parameters(recurse=False), None) is not None:
            module.to_empty(device=device, recurse=False)
            module.reset_parameters()


_DENSE_PARAMETERS = [p for p in inspect.signature(UNet2DModel.__init__).parameters.values() if p.name != "self"]


def _with_dense_signature(init):
    """Show `init` with the arguments of `UNet2DModel` before its own, as Diffusers' configuration reads them."""
    own = [p for p in inspect.signature(init).parameters.values() if p.kind is p.KEYWORD_ONLY]
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in [first, *_DENSE_PARAMETERS, *own]]
    init.__signature__ = inspect.Signature(parameters)
    return init


class GFPrunedUNet2DModel(UNet2DModel):
    r"""
    A [`UNet2DModel`] with the widths that gradient-flow pruning left (arXiv 2501.09464).

    Takes every argument of [`UNet2DModel`], with the values of the dense model, and:

    Parameters:
        layer_channels (`dict[str, tuple[int, int]]`, *optional*): Input and output channels of narrowed layers.
        norm_group_sizes (`dict[str, list[int]]`, *optional*): Channels in each group of narrowed group norms.
        attention_heads (`dict[str, int]`, *optional*): Heads left in attentions that lost some.

    Raises:
        ValueError: A width is not an integer, not in the range of the dense model, or the widths do not fit together.
            Nothing is allocated before that is known.
    """

    _no_split_modules = ["ResnetBlock2D", "Attention"]
    _keys_to_ignore_on_load_unexpected = [r"attentions\.\d+\.to_qkv\.(weight|bias)$"]  # copies, made by fuse_projections
    _auto_class = "AutoModel"  # config.json then says where a trusting AutoModel finds this file
    _card: str | None = None

    @register_to_config
    @_with_dense_signature
    def __init__(
        self,
        *args,
        layer_channels: dict[str, tuple[int, int]] | None = None,
        norm_group_sizes: dict[str, list[int]] | None = None,
        attention_heads: dict[str, int] | None = None,
        **kwargs,
    ):
        dense = {p.name: p.default for p in _DENSE_PARAMETERS}
        dense.update(zip(dense, args))
        dense.update(kwargs)
        if len(dense) > len(_DENSE_PARAMETERS):
            unknown = next(name for name in kwargs if name not in {p.name for p in _DENSE_PARAMETERS})
            raise TypeError(f"GFPrunedUNet2DModel got an unexpected keyword argument {unknown!r}")
        layer_channels = _checked_table("layer_channels", layer_channels)
        norm_group_sizes = _checked_table("norm_group_sizes", norm_group_sizes)
        attention_heads = _checked_table("attention_heads", attention_heads)
        _check_dense_config(dense)

        # 1. the dense skeleton, without memory
        device = nn.Linear(1, 1).weight.device  # where weights go now: a device context, or meta while loading
        with torch.device("meta"):
            try:
                super().__init__(**dense)
            except (TypeError, AttributeError, KeyError, UnboundLocalError, ZeroDivisionError) as error:
                raise ValueError(f"the dense part of the config cannot be built: {error}") from error
            # 2. narrow it
            modules = dict(self.named_modules())
            for name, channels in layer_channels.items():
                self.set_submodule(name, _checked_layer(name, modules.get(name), channels))
            for name, sizes in norm_group_sizes.items():
                self.set_submodule(name, _checked_norm(name, modules.get(name), sizes))
            for name in attention_heads:
                if not isinstance(modules.get(name), Attention):
                    raise ValueError(f"attention_heads names {name!r}, which is no attention")
            _set_static_attributes(self, attention_heads)
        count = sum(parameter.numel() for parameter in self.parameters())
        if count > MAX_PARAMETERS:
            raise ValueError(f"the config asks for {count:,} parameters, more than {MAX_PARAMETERS:,}")
        # 3. prove that the widths fit together, still without memory
        self._check_widths()
        if device.type != "meta":
            _materialize(self, device)

    @torch.no_grad()
    def _check_widths(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, ResnetBlock2D):
                # The forward below would not notice a width of 1, which broadcasts.
                residual = module.conv_shortcut.out_channels if module.conv_shortcut is not None else module.conv1.in_channels
                halves = 2 if module.time_embedding_norm == "scale_shift" else 1
                projected = module.time_emb_proj.out_features
                if module.conv2.out_channels != residual or projected != halves * module.conv1.out_channels:
                    raise ValueError(f"the widths in the config do not fit together in {name}")
        side = 2 ** len(self.config.block_out_channels)
        labels = None
        if self.config.class_embed_type == "identity":
            labels = torch.empty(1, self.time_embedding.linear_2.out_features, device="meta")
        elif self.class_embedding is not None:
            labels = torch.zeros(1, dtype=torch.long, device="meta")
        sample = torch.empty(1, self.config.in_channels, side, side, device="meta", dtype=self.dtype)
        training = self.training
        try:
            self.eval()(sample, torch.zeros(1, dtype=torch.long, device="meta"), class_labels=labels)
        except (ValueError, RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0] if str(error) else "a sampler got another width than its own"
            raise ValueError(f"the widths in the config do not fit together: {reason}") from error
        finally:
            self.train(training)

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, *args, **kwargs):
        try:
            config = super()._dict_from_json_file(*args, **kwargs)
        except RecursionError:
            config = None
        if not isinstance(config, dict):  # Diffusers would take a string for the name of another repository
            raise ValueError("config.json must hold a JSON object, of a depth that can be read")
        if not isinstance(config.get("quantization_config", {}), (dict, type(None))):
            _refuse("quantization_config", config["quantization_config"], "a JSON object")
        return config

    @classmethod
    @functools.wraps(UNet2DModel.from_pretrained.__func__)
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError("use_safetensors=False: pruned models are loaded from safetensors only")
        if kwargs.get("use_flashpack"):
            raise ValueError("use_flashpack=True: pruned models are loaded from safetensors only")
        device_map = kwargs.get("device_map")
        if not isinstance(device_map, Mapping) or "disk" not in device_map.values():
            kwargs.pop("offload_state_dict", None)  # Diffusers reads such weights back only beside others that stay on disk
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, use_safetensors=True, output_loading_info=True, **kwargs
        )
        # Diffusers only warns here, and leaves such weights random.
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[problem]:
                names = sorted(str(key) for key in info[problem])
                raise ValueError(
                    f"{pretrained_model_name_or_path}: the weights do not fit the config: "
                    f"{len(names)} {problem.replace('_', ' ')}, first {names[0]}"
                )
        return (model, info) if wants_info else model

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, resolved_model_file, *args, **kwargs):
        for name in resolved_model_file or ():  # an index of safetensors can name any file
            if not str(name).endswith(".safetensors"):
                raise ValueError(f"{name} is no safetensors file: pruned models are loaded from safetensors only")
        # Before anything is converted: NaN stays NaN, but whole numbers would become floats
        for part in [state_dict] if state_dict is not None else map(load_state_dict, resolved_model_file):
            _check_tensors(part, kwargs.get("dtype") or model.dtype, quantized=kwargs.get("hf_quantizer") is not None)
        return super()._load_pretrained_model(model, state_dict, resolved_model_file, *args, **kwargs)

    def to_json_string(self) -> str:
        # Where this copy was loaded from is nobody's business, and often a path.
        content = {key: value for key, value in json.loads(super().to_json_string()).items() if key != "_name_or_path"}
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    @functools.wraps(UNet2DModel.save_pretrained)
    def save_pretrained(self, save_directory, *args, **kwargs):
        given = inspect.signature(UNet2DModel.save_pretrained).bind(self, save_directory, *args, **kwargs).arguments
        if not given.get("safe_serialization", True):
            raise ValueError("safe_serialization=False: pruned models are saved as safetensors only")
        if given.get("is_main_process", True) and not os.path.isfile(save_directory):
            # Before the weights, so that an upload which the base class starts holds this file too.
            os.makedirs(save_directory, exist_ok=True)
            target = os.path.join(save_directory, MODULE_FILE)
            if not (os.path.exists(target) and os.path.samefile(__file__, target)):
                shutil.copyfile(__file__, target)
            # Diffusers leaves the index of an earlier, sharded save behind, and would load by it.
            variant = f".{given['variant']}" if given.get("variant") else ""
            index = os.path.join(save_directory, f"diffusion_pytorch_model.safetensors.index{variant}.json")
            if os.path.exists(index):
                os.remove(index)
        card = pathlib.Path(save_directory, "README.md")
        self._card = card.read_text("utf-8") if card.is_file() else None
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _upload_folder(self, working_dir, *args, **kwargs):
        if self._card is not None:  # Diffusers has just written a generic card over it
            pathlib.Path(working_dir, "README.md").write_text(self._card, "utf-8")
        return super()._upload_folder(working_dir, *args, **kwargs)


# Saved pipelines name the library of a component by its class's module: this package, whose file travels with them.
GFPrunedUNet2DModel.__module__ = "diffusers_gfprune"

# Every pipeline of Diffusers that takes a UNet2DModel: `from_pipe` passes a component on only if its very class is in the
# annotation of the argument.
for _name in (
    *("ConsistencyModelPipeline", "DDIMPipeline", "DDPMPipeline", "KarrasVePipeline", "LDMPipeline"),
    *("LDMSuperResolutionPipeline", "PNDMPipeline", "RePaintPipeline", "ScoreSdeVePipeline"),
):
    with contextlib.suppress(AttributeError, RuntimeError):  # a Diffusers without it, or without what it needs
        _init = getattr(diffusers, _name).__init__
        _init.__annotations__["unet"] = typing.get_type_hints(_init)["unet"] | GFPrunedUNet2DModel  # a union holds it once
