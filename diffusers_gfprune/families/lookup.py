"""The registry of families. A new architecture is added here."""

from __future__ import annotations

from torch import nn

from .base import Family
from .dit_transformer_2d import DiTTransformer2DFamily
from .pixart_transformer_2d import PixArtTransformer2DFamily
from .sd3_transformer_2d import SD3Transformer2DFamily
from .unet_2d import UNet2DFamily
from .unet_2d_condition import UNet2DConditionFamily

__all__ = ["FAMILIES", "family_named", "family_of"]

FAMILIES: list[Family] = [
    UNet2DFamily(),
    UNet2DConditionFamily(),
    DiTTransformer2DFamily(),
    PixArtTransformer2DFamily(),
    SD3Transformer2DFamily(),
]


def _supported() -> str:
    return ", ".join(family.dense_class.__name__ for family in FAMILIES)


def family_of(model: nn.Module) -> Family:
    """The family of a model: dense, masked, pruned or exported.

    Raises:
        ValueError: The model does not belong to a supported family.
    """
    for family in FAMILIES:
        if isinstance(model, family.dense_class) or getattr(model, "family", None) is family:  # exports have the attribute
            return family
    raise ValueError(f"a {type(model).__name__} cannot be pruned; supported: {_supported()}")


def family_named(class_name: str) -> Family:
    """The family with a dense or pruned class of the given name.

    Raises:
        ValueError: The name does not belong to a supported family.
    """
    for family in FAMILIES:
        if class_name in (family.dense_class.__name__, family.pruned_class.__name__):
            return family
    raise ValueError(f"a {class_name} cannot be pruned; supported: {_supported()}")
