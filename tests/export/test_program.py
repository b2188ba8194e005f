"""program.py: what all formats are made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffusers_gfprune.export.program import random_inputs, remove_idle_squeezes, to_tensors
from diffusers_gfprune.export.verification import sampled_reference
from diffusers_gfprune.pipeline_parts import PipelineParts
from helpers.latent_pipelines import PIPELINES


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


@pytest.mark.parametrize("name", ["sdxl", "pixart"])
def test_recorded_inputs_are_those_of_the_program(name: str, tmp_path: Path) -> None:
    """However the family calls its model; they calibrate int8."""
    parts = PipelineParts.of(PIPELINES[name](tmp_path / name))
    reference = sampled_reference(parts, None, 2, 1, ("a cat",))
    wanted = to_tensors(random_inputs(parts, 2))
    assert len(reference.recorded) == 1 and reference.recorded[0].keys() == wanted.keys()
    for key, values in reference.recorded[0].items():
        assert (values.shape, values.dtype) == (wanted[key].shape, wanted[key].dtype)
