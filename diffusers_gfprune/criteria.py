"""Criteria: one record for each way to score units, in one registry.

Configuration, plan, diagnostics and estimate read what they need to know of a criterion from its record. Those that come with
the package are in `scoring.importance`; `register_criterion` adds your own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["RANKINGS", "Criterion", "criteria", "find_criterion", "register_criterion"]

RANKINGS = ("group", "sensitivity", "global")

Score = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class Criterion:
    """A way to score units.

    Attributes:
        name: In `GFPruneConfig.criterion` and on the command line.
        function: From a `ScoringContext` to scores by group name, float32 with shape `(num_units,)`.
        title: In tables (default: the name).
        derivatives: How often losses are differentiated: 0, 1, or 2 where products with the Hessian may be taken.
        needs_batches: Whether calibration batches are scored on; without, only weights are.
        keeps_activations: Whether outputs of layers are read, which gradient checkpointing would compute again.
        ranking: Default of `GFPruneConfig.ranking`, one of `RANKINGS`.
        sensitivity_exponent: Default of `GFPruneConfig.sensitivity_exponent`, >= 0.
        passes: Time to score a batch, in training steps on as many images, >= 0.
        memory: Peak memory of scoring, relative to that of a training step on as many images, > 0; with two derivatives,
            that depends on how the Hessian is multiplied (`training.estimate`).

    Raises:
        ValueError: A value is out of its range.
    """

    name: str
    function: Score
    title: str = ""
    derivatives: int = 2
    needs_batches: bool = True
    keeps_activations: bool = False
    ranking: str = "group"
    sensitivity_exponent: float = 0.3
    passes: float = 1.0
    memory: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.name)
        for name, choices in (("derivatives", (0, 1, 2)), ("ranking", RANKINGS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)} must be one of {', '.join(map(str, choices))}")


_CRITERIA: dict[str, Criterion] = {}


def register_criterion(name: str, **properties) -> Callable[[Score], Score]:
    """Decorator: make a function available as `criterion=name`.

    Args:
        name: Of the criterion.
        **properties: Further fields of its `Criterion`. What is known of its cost and derivatives makes plans more precise
            and scoring cheaper; the defaults are right for any function.

    Raises:
        ValueError: The name is taken, or a property is out of its range.
    """

    def register(function: Score) -> Score:
        if name in _CRITERIA:
            raise ValueError(f"criterion {name} is registered already")
        _CRITERIA[name] = Criterion(name, function, **properties)
        return function

    return register


def criteria() -> tuple[str, ...]:
    """Names of all registered criteria."""
    return tuple(_CRITERIA)


def find_criterion(name: str) -> Criterion:
    """The record of a criterion.

    Raises:
        ValueError: None has this name.
    """
    if name not in _CRITERIA:
        raise ValueError(f"criterion={name} must be one of {', '.join(_CRITERIA)}")
    return _CRITERIA[name]
