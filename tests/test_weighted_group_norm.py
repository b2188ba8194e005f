"""Group norms with weighted channels and ragged groups: values, gradients, precision."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_gfprune.double_backward import weighted_group_norm as lean_weighted_group_norm
from diffusers_gfprune.remote import unet_2d_gfpruned
from diffusers_gfprune.remote.unet_2d_gfpruned import RaggedGroupNorm, norm_tables, weighted_group_norm

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# --- weighted group norm -----------------------------------------------------------------------------------------------


def mean_weights(*sizes: int) -> tuple[Tensor, tuple[int, ...]]:
    """Weights of plain means over groups of such sizes, and the sizes."""
    return norm_tables(sizes, CPU)[1], sizes


def masked_weights(mask: Tensor, *sizes: int) -> tuple[Tensor, tuple[int, ...]]:
    """Weights of means over what `mask` keeps, as masked norms make them, and the sizes of groups."""
    membership, _ = norm_tables(sizes, CPU)
    weights = membership * mask[:, None]
    return weights / weights.sum(dim=0).clamp_min(torch.finfo(torch.float32).tiny), sizes


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
    weights, sizes = WEIGHT_CASES[case]
    x = torch.randn(2, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    gamma, beta = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert check(lambda *args: weighted_group_norm(args[0], weights, sizes, *args[1:], 1e-2), (x, gamma, beta))


@pytest.mark.parametrize("wanted", [("x",), ("gamma",), ("beta",), ("x", "beta"), ("gamma", "beta")])
def test_weighted_group_norm_with_some_inputs_frozen(wanted: tuple[str, ...]):
    """Gradients of single inputs, once and with a graph, are those of all inputs."""
    weights, sizes = WEIGHT_CASES["ragged"]
    values = {"x": torch.randn(2, 6, 5), "gamma": torch.randn(6), "beta": torch.randn(6)}
    direction = torch.randn(2, 6, 5)

    def gradients(names: tuple[str, ...], create_graph: bool) -> dict[str, Tensor]:
        leaves = {name: value.clone().requires_grad_(name in names) for name, value in values.items()}
        y = weighted_group_norm(leaves["x"], weights, sizes, leaves["gamma"], leaves["beta"], 1e-5)
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
    weights, sizes = masked_weights(mask, 4, 4)
    x, gamma, beta = torch.randn(2, 8, 4, 4), torch.randn(8), torch.randn(8)
    found = weighted_group_norm(x, weights, sizes, gamma, beta, 1e-5)
    expected = F.group_norm(x[:, kept], 2, gamma[kept], beta[kept], 1e-5)
    torch.testing.assert_close(found[:, kept], expected, rtol=1e-5, atol=1e-5)
    x[:, ~kept] = 1e4
    again = weighted_group_norm(x, weights, sizes, gamma, beta, 1e-5)
    assert torch.equal(again[:, kept], found[:, kept])


CONDITIONS = [(300.0, 1.0), (-300.0, 1.0), (0.0, 1e-4), (5.0, 1e-2), (0.0, 1e4)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("offset", "spread"), CONDITIONS)
def test_ragged_group_norm_is_as_accurate_in_inference_as_in_training(
    offset: float, spread: float, memory_format: torch.memory_format
):
    """Fewer operations without gradients, and no digits lost by them."""
    norm = RaggedGroupNorm([3, 12, 1, 8])
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (torch.randn(2, 24, 8, 8) * spread + offset).contiguous(memory_format=memory_format)
    training = norm(x).detach()
    before = x.clone()
    with torch.no_grad():
        inference = norm(x)
        assert torch.equal(x, before)
        exact = copy.deepcopy(norm).double()(x.double())
    scale = exact.abs().max()
    assert (inference - exact).abs().max() <= 2 * (training - exact).abs().max() + 1e-6 * scale
    with torch.inference_mode():
        assert torch.equal(norm(x), inference)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(norm(x), inference, rtol=1e-5, atol=1e-5 * scale.item())  # nothing is cast down


@pytest.mark.parametrize(("offset", "spread"), CONDITIONS)
def test_weighted_group_norm_is_as_accurate_as_native(offset: float, spread: float):
    """E[x^2] - E[x]^2 would lose all digits at a mean of 300; forward and gradient against float64."""
    x, direction = torch.randn(2, 48, 64) * spread + offset, torch.randn(2, 48, 64)
    gamma, beta = torch.randn(48), torch.randn(48)
    weights, sizes = mean_weights(*[12] * 4)

    def outputs(function, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = x.to(dtype).requires_grad_()
        y = function(leaf, gamma.to(dtype), beta.to(dtype))
        return y.detach().double(), torch.autograd.grad(y, leaf, direction.to(dtype))[0].double()

    def native(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return F.group_norm(x, 4, gamma, beta, 1e-5)

    def ours(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return weighted_group_norm(x, weights, sizes, gamma, beta, 1e-5)

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


def test_native_backward_is_given_a_scale(monkeypatch: pytest.MonkeyPatch):
    """PyTorch 2.6 and 2.11 raise an error without one, PyTorch 2.14 does not."""
    native, given = torch.ops.aten.native_group_norm_backward, []

    class Ops:
        def native_group_norm_backward(self, *args):
            given.append(args[4])
            return native(*args)

    monkeypatch.setattr(torch.ops, "aten", Ops())
    norm = RaggedGroupNorm([3, 1, 2])
    norm(torch.randn(2, 6, 4, requires_grad=True)).square().sum().backward()
    assert [scale.shape for scale in given] == [(12,)]


# --- on a GPU ----------------------------------------------------------------------------------------------------------


LAUNCHED: list[list[torch.dtype]] = []  # dtypes of the tensors of every kernel
needs_triton = pytest.mark.skipif(unet_2d_gfpruned.triton is None, reason="needs Triton")


@pytest.fixture(params=[pytest.param("triton", marks=needs_triton)])
def kernels(monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of tests of the Triton kernels: a GPU, or else the CPU, on which Triton interprets them (see conftest.py)."""
    launch = unet_2d_gfpruned._launch
    LAUNCHED.clear()

    def recorded(kernel, x: Tensor, groups: int, *arguments) -> None:
        LAUNCHED.append([argument.dtype for argument in arguments if isinstance(argument, Tensor)])
        launch(kernel, x, groups, *arguments)

    monkeypatch.setattr(unet_2d_gfpruned, "_launch", recorded)
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setattr(unet_2d_gfpruned, "_has_kernels", lambda x: True)
    return "cpu"


