"""The pruned model by itself: its norm, the checks of its configuration, and what saving and loading keep."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, BASE, build, inputs, random_masks
from diffusers import UNet2DModel
from diffusers.models.embeddings import GaussianFourierProjection
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffusers_gfprune.remote.unet_2d_gfpruned as module_file
from diffusers_gfprune import GFPrunedUNet2DModel
from diffusers_gfprune.channel_groups import trace_channel_groups
from diffusers_gfprune.compaction import compact, plan_compaction
from diffusers_gfprune.remote.unet_2d_gfpruned import RaggedGroupNorm, norm_tables, weighted_group_norm

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = ["config.json", "diffusers_gfprune.py", WEIGHTS]
RESNET = "down_blocks.0.resnets.0"
ATTENTION = "mid_block.attentions.0"
HOSTILE_INTEGERS = [10**9, -1, 0, True, 2.0, float("nan"), "16", [16], {}]


@functools.lru_cache
def pruned(name: str = "base", seed: int = 0) -> GFPrunedUNet2DModel:
    """A pruned model, ragged norms and missing heads included. Shared by tests: copy it before changing it."""
    unet = build(name)
    groups = trace_channel_groups(unet)
    return compact(unet, plan_compaction(unet, groups, random_masks(groups, seed)))


@torch.no_grad()
def run(unet: nn.Module) -> Tensor:
    """The output for the standard inputs, in the model's dtype."""
    arguments = inputs(unet)
    return unet(**{**arguments, "sample": arguments["sample"].to(unet.dtype)}).sample


def table_arguments(**tables) -> dict:
    """Arguments of a model with the dense config of 'base'."""
    return {**BASE, **tables}


