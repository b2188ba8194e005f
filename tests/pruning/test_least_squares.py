"""Least squares for one layer: known answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diffusers_gfprune.pruning import least_squares
from diffusers_gfprune.pruning.least_squares import LeastSquares, drawn_rows, features, output_rows

ALL = 10**6  # rows: more than there are


def solved(layer: nn.Module, batches: list[tuple[Tensor, Tensor]], ridge: float = 1e-9, rows: int = ALL, kept=None):
    """Changes of weight and bias for batches of inputs and gaps."""
    inputs = torch.arange(layer.weight.shape[1]) if kept is None else torch.tensor(kept)
    sums = LeastSquares(layer, inputs, torch.arange(layer.weight.shape[0]))
    first = 0
    for x, gap in batches:
        sums.add(x, gap, gap, rows, tuple(range(first, first + len(x))))
        first += len(x)
    return sums.solve(ridge)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 5, 3, stride=2), nn.Conv2d(3, 5, 1, bias=False), nn.Linear(3, 5)],
    ids=["convolution", "strided", "pointwise", "linear"],
)
def test_outputs_are_linear_in_features(layer: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8) if isinstance(layer, nn.Conv2d) else torch.randn(2, 7, 3)
    expected = features(layer, x) @ layer.weight.flatten(1).T
    expected = expected if layer.bias is None else expected + layer.bias
    torch.testing.assert_close(output_rows(layer, layer(x)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 5, 3, padding=1), nn.Linear(3, 5)], ids=["convolution", "linear"])
def test_gap_of_other_weights_is_found(layer: nn.Module) -> None:
    """A gap that another weight and bias would close is closed by just these."""
    other = nn.Conv2d(3, 5, 3, padding=1) if isinstance(layer, nn.Conv2d) else nn.Linear(3, 5)
    x = torch.randn(16, 3, 8, 8) if isinstance(layer, nn.Conv2d) else torch.randn(64, 3)
    with torch.no_grad():
        weight, bias = solved(layer, [(x, other(x) - layer(x))])
        torch.testing.assert_close((layer.weight + weight).float(), other.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close((layer.bias + bias).float(), other.bias, rtol=1e-4, atol=1e-5)


def test_only_given_inputs_are_used() -> None:
    layer = nn.Linear(4, 2)
    x = torch.randn(64, 4)
    x[:, 3] = 2 * x[:, 0] - x[:, 1]  # a removed feature
    weight, bias = solved(layer, [(x, x[:, 3:].expand(-1, 2))], kept=[0, 1, 2])
    torch.testing.assert_close(weight.float(), torch.tensor([[2.0, -1.0, 0.0]] * 2), rtol=1e-5, atol=1e-5)
    assert bias.abs().max() < 1e-5


@pytest.mark.parametrize("ridge", [1e-6, 1.0, 1e3])
def test_constant_gap_goes_into_the_bias(ridge: float) -> None:
    layer = nn.Conv2d(3, 2, 3, padding=1)
    gap = torch.tensor([1.5, -2.0]).view(1, 2, 1, 1).expand(4, 2, 8, 8)
    weight, bias = solved(layer, [(torch.randn(4, 3, 8, 8), gap)], ridge)
    assert weight.abs().max() < 1e-6
    torch.testing.assert_close(bias.float(), torch.tensor([1.5, -2.0]), rtol=1e-6, atol=0)


def test_large_ridge_leaves_weights_as_they_are() -> None:
    x = torch.randn(64, 3)
    near, far = (solved(nn.Linear(3, 3, bias=False), [(x, x)], ridge)[0] for ridge in (1e-6, 1e6))
    torch.testing.assert_close(near.float(), torch.eye(3), rtol=1e-4, atol=1e-4)
    assert far.abs().max() < 1e-4


def test_input_of_zeros_changes_the_bias_only() -> None:
    weight, bias = solved(nn.Linear(3, 2), [(torch.zeros(8, 3), torch.ones(8, 2))])
    assert (weight == 0).all() and torch.allclose(bias, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("rows", [ALL, 5], ids=["all rows", "drawn rows"])
def test_batches_add_up(rows: int) -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1)
    x, gap = torch.randn(6, 3, 8, 8), torch.randn(6, 4, 8, 8)
    once = solved(layer, [(x, gap)], 0.1, rows)
    twice = solved(layer, [(x[:4], gap[:4]), (x[4:], gap[4:])], 0.1, rows)
    for one, two in zip(once, twice):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_drawn_rows_are_few() -> None:
    sums = LeastSquares(nn.Conv2d(1, 1, 1), torch.tensor([0]), torch.tensor([0]))
    sums.add(torch.ones(3, 1, 8, 8), torch.ones(3, 1, 8, 8), torch.full((3, 1, 8, 8), 2.0), rows=5, seeds=(1, 2, 3))
    assert sums.gram[1, 1] == 15 and sums.reduce() == pytest.approx(0.5)


def test_each_image_draws_rows_of_its_own() -> None:
    whole = drawn_rows((7, -3, 5), 64, 10)
    torch.testing.assert_close(torch.cat([drawn_rows((7,), 64, 10), drawn_rows((-3, 5), 64, 10)]), whole)
    assert all(len(set(rows)) == 10 and 0 <= min(rows) and max(rows) < 64 for rows in whole.tolist())
    assert whole[0].tolist() != whole[1].tolist() != whole[2].tolist()


CENTRED = [
    *(nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 5, 3, stride=2), nn.Conv2d(3, 5, 3, stride=2, padding=1)),
    *(nn.Conv2d(3, 5, 3, padding=4, dilation=2), nn.Conv2d(3, 5, (1, 3), padding=(0, 1)), nn.Conv2d(3, 5, 5, padding=2)),
]


@pytest.mark.parametrize("layer", CENTRED, ids=lambda layer: f"{layer.kernel_size}{layer.stride}{layer.padding}"[:20])
def test_a_centre_is_what_a_kernel_of_zeros_elsewhere_reads(layer: nn.Conv2d) -> None:
    x = torch.randn(2, 3, 9, 8)
    rows, columns = (k // 2 for k in layer.kernel_size)
    with torch.no_grad():
        centre = layer.weight[:, :, rows, columns].clone()
        layer.weight.zero_()[:, :, rows, columns] = centre
        expected = features(layer, x, centre=True) @ centre.T + layer.bias
        torch.testing.assert_close(output_rows(layer, layer(x)), expected, rtol=1e-4, atol=1e-5)


def test_layers_of_many_features_change_at_the_centre_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gap that other weights there would close is closed by just these."""
    monkeypatch.setattr(least_squares, "MAX_FEATURES", 26)
    layer, x = nn.Conv2d(3, 5, 3, padding=1), torch.randn(16, 3, 8, 8)
    change = torch.zeros(5, 3, 3, 3)
    change[:, :, 1, 1] = torch.randn(5, 3)
    with torch.no_grad():
        gap = torch.nn.functional.conv2d(x, change, torch.ones(5), padding=1)
        weight, bias = solved(layer, [(x, gap)])
        assert len(LeastSquares(layer, torch.arange(3), torch.arange(5)).gram) == 4
    torch.testing.assert_close(weight.float(), change, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias.float(), torch.ones(5), rtol=1e-4, atol=1e-5)
