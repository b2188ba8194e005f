"""pruning/side_by_side.py: two models of one architecture in one pass, layer by layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.pruning.side_by_side import Pair, side_by_side
from helpers.families import BASES, build, inputs


@pytest.mark.parametrize("family", BASES)
def test_outputs_are_those_of_the_two_models(family: str) -> None:
    """All weights differ, those of tables as well, which are in no layer."""
    first, second = build(family), build(family, seed=1)
    seen: list[str] = []

    def visit(name: str, layer: nn.Module, pair: Pair) -> bool:
        seen.append(name)
        torch.testing.assert_close(layer(pair.masked_input), pair.masked_output)
        return False

    with side_by_side(first, second, visit) as run:
        found = run(inputs(first))
    layers = {name for name, module in first.named_modules() if isinstance(getattr(module, "weight", None), nn.Parameter)}
    assert set(seen) == layers and len(layers) > 10
    with torch.no_grad():
        wanted = [family_of(model).output(model, inputs(model)) for model in (first, second)]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # afterwards, they are as before
        assert torch.equal(family_of(first).output(first, inputs(first)), wanted[0])
