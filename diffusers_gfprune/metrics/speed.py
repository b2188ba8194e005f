"""Speed and memory of several models: latency, throughput and peak memory of one forward pass.

All models of a setting are timed in interleaved rounds (A B A B ...), so that other load on the machine affects all equally.
With t_m(r) the seconds of model m in round r, and n the batch size,

    latency = median_r t_m(r)        throughput = n / latency        speed-up = median_r t_first(r) / t_m(r)

The speed-up is a median of ratios, not a ratio of medians, because the two times of a ratio are measured directly after each
other. `speedup` computes its confidence interval. `peak_memory` counts memory.

A mode is how models run: eagerly, compiled by `torch.compile`, or exported to a runtime. Runtimes (`runtimes`) execute on the
CPU, in float32, with as many threads as PyTorch, the model exported for the batch size.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..argument_fields import at_least, check_range
from ..errors import portable_error
from ..families.lookup import family_of
from ..runtimes.forwards import ConversionError, model_call
from ..runtimes.program import TensorModel, to_tensors
from ..runtimes.requirements import RUNTIMES, runtime_versions
from .model_size import hardware_name, spatial_size
from .peak_memory import allocated_at_most, storage_bytes
from .speedup import median_interval

__all__ = [
    *("DTYPES", "MODES", "PreparedForward", "SpeedSetting", "compilation", "compilation_error", "measure_speed"),
    *("parse_settings", "prepare_forward", "seconds_of", "timed_device"),
]

DTYPES = ("float32", "bfloat16", "float16")
MODES = ("eager", "compiled", *RUNTIMES)
MEMORY_FORMATS = ("contiguous", "channels_last")
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class SpeedSetting:
    """Settings of a forward pass.

    Attributes:
        batch_size: Number of samples (>= 1).
        dtype: Dtype of weights and samples, one of `DTYPES`; `"float32"` in runtimes.
        mode: One of `MODES`. `"compiled"`: `torch.compile` compiles the whole model, for these shapes.
        channels_last: Whether weights and samples use the channels-last memory format; False in runtimes.

    Raises:
        ValueError: A value is not allowed.
    """

    batch_size: int
    dtype: str
    mode: str = "eager"
    channels_last: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.batch_size, int) or isinstance(self.batch_size, bool) or self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size!r} must be a whole number of samples, at least 1")
        for name, allowed in (("dtype", DTYPES), ("mode", MODES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        if not isinstance(self.channels_last, bool):
            raise ValueError(f"channels_last={self.channels_last!r} must be True or False")
        if self.runtime is not None and self.dtype != "float32":
            raise ValueError(f"dtype={self.dtype} must be float32 in {self.mode}")
        if self.runtime is not None and self.channels_last:
            raise ValueError(f"memory_format=channels_last must be contiguous in {self.mode}, which chooses its own")

    @property
    def runtime(self) -> str | None:
        """The runtime that executes the model; None: PyTorch."""
        return self.mode if self.mode in RUNTIMES else None

    def describe(self) -> str:
        """Batch size, dtype and mode as text: `batch 16, float32, eager`."""
        return f"batch {self.batch_size}, {self.dtype}, {self.mode}"

    @property
    def memory_format(self) -> str:
        """One of `MEMORY_FORMATS`."""
        return MEMORY_FORMATS[self.channels_last]


def parse_settings(
    batch_sizes: Iterable[int],
    dtypes: Iterable[str] = ("float32",),
    modes: Iterable[str] = ("eager",),
    memory_formats: Iterable[str] = ("contiguous",),
) -> list[SpeedSetting]:
    """Every combination of the given lists, the last list varying fastest.

    Args:
        batch_sizes: Batch sizes (each >= 1).
        dtypes: Values from `DTYPES`, or `fp32`, `bf16`, `fp16` for short.
        modes: Values from `MODES`.
        memory_formats: Values from `MEMORY_FORMATS`.

    Raises:
        ValueError: A value is not allowed, a list is empty, or a runtime is combined with what it has not.
    """
    words = {"batch_sizes": list(batch_sizes), "dtypes": [SHORT_DTYPES.get(dtype, dtype) for dtype in dtypes]}
    words |= {"modes": list(modes), "memory_formats": list(memory_formats)}
    for name, known in (("batch_sizes", None), ("dtypes", DTYPES), ("modes", MODES), ("memory_formats", MEMORY_FORMATS)):
        if not words[name]:
            raise ValueError(f"{name}=[] must have at least one entry")
        for word in words[name]:
            if known is not None and word not in known:
                raise ValueError(f"{name}={word} must be one of {', '.join(known)}")
    for mode in (mode for mode in words["modes"] if mode in RUNTIMES):
        for name, only in (("dtypes", "float32"), ("memory_formats", "contiguous")):
            if other := [word for word in words[name] if word != only]:
                raise ValueError(f"{name}={other[0]} must be {only} with modes={mode}: measure {other[0]} separately")
    return [
        SpeedSetting(batch_size, dtype, mode, memory_format == "channels_last")
        for batch_size, dtype, mode, memory_format in itertools.product(*(dict.fromkeys(words[name]) for name in words))
    ]


def measure_speed(
    models: Mapping[str, nn.Module],
    settings: Sequence[SpeedSetting],
    *,
    sample_size: int | tuple[int, int] | None = None,
    repeats: int = 20,
    warmup: int = 3,
    progress: str | None = None,
) -> list[dict]:
    """Time models in interleaved rounds, in every setting.

    Copies of the models are timed, in evaluation mode and without gradients. The given models and the global random state are
    unchanged. All copies of a setting are on the device at once, or in a runtime on the CPU. `float32` follows
    `torch.backends`, and may mean TF32 in convolutions. Compilation discards everything that `torch.compile` compiled before
    in this process.

    Args:
        models: Models by name, all on one device: a CPU or a CUDA device. The others are compared with the first.
        settings: Settings to measure.
        sample_size: Height and width in pixels (default: each model's own).
        repeats: Number of rounds (>= 1); each times every model once.
        warmup: Number of forward passes of each model before timing (>= 1), in which it is compiled and fills its caches.
        progress: Label of a progress bar; None: no bar.

    Returns:
        A dict for each setting and model, models varying fastest:

        - `model`, the name; `batch_size`, `dtype`, `mode` and `memory_format`, the setting; `sample_size`, `[height, width]`;
        - `latency_ms`, the median time of one forward pass; `samples_per_second` at that latency;
        - `speedup` over the first model (see the module docstring): 1.0 for the first model, `None` if the first model
          failed; `speedup_interval`, `[low, high]`, its confidence interval (see `speedup.median_interval`): `None` for the
          first model and with too few rounds;
        - `peak_memory_bytes`: weights, buffers, arguments, and the maximum that one forward pass allocates (see
          `peak_memory`), without values that the model cached outside of its buffers in its first forward pass; `None` in
          runtimes, whose memory PyTorch does not see;
        - `device`, `"cpu"` or `"cuda"`; `hardware`, its name; `threads` on the CPU;
        - `runtime_version`, in runtimes.

        If a model cannot run (no compiler, no runtime, an operation without this dtype, too little memory), `error` replaces
        the figures: the reason in one line, without local folders.

    Raises:
        ValueError: There are no models, settings, rounds or warm-up passes; the models' devices differ or are not supported;
            a model has no size and none is given.
    """
    _validate(models, settings, repeats, warmup)
    sizes = {name: spatial_size(model, sample_size) for name, model in models.items()}
    rows = []
    with tqdm(total=len(settings) * (len(models) + repeats), desc=progress, disable=progress is None) as bar, torch.no_grad():
        for setting in settings:
            with compilation(setting, len(models)):
                rows += _measure_setting(models, setting, sizes, repeats, warmup, bar.update)
    return rows


def _validate(models: Mapping[str, nn.Module], settings: Sequence[SpeedSetting], repeats: int, warmup: int) -> None:
    for name, value in (("models", models), ("settings", settings)):
        if not len(value):
            raise ValueError(f"{name} is empty: there must be at least one")
    check_range(at_least(1), repeats=repeats, warmup=warmup)
    for setting in settings:
        if not isinstance(setting, SpeedSetting):
            raise ValueError(f"settings has {setting!r}: each must be a SpeedSetting")
    devices = sorted({str(next(model.parameters()).device) for model in models.values()})
    if len(devices) > 1:
        raise ValueError(f"the models are on {' and '.join(devices)}: put all of them on one device")
    if torch.device(devices[0]).type not in ("cpu", "cuda"):
        raise ValueError(f"the models are on {devices[0]}: they must be on a CPU or on a CUDA device")


@contextlib.contextmanager
def compilation(setting: SpeedSetting, models: int) -> Iterator[None]:
    """Reset the compiler before and after measuring several models in one setting.

    Otherwise code of earlier settings counts as recompilations of this one, and keeps their models alive.
    """
    if setting.mode != "compiled":
        yield
        return
    import torch._dynamo

    torch._dynamo.reset()
    try:
        # All models share the code of one `forward`, so each counts as a recompilation.
        with torch._dynamo.config.patch(recompile_limit=max(torch._dynamo.config.recompile_limit, models)):
            yield
    finally:
        torch._dynamo.reset()


class _Runner:
    """A copy of a model that is warmed up to be timed, or the error that occurred."""

    def __init__(self, model: nn.Module, setting: SpeedSetting, size: tuple[int, int], warmup: int) -> None:
        self.device, self.seconds = timed_device(model, setting), []
        self.error: str | None = None
        self.peak_memory: int | None = None
        with self._recorded_error():
            self.forward, tensors = prepare_forward(model, setting, size)
            for _ in range(warmup):
                self.forward()
            if setting.runtime is None:
                self.peak_memory = storage_bytes(tensors) + allocated_at_most(self.forward, self.device)

    @contextlib.contextmanager
    def _recorded_error(self) -> Iterator[None]:
        """Record an error, and release the copy."""
        try:
            yield
        # From the device, its allocator, Dynamo, Inductor or a runtime
        except (RuntimeError, ImportError, ConversionError) as error:
            self.error, self.forward = portable_error(error), None

    def time(self) -> None:
        """Time one forward pass, unless there was an error."""
        if self.error is None:
            with self._recorded_error():
                self.seconds.append(seconds_of(self.forward, self.device))


def _measure_setting(
    models: Mapping[str, nn.Module],
    setting: SpeedSetting,
    sizes: Mapping[str, tuple[int, int]],
    repeats: int,
    warmup: int,
    advance: Callable[[], object],
) -> list[dict]:
    device = timed_device(next(iter(models.values())), setting)
    machine = {"device": device.type, "hardware": hardware_name(device), "threads": torch.get_num_threads()}
    runners = {}
    for name, model in models.items():
        runners[name] = _Runner(model, setting, sizes[name], warmup)
        advance()
    for _ in range(repeats):
        for runner in runners.values():
            runner.time()
        advance()
    first = next(iter(runners.values()))
    rows = []
    for name, runner in runners.items():
        row: dict = {
            "model": name,
            "batch_size": setting.batch_size,
            "dtype": setting.dtype,
            "mode": setting.mode,
            "memory_format": setting.memory_format,
            "sample_size": list(sizes[name]),
        }
        if runner.error is not None:
            row["error"] = runner.error
        else:
            median = statistics.median(runner.seconds)
            # The first model may have failed after some rounds
            ratios = [] if first.error is not None else [a / b for a, b in zip(first.seconds, runner.seconds)]
            row |= {
                "latency_ms": 1000 * median,
                "samples_per_second": setting.batch_size / median,
                "speedup": statistics.median(ratios) if ratios else None,
                "speedup_interval": None if runner is first else median_interval(ratios),
                "peak_memory_bytes": runner.peak_memory,
            }
            if setting.runtime is not None:
                row["runtime_version"] = runtime_versions(setting.runtime)[setting.runtime]
        rows.append({**row, **machine})
    return rows


class PreparedForward(NamedTuple):
    """A forward pass for timing.

    Attributes:
        forward: Runs it.
        tensors: Weights, buffers and arguments that it holds in PyTorch; none in a runtime.
    """

    forward: Callable[[], object]
    tensors: list[Tensor]


def timed_device(model: nn.Module, setting: SpeedSetting) -> torch.device:
    """Device of a forward pass: that of the model, or the CPU in a runtime."""
    return torch.device("cpu") if setting.runtime is not None else next(model.parameters()).device


def compilation_error(device: torch.device) -> str | None:
    """Why compilation fails on this machine, in one line. A small function is compiled: a model would take half a minute."""
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
    except (RuntimeError, ImportError) as error:
        return portable_error(error)
    return None


def prepare_forward(model: nn.Module, setting: SpeedSetting, size: tuple[int, int]) -> PreparedForward:
    """Prepare a forward pass for timing, on `timed_device`; the caller disables gradients.

    Args:
        model: A model; it is unchanged.
        setting: Settings of the forward pass.
        size: Height and width in pixels.

    Raises:
        ImportError: The runtime is not installed.
        ConversionError: The runtime cannot convert or load the model.
    """
    device, dtype = timed_device(model, setting), getattr(torch, setting.dtype)
    memory_format = torch.channels_last if setting.channels_last else torch.contiguous_format
    # Copy the given model for every setting: a copy in another dtype has rounded weights.
    twin = copy.deepcopy(model).eval()
    # Diffusers' `to` does the same, but warns about float32
    nn.Module.to(twin, device=device, dtype=dtype, memory_format=memory_format)
    family = family_of(twin)
    inputs = family.example_inputs(twin, *size, setting.batch_size, device, dtype)
    noise = torch.randn(inputs.sample.shape, generator=torch.Generator().manual_seed(0))
    inputs = inputs._replace(sample=noise.to(device=device, dtype=dtype).contiguous(memory_format=memory_format))
    if setting.runtime is not None:
        return PreparedForward(model_call(TensorModel(twin, [*inputs.conditioning]), to_tensors(inputs), setting.runtime), [])
    # fullgraph: otherwise parts that Dynamo cannot compile would run eagerly and be reported as compiled.
    function = torch.compile(twin, fullgraph=True, dynamic=False) if setting.mode == "compiled" else twin
    held = [*twin.parameters(), *twin.buffers(), inputs.sample, inputs.timesteps, *inputs.conditioning.values()]
    return PreparedForward(lambda: family.predict(function, inputs), held)


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, including the device's work."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    action()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
