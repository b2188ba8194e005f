"""Registry of criteria, with one record for each.

Configuration, plan, diagnostics and estimate read the properties of a criterion from its record. The criteria of the package
are in `scoring.importance`; `register_criterion` adds others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["RANKINGS", "Criterion", "criteria", "find_criterion", "register_criterion"]

RANKINGS = ("joint", "group", "sensitivity", "curves", "global")

Score = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class Criterion:
    """A way to score units.

    Attributes:
        name: Name in `GFPruneConfig.criterion` and on the command line.
        function: Maps a `ScoringContext` to scores by group name, float32 with shape `(num_units,)`.
        joint: Maps a `ScoringContext` to `JointScores`, for `ranking="joint"`; None if the criterion scores single units only.
        title: Title in tables (default: the name).
        derivatives: Order of the derivatives of the loss: 0, 1, or 2 if Hessian-vector products may be computed.
        needs_batches: Whether calibration batches are used; otherwise scores depend on weights only.
        needs_target: Whether the loss of a batch is used, which needs a target of the model's process.
        keeps_activations: Whether layer outputs are read, which gradient checkpointing would recompute.
        ranking: Default of `GFPruneConfig.ranking`, one of `RANKINGS`.
        sensitivity_exponent: Default of `GFPruneConfig.sensitivity_exponent`, >= 0.
        passes: Time to score a batch, relative to a training step with the same batch size, >= 0.
        block_passes: Likewise the additional time for each removable block, >= 0.
        weight_gradients: Whether scoring holds the gradients of all weights. With two derivatives it always does.
        activation_memory: Memory of activations at the peak of scoring, relative to what the forward of a training step with
            the same batch size keeps, > 0. With two derivatives it depends on the method of the Hessian-vector product
            (`training.estimate`).

    Raises:
        ValueError: A value is out of range.
    """

    name: str
    function: Score
    joint: Callable | None = None
    title: str = ""
    derivatives: int = 2
    needs_batches: bool = True
    needs_target: bool = True
    keeps_activations: bool = False
    ranking: str = "group"
    sensitivity_exponent: float = 0.3
    passes: float = 1.0
    block_passes: float = 0.0
    weight_gradients: bool = True
    activation_memory: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.name)
        for name, choices in (("derivatives", (0, 1, 2)), ("ranking", RANKINGS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)} must be one of {', '.join(map(str, choices))}")
        for name in ("sensitivity_exponent", "passes", "block_passes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a number >= 0")
        if not 0 < self.activation_memory < math.inf:
            raise ValueError(f"activation_memory={self.activation_memory} must be a number > 0")
        if self.ranking == "joint" and self.joint is None:
            raise ValueError("ranking=joint needs a function that measures joint changes: pass joint")


_CRITERIA: dict[str, Criterion] = {}


def register_criterion(name: str, **properties) -> Callable[[Score], Score]:
    """Decorator: make a function available as `criterion=name`.

    Args:
        name: Name of the criterion.
        **properties: Further fields of its `Criterion`. The defaults are safe for any function; exact values make scoring
            cheaper and estimates more precise.

    Raises:
        ValueError: The name is already registered, or a property is out of range.
    """

    def register(function: Score) -> Score:
        if name in _CRITERIA:
            raise ValueError(f"criterion {name} is already registered")
        _CRITERIA[name] = Criterion(name, function, **properties)
        return function

    return register


def criteria() -> tuple[str, ...]:
    """Names of all registered criteria."""
    return tuple(_CRITERIA)


def find_criterion(name: str) -> Criterion:
    """The record of a criterion.

    Raises:
        ValueError: No criterion has this name.
    """
    if name not in _CRITERIA:
        raise ValueError(f"criterion={name} must be one of {', '.join(_CRITERIA)}")
    return _CRITERIA[name]
