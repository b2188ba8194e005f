"""Frozen models that are on a device only while they are used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["moved"]


@contextmanager
def moved(models: Sequence[nn.Module], device: torch.device | str) -> Iterator[None]:
    """Context in which models are on a device; then each returns to where it was.

    Args:
        models: Models with at least one parameter, each on one device.
        device: The device.
    """
    homes = [next(model.parameters()).device for model in models]
    try:
        for model in models:
            model.to(device)
        yield
    finally:
        for model, home in zip(models, homes):
            model.to(home)
