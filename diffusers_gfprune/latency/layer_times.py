"""Times of layers over their widths, as shares of the time of the dense forward.

The table follows HALP (Shen et al., 2021, https://arxiv.org/abs/2110.10811). Each round r of a workload w times each of its
points once. With t_w(i, o; r) the time from i to o channels and (I, O) the widest point,

    t_w(i, o)      =  median_r t_w(i, o; r) / t_w(I, O; r)  x  median_r t_w(I, O; r)
    share_w(i, o)  =  t_w(i, o) / sum_l t_w(l)(in_l, out_l)  x  median_s L(s) / T(s)

where l are the layer calls of the dense forward pass, T(s) is the time of that pass in round s, and L(s) the time of all its
layers in sequence. Both times of a ratio are taken shortly after each other, under the same load of the machine. Short calls
are interrupted less often than long ones: they are not comparable, so that L and T set the scale. With one call at a time,
weights are outside of the cache if the model is large, as in a forward pass.

The times are those of PyTorch, eagerly, or of the runtime for which the budget is.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..metrics.cache import TensorCache
from ..metrics.model_size import hardware_name, spatial_size
from ..metrics.speed import SpeedSetting, prepare_forward, seconds_of, timed_device
from ..precision import float32_description
from ..runtimes.requirements import runtime_versions
from .layer_forwards import EagerLayers, Forward, Layers, RuntimeLayers
from .layer_workloads import Inputs, Workload

__all__ = ["Grid", "layer_shares", "machine_description", "measure_shares"]

Timer = Callable[[Forward, torch.device], float]
GridPoint = tuple[int, int, int]  # index of a grid, input and output channels

FORMAT = 2  # of the cache; entries of other formats are measured again
ROUNDS = (5, 25)  # minimum, maximum
SECONDS = 2.0  # time limit for a workload, beyond the minimum number of rounds
DENSE_SECONDS = 15.0  # the same for the dense forward pass


@dataclass(frozen=True)
class Grid:
    """Widths at which a workload is timed.

    Attributes:
        workload: The workload.
        wide_in: Input channels in ascending order; `(0,)` if the workload is not two-sided.
        wide_out: Output channels in ascending order.
    """

    workload: Workload
    wide_in: tuple[int, ...]
    wide_out: tuple[int, ...]

    def describe(self) -> dict:
        """JSON values that identify the grid."""
        work = {"kind": type(self.workload).__name__, **dataclasses.asdict(self.workload)}
        return {"workload": work, "wide_in": self.wide_in, "wide_out": self.wide_out}


def machine_description(device: torch.device) -> dict:
    """Machine and software settings that times depend on, as JSON values."""
    return {
        "device": device.type,
        "hardware": hardware_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **float32_description(device),
    }


def layer_shares(
    unet: nn.Module,
    grids: Sequence[Grid],
    calls: Sequence[GridPoint],
    setting: SpeedSetting,
    sample_size: int | tuple[int, int] | None = None,
    cache: TensorCache | None = None,
    progress: str | None = None,
) -> list[np.ndarray]:
    """The table of the module docstring, from the cache or measured.

    Args:
        unet: The dense model, without masks, on the target device.
        grids: The grids to measure.
        calls: The layers of one dense forward pass.
        setting: Batch size, dtype and mode. Layers are timed individually; in PyTorch, always eagerly.
        sample_size: Height and width in pixels (default: the model's).
        cache: Cache for tables (default: no cache).
        progress: Text of the progress bar, if any.

    Returns:
        For each grid, shares of the dense time with shape `(len(wide_in), len(wide_out))`.
    """
    device, runtime = timed_device(unet, setting), setting.runtime
    size = spatial_size(unet, sample_size)
    key = {
        "format": FORMAT,
        **machine_description(device),
        "batch_size": setting.batch_size,
        "dtype": setting.dtype,
        "sample_size": size,
        # For the rest of the forward pass; private entries contain the source of the model
        "config": {name: value for name, value in unet.config.items() if not name.startswith("_")},
        "grids": [grid.describe() for grid in grids],
        "calls": [list(point) for point in calls],
        **({} if runtime is None else {"runtime": runtime, "versions": runtime_versions(runtime)}),
    }

    def measure() -> dict[str, Tensor]:
        inputs = Inputs(setting.batch_size, device, getattr(torch, setting.dtype))
        layers = EagerLayers(inputs) if runtime is None else RuntimeLayers(inputs, runtime)
        alike = dataclasses.replace(setting, mode="eager" if runtime is None else runtime)
        with torch.no_grad():
            dense = prepare_forward(unet, alike, size).forward
            tables = measure_shares(dense, grids, calls, layers, device, progress=progress)
        return {str(number): torch.from_numpy(table) for number, table in enumerate(tables)}

    tables = (cache or TensorCache(None)).get("layer-times", key, measure)
    return [tables[str(number)].numpy() for number in range(len(grids))]


def measure_shares(
    dense: Forward,
    grids: Sequence[Grid],
    calls: Sequence[GridPoint],
    layers: Layers,
    device: torch.device,
    timer: Timer = seconds_of,
    progress: str | None = None,
) -> list[np.ndarray]:
    """Measure the table of the module docstring.

    Args:
        dense: Forward pass of the dense model.
        grids: The grids to measure.
        calls: The layers of that forward pass, each a point of its grid.
        layers: Runs layers.
        device: Device on which they run.
        timer: Returns the seconds of a call on a device.
        progress: Text of the progress bar, if any.

    Returns:
        For each grid, shares of the dense time with shape `(len(wide_in), len(wide_out))`.
    """
    seconds = []
    points = [[(grid.workload, wide_in, wide_out) for wide_in in grid.wide_in for wide_out in grid.wide_out] for grid in grids]
    with tqdm(total=len(grids) + 1, desc=progress, disable=progress is None) as bar:
        for grid, forwards in zip(grids, layers.forwards(points)):
            times = np.array(_rounds(forwards, device, timer, SECONDS))  # (rounds, points)
            medians = np.median(times / times[:, -1:], axis=0) * np.median(times[:, -1])
            seconds.append(medians.reshape(len(grid.wide_in), len(grid.wide_out)))
            bar.update()
        together = layers.sequence([(grids[index].workload, wide_in, wide_out) for index, wide_in, wide_out in calls])
        rounds = _rounds([dense, together], device, timer, DENSE_SECONDS)
        bar.update()
    explained = statistics.median(summed / whole for whole, summed in rounds)
    summed = sum(
        seconds[index][grids[index].wide_in.index(wide_in), grids[index].wide_out.index(wide_out)]
        for index, wide_in, wide_out in calls
    )
    return [table * (explained / summed) for table in seconds]


def _rounds(calls: Sequence[Forward], device: torch.device, timer: Timer, seconds: float) -> list[list[float]]:
    """Time calls in rounds until the time limit, within the minimum and maximum number of rounds."""
    for call in calls:  # warm-up: selects kernels and allocates memory
        timer(call, device)
    rounds: list[list[float]] = []
    least, most = ROUNDS
    spent = 0.0
    while len(rounds) < least or (len(rounds) < most and spent < seconds):
        rounds.append([timer(call, device) for call in calls])
        spent += sum(rounds[-1])
    return rounds
