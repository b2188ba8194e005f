"""Second derivatives against numerical ones, and against those of autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_gfprune.scoring.double_backward import LeanDoubleBackward
from helpers.architectures import build


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def lean(function):
    def run(*inputs):
        with LeanDoubleBackward():
            return function(*inputs)

    return run


FUNCTIONS = {
    "group_norm": (lambda x, w, b: F.group_norm(x, 3, w, b), [(2, 6, 3, 2), (6,), (6,)]),
    "silu": (F.silu, [(3, 4)]),
    "conv": (lambda x, w, b: F.conv2d(x, w, b, padding=1), [(2, 3, 4, 5), (4, 3, 3, 3), (4,)]),
    "conv, strided": (lambda x, w, b: F.conv2d(x, w, b, stride=2), [(2, 3, 5, 6), (4, 3, 3, 3), (4,)]),
    "conv, dilated, grouped": (lambda x, w: F.conv2d(x, w, None, 1, (2, 1), (2, 1), 2), [(1, 4, 5, 4), (4, 2, 3, 3)]),
    "conv, same": (lambda x, w: F.conv2d(x, w, padding="same"), [(1, 2, 4, 4), (3, 2, 3, 3)]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_twice(name):
    torch.manual_seed(0)
    function, shapes = FUNCTIONS[name]
    inputs = [random(*shape) for shape in shapes]
    torch.testing.assert_close(lean(function)(*inputs), function(*inputs))
    assert gradcheck(lean(function), inputs)
    assert gradgradcheck(lean(function), inputs)


def test_convolution_of_a_constant_and_of_its_bias_alone():
    """Cases in which one of the vectors, or one of the gradients, is not there."""
    torch.manual_seed(0)
    x, weight, bias = random(2, 3, 4, 4).detach(), random(4, 3, 3, 3), random(4)
    assert gradgradcheck(lean(lambda w, b: F.conv2d(x, w, b)), (weight, bias))
    assert gradgradcheck(lean(lambda b: F.conv2d(x, weight.detach(), b) ** 2), (bias,))


def test_values_that_are_not_ours_are_left_to_torch():
    x = torch.randn(2, 6, 3, 3)
    with LeanDoubleBackward():
        assert F.silu(x.clone(), inplace=True).equal(F.silu(x))
        assert F.group_norm(x, 3).equal(nn.GroupNorm(3, 6, affine=False)(x))
        assert F.conv2d(x[:, :, 0:1], torch.ones(1, 6, 1, 1)).shape == (2, 1, 1, 3)


@pytest.mark.parametrize("architecture", ["base", "scale-shift"])
def test_hessian_vector_product_of_a_unet(architecture):
    """The product that autograd composes is the known answer."""
    torch.manual_seed(0)
    unet = build(architecture).double()
    x, t = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([10, 900])
    parameters = list(unet.parameters())
    vectors = [torch.randn_like(parameter) for parameter in parameters]

    def product():
        with sdpa_kernel(SDPBackend.MATH):
            gradient = torch.autograd.grad(unet(x, t).sample.pow(2).mean(), parameters, create_graph=True)
            return torch.autograd.grad(sum((g * v).sum() for g, v in zip(gradient, vectors)), parameters)

    with LeanDoubleBackward():
        ours = product()
    for got, wanted in zip(ours, product()):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
