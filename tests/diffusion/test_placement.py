"""diffusion/placement.py: a model that was moved comes back, also after an error."""

from __future__ import annotations

import pytest
from torch import nn

from diffusers_gfprune.diffusion.placement import moved


class Travelling(nn.Linear):
    """Remembers where it was sent, and stays."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.sent: list[str] = []

    def to(self, device) -> Travelling:
        self.sent.append(str(device))
        return self


def test_models_return_to_where_they_were() -> None:
    models = [Travelling(), Travelling()]
    with moved(models, "cuda:3"):
        assert [model.sent for model in models] == [["cuda:3"]] * 2
    assert [model.sent for model in models] == [["cuda:3", "cpu"]] * 2
    with pytest.raises(KeyError), moved(models[:1], "meta"):
        raise KeyError
    assert models[0].sent[-2:] == ["meta", "cpu"]
