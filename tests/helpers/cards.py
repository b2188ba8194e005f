"""Helpers for tests of model cards: results and reports of committed runs, rendered."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers_gfprune.reports import model_card
from diffusers_gfprune.reports.results import Results

ROLES = ("dense", "pruned")
EARLIER = ("parameters", "macs", "weight_file_bytes", "step_loss")  # figures of a model in results of format 3


def content(run: Path) -> tuple[dict, dict]:
    return tuple(json.loads((run / name).read_text()) for name in ("results.json", "pruning_report.json"))


def render_card(results: dict, *arguments) -> str:
    """The card of results as their file has them."""
    return model_card.render_card(Results.from_dict(results), *arguments)


def render_eval_results(results: dict, report: dict) -> str | None:
    """Evaluation results of results as their file has them."""
    return model_card.render_eval_results(Results.from_dict(results), report)


def speed_rows() -> list[dict]:
    """Made-up rows of `measure_speed`: eager at two batch sizes, and no compiler."""
    machine = {"dtype": "float32", "memory_format": "contiguous", "device": "cpu", "hardware": "abacus", "threads": 2}
    rows = []
    for batch_size, speedup, low, high in ((1, 1.01, 0.97, 1.04), (16, 1.32, 1.28, 1.35)):
        for model, times in (("dense", 1.0), ("pruned", speedup)):
            interval = None if model == "dense" else [low, high]
            figures = {"latency_ms": 10 * batch_size / times, "speedup": times, "speedup_interval": interval}
            rows.append({"model": model, "batch_size": batch_size, "mode": "eager", **figures, **machine})
    failed = {"batch_size": 16, "mode": "compiled", "error": "InvalidCxxCompiler: none of a|b works", **machine}
    return [*rows, {"model": "dense", **failed}, {"model": "pruned", **failed}]


def with_speed(results: dict, rows: list[dict]) -> dict:
    """Results with these rows of speed, each under its model."""
    own = {role: [{k: v for k, v in row.items() if k != "model"} for row in rows if row["model"] == role] for role in ROLES}
    return {**results, **{role: {**results[role], "speed": own[role]} for role in ROLES}}


def in_format_3(results: dict) -> dict:
    """The same results as earlier versions had them: quality beside the other figures, and speed apart from the models."""
    figures = {role: {k: v for k, v in results[role].items() if k in EARLIER} | results[role]["quality"] for role in ROLES}
    rows = [{"model": role, **row} for role in ROLES for row in results[role]["speed"]]
    return {"format_version": 3, **figures, "speed": rows, "evaluation": results["evaluation"]}
