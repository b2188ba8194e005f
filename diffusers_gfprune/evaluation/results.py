"""`results.json` of an evaluation: typed, versioned, with everything a figure depends on; and tables of several.

Figures may be compared only where everything that they depend on is the same: `differing_settings` says what is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ..metrics.speedup import describe_speedup

__all__ = [
    "EvaluationResults",
    "ModelFigures",
    "common_reference",
    "comparison_table",
    "differing_machines",
    "differing_settings",
    "read_results",
    "reference_title",
]

FORMAT_VERSION = 2
KIND = "evaluation"


@dataclass
class ModelFigures:
    """What was measured on one model; None where it was not.

    Attributes:
        name: Hub id, or last part of a path.
        revision: Commit on the Hub.
        weights: CRC-32 of the weights, in hexadecimal.
        ema: Whether the weights are averaged; None if nothing says so.
        parameters: Trained values.
        macs: Multiply-accumulates of one forward at batch 1.
        weight_file_bytes: Of the weights as safetensors.
        step_loss: Mean squared error of the noise prediction on held-out images.
        step_loss_by_timestep: The same by timestep.
        step_loss_null_label: The same with the null label in place of all labels, where the model has one.
        quality: Distances and similarities by metric, such as `fid`, `kid`, `fd_efflite0`, `ssim_to_dense`.
        speed: One entry a setting (see `diffusers_gfprune.evaluation.speed`).
        scheduler: Configuration of the noise scheduler that the model was trained with, which sampling follows.
    """

    name: str
    revision: str | None = None
    weights: str | None = None
    ema: bool | None = None
    parameters: int | None = None
    macs: int | None = None
    weight_file_bytes: int | None = None
    step_loss: float | None = None
    step_loss_by_timestep: dict[str, float] | None = None
    quality: dict[str, float | None] = field(default_factory=dict)
    speed: list[dict] = field(default_factory=list)
    scheduler: dict | None = None
    step_loss_null_label: float | None = None


@dataclass
class EvaluationResults:
    """The content of `results.json`.

    Attributes:
        model: Figures of the model.
        reference_model: Figures of the dense model, where there was one.
        evaluation: What the figures depend on: sampler, steps, spacing, seed, number of images, feature networks, data,
            number type, device, versions.
        command: Command line.
    """

    model: ModelFigures
    reference_model: ModelFigures | None
    evaluation: dict
    command: str

    def to_dict(self) -> dict:
        """JSON values."""
        return {"format_version": FORMAT_VERSION, "kind": KIND, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping) -> EvaluationResults:
        """From JSON values.

        Raises:
            ValueError: They are no results of an evaluation, or of another version.
        """
        if values.get("kind") != KIND or values.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"kind={values.get('kind')} and format_version={values.get('format_version')} must be {KIND} and "
                f"{FORMAT_VERSION}: run evaluate.py on the model first"
            )
        reference = values.get("reference_model")
        try:
            return cls(
                _figures(values["model"]),
                None if reference is None else _figures(reference),
                _typed(dict, "evaluation", values["evaluation"]),
                _typed(str, "command", values["command"]),
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"a field of the results is missing or malformed: {error}") from error


NUMBER = (int, float)
TYPES = {
    "name": str,
    "revision": str,
    "weights": str,
    "ema": bool,
    "parameters": int,
    "macs": int,
    "weight_file_bytes": int,
    "scheduler": dict,
    "step_loss": NUMBER,
    "step_loss_by_timestep": dict,
    "step_loss_null_label": NUMBER,
    "quality": dict,
    "speed": list,
}


def _typed(kind: type | tuple[type, ...], name: str, value: object):
    """The value, if it is of its kind; a truth value is no number."""
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{name}={value!r}")
    return value


def _figures(values: Mapping) -> ModelFigures:
    unknown = sorted({*values} - {f.name for f in fields(ModelFigures)})
    if unknown:
        raise ValueError(f"unknown field {unknown[0]}")
    for name, value in values.items():
        if value is not None or name in ("name", "quality", "speed"):
            _typed(TYPES[name], name, value)
    numbers = {**values.get("quality", {}), **(values.get("step_loss_by_timestep") or {})}
    for name, value in numbers.items():
        if value is not None:
            _typed(NUMBER, name, value)
    for entry in values.get("speed", []):
        _typed(dict, "speed", entry)
    return ModelFigures(**values)


def read_results(folder: str | Path) -> EvaluationResults:
    """Results that an evaluation left in a folder.

    Raises:
        ValueError: There are none, or they cannot be read.
    """
    path = Path(folder) / "results.json"
    try:
        return EvaluationResults.from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ValueError(f"compare={folder} holds no results.json: run evaluate.py on the model first") from None
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# What may differ in a comparison: `differing_machines` reports it.
FREE = ("versions", "hardware", "threads", "num_processes")
SETTING = ("batch_size", "dtype", "mode", "memory_format")
MACHINE = ("device", "hardware", "threads", "sample_size")


def differing_settings(results: Sequence[EvaluationResults]) -> list[str]:
    """Settings in which evaluations differ so that their figures cannot be compared, each with all values."""
    settings = [_flat({k: v for k, v in result.evaluation.items() if k not in FREE}) for result in results]
    found = []
    for name in dict.fromkeys(name for one in settings for name in one):
        values = [one.get(name) for one in settings]
        if any(value != values[0] for value in values):
            found.append(f"{name}: {', '.join(map(str, values))}")
    return found


def differing_machines(results: Sequence[EvaluationResults]) -> dict[str, list]:
    """Versions, hardware and the like in which evaluations differ, which is no reason not to compare them, with all values."""
    settings = [_flat({k: v for k, v in result.evaluation.items() if k in FREE}) for result in results]
    names = dict.fromkeys(name for one in settings for name in one)
    found = {name: [one.get(name) for one in settings] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def _flat(values: Mapping, prefix: str = "") -> dict:
    """Nested settings under names with dots, so that only what differs need be told."""
    found = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def common_reference(results: Sequence[EvaluationResults]) -> ModelFigures | None:
    """The reference model, where all evaluations have the same one."""
    references = [result.reference_model for result in results]
    if any(reference is None for reference in references):
        return None
    return references[0] if len({(r.name, r.weights) for r in references}) == 1 else None


def reference_title(reference: ModelFigures) -> str:
    """What the reference model is called beside the others, one of which may have its name."""
    return f"{reference.name} (reference)"


def comparison_table(results: Sequence[EvaluationResults]) -> str:
    """A Markdown table, a row a model, the common reference model first; `-` where something was not measured.

    Latency is there where all models were timed alike on the same machine, and how many times as fast as the reference model
    they are where they were timed beside it.
    """
    rows = [(result.model.name, result.model) for result in results]
    reference = common_reference(results)
    if reference is not None:
        rows.insert(0, (reference_title(reference), reference))
    figures = [row for _, row in rows]
    metrics = list(dict.fromkeys(name for row in figures for name in row.quality))
    titles = {"ssim_to_dense": "SSIM to dense", "psnr_to_dense": "PSNR to dense (dB)"}
    distances = results[0].evaluation.get("distances")
    for name, entry in distances.items() if isinstance(distances, dict) else ():
        titles[name] = str(entry.get("title", name)) if isinstance(entry, dict) else name
    timed = _timed_alike(figures, speedups=reference is not None)
    unlabelled = ["step loss (null label)"] if any(row.step_loss_null_label is not None for row in figures) else []
    header = [
        "model",
        "parameters",
        "MACs",
        "file",
        "step loss",
        *unlabelled,
        *(titles.get(name, name) for name in metrics),
        *timed,
    ]
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for number, (name, row) in enumerate(rows):
        cells = [name, _big(row.parameters), _big(row.macs), _bytes(row.weight_file_bytes)]
        cells += [_figure(row.step_loss), *(_figure(row.step_loss_null_label) for _ in unlabelled)]
        cells += [_figure(row.quality.get(metric)) for metric in metrics]
        lines.append("| " + " | ".join([*cells, *(column[number] for column in timed.values())]) + " |")
    return "\n".join(lines)


def _timed_alike(figures: Sequence[ModelFigures], speedups: bool) -> dict[str, list[str]]:
    """Columns of all models' latencies and, if the first is what they were timed beside, speed-ups.

    A column's name says no more of a setting than distinguishes it.
    """
    found: dict[tuple, list[dict]] = {}
    for first in figures[0].speed:
        alike = [
            [entry for entry in row.speed if all(entry.get(k) == first.get(k) for k in (*SETTING, *MACHINE))]
            for row in figures
        ]
        timed = [entries[0] if entries else {} for entries in alike]
        if all(isinstance(entry.get("latency_ms"), NUMBER) for entry in timed):
            found[tuple(str(first.get(name)) for name in SETTING)] = timed
    varying = [index for index in range(1, len(SETTING)) if len({setting[index] for setting in found}) > 1]
    columns = {}
    for setting, entries in found.items():
        title = " ".join([f"batch {setting[0]}", *(setting[index] for index in varying)])
        columns[f"latency (ms), {title}"] = [_figure(entry["latency_ms"]) for entry in entries]
        others = [(entry.get("speedup"), entry.get("speedup_interval")) for entry in entries[1:]]
        if speedups and others and all(None not in other for other in others):
            columns[f"speed, {title}"] = ["1", *(describe_speedup(*other) for other in others)]
    return columns


def _big(value: int | None) -> str:
    if value is None:
        return "-"
    unit, name = (1e9, "G") if value >= 1e9 else (1e6, "M")
    return f"{value / unit:.2f}{name}"


def _bytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.3g} MB"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
