"""conversion.py: what is left out of programs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diffusers_gfprune.runtimes.conversion import remove_idle_squeezes


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