@pytest.mark.parametrize(("case", "positions"), [*((case, 3) for case in WEIGHT_CASES), ("soft", 1)])
@pytest.mark.parametrize("function", [weighted_group_norm, lean_weighted_group_norm], ids=["plain", "lean"])
def test_kernels_differentiate_twice(case: str, positions: int, function, kernels: str):
    """In training and in scoring, with a gradient that is not contiguous; against autograd through the plain form."""
    weights, sizes = WEIGHT_CASES[case]
    weights = weights.double()
    weights = weights / weights.sum(dim=0).clamp_min(1e-30)  # sums of 1 to the last digit, which the backward builds on
    values = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 6, positions), 6, 6)]
    direction = torch.randn(2, positions, 6, dtype=torch.float64).transpose(1, 2)

    def derivatives(where: str, norm, *groups) -> list[Tensor]:
        leaves = [value.to(where).requires_grad_() for value in values]
        y = norm(leaves[0], weights.to(where), *groups, *leaves[1:], 1e-2)
        first = torch.autograd.grad(y, leaves, direction.to(where), retain_graph=True)  # by the hand-written backward
        graph = torch.autograd.grad(y, leaves, direction.to(where), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in graph), leaves[:2])
        return [tensor.detach().cpu() for tensor in (y, *first, *graph, *second)]

    plain = derivatives("cpu", unet_2d_gfpruned._normalize, unet_2d_gfpruned._membership(sizes, weights))
    for found, expected in zip(derivatives(kernels, function, sizes), plain):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # eps reaches the kernels in float32
    assert LAUNCHED


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test runs."""
    return request.param


def outputs_and_gradients(norm: RaggedGroupNorm, x: Tensor, direction: Tensor) -> list[Tensor]:
    """Output, and gradients of the input, scale and shift, in float64 on the CPU."""
    leaf = x.clone().requires_grad_()
    y = norm(leaf)
    found = torch.autograd.grad(y, [leaf, norm.weight, norm.bias], direction.to(y))
    with torch.no_grad():
        assert torch.equal(norm(x), y)
    assert y.dtype == found[0].dtype == x.dtype
    return [tensor.detach().cpu().double() for tensor in (y, *found)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((3, 12, 1, 8), (8, 8)), ((2, 70), (4, 8)), ((3, 1), (36, 37)), ((3, 1), (1, 3))],
    ids=["several-groups", "channels-in-two-tiles", "positions-in-two-tiles", "fewer-than-a-tile"],
)
def test_kernels_equal_the_other_path(sizes: tuple[int, ...], shape: tuple[int, int], dtype: torch.dtype, kernels: str):
    """Half precision, too: read and written as it is, with statistics in float32."""
    norm = RaggedGroupNorm(sizes)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, direction = (torch.randn(2, sum(sizes), *shape) * 2 + 3).to(dtype), torch.randn(2, sum(sizes), *shape).to(dtype)
    exact_norm = copy.deepcopy(norm).double()
    with pytest.MonkeyPatch.context() as without:
        without.setattr(unet_2d_gfpruned, "_has_kernels", lambda x: False)
        expected = outputs_and_gradients(exact_norm, x.double(), direction.double())
    norm = exact_norm if dtype == torch.float64 else norm
    tolerance = 1e-9 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps + 20 * torch.finfo(torch.float32).eps
    for found, exact in zip(outputs_and_gradients(norm.to(kernels), x.to(kernels), direction), expected):
        assert (found - exact).abs().max() <= tolerance * exact.abs().max()
    assert {dtypes[0] for dtypes in LAUNCHED} == {dtype}  # input or gradient: not a float32 copy


def test_kernels_read_scales_in_half_precision(kernels: str):
    """As a model in bfloat16 has them; without gradients nothing is copied to float32."""
    norm, x = RaggedGroupNorm([3, 1, 2]).to(kernels, torch.bfloat16), torch.randn(2, 6, 4, 4).to(kernels, torch.bfloat16)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    with torch.no_grad():
        found = norm(x)
    torch.testing.assert_close(found, norm(x).detach(), rtol=0, atol=0)
    without, trained = (dtypes[4:6] for dtypes in LAUNCHED)  # of scale and shift
    assert without == [torch.bfloat16] * 2 and trained == [torch.float32] * 2


def test_kernels_hide_no_nan(kernels: str):
    """In one group of one sample, and in no other."""
    norm, x = RaggedGroupNorm([3, 1, 2]).to(kernels), torch.randn(2, 6, 4, 4).to(kernels)
    x[1, 1, 2, 3] = torch.nan
    found = norm(x).isnan().flatten(2).all(dim=2).cpu()
    assert found.tolist() == [[False] * 6, [True] * 3 + [False] * 3]


def test_kernels_see_nothing_of_removed_channels(kernels: str):
    """Nor of channels beyond a group's end, which lie in the same tile."""
    mask = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1])
    weights, sizes = masked_weights(mask, 4, 4)
    x, gamma, beta = (torch.randn(shape).to(kernels) for shape in ((2, 8, 3, 3), 8, 8))
    kept = mask.bool().to(kernels)
    found = weighted_group_norm(x, weights.to(kernels), sizes, gamma, beta, 1e-5)
    expected = F.group_norm(x[:, kept], 2, gamma[kept], beta[kept], 1e-5)
    torch.testing.assert_close(found[:, kept], expected, rtol=1e-5, atol=1e-5)
    x[:, ~kept] = 1e4
    again = weighted_group_norm(x, weights.to(kernels), sizes, gamma, beta, 1e-5)
    assert torch.equal(again[:, kept], found[:, kept])


