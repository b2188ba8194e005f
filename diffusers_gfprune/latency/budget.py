"""Measurements for a latency budget before the first step, with the same result on every rank.

    table of layer times  ->  ladders of widths  ->  models of planned widths, built and timed  ->  corrected latency model

Rank 0 measures; the other ranks wait and receive its result as JSON, bit for bit. A resumed run reads the result from its
checkpoint instead, since a second measurement would lead to other widths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..distributed import made_by_first_rank
from ..metrics.cache import TensorCache
from ..metrics.speed import SpeedSetting, compilation_error
from ..pruning.budget import select_units
from ..pruning.channel_groups import ChannelGroup
from ..pruning.compaction import compact, plan_compaction
from ..pruning.cost_model import CostModel
from ..pruning.depth import is_reachable, plan_widths
from .calibration import TimePair, calibrate, latency_meter
from .layer_times import layer_shares
from .model import LatencyModel

__all__ = ["check_setting", "measured_latency_model", "model_of_widths"]


def model_of_widths(
    unet: nn.Module, groups: Sequence[ChannelGroup], widths: np.ndarray, attention_unit: str = "head_dim"
) -> nn.Module:
    """A compacted model that keeps the first units of each group, for timing only.

    Args:
        unet: The dense model; it is not modified.
        groups: Its channel groups.
        widths: Channels that each group keeps, widths of its ladder, with shape `(groups,)`.
        attention_unit: As in `width_ladder`.
    """
    masks = {
        group.name: select_units(group, torch.zeros(group.num_units), int(width), attention_unit).float()
        for group, width in zip(groups, widths)
    }
    return compact(unet, plan_compaction(unet, groups, masks))


def check_setting(measurements: Mapping, setting: SpeedSetting) -> None:
    """Check that a latency model was measured in a setting; earlier versions did not save it.

    Args:
        measurements: Second return value of `measured_latency_model`.
        setting: Settings of the forward passes that a budget is for.

    Raises:
        ValueError: It was measured in another one.
    """
    saved = measurements.get("setting") or {}
    for name, value in dataclasses.asdict(setting).items():
        if saved.get(name, value) != value:
            option = "latency_backend" if name == "mode" else f"latency_{name}"
            raise ValueError(f"times were measured with {option}={saved[name]}, which must be {value}: measure them again")


def measured_latency_model(
    unet: nn.Module,
    groups: Sequence[ChannelGroup],
    ratio: float,
    setting: SpeedSetting,
    ladders_for: Callable[[CostModel], Sequence[Sequence[int]]],
    *,
    sample_size: int | tuple[int, int] | None = None,
    attention_unit: str = "head_dim",
    measurements: Mapping | None = None,
    cache_dir: Path | None = None,
    progress: bool = False,
) -> tuple[LatencyModel, dict]:
    """Measure or load the latency model for planning a budget.

    Args:
        unet: The dense model, without masks, on the target device; it is not modified.
        groups: Its channel groups.
        ratio: Share of the dense time to remove, in (0, 1).
        setting: Settings of the forward passes. In a runtime, layers and models are exported to it.
        ladders_for: Returns the possible widths of each group for a cost model.
        sample_size: Height and width in pixels (default: the model's).
        attention_unit: As in `width_ladder`.
        measurements: Second return value of an earlier call, which replaces the measurements.
        cache_dir: Cache directory for layer times (default: no cache).
        progress: Whether progress bars are shown, for layers and for models.

    Returns:
        The latency model, and JSON values to restore it: `setting`, `model`, and `calibration`, the measured models.

    Raises:
        ImportError: The runtime is not installed.
        ValueError: `measurements` belong to another model or setting, or the measurement failed on rank 0; the latter on every
            rank.
    """
    model = LatencyModel(unet, groups, sample_size, setting.runtime)
    cost = CostModel(unet, groups, sample_size, model.seconds)

    def measure() -> dict:
        if setting.mode == "compiled" and (error := compilation_error(next(unet.parameters()).device)):
            raise ValueError(f"latency_backend=compile does not work on this machine: {error}")
        layers = "timing layers" if progress else None
        model.set_shares(
            layer_shares(unet, model.grids, model.calls, setting, sample_size, TensorCache(cache_dir), progress=layers)
        )
        narrowest = np.array([ladder[-1] for ladder in ladders_for(cost)])
        bar = tqdm(desc="timing models", unit="model", disable=not progress)
        with bar, latency_meter(unet, setting, sample_size) as measure_model:

            def measured(widths: np.ndarray) -> TimePair:
                pair = measure_model(model_of_widths(unet, groups, widths, attention_unit))
                bar.update()
                return pair

            def planned() -> np.ndarray | None:
                ladders = ladders_for(cost)  # anew, since possible widths depend on the correction, too
                return plan_widths(cost, "latency", ratio, ladders) if is_reachable(cost, "latency", ratio, ladders) else None

            calibration = calibrate(model, ratio, narrowest, planned, measured)
        return {"setting": dataclasses.asdict(setting), "model": model.to_dict(), "calibration": calibration}

    measurements = made_by_first_rank(measure) if measurements is None else dict(measurements)
    if "model" not in measurements:
        raise ValueError("the measured times are damaged: they must have an entry model")
    check_setting(measurements, setting)
    model.load_dict(measurements["model"])
    return model, measurements
