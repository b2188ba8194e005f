"""`results.json`: figures of a model and its reference model, and everything that they depend on.

Pruning runs and evaluations write the same file, with different names of the two models (`ROLES`): a run compares `pruned`
with `dense`, an evaluation compares `model` with `reference_model`.

    {"format_version": 4, "kind": "pruning run",
     "dense":  {"name": "dense", "parameters": 1201761, "macs": 28967936, ..., "quality": {"fd_pixels": 0.05}, "speed": [...]},
     "pruned": {...},
     "evaluation": {"sampler": "DDIM", "num_images": 1000, "seed": 1234, ...}}

`read_results` reads every format version. In versions 1 to 3 of a run, metrics are stored next to the costs of a model, and
`speed` next to the models; in versions 1 and 2 a model has a single `latency` instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import get_type_hints

__all__ = ["EVALUATION", "FORMAT_VERSION", "PRUNING_RUN", "ModelFigures", "Results", "read_results"]

FORMAT_VERSION = 4
PRUNING_RUN, EVALUATION = "pruning run", "evaluation"
# Keys of the model and of its reference, by kind of results
ROLES = {PRUNING_RUN: ("pruned", "dense"), EVALUATION: ("model", "reference_model")}


@dataclass
class ModelFigures:
    """Figures of one model; None if not measured.

    Attributes:
        name: Hub id, or last part of a path; `dense` or `pruned` in a run.
        revision: Commit on the Hub.
        weights: CRC-32 of the weights, in hexadecimal.
        ema: Whether the weights are an exponential moving average; None if unknown.
        parameters: Number of trainable values.
        macs: Multiply-accumulates of one forward pass at batch size 1.
        weight_file_bytes: Size of the weights as safetensors, in bytes.
        step_loss: Mean squared error of the prediction on held-out images; for consistency models, its distance to that of the
            dense model, which then has 0.
        step_loss_by_timestep: Step loss by timestep.
        quality: Distances and similarities by metric, such as `fid`, `kid`, `fd_efflite0`, `ssim_to_dense`.
        speed: One entry per setting: the rows of `metrics.speed.measure_speed` without `model`.
        scheduler: Configuration of the noise scheduler of training, which is also used for sampling.
        step_loss_null_label: Step loss with the null label, or the empty prompt, for all images, if the model has one.
    """

    name: str
    revision: str | None = None
    weights: str | None = None
    ema: bool | None = None
    parameters: int | None = None
    macs: int | None = None
    weight_file_bytes: int | None = None
    step_loss: int | float | None = None
    step_loss_by_timestep: dict | None = None
    quality: dict = field(default_factory=dict)
    speed: list = field(default_factory=list)
    scheduler: dict | None = None
    step_loss_null_label: int | float | None = None

    @classmethod
    def from_dict(cls, values: Mapping) -> ModelFigures:
        """From JSON values.

        Raises:
            ValueError: A field is unknown or has another type.
            TypeError: `name` is missing.
        """
        types = get_type_hints(cls)
        unknown = sorted({*values} - {*types})
        if unknown:
            raise ValueError(f"unknown field {unknown[0]}")
        for name, value in values.items():
            _typed(types[name], name, value)
        numbers = {**values.get("quality", {}), **(values.get("step_loss_by_timestep") or {})}
        for name, value in numbers.items():
            _typed(int | float | None, name, value)
        for entry in values.get("speed", []):
            _typed(dict, "speed", entry)
        return cls(**values)


@dataclass
class Results:
    """The content of `results.json`.

    Attributes:
        kind: `PRUNING_RUN` or `EVALUATION`.
        model: Figures of the pruned or evaluated model.
        reference_model: Figures of the dense model; None in an evaluation without one.
        evaluation: Everything that the figures depend on: sampler, steps, spacing, seed, number of images, feature networks,
            data, dtype, device, versions.
        command: Command line of an evaluation; that of a run is in `pruning_report.json`.
        latency_budget: Requested and reached latency of a run with `target=latency`.
    """

    kind: str
    model: ModelFigures
    reference_model: ModelFigures | None
    evaluation: dict
    command: str | None = None
    latency_budget: dict | None = None

    def to_dict(self) -> dict:
        """JSON values."""
        model, reference = ROLES[self.kind]
        values = {"format_version": FORMAT_VERSION, "kind": self.kind, model: asdict(self.model)}
        values[reference] = None if self.reference_model is None else asdict(self.reference_model)
        values["evaluation"] = self.evaluation
        more = {"command": self.command, "latency_budget": self.latency_budget}
        return values | {name: value for name, value in more.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping) -> Results:
        """From JSON values of any format version.

        Raises:
            ValueError: The values are not results, or a field is missing or malformed.
        """
        version, kind = values.get("format_version"), values.get("kind", PRUNING_RUN)
        if kind not in [*ROLES] or version not in range(1, FORMAT_VERSION + 1):
            raise ValueError(
                f"kind={kind} and format_version={version} must be one of {', '.join(ROLES)} and 1 to {FORMAT_VERSION}"
            )
        try:
            if kind == PRUNING_RUN and version < 4:
                values = _upgraded(values)
            model, reference = ROLES[kind]
            no_reference = kind == EVALUATION and values.get(reference) is None
            return cls(
                kind,
                ModelFigures.from_dict(values[model]),
                None if no_reference else ModelFigures.from_dict(values[reference]),
                _typed(dict, "evaluation", values["evaluation"]),
                _typed(str, "command", values["command"]) if kind == EVALUATION else None,
                values.get("latency_budget"),
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"a field of the results is missing or malformed: {error}") from error


def _typed(kind: type | UnionType, name: str, value: object):
    """The value, if it has the given type; a bool does not count as a number."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind != bool | None):
        raise ValueError(f"{name}={value!r}")
    return value


def _upgraded(values: Mapping) -> dict:
    """Convert results of a run from format version 1 to 3 into version 4."""
    known = {f.name for f in fields(ModelFigures)}
    upgraded = dict(values)
    for role in ROLES[PRUNING_RUN]:
        figures = dict(values[role])
        if "latency" in figures:
            latency = figures.pop("latency")
            speed = [] if latency is None else [latency]
        else:
            speed = [{k: v for k, v in row.items() if k != "model"} for row in values["speed"] if row["model"] == role]
        quality = {name: figures.pop(name) for name in [*figures] if name not in known}
        upgraded[role] = {"name": role, **figures, "quality": quality, "speed": speed}
    return upgraded


def read_results(path: str | Path) -> Results:
    """Read `results.json` of a run or an evaluation, of any format version.

    Args:
        path: The file, or its folder.

    Raises:
        ValueError: The file is missing or cannot be read.
    """
    path = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    try:
        return Results.from_dict(json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
