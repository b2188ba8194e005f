"""conversion.py: what is left out of programs, and what is moved in them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diffusers_gfprune.runtimes.conversion import lower_channel_sums, remove_idle_squeezes, to_openvino
from diffusers_gfprune.runtimes.sessions import FULL_PRECISION, openvino_core


class Squeezed(nn.Module):
    """Squeezes an axis."""

    def forward(self, x: Tensor, dim: int) -> Tensor:
        return 2 * (x + 1).squeeze(dim)


@pytest.mark.parametrize(("dim", "left"), [(1, 0), (-2, 0), (2, 1)])
def test_only_squeezes_that_do_nothing_are_removed(dim: int, left: int) -> None:
    x = torch.randn(2, 3, 1)
    program = torch.export.export(Squeezed(), (x, dim), dynamic_shapes=({0: torch.export.Dim("batch", max=4)}, None))
    remove_idle_squeezes(program.graph_module)
    assert [node.target for node in program.graph.nodes].count(torch.ops.aten.squeeze.dim) == left
    torch.testing.assert_close(program.module()(x, dim), Squeezed()(x, dim))


class Scaled(nn.Module):
    """Values of channels with a number added, twice read, at the size of the pixels of `x`."""

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        scale = values + 1
        return x * scale + scale


@pytest.mark.parametrize(
    ("shape", "lowered"),
    [((2, 4, 1, 1), True), ((1, 4, 1, 1), True), ((2, 4, 3, 1), False), ((2, 4, 3, 3), False), ((4, 1, 1), False)],
)
def test_only_sums_over_channels_are_lowered(shape: tuple[int, ...], lowered: bool) -> None:
    x, values = torch.randn(2, 4, 3, 3), torch.randn(shape)
    program = torch.export.export(Scaled(), (x, values))
    lower_channel_sums(program.graph_module)
    program.graph_module.graph.lint()
    (sum_,) = (node for node in program.graph.nodes if node.target == torch.ops.aten.add.Tensor and 1 in node.args)
    assert (sum_.args[0].target == torch.ops.aten.squeeze.dims) == lowered
    torch.testing.assert_close(program.module()(x, values), Scaled()(x, values))


class ScaledNorm(nn.Module):
    """The norm of a `scale_shift` block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, 16)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = embedding[:, :, None, None].chunk(2, dim=1)
        return self.norm(x) * (1 + scale) + shift


def test_openvino_runs_scaled_norms_of_fixed_shapes() -> None:
    """Without lowered sums, compilation is a segmentation fault (OpenVINO 2026.4.1)."""
    inputs = {"x": torch.randn(2, 16, 8, 8), "embedding": torch.randn(2, 32)}
    program = torch.export.export(ScaledNorm(), tuple(inputs.values()))
    model = to_openvino(program, {name: list(values.shape) for name, values in inputs.items()}, ["output"])
    assert not model.is_dynamic()
    run = openvino_core().compile_model(model, "CPU", FULL_PRECISION)
    found = run({name: values.numpy() for name, values in inputs.items()})[0]
    torch.testing.assert_close(torch.as_tensor(found), ScaledNorm()(*inputs.values()), rtol=1e-4, atol=1e-5)
