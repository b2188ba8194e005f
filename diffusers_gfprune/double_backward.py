"""Hessian-vector products at the price of a few more passes: double backward of convolution, group norm and SiLU.

Autograd differentiates twice by composing elementwise operations for norms and activations, each of which keeps its result,
and turns convolutions inside out (the batch becomes channels). Here the second derivative of each is written down, in terms of
native kernels.

Notation: `dy` is the gradient of the output, `u` the vector that the first backward's result is multiplied by.

Convolution, with `S = <u_x, dx> + <u_w, dw> + <u_b, db>`, is bilinear in `(x, w)`:

    dS/d(dy) = conv(u_x, w) + conv(x, u_w) + u_b        dS/dx = dx of (dy, u_w)        dS/dw = dw of (u_x, dy)

SiLU, `y = x s` with `s = sigmoid(x)`:      y'' = s (1 - s) (2 + x (1 - 2 s))

Group norm, weighted as in `remote.unet_2d_gfpruned` (weights `w_i` of the elements of a group sum to 1), with
`z = (x - mean) r`, `r = 1 / sqrt(var + eps)`, `y = gamma z + beta`, and sums over the elements of a group

    A = sum gamma dy      B = sum gamma dy z      U0 = sum w u      U1 = sum w u z      T = sum gamma u dy - A U0 - B U1

    dx       = r (gamma dy - w A - w z B)
    dS/d(dy) = gamma r (u - U0 - z U1) + u_gamma z + u_beta
    dS/dgamma = sum over a channel of r dy (u - U0 - z U1)
    dS/dx    = r (q - w sum q - w z sum q z) - w r^2 z T       with q = (u_gamma - r gamma U1) dy - r B w u
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from .remote.unet_2d_gfpruned import channel_sums, norm_backward, norm_forward, norm_tables
from .remote.unet_2d_gfpruned import weighted_group_norm as _weighted_group_norm

__all__ = ["LeanDoubleBackward", "weighted_group_norm"]


# --- group norm --------------------------------------------------------------------------------------------------------


class _GroupNorm(Function):
    """Weighted group norm that can be differentiated twice."""

    @staticmethod
    def forward(ctx, x, weights, group_sizes, gamma, beta, eps):
        output, statistics = norm_forward(x, weights, group_sizes, gamma, beta, eps)
        ctx.save_for_backward(x, weights, gamma, *statistics)
        ctx.group_sizes = group_sizes
        return output

    @staticmethod
    def backward(ctx, grad):
        # A node of its own is only worth its price where it is differentiated.
        function = _GroupNormBackward.apply if torch.is_grad_enabled() else norm_backward
        x, weights, *others = ctx.saved_tensors
        dx, dgamma, dbeta, *_ = function(grad.contiguous(), x, weights, ctx.group_sizes, *others)
        return dx, None, None, dgamma, dbeta, None


class _GroupNormBackward(Function):
    @staticmethod
    def forward(ctx, grad, x, weights, group_sizes, *others):
        *gradients, b, a = norm_backward(grad, x, weights, group_sizes, *others)
        ctx.save_for_backward(grad, x, weights, *others, a, b)
        ctx.group_sizes = group_sizes
        return tuple(gradients)

    @staticmethod
    def backward(ctx, u, u_gamma, u_beta):
        grad, x, weights, gamma, mean, rstd, scale, group_mean, r, a, b = ctx.saved_tensors  # a, b: sums of dy and dy z
        membership = norm_tables(ctx.group_sizes, x.device)[0].to(weights.dtype)
        u = u.contiguous()
        positions = x.shape[2]
        w = weights.sum(dim=1) / positions  # (C,), of an element

        def over_group(values: Tensor) -> Tensor:
            return (values @ membership) @ membership.t()

        # Sums over a channel, (B, C), then over its group
        u_sum, u_centred = channel_sums(u, x, mean, rstd, group_mean)
        k = channel_sums(u, grad, torch.zeros_like(mean), torch.ones_like(rstd), torch.zeros_like(mean))[1]
        A, B, ku = over_group(torch.cat([gamma * a, gamma * b, gamma * k])).chunk(3)
        U0, U1 = over_group(torch.cat([w * u_sum, w * u_centred * r])).chunk(2)
        q_sum, qz_sum = over_group(torch.cat([u_gamma * a, u_gamma * b])).chunk(2)
        q_sum = q_sum - r * (U1 * A + B * U0)
        qz_sum = qz_sum - 2 * r * U1 * B
        T = ku - A * U0 - B * U1

        # Both results are affine in u, dy and x, with coefficients per sample and channel.
        on_z = u_gamma - scale * U1
        d_grad = _affine((u_beta - scale * U0) - on_z * r * group_mean, (on_z * r, x), (scale, u))
        x_on_z = -w * r * (qz_sum + r * T)
        d_x = _affine(-w * r * q_sum - x_on_z * r * group_mean, (x_on_z * r, x), (r * on_z, grad), (-w * r.square() * B, u))
        d_gamma = (r * (k - U0 * a - U1 * b)).sum(dim=0)
        return d_grad, d_x, None, None, d_gamma, None, None, None, None, None


def _affine(constant: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """`constant + sum of coefficient * tensor`, with coefficients `(B, C)` and tensors `(B, C, N)`."""
    (coefficient, tensor), *others = terms
    output = torch.mul(tensor, coefficient[:, :, None]).add_(constant[:, :, None])
    for coefficient, tensor in others:
        output.addcmul_(coefficient[:, :, None], tensor)
    return output


def weighted_group_norm(
    x: Tensor, weights: Tensor, group_sizes: tuple[int, ...], gamma: Tensor, beta: Tensor, eps: float
) -> Tensor:
    """`remote.unet_2d_gfpruned.weighted_group_norm`, whose second derivative is cheap."""
    return _weighted_group_norm(x, weights, group_sizes, gamma, beta, eps, function=_GroupNorm)


# --- SiLU --------------------------------------------------------------------------------------------------------------


class _SiLU(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx, grad):
        return _SiLUBackward.apply(grad, *ctx.saved_tensors)


class _SiLUBackward(Function):
    @staticmethod
    def forward(ctx, grad, x):
        ctx.save_for_backward(grad, x)
        return torch.ops.aten.silu_backward(grad, x)

    @staticmethod
    def backward(ctx, u):
        grad, x = ctx.saved_tensors
        s = torch.sigmoid(x)
        curvature = torch.addcmul(s.new_tensor(2.0), x, 1 - 2 * s).mul_(s).mul_(1 - s)
        return torch.ops.aten.silu_backward(u, x), curvature.mul_(u).mul_(grad)


# --- convolution -------------------------------------------------------------------------------------------------------


class _Conv2d(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation, groups):
        ctx.save_for_backward(x, weight)
        ctx.options = stride, padding, dilation, groups
        return F.conv2d(x, weight, bias, *ctx.options)

    @staticmethod
    def backward(ctx, grad):
        dx, dw, db = _Conv2dBackward.apply(grad, *ctx.saved_tensors, ctx.options, ctx.needs_input_grad[:3])
        return dx, dw, db, None, None, None, None


def _convolution_backward(grad, x, weight, options, wanted):
    stride, padding, dilation, groups = options
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, list(wanted)
    )


class _Conv2dBackward(Function):
    @staticmethod
    def forward(ctx, grad, x, weight, options, wanted):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, x, weight)
        ctx.options = options
        return _convolution_backward(grad, x, weight, options, wanted)

    @staticmethod
    def backward(ctx, u_x, u_w, u_b):
        grad, x, weight = ctx.saved_tensors
        need_grad, need_x, need_w, *_ = ctx.needs_input_grad
        d_grad = d_x = d_w = None
        if need_grad:
            parts = [F.conv2d(x, u_w, u_b, *ctx.options)] if u_w is not None else []
            if u_x is not None:
                parts.append(F.conv2d(u_x, weight, u_b if u_w is None else None, *ctx.options))
            if parts:
                d_grad = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
            elif u_b is not None:
                d_grad = u_b.view(1, -1, 1, 1).expand_as(grad)
        if need_x and u_w is not None:
            d_x = _convolution_backward(grad, x, u_w, ctx.options, (True, False, False))[0]
        if need_w and u_x is not None:
            d_w = _convolution_backward(grad, u_x, weight, ctx.options, (False, True, False))[1]
        return d_grad, d_x, d_w, None, None


# --- in place of the native ones ---------------------------------------------------------------------------------------


def _conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if isinstance(padding, str) or input.ndim != 4:
        return NotImplemented
    options = ([value] * 2 if isinstance(value, int) else list(value) for value in (stride, padding, dilation))
    return _Conv2d.apply(input, weight, bias, *options, groups)


def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    if weight is None or bias is None:
        return NotImplemented
    sizes = (input.shape[1] // num_groups,) * num_groups
    _, weights = norm_tables(sizes, input.device)
    return weighted_group_norm(input, weights, sizes, weight, bias, eps)


def _silu(input, inplace=False):
    return NotImplemented if inplace else _SiLU.apply(input)


_LEAN = {torch.conv2d: _conv2d, F.group_norm: _group_norm, F.silu: _silu}


class LeanDoubleBackward(TorchFunctionMode):
    """Context in which convolutions, group norms and SiLUs can be differentiated twice at low cost. Values stay the same, to
    float rounding."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        lean = _LEAN.get(func)
        if lean is not None:
            output = lean(*args, **(kwargs or {}))
            if output is not NotImplemented:
                return output
        return func(*args, **(kwargs or {}))