class NoMemory(TorchDispatchMode):
    """Fails a test that makes a tensor of more than a few values outside of the meta device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                assert leaf.numel() <= 1000, f"{func} allocated {tuple(leaf.shape)}"
        return result


# --- weighted group norm -----------------------------------------------------------------------------------------------


def mean_weights(*sizes: int) -> tuple[Tensor, Tensor]:
    """Weights of plain means over groups of such sizes, and which channel is in which group."""
    membership, weights = norm_tables(sizes, CPU)
    return weights, membership


def masked_weights(mask: Tensor, *sizes: int) -> tuple[Tensor, Tensor]:
    """Weights of means over what `mask` keeps, as masked norms make them."""
    membership, _ = norm_tables(sizes, CPU)
    weights = membership * mask[:, None]
    return weights / weights.sum(dim=0).clamp_min(torch.finfo(torch.float32).tiny), membership


WEIGHT_CASES = {
    "equal": mean_weights(2, 2, 2),
    "ragged": mean_weights(1, 3, 2),
    "one-channel-groups": mean_weights(1, 1, 1, 1, 1, 1),
    "soft": masked_weights(torch.tensor([1.0, 0.3, 1, 0.7, 0.1, 1]), 2, 2, 2),
    "removed-channels": masked_weights(torch.tensor([1.0, 0, 1, 1, 0, 1]), 2, 2, 2),
    "removed-group": masked_weights(torch.tensor([0.0, 0, 1, 1, 1, 0]), 2, 2, 2),
}


@pytest.mark.parametrize("case", WEIGHT_CASES)
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_weighted_group_norm_differentiates_twice(case: str, check):
    """The hand-written backward, and the double backward that exact gradient flow needs."""
    weights, membership = WEIGHT_CASES[case]
    x = torch.randn(2, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    gamma, beta = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert check(lambda *args: weighted_group_norm(args[0], weights, membership, *args[1:], 1e-2), (x, gamma, beta))


@pytest.mark.parametrize("wanted", [("x",), ("gamma",), ("beta",), ("x", "beta"), ("gamma", "beta")])
def test_weighted_group_norm_with_some_inputs_frozen(wanted: tuple[str, ...]):
    """Gradients of single inputs, once and with a graph, are those of all inputs."""
    weights, membership = WEIGHT_CASES["ragged"]
    values = {"x": torch.randn(2, 6, 5), "gamma": torch.randn(6), "beta": torch.randn(6)}
    direction = torch.randn(2, 6, 5)

    def gradients(names: tuple[str, ...], create_graph: bool) -> dict[str, Tensor]:
        leaves = {name: value.clone().requires_grad_(name in names) for name, value in values.items()}
        y = weighted_group_norm(leaves["x"], weights, membership, leaves["gamma"], leaves["beta"], 1e-5)
        found = torch.autograd.grad(y, [leaves[name] for name in names], direction, create_graph=create_graph)
        return dict(zip(names, found))

    expected = gradients(("x", "gamma", "beta"), create_graph=False)
    for create_graph in (False, True):
        for name, gradient in gradients(wanted, create_graph).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (2, 12, 9), (2, 12, 1, 2), (3, 12, 2, 3, 4)])
def test_weighted_group_norm_equals_native_for_equal_weights(shape: tuple[int, ...], groups: int):
    """Images, tokens and volumes."""
    x, gamma, beta = torch.randn(shape) * 2 + 1, torch.randn(12), torch.randn(12)
    found = weighted_group_norm(x, *mean_weights(*[12 // groups] * groups), gamma, beta, 1e-5)
    expected = F.group_norm(x.double(), groups, gamma.double(), beta.double(), 1e-5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert found.shape == x.shape


def test_weighted_group_norm_of_a_single_position():
    """The bottom of a deep model on a small image: statistics run over channels only."""
    x, gamma, beta = torch.randn(2, 12, 1, 1), torch.randn(12), torch.randn(12)
    found = weighted_group_norm(x, *mean_weights(4, 4, 4), gamma, beta, 1e-5)
    torch.testing.assert_close(found, F.group_norm(x, 3, gamma, beta, 1e-5), rtol=1e-4, atol=1e-5)
    alone = weighted_group_norm(x, *mean_weights(*[1] * 12), gamma, beta, 1e-5)  # a single value has no variance
    torch.testing.assert_close(alone.flatten(1), beta.expand(2, 12), rtol=0, atol=1e-3)


def test_weighted_group_norm_of_channels_last_memory():
    """Convolutions on many devices return this layout."""
    x = torch.randn(2, 12, 5, 7).contiguous(memory_format=torch.channels_last)
    gamma, beta = torch.randn(12), torch.randn(12)
    found = weighted_group_norm(x, *mean_weights(4, 4, 4), gamma, beta, 1e-5)
    torch.testing.assert_close(found, F.group_norm(x, 3, gamma, beta, 1e-5), rtol=1e-5, atol=1e-5)


def test_zero_weights_remove_channels():
    """What a zero-weighted channel holds is unseen by the others."""
    mask = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1])
    kept = mask.bool()
    weights, membership = masked_weights(mask, 4, 4)
    x, gamma, beta = torch.randn(2, 8, 4, 4), torch.randn(8), torch.randn(8)
    found = weighted_group_norm(x, weights, membership, gamma, beta, 1e-5)
    expected = F.group_norm(x[:, kept], 2, gamma[kept], beta[kept], 1e-5)
    torch.testing.assert_close(found[:, kept], expected, rtol=1e-5, atol=1e-5)
    x[:, ~kept] = 1e4
    again = weighted_group_norm(x, weights, membership, gamma, beta, 1e-5)
    assert torch.equal(again[:, kept], found[:, kept])


@pytest.mark.parametrize(("offset", "spread"), [(300.0, 1.0), (-300.0, 1.0), (0.0, 1e-4), (5.0, 1e-2), (0.0, 1e4)])
def test_weighted_group_norm_is_as_accurate_as_native(offset: float, spread: float):
    """E[x^2] - E[x]^2 would lose all digits at a mean of 300; forward and gradient against float64."""
    x, direction = torch.randn(2, 48, 64) * spread + offset, torch.randn(2, 48, 64)
    gamma, beta = torch.randn(48), torch.randn(48)
    weights, membership = mean_weights(*[12] * 4)

    def outputs(function, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = x.to(dtype).requires_grad_()
        y = function(leaf, gamma.to(dtype), beta.to(dtype))
        return y.detach().double(), torch.autograd.grad(y, leaf, direction.to(dtype))[0].double()

    def native(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return F.group_norm(x, 4, gamma, beta, 1e-5)

    def ours(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return weighted_group_norm(x, weights, membership, gamma, beta, 1e-5)

    for found, with_native, exact in zip(
        outputs(ours, torch.float32), outputs(native, torch.float32), outputs(native, torch.float64)
    ):
        scale = exact.abs().max()
        assert (found - exact).abs().max() <= 5 * (with_native - exact).abs().max() + 1e-6 * scale
        assert (found - exact).abs().max() <= 1e-4 * scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weighted_group_norm_keeps_the_dtype(dtype: torch.dtype):
    """Half precision is normalized in float32, and comes back as it was."""
    x = (torch.randn(2, 6, 4, 4) * 30).to(dtype)
    gamma, beta = torch.randn(6).to(dtype), torch.randn(6).to(dtype)
    found = weighted_group_norm(x, *WEIGHT_CASES["ragged"], gamma, beta, 1e-5)
    assert found.dtype == dtype
    exact = weighted_group_norm(x.double(), *WEIGHT_CASES["ragged"], gamma.double(), beta.double(), 1e-5)
    torch.testing.assert_close(found.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)


def test_weighted_group_norm_is_exact_under_autocast():
    """Its small matrix products make statistics, which bfloat16 would round to two digits."""
    x, gamma, beta = torch.randn(2, 6, 4, 4), torch.randn(6), torch.randn(6)
    expected = weighted_group_norm(x, *WEIGHT_CASES["ragged"], gamma, beta, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        found = weighted_group_norm(x, *WEIGHT_CASES["ragged"], gamma, beta, 1e-5)
    assert torch.equal(found, expected)


def test_norm_tables_known_answer():
    """Three channels in the first group, one in the second."""
    membership, weights = norm_tables((3, 1), CPU)
    assert torch.equal(membership, torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]]))
    torch.testing.assert_close(weights, torch.tensor([[1 / 3, 0], [1 / 3, 0], [1 / 3, 0], [0, 1]]))


@pytest.mark.parametrize("case", WEIGHT_CASES)
def test_sampling_and_training_normalize_alike(case: str):
    """Without gradients another path is taken, which must give the same bits."""
    x, gamma, beta = torch.randn(2, 6, 4, 4), torch.randn(6), torch.randn(6, requires_grad=True)
    expected = weighted_group_norm(x, *WEIGHT_CASES[case], gamma, beta, 1e-5)
    with torch.no_grad():
        assert torch.equal(weighted_group_norm(x, *WEIGHT_CASES[case], gamma, beta, 1e-5), expected)


# --- ragged group norm -------------------------------------------------------------------------------------------------


def test_ragged_group_norm_is_a_norm_of_each_group():
    """Group by group the same as native norms of one group."""
    sizes = (3, 1, 5, 2)
    norm = RaggedGroupNorm(sizes, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 11, 4, 6)
    pieces = zip(x.split(sizes, dim=1), norm.weight.split(sizes), norm.bias.split(sizes))
    expected = torch.cat([F.group_norm(part, 1, gamma, beta, 1e-3) for part, gamma, beta in pieces], dim=1)
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)


def test_ragged_group_norm_looks_like_a_group_norm():
    """Diffusers, accelerate and users look at type, names and repr."""
    norm = RaggedGroupNorm([3, 1, 2], eps=1e-6)
    assert isinstance(norm, nn.GroupNorm)
    assert (norm.num_channels, norm.num_groups, norm.eps) == (6, 3, 1e-6)
    assert {name: tuple(value.shape) for name, value in norm.state_dict().items()} == {"weight": (6,), "bias": (6,)}
    assert repr(norm) == "RaggedGroupNorm(group_sizes=[3, 1, 2], eps=1e-06)"
    assert torch.equal(norm.weight, torch.ones(6))
    assert torch.equal(norm.bias, torch.zeros(6))


def test_training_after_sampling_in_inference_mode():
    """The tables of groups are cached: made in inference mode, they must still serve a backward pass."""
    norm = RaggedGroupNorm([3, 1, 2, 11])  # sizes that no other test has cached
    x = torch.randn(2, 17, 4)
    with torch.inference_mode():
        norm(x)
    norm(x).square().sum().backward()
    assert norm.weight.grad.abs().sum() > 0


def test_compiled_ragged_group_norm_equals_eager():
    """The compiler gets the plain form: outputs and gradients are those of the other."""
    torch._dynamo.reset()
    norm = RaggedGroupNorm([3, 1, 2])
    nn.init.normal_(norm.weight)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 6, 4, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(norm(x).pow(3).sum(), x)
    (found,) = torch.autograd.grad(compiled(x).pow(3).sum(), x)
    torch.testing.assert_close(compiled(x), norm(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- building from a configuration -------------------------------------------------------------------------------------


def test_tables_narrow_the_layers_they_name():
    """Everything else is as wide as in the dense model."""
    model = GFPrunedUNet2DModel(
        **table_arguments(
            layer_channels={
                f"{RESNET}.conv1": [16, 7],
                f"{RESNET}.time_emb_proj": [64, 7],
                f"{RESNET}.conv2": [7, 16],
                f"{ATTENTION}.to_q": [32, 6],
                f"{ATTENTION}.to_k": [32, 6],
                f"{ATTENTION}.to_v": [32, 6],
                f"{ATTENTION}.to_out.0": [6, 32],
            },
            norm_group_sizes={f"{RESNET}.norm2": [1, 2, 4]},
            attention_heads={ATTENTION: 3},
        )
    )
    resnet, attention = model.get_submodule(RESNET), model.get_submodule(ATTENTION)
    assert resnet.conv1.weight.shape == (7, 16, 3, 3)
    assert resnet.norm2.group_sizes == (1, 2, 4)
    assert (attention.heads, attention.inner_dim, attention.scale) == (3, 6, 2**-0.5)
    assert model.down_blocks[1].resnets[0].conv1.weight.shape == (32, 16, 3, 3)
    assert run(model).shape == (2, 1, 8, 8)


def test_without_tables_it_is_the_dense_model():
    """Dense weights fit, with the same outputs bit for bit."""
    dense = build()
    model = GFPrunedUNet2DModel(**BASE).eval()
    model.load_state_dict(dense.state_dict())
    assert torch.equal(run(model), run(dense))


def test_dense_arguments_may_be_positional():
    """As for `UNet2DModel`: sample_size, in_channels, out_channels."""
    rest = {key: value for key, value in BASE.items() if key not in ("sample_size", "in_channels", "out_channels")}
    model = GFPrunedUNet2DModel(12, 3, 2, **rest)
    assert (model.config.sample_size, model.config.in_channels, model.config.out_channels) == (12, 3, 2)
    assert model.conv_in.in_channels == 3


def test_unknown_arguments_are_refused():
    """A misspelt table would leave the model dense."""
    with pytest.raises(TypeError, match="layer_chanels"):
        GFPrunedUNet2DModel(**BASE, layer_chanels={})


@pytest.mark.parametrize("name", ["base", "fourier-time", "learned-time", "class-embedding"])
def test_fresh_weights_are_initialized_as_torch_does(name: str):
    """The model is built without memory first: every weight must be drawn afterwards."""
    model = GFPrunedUNet2DModel.from_config(pruned(name).config)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = module.weight[0].numel() ** -0.5
            assert module.weight.abs().max() <= bound
            assert module.bias.abs().max() <= bound
            assert module.weight.abs().max() > bound / 4
        elif isinstance(module, nn.GroupNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
        elif isinstance(module, nn.Embedding):
            assert 0.8 < module.weight.std() < 1.2
        elif isinstance(module, GaussianFourierProjection):
            assert 8 < module.weight.std() < 32  # the scale is 16
            assert not module.weight.requires_grad
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert torch.isfinite(run(model)).all()


def test_meta_device_context_allocates_nothing():
    """How accelerate and Diffusers plan a model that may not fit."""
    config = pruned().config
    with torch.device("meta"), NoMemory():
        model = GFPrunedUNet2DModel.from_config(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in pruned().named_parameters()}


def test_building_leaves_the_mode_alone():
    """The check of the widths runs in evaluation mode, without a trace of it."""
    model = GFPrunedUNet2DModel(**BASE)
    assert {module.training for module in model.modules()} == {True}


def narrowed(**changes) -> dict:
    """A valid table of layers that narrows one resnet to 8 channels, with changes."""
    return {f"{RESNET}.conv1": [16, 8], f"{RESNET}.time_emb_proj": [64, 8], f"{RESNET}.conv2": [8, 16], **changes}


def narrowed_attention(width: int = 16, **changes) -> dict:
    """A valid table of layers that narrows one attention, with changes."""
    inner = {f"{ATTENTION}.to_{letter}": [32, width] for letter in "qkv"}
    return {**inner, f"{ATTENTION}.to_out.0": [width, 32], **changes}


def test_the_valid_tables_that_hostile_ones_are_made_of():
    """Or the refusals below would prove nothing."""
    norms = {f"{RESNET}.norm2": [2, 2, 3, 1]}
    model = GFPrunedUNet2DModel(
        **table_arguments(
            layer_channels={**narrowed(), **narrowed_attention()}, norm_group_sizes=norms, attention_heads={ATTENTION: 2}
        )
    )
    assert run(model).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        *[({"layer_channels": narrowed(**{f"{RESNET}.conv1": [16, width]})}, r"conv1'\]") for width in HOSTILE_INTEGERS],
        *[({"layer_channels": narrowed(**{f"{RESNET}.conv1": [width, 8]})}, r"conv1'\]") for width in HOSTILE_INTEGERS],
        ({"layer_channels": {f"{RESNET}.conv1": [16, 17]}}, r"from 1 to the dense \[16, 16\]"),
        ({"layer_channels": {f"{RESNET}.conv1": []}}, "two integers"),
        ({"layer_channels": {f"{RESNET}.conv1": [16]}}, "two integers"),
        ({"layer_channels": {f"{RESNET}.conv1": [16, 8, 3]}}, "two integers"),
        ({"layer_channels": {f"{RESNET}.conv1": 8}}, "two integers"),
        ({"layer_channels": {f"{RESNET}.conv1": "88"}}, "two integers"),
        ({"layer_channels": {f"{RESNET}.conv1": None}}, "two integers"),
        ({"layer_channels": {f"{RESNET}.conv1": {"0": 16, "1": 8}}}, "two integers"),
        ({"layer_channels": {"nowhere": [16, 8]}}, "'nowhere', which is no convolution"),
        ({"layer_channels": {"": [16, 8]}}, "'', which is no convolution"),
        ({"layer_channels": {RESNET: [16, 8]}}, "which is no convolution"),
        ({"layer_channels": {f"{RESNET}.norm1": [16, 8]}}, "which is no convolution"),
        ({"layer_channels": {f"{RESNET}.conv1.weight": [16, 8]}}, "which is no convolution"),
        ({"layer_channels": {"__class__": [16, 8]}}, "which is no convolution"),
        ({"in_channels": 3, "layer_channels": {"conv_in": [2, 16]}}, "changes 3 channels that are never pruned"),
        ({"out_channels": 3, "layer_channels": {"conv_out": [16, 2]}}, "changes 3 channels that are never pruned"),
        ({"num_class_embeds": 10, "layer_channels": {"class_embedding": [9, 64]}}, "changes 10 channels"),
        ({"layer_channels": {f"{RESNET}.conv1": [16, 8]}}, "do not fit together"),
        ({"layer_channels": {"time_embedding.linear_1": [8, 64]}}, "do not fit together"),
        ({"layer_channels": narrowed_attention(**{f"{ATTENTION}.to_q": [32, 8]})}, "do not fit together"),
        ({"layer_channels": narrowed_attention(**{f"{ATTENTION}.to_k": [32, 8]})}, "do not fit together"),
        ({"layer_channels": narrowed_attention(**{f"{ATTENTION}.to_v": [32, 8]})}, "do not fit together"),
        *[({"norm_group_sizes": {"conv_norm_out": [4, 4, size, 4]}}, "conv_norm_out") for size in HOSTILE_INTEGERS],
        ({"norm_group_sizes": {"conv_norm_out": []}}, "list of integers"),
        ({"norm_group_sizes": {"conv_norm_out": 16}}, "list of integers"),
        ({"norm_group_sizes": {"conv_norm_out": "4444"}}, "list of integers"),
        ({"norm_group_sizes": {"conv_norm_out": [5, 4, 4, 3]}}, "up to 4 sizes from 1 to 4"),
        ({"norm_group_sizes": {"conv_norm_out": [2] * 8}}, "up to 4 sizes from 1 to 4"),
        ({"norm_group_sizes": {"conv_norm_out": [4, 4, 4]}}, "do not fit together"),
        ({"norm_group_sizes": {"conv_norm_out": [4, 4, 4, 3]}}, "do not fit together"),
        ({"layer_channels": narrowed(), "norm_group_sizes": {f"{RESNET}.norm2": [2, 2, 2, 1]}}, "do not fit together"),
        ({"layer_channels": narrowed(), "norm_group_sizes": {f"{RESNET}.norm2": [3, 3, 3]}}, "do not fit together"),
        ({"norm_group_sizes": {"nowhere": [4]}}, "'nowhere', which is no group norm"),
        ({"norm_group_sizes": {"conv_in": [4]}}, "'conv_in', which is no group norm"),
        *[({"attention_heads": {ATTENTION: heads}}, "attention_heads") for heads in HOSTILE_INTEGERS],
        ({"attention_heads": {ATTENTION: 5}}, "from 1 to 4"),
        ({"attention_heads": {ATTENTION: 3}}, "divide 32 channels"),
        ({"attention_heads": {"nowhere": 1}}, "'nowhere', which is no attention"),
        ({"attention_heads": {"conv_in": 1}}, "'conv_in', which is no attention"),
        *[
            ({table: value}, f"{table} must map module names")
            for table in ("layer_channels", "norm_group_sizes", "attention_heads")
            for value in ([["conv_in", 1]], "conv_in", 7, 0.5, True, {1: [1, 1]})
        ],
        *[({"block_out_channels": (16, width)}, "block_out_channels") for width in HOSTILE_INTEGERS],
        *[({"block_out_channels": value}, "block_out_channels") for value in (16, "16", [], {}, [16] * 17, None)],
        *[({"layers_per_block": value}, "layers_per_block") for value in HOSTILE_INTEGERS],
        *[({"in_channels": value}, "in_channels") for value in HOSTILE_INTEGERS],
        *[({"out_channels": value}, "out_channels") for value in HOSTILE_INTEGERS],
        *[({"norm_num_groups": value}, "norm_num_groups") for value in HOSTILE_INTEGERS],
        *[({"attention_head_dim": value}, "attention_head_dim") for value in HOSTILE_INTEGERS],
        *[({"time_embedding_dim": value}, "time_embedding_dim") for value in HOSTILE_INTEGERS],
        *[({"num_class_embeds": value}, "num_class_embeds") for value in HOSTILE_INTEGERS],
        ({"time_embedding_type": "learned", "num_train_timesteps": 10**9}, "num_train_timesteps"),
    ],
)
def test_hostile_configurations_are_refused_before_anything_is_allocated(tables: dict, message: str):
    """A config comes from the Hub: it must not crash the process, exhaust memory, or build what never ran."""
    with pytest.raises(ValueError, match=message), NoMemory():
        GFPrunedUNet2DModel(**table_arguments(**tables))


@pytest.mark.parametrize(
    ("layer", "channels"),
    [
        (f"{RESNET}.time_emb_proj", [64, 1]),
        (f"{RESNET}.conv2", [16, 1]),
        ("down_blocks.1.resnets.0.conv_shortcut", [16, 1]),
    ],
)
def test_widths_that_broadcast_are_refused(layer: str, channels: list[int]):
    """One channel added to sixteen runs without an error, and is no pruned model."""
    with pytest.raises(ValueError, match="do not fit together"):
        GFPrunedUNet2DModel(**table_arguments(layer_channels={layer: channels}))


@pytest.mark.parametrize(
    "change",
    [
        {"layer_channels": {"conv_in": [1, 10**9]}},
        {"block_out_channels": [16, 10**9]},
        {"layers_per_block": 10**9},
        {"norm_group_sizes": {"conv_norm_out": [float("nan")]}},
        {"attention_heads": {ATTENTION: 0}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_hostile_config_files_are_refused(change: dict, tmp_path: Path):
    """The same through config.json and `from_pretrained`."""
    pruned().save_pretrained(tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(ValueError, match=next(iter(change))):
        GFPrunedUNet2DModel.from_pretrained(tmp_path)


SMALL = {**BASE, **ARCHITECTURES["one-level"]}  # the quickest to build
MODULE_NAMES = [name for name, _ in GFPrunedUNet2DModel(**SMALL).named_modules()]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = JSON | st.lists(st.integers(0, 34), min_size=1, max_size=4) | st.integers(1, 4)
TABLES = JSON | st.dictionaries(st.sampled_from(MODULE_NAMES) | st.text(max_size=8), ENTRIES, max_size=3)


def build_or_refuse(arguments: dict) -> GFPrunedUNet2DModel | ValueError:
    """What a configuration comes to; any other exception passes through, and fails the test."""
    try:
        return GFPrunedUNet2DModel(**arguments)
    except ValueError as error:
        return error


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(layer_channels=TABLES, norm_group_sizes=TABLES, attention_heads=TABLES)
def test_arbitrary_tables_build_or_raise_value_error(layer_channels, norm_group_sizes, attention_heads):
    """Whatever JSON holds: a model that runs, or a ValueError with a message."""
    result = build_or_refuse(
        {
            **SMALL,
            "layer_channels": layer_channels,
            "norm_group_sizes": norm_group_sizes,
            "attention_heads": attention_heads,
        }
    )
    if isinstance(result, ValueError):
        assert str(result)
    else:
        assert run(result.eval()).shape == (2, 1, 8, 8)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_one_entry_changed_builds_or_raises_value_error(data):
    """Near a valid configuration, where a wrong width gets furthest."""
    tables = {
        table: copy.deepcopy(dict(pruned("one-level").config[table]))
        for table in ("layer_channels", "norm_group_sizes", "attention_heads")
    }
    table = data.draw(st.sampled_from([name for name, entries in tables.items() if entries]))
    name = data.draw(st.sampled_from(sorted(tables[table])))
    tables[table][name] = data.draw(ENTRIES)
    result = build_or_refuse({**SMALL, **tables})
    if isinstance(result, ValueError):
        assert str(result)
    else:
        assert run(result.eval()).shape == (2, 1, 8, 8)


# --- saving and loading ------------------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes) -> None:
    """Change entries of a saved config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace, add, or (None) drop tensors of a saved weights file."""
    path = folder / WEIGHTS
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name", ["base", "scale-shift", "class-embedding", "class-identity", "fourier-time", "learned-time", "resnet-samplers"]
)
def test_from_pretrained_reproduces_the_outputs_bit_for_bit(name: str, tmp_path: Path):
    """Invariant 5: what is saved is what was measured."""
    pruned(name).save_pretrained(tmp_path)
    loaded = GFPrunedUNet2DModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert torch.equal(run(loaded), run(pruned(name)))


def test_saved_files(tmp_path: Path):
    """Weights, configuration, and the module that builds the model, byte for byte."""
    pruned().save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    assert (tmp_path / "diffusers_gfprune.py").read_bytes() == Path(module_file.__file__).read_bytes()


def test_config_round_trip(tmp_path: Path):
    """config.json is the dense configuration and three tables, and comes back equal."""
    pruned().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["_class_name"] == "GFPrunedUNet2DModel"
    for table in ("layer_channels", "norm_group_sizes", "attention_heads"):
        assert written[table]
        assert written[table] == pruned().config[table]
    for key, value in BASE.items():
        assert written[key] == (list(value) if isinstance(value, tuple) else value)
    loaded = GFPrunedUNet2DModel.from_pretrained(tmp_path)
    visible = {key: value for key, value in pruned().config.items() if not key.startswith("_")}
    assert {key: loaded.config[key] for key in visible} == {
        key: list(value) if isinstance(value, tuple) else value for key, value in visible.items()
    }


def test_the_shipped_module_loads_the_model_by_itself(tmp_path: Path):
    """Without this package, Diffusers runs the file beside the weights: it must need nothing else of ours."""
    pruned().save_pretrained(tmp_path)
    spec = importlib.util.spec_from_file_location("shipped_module", tmp_path / "diffusers_gfprune.py")
    shipped = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shipped)
    assert shipped.GFPrunedUNet2DModel is not GFPrunedUNet2DModel
    loaded = shipped.GFPrunedUNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(run(loaded), run(pruned()))
    loaded.save_pretrained(tmp_path)  # copies its own file onto itself
    assert (tmp_path / "diffusers_gfprune.py").read_bytes() == Path(module_file.__file__).read_bytes()


@pytest.mark.parametrize("method", ["save_pretrained", "from_pretrained"])
def test_overrides_show_the_signature_of_diffusers(method: str):
    """Pipelines look for `variant` and others in the signature, and pass on only what they find."""
    assert inspect.signature(getattr(GFPrunedUNet2DModel, method)) == inspect.signature(getattr(UNet2DModel, method))


def test_variant_is_saved_beside_the_main_weights(tmp_path: Path):
    """Without its signature, the override would hide `variant`, and half precision overwrite the main weights."""
    half = copy.deepcopy(pruned()).half()
    pruned().save_pretrained(tmp_path)
    main = (tmp_path / WEIGHTS).read_bytes()
    half.save_pretrained(tmp_path, variant="fp16")
    assert sorted(os.listdir(tmp_path)) == sorted([*FILES, "diffusion_pytorch_model.fp16.safetensors"])
    assert (tmp_path / WEIGHTS).read_bytes() == main
    assert torch.equal(run(GFPrunedUNet2DModel.from_pretrained(tmp_path)), run(pruned()))
    loaded = GFPrunedUNet2DModel.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float16
        assert torch.equal(value, half.state_dict()[name])


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_shards_round_trip(low_cpu_mem_usage: bool, tmp_path: Path):
    """Large models come in several files and an index."""
    pruned().save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(name for name in os.listdir(tmp_path) if "-of-" in name)
    assert len(shards) > 2
    assert sorted(os.listdir(tmp_path)) == sorted([*FILES[:2], f"{WEIGHTS}.index.json", *shards])
    loaded = GFPrunedUNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(run(loaded), run(pruned()))


@pytest.mark.parametrize(
    ("first", "second"),
    [({}, {}), ({}, {"max_shard_size": "50KB"}), ({"max_shard_size": "50KB"}, {}), ({"max_shard_size": "20KB"},) * 2],
    ids=["whole-whole", "whole-sharded", "sharded-whole", "sharded-sharded"],
)
def test_saving_again_into_the_same_folder(first: dict, second: dict, tmp_path: Path):
    """The later model is what loads, whatever the earlier one left there."""
    pruned(seed=1).save_pretrained(tmp_path, **first)
    pruned(seed=0).save_pretrained(tmp_path, **second)
    assert torch.equal(run(GFPrunedUNet2DModel.from_pretrained(tmp_path)), run(pruned(seed=0)))


def test_a_loaded_model_saves_into_its_own_folder(tmp_path: Path):
    """Fine-tune, save in place: the module file is the source and the target of the copy."""
    pruned().save_pretrained(tmp_path)
    loaded = GFPrunedUNet2DModel.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    assert torch.equal(run(GFPrunedUNet2DModel.from_pretrained(tmp_path)), run(pruned()))


def test_other_processes_write_no_module_file(tmp_path: Path):
    """In distributed training, only the main process writes what is not a shard of weights."""
    pruned().save_pretrained(tmp_path, is_main_process=False)
    assert "diffusers_gfprune.py" not in os.listdir(tmp_path)
    assert "config.json" not in os.listdir(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_torch_dtype(dtype: torch.dtype, tmp_path: Path):
    """Weights are cast on loading, to what casting the model would give."""
    pruned().save_pretrained(tmp_path)
    loaded = GFPrunedUNet2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    expected = copy.deepcopy(pruned()).to(dtype)
    for name, value in loaded.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, expected.state_dict()[name])
    assert torch.equal(run(loaded), run(expected))


@pytest.mark.parametrize(
    "options",
    [
        {"low_cpu_mem_usage": True},
        {"low_cpu_mem_usage": False},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": "auto"},
        {"use_safetensors": True},
        {"use_safetensors": None},
    ],
    ids=str,
)
def test_ways_of_loading_give_the_same_model(options: dict, tmp_path: Path):
    """Through an empty model or not: no weight may stay on the meta device, or random."""
    pruned("fourier-time").save_pretrained(tmp_path)
    loaded = GFPrunedUNet2DModel.from_pretrained(tmp_path, **options)
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cpu"}
    assert torch.equal(run(loaded), run(pruned("fourier-time")))


def test_loading_info_is_returned_when_asked_for(tmp_path: Path):
    """The override looks at the info itself, and must hand it on."""
    pruned().save_pretrained(tmp_path)
    loaded, info = GFPrunedUNet2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, GFPrunedUNet2DModel)
    assert set(info["missing_keys"]) == set(info["unexpected_keys"]) == set()


def test_a_loaded_model_trains(tmp_path: Path):
    """Fine-tuning starts from what was published."""
    pruned().save_pretrained(tmp_path)
    loaded = GFPrunedUNet2DModel.from_pretrained(tmp_path).train()
    loaded.enable_gradient_checkpointing()
    loaded(**inputs(loaded)).sample.square().sum().backward()
    without = {name for name, parameter in loaded.named_parameters() if parameter.grad is None}
    assert without == set()


# --- files that do not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_in.weight": None}, "missing keys, first conv_in.weight"),
        ({f"{RESNET}.norm2.bias": None, "conv_in.weight": None}, "2 missing keys"),
        ({"intruder.weight": torch.zeros(3)}, "unexpected keys, first intruder.weight"),
        ({"conv_in.bias": torch.zeros(3)}, "conv_in.bias"),
    ],
    ids=["missing", "two-missing", "unexpected", "another-shape"],
)
def test_weights_that_do_not_fit_the_config_are_refused(changes: dict, message: str, low_cpu_mem_usage: bool, tmp_path: Path):
    """Diffusers warns, and leaves what is missing random: samples would be noise."""
    pruned().save_pretrained(tmp_path)
    edit_weights(tmp_path, changes)
    with pytest.raises((ValueError, RuntimeError), match=message):
        GFPrunedUNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_shapes_that_do_not_fit_are_refused_even_if_told_to_ignore_them(tmp_path: Path):
    """`ignore_mismatched_sizes` would leave random weights."""
    pruned().save_pretrained(tmp_path)
    edit_weights(tmp_path, {"conv_in.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="mismatched keys.*conv_in.bias"):
        GFPrunedUNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_config_without_its_tables_is_refused(low_cpu_mem_usage: bool, tmp_path: Path):
    """Somebody replaced config.json by that of the dense model."""
    pruned().save_pretrained(tmp_path)
    edit_config(tmp_path, layer_channels={}, norm_group_sizes={}, attention_heads={})
    with pytest.raises((ValueError, RuntimeError), match=r"shape|size mismatch"):
        GFPrunedUNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.9999])
def test_truncated_weights_are_refused(share: float, tmp_path: Path):
    """An interrupted download."""
    pruned().save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: int(share * len(content))])
    with pytest.raises(OSError, match=WEIGHTS):
        GFPrunedUNet2DModel.from_pretrained(tmp_path)


class _CreatesAFile:
    """Unpickling an instance creates a file: code that a weights file must never run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def pickled(tmp_path: Path) -> tuple[Path, Path]:
    """A folder whose only weights are a malicious pickle, and the file that its unpickling would create."""
    folder, marker = tmp_path / "unet", tmp_path / "marker"
    pruned().save_pretrained(folder)
    (folder / WEIGHTS).unlink()
    torch.save({**pruned().state_dict(), "payload": _CreatesAFile(marker)}, folder / "diffusion_pytorch_model.bin")
    return folder, marker


