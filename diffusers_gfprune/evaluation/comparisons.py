"""Comparison of evaluations: the settings in which they differ, and a table of their figures.

Figures are comparable only if everything that they depend on is the same. `differing_settings` lists what is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..diffusion.consistency import ConsistencyProcess
from ..diffusion.ddpm import process_entries
from ..metrics.speedup import describe_speedup
from ..reports.results import ModelFigures, Results

__all__ = ["common_reference", "comparison_table", "differing_machines", "differing_settings", "reference_title"]

# What may differ in a comparison: `differing_machines` reports it.
FREE = ("versions", "hardware", "threads", "num_processes")
SIMILARITIES = ("ssim_to_dense", "psnr_to_dense")
# What a data set is called
NAMES = ("name", "hub_id", "config_name")
LONG = 16
SETTING = ("batch_size", "dtype", "mode", "memory_format")
MACHINE = ("device", "hardware", "threads", "sample_size", "runtime_version")


def differing_settings(results: Sequence[Results]) -> list[str]:
    """Differing settings that make figures incomparable, each with the values of all evaluations that it matters to.

    Those with similarities to a reference model, or with distances to its outputs as step loss, must have the same reference,
    by its weights: other figures do not depend on it. Those with a step loss of a DDPM must have the same process. Data are
    compared by their content where that is recorded, and else by name.
    """
    settings = [{k: v for k, v in one.evaluation.items() if k not in (*FREE, "similarities")} for one in results]
    differing = _differing(_without_names(settings))
    kinds = [one.evaluation["similarities"] for one in results if one.evaluation.get("similarities")]
    differing |= _differing([{"similarities": kind} for kind in kinds])
    related = [one.reference_model for one in results if one.reference_model is not None and _depends_on_reference(one)]
    differing |= _differing([{"reference_model": {"weights": reference.weights}} for reference in related])
    schedulers = [one.model.scheduler for one in results if one.model.step_loss is not None and one.model.scheduler]
    ddpms = [scheduler for scheduler in schedulers if "beta_schedule" in scheduler]
    differing |= _differing([{"scheduler": process_entries(scheduler)} for scheduler in ddpms])
    return [f"{name}: {', '.join(map(_words, values))}" for name, values in differing.items()]


def _words(value: object) -> str:
    """A setting for a message; a scheduler may have a thousand betas."""
    return f"a list of {len(value)}" if isinstance(value, list) and len(value) > LONG else str(value)


def _depends_on_reference(result: Results) -> bool:
    """Whether some of the figures are relations to the reference model."""
    no_target = result.evaluation.get("sampler") == ConsistencyProcess.sampler_title
    similar = any(result.model.quality.get(metric) is not None for metric in SIMILARITIES)
    return similar or (no_target and result.model.step_loss is not None)


def _without_names(settings: Sequence[dict]) -> Sequence[dict]:
    """Settings without names of the data, where hashes of all images that were read are recorded, and equal.

    The same images have many names: that of the Hub, and relative and absolute paths of copies.
    """
    hashes = [_hashes(one) for one in settings]
    if None in hashes or len({*hashes}) > 1:
        return settings
    content = [{k: v for k, v in (one.get("dataset") or {}).items() if k not in NAMES} for one in settings]
    return [{**one, "dataset": dataset} for one, dataset in zip(settings, content)]


def _hashes(evaluation: Mapping) -> tuple | None:
    """Hashes of the real images of distances and of the held-out images; None if one that was read has none."""
    real, held_out = (evaluation.get("dataset") or {}).get("fingerprint"), evaluation.get("step_loss_fingerprint")
    missing = (evaluation.get("distances") and real is None) or (evaluation.get("step_loss_images") and held_out is None)
    return None if missing else (real, held_out)


def differing_machines(results: Sequence[Results]) -> dict[str, list]:
    """Differing versions and hardware, with the values of all evaluations. Figures stay comparable."""
    return _differing([{k: v for k, v in result.evaluation.items() if k in FREE} for result in results])


def _differing(settings: Sequence[Mapping]) -> dict[str, list]:
    """The values of all evaluations by name, where they differ."""
    flat = [_flat(one) for one in settings]
    values_by_name = {name: [one.get(name) for one in flat] for name in dict.fromkeys(name for one in flat for name in one)}
    return {name: values for name, values in values_by_name.items() if any(value != values[0] for value in values)}


def _flat(values: Mapping, prefix: str = "") -> dict:
    """Nested settings under names with dots, so that only the differing entry is reported."""
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def common_reference(results: Sequence[Results]) -> ModelFigures | None:
    """The reference model, if all evaluations have the same one."""
    references = [result.reference_model for result in results]
    if any(reference is None for reference in references):
        return None
    return references[0] if len({(r.name, r.weights) for r in references}) == 1 else None


def reference_title(reference: ModelFigures) -> str:
    """Title of the reference model, which tells it from an evaluated model of the same name."""
    return f"{reference.name} (reference)"


def comparison_table(results: Sequence[Results]) -> str:
    """A Markdown table with one row per model, the common reference model first; `-` marks missing figures.

    Latencies are shown if all models were timed with the same settings on the same machine, and speed-ups if the models were
    also timed next to the reference model.
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
    names = [titles.get(name, name) for name in metrics]
    header = ["model", "parameters", "MACs", "file", "step loss", *unlabelled, *names, *timed]
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for number, (name, row) in enumerate(rows):
        cells = [name, _big(row.parameters), _big(row.macs), _bytes(row.weight_file_bytes)]
        cells += [_figure(row.step_loss), *(_figure(row.step_loss_null_label) for _ in unlabelled)]
        cells += [_figure(row.quality.get(metric)) for metric in metrics]
        lines.append("| " + " | ".join([*cells, *(column[number] for column in timed.values())]) + " |")
    return "\n".join(lines)


def _timed_alike(figures: Sequence[ModelFigures], speedups: bool) -> dict[str, list[str]]:
    """Columns of all models' latencies and, if the first model is their common reference, speed-ups.

    A column's name has only the part of a setting that varies.
    """
    timed_by_setting: dict[tuple, list[dict]] = {}
    for first in figures[0].speed:
        alike = [
            [entry for entry in row.speed if all(entry.get(k) == first.get(k) for k in (*SETTING, *MACHINE))]
            for row in figures
        ]
        timed = [entries[0] if entries else {} for entries in alike]
        if all(isinstance(entry.get("latency_ms"), int | float) for entry in timed):
            timed_by_setting[tuple(str(first.get(name)) for name in SETTING)] = timed
    varying = [index for index in range(1, len(SETTING)) if len({setting[index] for setting in timed_by_setting}) > 1]
    columns = {}
    for setting, entries in timed_by_setting.items():
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
