"""Speed and memory of models side by side: latency, throughput and peak memory of one forward.

All models of a setting are timed in interleaved rounds (A B A B ...), so that other load on the machine meets all alike. With
t_m(r) the seconds of model m in round r, and n the batch size,

    latency = median_r t_m(r)        throughput = n / latency        speed-up = median_r t_first(r) / t_m(r)

The speed-up is a median of ratios, not a ratio of medians: both times of a ratio were taken a moment apart. How sure it is,
and what may be said of it, is in `speedup`.

Peak memory is counted, not sampled, and has the same definition everywhere: the bytes of the weights and of the arguments,
plus the most that one forward, after the warm-up, has allocated at a time on top of what was held when it started. On CUDA
the allocator keeps that count. On a CPU no counter exists, so it is summed up from the allocations and releases that PyTorch's
profiler records in order; these are all that PyTorch makes, those inside of kernels and of compiled code too, while scratch
space that a library allocates by itself is missing. The resident size of the process, which `benchmarks/cost.py` takes, needs
a process for each figure and contains whatever else that process has loaded.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import first_line
from ..families.lookup import family_of
from .model_size import hardware_name, spatial_size
from .speedup import median_interval

__all__ = [
    "DTYPES",
    "MEMORY_FORMATS",
    "MODES",
    "SpeedSetting",
    "compilation",
    "measure_speed",
    "parse_settings",
    "portable_error",
    "prepare_forward",
    "seconds_of",
]

DTYPES = ("float32", "bfloat16", "float16")
MODES = ("eager", "compiled")
MEMORY_FORMATS = ("contiguous", "channels_last")
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class SpeedSetting:
    """How a forward is run.

    Attributes:
        batch_size: Samples in it (>= 1).
        dtype: Of weights and samples, one of `DTYPES`.
        compiled: Whether `torch.compile` compiles the whole model, for these shapes.
        channels_last: Whether weights and samples lie in memory with their channels last.

    Raises:
        ValueError: One of them is none of these.
    """

    batch_size: int
    dtype: str
    compiled: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.batch_size, int) or isinstance(self.batch_size, bool) or self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size!r} must be a whole number of samples, at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        for name in ("compiled", "channels_last"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")

    @property
    def mode(self) -> str:
        """One of `MODES`."""
        return MODES[self.compiled]

    def describe(self) -> str:
        """Batch size, dtype and mode in words: `batch 16, float32, eager`."""
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
    """Every combination of what a command line lists, the last list varying fastest.

    Args:
        batch_sizes: Samples in a forward (each >= 1).
        dtypes: Of `DTYPES`, or `fp32`, `bf16`, `fp16` for short.
        modes: Of `MODES`.
        memory_formats: Of `MEMORY_FORMATS`.

    Raises:
        ValueError: A word or a number is none of these, or a list is empty.
    """
    words = {"batch_sizes": list(batch_sizes), "dtypes": [SHORT_DTYPES.get(dtype, dtype) for dtype in dtypes]}
    words |= {"modes": list(modes), "memory_formats": list(memory_formats)}
    for name, known in (("batch_sizes", None), ("dtypes", DTYPES), ("modes", MODES), ("memory_formats", MEMORY_FORMATS)):
        if not words[name]:
            raise ValueError(f"{name}=[] must have at least one entry")
        for word in words[name]:
            if known is not None and word not in known:
                raise ValueError(f"{name}={word} must be one of {', '.join(known)}")
    return [
        SpeedSetting(batch_size, dtype, mode == "compiled", memory_format == "channels_last")
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
    """Time models side by side, in every setting.

    The forwards are those of copies, in evaluation mode and without gradients; the given models and the global random state
    stay as they are. All copies of a setting are on the device at once. `float32` is what `torch.backends` makes of it, which
    may be TF32 in convolutions. Compilation drops what `torch.compile` has compiled before in this process.

    Args:
        models: By name, all on one device: a CPU or a CUDA device. The first is what the others are compared with.
        settings: What to measure.
        sample_size: Height and width in pixels (default: each model's own).
        repeats: Rounds, in each of which every model is timed once (>= 1).
        warmup: Forwards of each model before that (>= 1), in which it is compiled and fills its caches.
        progress: Text of a progress bar, if any.

    Returns:
        A dict for each setting and model, in this order of nesting:

        - `model`, its name; `batch_size`, `dtype`, `mode` and `memory_format`, the setting; `sample_size`, `[height, width]`;
        - `latency_ms`, the median of one forward; `samples_per_second` at that latency;
        - `speedup`, how many times as fast as the first model (see the module docstring): 1.0 for that one itself, `None` if
          it failed; `speedup_interval`, `[low, high]`, the confidence interval of it (see `speedup.median_interval`): `None`
          for the first model, and where there are too few rounds;
        - `peak_memory_bytes`, weights, buffers, arguments, and the most that one forward allocates (see the module docstring);
          not what the model made in its first forward and cached outside of its buffers;
        - `device`, `"cpu"` or `"cuda"`; `hardware`, the name of it; `threads` of PyTorch on the CPU.

        Where the machine cannot do it (no compiler, an operation that lacks the dtype, too little memory), `error` is there
        instead of the figures: one line that says why, without folders of this machine.

    Raises:
        ValueError: There is no model, no setting, no round or no warm-up; the models' devices differ or are of another kind;
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
    for name, value in (("repeats", repeats), ("warmup", warmup)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
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
    """A clean compiler for several models in one setting.

    Compiled code of earlier settings would count as recompilations of this one, and keep their models alive."""
    if not setting.compiled:
        yield
        return
    import torch._dynamo

    torch._dynamo.reset()
    try:
        # All models share the code of one `forward`, and each is a compilation of it.
        with torch._dynamo.config.patch(recompile_limit=max(torch._dynamo.config.recompile_limit, models)):
            yield
    finally:
        torch._dynamo.reset()


@dataclass
class _Runner:
    """A copy of a model that is ready to be timed, or the reason why there is none."""

    forward: Callable[[], object] | None = None
    peak_memory: int = 0
    seconds: list[float] = field(default_factory=list)
    error: str | None = None

    def attempt(self, action: Callable[[], None]) -> None:
        """Run `action` unless something failed before; note what fails now, and give the copy back."""
        if self.error is not None:
            return
        try:
            action()
        except (RuntimeError, ImportError) as error:  # of the device, its allocator, Dynamo, Inductor
            self.error = portable_error(error)
            self.forward = None


def _measure_setting(
    models: Mapping[str, nn.Module],
    setting: SpeedSetting,
    sizes: Mapping[str, tuple[int, int]],
    repeats: int,
    warmup: int,
    advance: Callable[[], object],
) -> list[dict]:
    device = next(next(iter(models.values())).parameters()).device
    runners = {name: _Runner() for name in models}
    for name, runner in runners.items():
        runner.attempt(lambda runner=runner, name=name: _prepare(runner, models[name], setting, sizes[name], warmup, device))
        advance()
    for _ in range(repeats):
        for runner in runners.values():
            runner.attempt(lambda runner=runner: runner.seconds.append(seconds_of(runner.forward, device)))
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
            # The first model may have failed in a later round
            ratios = [] if first.error is not None else [a / b for a, b in zip(first.seconds, runner.seconds)]
            row |= {
                "latency_ms": 1000 * median,
                "samples_per_second": setting.batch_size / median,
                "speedup": statistics.median(ratios) if ratios else None,
                "speedup_interval": None if runner is first else median_interval(ratios),
                "peak_memory_bytes": runner.peak_memory,
            }
        rows.append({**row, "device": device.type, "hardware": hardware_name(device), "threads": torch.get_num_threads()})
    return rows


def _prepare(
    runner: _Runner, model: nn.Module, setting: SpeedSetting, size: tuple[int, int], warmup: int, device: torch.device
) -> None:
    """Copy the model, warm the copy up, and count its memory."""
    twin, inputs, runner.forward = prepare_forward(model, setting, size, device)
    for _ in range(warmup):
        runner.forward()
    held = _bytes([*twin.parameters(), *twin.buffers(), inputs.sample, inputs.timesteps, *inputs.conditioning.values()])
    runner.peak_memory = held + _allocated_at_most(runner.forward, device)


def prepare_forward(
    model: nn.Module, setting: SpeedSetting, size: tuple[int, int], device: torch.device
) -> tuple[nn.Module, dict[str, Tensor], Callable[[], object]]:
    """A forward that is ready to be timed, without gradients around it.

    Args:
        model: On `device`; it stays as it is.
        setting: How the forward is run.
        size: Height and width in pixels.
        device: Where it runs.

    Returns:
        A copy of the model in evaluation mode, its arguments, and a function that calls the one with the other.
    """
    dtype = getattr(torch, setting.dtype)
    memory_format = torch.channels_last if setting.channels_last else torch.contiguous_format
    # Any later setting starts from the given model, not from a copy that was rounded for an earlier one.
    twin = copy.deepcopy(model).eval()
    nn.Module.to(twin, dtype=dtype, memory_format=memory_format)  # that of Diffusers does the same, and warns of float32
    family = family_of(twin)
    inputs = family.example_inputs(twin, *size, setting.batch_size, device, dtype)
    noise = torch.randn(inputs.sample.shape, generator=torch.Generator().manual_seed(0))
    inputs = inputs._replace(sample=noise.to(device=device, dtype=dtype).contiguous(memory_format=memory_format))
    # The whole model or nothing: where Dynamo gives up on a part, that part would run eagerly under the name of compiled.
    function = torch.compile(twin, fullgraph=True, dynamic=False) if setting.compiled else twin
    return twin, inputs, lambda: family.predict(function, inputs)


def portable_error(error: Exception) -> str:
    """What an error says first, of at most 300 characters. Files keep their names and lose their folders: results travel."""
    reason = re.sub(r"(?<![\w.])/(?:[^\s/:'\"]+/)+", "", first_line(error) if str(error).strip() else "no message")
    return f"{type(error).__name__}: {reason}"[:300]


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device is done."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    action()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Memory of tensors, of which several may share one."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _allocated_at_most(forward: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a call has allocated at a time, its result among them, on top of what is held already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet_profiler(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = forward()
    del result
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes, initial=0))


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Its library reads its log level from the environment, and otherwise reports an error where there is no GPU."""
    name = "KINETO_LOG_LEVEL"
    unset = name not in os.environ
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if unset:
            del os.environ[name]