@needs_triton
def test_without_a_working_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """No C compiler, an old card: said once, and the other path taken."""

    def fails(*arguments):
        raise RuntimeError("Failed to find C compiler")

    norm, x = RaggedGroupNorm([3, 1, 2]), torch.randn(2, 6, 4, 4)
    expected = norm(x)
    unet_2d_gfpruned._kernels_work.cache_clear()
    with monkeypatch.context() as broken:
        broken.setattr(unet_2d_gfpruned, "_launch", fails)
        broken.setattr(unet_2d_gfpruned, "_has_kernels", lambda x: unet_2d_gfpruned._kernels_work(x.device, x.dtype))
        assert torch.equal(norm(x), expected)
        assert torch.equal(norm(x), expected)
    unet_2d_gfpruned._kernels_work.cache_clear()
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("Triton does not work on cpu with torch.float32; ") and said.endswith(": Failed to find C compiler")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.randn(2, 7, 4)}, r"group_sizes=\(3, 1, 2\) must be those of the 7 channels of x, got weights of shape"),
        ({"sizes": (3, 1)}, r"group_sizes=\(3, 1\) must be those of the 6 channels of x"),
        ({"weights": torch.ones(6, 2)}, r"got weights of shape \(6, 2\), 6 values of gamma and 6 of beta"),
        ({"gamma": torch.ones(5)}, "5 values of gamma and 6 of beta"),
        ({"beta": torch.ones(7)}, "6 values of gamma and 7 of beta"),
        ({"gamma": torch.ones(6, device="meta")}, "x is on cpu, which is not where all of weights, gamma and beta are: meta"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changed: dict, message: str):
    """A kernel would read and write beyond its tensors."""
    arguments = {"x": torch.randn(2, 6, 4), "weights": torch.ones(6, 3), "sizes": (3, 1, 2)}
    arguments = {**arguments, "gamma": torch.ones(6), "beta": torch.ones(6), **changed}
    with pytest.raises(ValueError, match=message):
        weighted_group_norm(*arguments.values(), 1e-5)


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 1, 1)])
def test_empty_batches_and_single_positions(shape: tuple[int, ...], device: str):
    """Nothing to normalize, and statistics over channels alone."""
    norm = RaggedGroupNorm([3, 1, 2]).to(device)
    x = torch.randn(shape, device=device, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    expected = [F.group_norm(part, 1, eps=norm.eps) for part in x.detach().cpu().split([3, 1, 2], dim=1)] if shape[0] else [x]
    torch.testing.assert_close(y.detach().cpu(), torch.cat(expected, dim=1).detach().cpu(), rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("offset", "spread", "dtype"),
    [
        *((*condition, dtype) for condition in CONDITIONS for dtype in (torch.float32, torch.bfloat16, torch.float64)),
        *((*condition, torch.float16) for condition in CONDITIONS if max(condition) < 1e3),  # of its range
    ],
)
def test_gpu_equals_cpu(offset: float, spread: float, dtype: torch.dtype, memory_format: torch.memory_format):
    """The kernels themselves."""
    norm = RaggedGroupNorm([3, 12, 1, 8])
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, direction = ((torch.randn(4, 24, 16, 16) * scale + shift).to(dtype) for scale, shift in ((spread, offset), (1, 0)))
    expected = outputs_and_gradients(copy.deepcopy(norm).double(), x.double(), direction.double())
    on_gpu = copy.deepcopy(norm).double() if dtype == torch.float64 else copy.deepcopy(norm)
    found = outputs_and_gradients(on_gpu.cuda(), x.cuda().contiguous(memory_format=memory_format), direction.cuda())
    conditioning = 1 + abs(offset) / spread  # of means that are taken in float32
    for result, exact in zip(found, expected):
        statistics = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        tolerance = max(4 * torch.finfo(dtype).eps + 20 * conditioning * statistics, 1e-7)  # eps is float32 in kernels
        assert (result - exact).abs().max() <= tolerance * exact.abs().max()


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


def test_compiled_norms_make_no_tables_and_call_no_library():
    """Tables are constants of the compiled code: to make them anew takes more kernels than the norm itself. Products with them
    are fused with the rest, which a matrix product is not."""
    torch._dynamo.reset()
    made = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        made.extend(str(node.target) for node in graph.graph.nodes if node.op in ("call_function", "call_method"))
        return graph

    norm, x = RaggedGroupNorm([3, 1, 2]), torch.randn(2, 6, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(norm, backend=backend, fullgraph=True)(x), norm(x), rtol=1e-5, atol=1e-5)
    unwanted = ("arange", "repeat_interleave", "tensor", "contiguous", "matmul")
    assert made and not [name for name in made if any(word in name for word in unwanted)]


def test_an_export_leaves_nothing_behind():
    """Tensors are fakes while a model is exported: a cached one would spoil the norms of all later models."""
    norm, x = RaggedGroupNorm([4, 1, 2]), torch.randn(2, 7, 4, 4)  # sizes that no other test has cached
    exported = torch.export.export(norm, (x,), strict=False).module()
    expected = torch.cat([F.group_norm(part, 1, eps=norm.eps) for part in x.split([4, 1, 2], dim=1)], dim=1)
    torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)