def test_the_malicious_pickle_works(tmp_path: Path):
    """Or the absence of its marker would prove nothing."""
    marker = tmp_path / "marker"
    content = pickle.dumps(_CreatesAFile(marker))
    assert not marker.exists()
    pickle.loads(content)
    assert marker.exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, OSError),
        ({"low_cpu_mem_usage": False}, OSError),
        ({"use_safetensors": None}, OSError),
        ({"use_safetensors": True}, OSError),
        ({"use_safetensors": False}, ValueError),
    ],
    ids=str,
)
def test_pickles_are_never_unpickled(pickled: tuple[Path, Path], options: dict, error: type):
    """Loading a model runs no code from its weights, whatever is asked for."""
    folder, marker = pickled
    with pytest.raises(error, match="safetensors"):
        GFPrunedUNet2DModel.from_pretrained(folder, **options)
    assert not marker.exists()


def test_a_shard_index_cannot_name_a_pickle(pickled: tuple[Path, Path]):
    """An index file is free text: it may point at another kind of file."""
    folder, marker = pickled
    weight_map = dict.fromkeys(pruned().state_dict(), "diffusion_pytorch_model.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match="diffusion_pytorch_model.bin"):
        GFPrunedUNet2DModel.from_pretrained(folder)
    assert not marker.exists()


def test_use_safetensors_false_is_refused(tmp_path: Path):
    """Even where safetensors lie ready: who asks for pickles is told no, not silently given something else."""
    pruned().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors=False"):
        GFPrunedUNet2DModel.from_pretrained(tmp_path, use_safetensors=False)
