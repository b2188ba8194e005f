"""Speed and memory: known answers on a small model, and measurements of real models."""

from __future__ import annotations

import copy
import functools
import os
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from diffusers_gfprune.metrics import speed
from diffusers_gfprune.metrics.peak_memory import allocated_at_most
from diffusers_gfprune.metrics.speed import SpeedSetting, measure_speed, parse_settings
from diffusers_gfprune.metrics.speedup import compare_speeds, describe_speedup, median_interval
from diffusers_gfprune.runtimes.forwards import ConversionError
from diffusers_gfprune.runtimes.requirements import RUNTIMES
from helpers import families
from helpers.architectures import build, pruned
from helpers.tiny_pipelines import tiny_pipeline
from helpers.toy import Toy

EAGER = SpeedSetting(2, "float32")
FIGURES = {"latency_ms", "samples_per_second", "speedup", "speedup_interval", "peak_memory_bytes"}
LOG: list[str] = []


class Tiny(Toy):
    """A model with the interface of a UNet and known memory: 3 n bytes at the peak for n bytes of samples."""

    def __init__(self, name: str = "tiny", width: int = 10) -> None:
        super().__init__()
        self.name = name
        self.config = SimpleNamespace(in_channels=1, sample_size=8, class_embed_type=None)
        self.class_embedding = None
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("table", torch.ones(3))

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        first = sample.exp()  # n
        second = first.exp()  # 2 n
        del first  # n
        return UNet2DOutput(torch.cat([second, second], dim=1))  # 3 n


class Logging(Tiny):
    """Logs each run with its mode and inputs."""

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        LOG.append(self.name)
        assert not self.training
        assert not torch.is_grad_enabled()
        return super().forward(sample, timestep)


class Convolution(Tiny):
    """Logs its weights and samples, which have several channels and rows."""

    def __init__(self) -> None:
        super().__init__()
        self.config.in_channels = 3
        self.conv = nn.Conv2d(3, 2, kernel_size=3)

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        last = [tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (sample, self.conv.weight)]
        LOG.append(f"{sample.shape[0]} {sample.dtype} {self.conv.weight.dtype} {last}")
        return UNet2DOutput(self.conv(sample))


class Failing(Tiny):
    """Raises `error` in forward number `at` and later, or in all of a dtype."""

    def __init__(self, error: Exception, at: int = 0, dtype: torch.dtype | None = None) -> None:
        super().__init__("failing")
        self.error, self.at, self.dtype, self.forwards = error, at, dtype, 0

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        self.forwards += 1
        if self.forwards > self.at and self.dtype in (None, sample.dtype):
            raise self.error
        return super().forward(sample, timestep)


class Breaking(Tiny):
    """Cannot be compiled as a whole."""

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        torch._dynamo.graph_break()
        return super().forward(sample, timestep)


class Wide(Tiny):
    """Uses its weights, so that another width is another program."""

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        return UNet2DOutput(super().forward(sample, timestep).sample * self.weight.sum())


# --- figures -----------------------------------------------------------------------------------------------------------


def test_models_are_measured_side_by_side() -> None:
    """Each row has its setting and model."""
    rows = measure_speed({"dense": build("base"), "pruned": pruned("base")}, [EAGER, SpeedSetting(1, "bfloat16")], repeats=2)
    assert [(row["model"], row["batch_size"], row["dtype"]) for row in rows] == [
        ("dense", 2, "float32"),
        ("pruned", 2, "float32"),
        ("dense", 1, "bfloat16"),
        ("pruned", 1, "bfloat16"),
    ]
    for row in rows:
        assert "error" not in row
        assert row["latency_ms"] > 0
        assert row["samples_per_second"] == pytest.approx(row["batch_size"] * 1000 / row["latency_ms"])
        assert (row["mode"], row["memory_format"], row["sample_size"]) == ("eager", "contiguous", [8, 8])
        assert (row["device"], row["threads"]) == ("cpu", 1)
        assert row["hardware"]
    assert rows[0]["speedup"] == rows[2]["speedup"] == 1.0
    assert rows[1]["peak_memory_bytes"] < rows[0]["peak_memory_bytes"]


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_peak_memory_by_hand(dtype: str, size: int) -> None:
    """10 weights, 3 of a buffer, samples of 5 x 1 x 6 x 7 values, 5 timesteps of 8 bytes, and 3 times the samples."""
    (row,) = measure_speed({"tiny": Tiny()}, [SpeedSetting(5, dtype)], sample_size=(6, 7), repeats=1)
    samples = 5 * 6 * 7 * size
    assert row["peak_memory_bytes"] == (10 + 3) * size + samples + 5 * 8 + 3 * samples
    assert row["sample_size"] == [6, 7]


def test_peak_memory_holds_what_kernels_allocate_and_forget() -> None:
    """A median over samples sorts a copy of them inside of the operation: no tensor of the program ever shows it."""
    sample = torch.zeros(1000, 1000)
    result = torch.median(sample.t(), dim=1).values
    assert result.nbytes == 4000
    found = allocated_at_most(lambda: torch.median(sample.t(), dim=1).values, torch.device("cpu"))
    assert found >= sample.nbytes


def test_memory_is_counted_alike_whatever_else_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the difference of the allocator's peak to what it held before, between two waits for the device."""
    calls: list[str] = []
    answers = {"synchronize": None, "reset_peak_memory_stats": None, "memory_allocated": 100, "max_memory_allocated": 175}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name, answer=answer: [calls.append(name), answer][1])
    assert allocated_at_most(lambda: calls.append("forward"), torch.device("cuda")) == 75
    wanted = ["synchronize", "reset_peak_memory_stats", "memory_allocated", "forward", "synchronize", "max_memory_allocated"]
    assert calls == wanted
    calls.clear()
    assert speed.seconds_of(lambda: calls.append("forward"), torch.device("cuda")) >= 0
    assert calls == ["synchronize", "forward", "synchronize"]


def test_speedup_is_the_median_of_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of 1, 2, 9 s against 1, 4, 3 s: ratios 1, 1/2, 3. The ratio of the medians would be 2/3. Twice as many rounds as
    these have an interval, and the first model has none: it is compared with nothing."""
    times = iter([1.0, 1.0, 2.0, 4.0, 9.0, 3.0] * 3)
    monkeypatch.setattr(speed, "seconds_of", lambda action, device: next(times))
    first, second = measure_speed({"a": Tiny(), "b": Tiny()}, [SpeedSetting(4, "float32")], repeats=3)
    assert (first["latency_ms"], first["samples_per_second"], first["speedup"]) == (2000, 2, 1)
    assert (second["latency_ms"], second["samples_per_second"], second["speedup"]) == (3000, pytest.approx(4 / 3), 1)
    assert first["speedup_interval"] is second["speedup_interval"] is None
    first, second = measure_speed({"a": Tiny(), "b": Tiny()}, [SpeedSetting(4, "float32")], repeats=6)
    assert first["speedup_interval"] is None and second["speedup_interval"] == (0.5, 3)


def test_the_interval_of_a_median_by_hand() -> None:
    """Of n rounds, in any order; 2 P(B < k) is 2/64 for n = 6, k = 1, and 2 (1 + 10) / 1024 for n = 10, k = 2."""
    assert median_interval(range(5)) is None
    assert median_interval([5, 3, 1, 4, 2, 0]) == (0, 5)
    assert median_interval(range(10)) == (1, 8)
    assert median_interval(range(2000)) == (955, 1044)  # numbers of subsets that no float holds
    assert median_interval(range(20)) == (5, 14)  # 1 - 2 (1 + 20 + 190 + 1140 + 4845 + 15504) / 2^20 = 0.9586
    assert median_interval(range(10), confidence=0.75) == (2, 7)
    with pytest.raises(ValueError, match="confidence=1 must be between 0 and 1"):
        median_interval(range(10), confidence=1)


@pytest.mark.parametrize(
    ("speedup", "interval", "words"),
    [
        (1.3249, (1.28, 1.35), "1.32 times as fast (1.28 to 1.35)"),
        (0.91, (0.88, 0.94), "0.91 times as fast (0.88 to 0.94)"),
        (1.01, (0.97, 1.04), "no difference (0.97 to 1.04)"),
        (1.02, (1.004, 1.04), "no difference (1.00 to 1.04)"),  # as it is printed
        (1.3, None, "1.30 times as fast (too few rounds for a confidence interval)"),
    ],
)
def test_a_speedup_in_words(speedup: float, interval: tuple | None, words: str) -> None:
    assert describe_speedup(speedup, interval) == words


def test_speeds_side_by_side() -> None:
    """A line a setting, with what could not be measured in its place; a dtype where there are several."""
    setting = {"batch_size": 16, "mode": "compiled", "memory_format": "contiguous"}
    rows = [
        {**setting, "dtype": "float32", "latency_ms": 4.0, "speedup": 1.0, "speedup_interval": None},
        {**setting, "dtype": "float32", "latency_ms": 2.0, "speedup": 2.0, "speedup_interval": [1.9, 2.1]},
        {**setting, "dtype": "bfloat16", "error": "no compiler"},
        {**setting, "dtype": "bfloat16", "latency_ms": 1.0, "speedup": None, "speedup_interval": None},
    ]
    found = [tuple(line.values()) for line in compare_speeds(rows[::2], rows[1::2])]
    assert found == [
        ("batch 16, compiled, float32", 4.0, 2.0, "2.00 times as fast (1.90 to 2.10)"),
        ("batch 16, compiled, bfloat16", None, 1.0, "dense not measured: no compiler"),
    ]
    assert compare_speeds(rows[:1], rows[1:2])[0]["title"] == "batch 16, compiled"
    with pytest.raises(ValueError):
        compare_speeds(rows[:1], rows[1:3])


def test_rounds_are_interleaved() -> None:
    """After warm-up and the count of memory, model by model, rounds go through all models."""
    LOG.clear()
    measure_speed({"A": Logging("a"), "B": Logging("b")}, [EAGER], repeats=3, warmup=2)
    assert "".join(LOG) == "aaa" + "bbb" + "ababab"


def test_models_run_as_the_setting_says() -> None:
    """Batch, dtype and memory format are those of weights and samples, not only of the row."""
    LOG.clear()
    settings = parse_settings([4], ["float32", "bfloat16"], memory_formats=["contiguous", "channels_last"])
    assert all("error" not in row for row in measure_speed({"convolution": Convolution()}, settings, repeats=1))
    assert list(dict.fromkeys(LOG)) == [
        "4 torch.float32 torch.float32 [False, False]",
        "4 torch.float32 torch.float32 [True, True]",
        "4 torch.bfloat16 torch.bfloat16 [False, False]",
        "4 torch.bfloat16 torch.bfloat16 [True, True]",
    ]


@pytest.mark.parametrize("name", ["base", "class-identity", "non-square"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_given_models_stay_as_they_are(name: str, channels_last: bool) -> None:
    """Measured are copies, from which every setting starts anew; nothing is drawn from the global generator."""
    unet = build(name).train()
    unet.mid_block.eval()
    before = copy.deepcopy(unet)
    state = torch.get_rng_state()
    rows = measure_speed({"unet": unet}, [SpeedSetting(1, "bfloat16", channels_last=channels_last), EAGER], repeats=1)
    assert [row["memory_format"] for row in rows] == ["channels_last" if channels_last else "contiguous", "contiguous"]
    assert all("error" not in row for row in rows)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in unet.modules()] == [module.training for module in before.modules()]
    for (key, value), old in zip(unet.state_dict().items(), before.state_dict().values()):
        assert value.dtype == old.dtype
        assert value.stride() == old.stride()
        assert torch.equal(value, old), key
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_the_environment_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log level of the profiler is lent."""
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    measure_speed({"tiny": Tiny()}, [EAGER], repeats=1, warmup=1)
    assert "KINETO_LOG_LEVEL" not in os.environ
    monkeypatch.setenv("KINETO_LOG_LEVEL", "3")
    measure_speed({"tiny": Tiny()}, [EAGER], repeats=1, warmup=1)
    assert os.environ["KINETO_LOG_LEVEL"] == "3"


# --- runtimes ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_models_are_measured_in_a_runtime(runtime: str) -> None:
    """On the CPU, as they are exported: interleaved, with a speed-up, and the version of the runtime."""
    unets = {"dense": tiny_pipeline().unet, "pruned": tiny_pipeline(block_out_channels=(4, 4)).unet}
    dense, pruned = measure_speed(unets, [SpeedSetting(2, "float32", runtime)], repeats=6)
    assert "error" not in dense and "error" not in pruned
    assert (dense["mode"], dense["device"], dense["threads"]) == (runtime, "cpu", torch.get_num_threads())
    assert dense["runtime_version"] == __import__(runtime).__version__
    assert dense["speedup"] == 1 and pruned["speedup"] > 0 and len(pruned["speedup_interval"]) == 2
    assert dense["latency_ms"] > 0 and dense["peak_memory_bytes"] is None


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("family", families.BASES)
def test_models_of_every_family_run_in_runtimes(family: str, runtime: str) -> None:
    """With labels, or embeddings of text."""
    (row,) = measure_speed({"dense": families.build(family)}, [SpeedSetting(2, "float32", runtime)], repeats=1, warmup=1)
    assert row.get("error") is None and row["latency_ms"] > 0


def test_what_a_runtime_cannot_run_is_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason. Other modes are measured all the same."""

    def fails(*args) -> None:
        raise ConversionError("openvino cannot run this model: no kernel in /opt/secret/lib/x.so")

    monkeypatch.setattr(speed, "model_call", fails)
    eager, failed = measure_speed({"tiny": Tiny()}, [EAGER, SpeedSetting(2, "float32", "openvino")], repeats=1)
    assert "error" not in eager
    assert failed["error"] == "ConversionError: openvino cannot run this model: no kernel in x.so"
    assert not FIGURES & set(failed)


# --- what the machine cannot do ----------------------------------------------------------------------------------------


def test_a_dtype_that_is_not_supported_is_an_entry() -> None:
    """One line, in the place of the figures; everything else is measured."""
    error = NotImplementedError('"cat" not implemented for Half\nsecond line')
    models = {"failing": Failing(error, dtype=torch.float16), "tiny": Tiny()}
    half, tiny_half, full, tiny_full = measure_speed(models, [SpeedSetting(1, "float16"), EAGER], repeats=2)
    assert half["error"] == 'NotImplementedError: "cat" not implemented for Half'
    assert not FIGURES & set(half)
    assert set(tiny_half) - {"error"} == set(half) - {"error"} | FIGURES
    assert tiny_half["speedup"] is None  # nothing to compare with
    assert tiny_half["latency_ms"] > 0
    assert full["speedup"] == 1.0
    assert tiny_full["speedup"] > 0


def test_a_failure_while_timing_is_an_entry() -> None:
    """Such as memory that another process took in between."""
    models = {"tiny": Tiny(), "failing": Failing(RuntimeError("out of memory"), at=6)}
    tiny, failing = measure_speed(models, [EAGER], repeats=5, warmup=3)
    assert failing["error"] == "RuntimeError: out of memory"
    assert tiny["speedup"] == 1.0


def test_a_mistake_is_no_entry() -> None:
    """What the machine is not to blame for is raised."""
    with pytest.raises(TypeError, match="a mistake"):
        measure_speed({"failing": Failing(TypeError("a mistake"))}, [EAGER])


# --- compilation -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_models_are_measured() -> None:
    """Compilation fuses the chain of operations, and what is never made takes no memory."""
    eager, compiled = measure_speed({"tiny": Tiny()}, parse_settings([64], modes=["eager", "compiled"]), repeats=2)
    assert (eager["mode"], compiled["mode"]) == ("eager", "compiled")
    assert compiled["latency_ms"] > 0
    held, samples = (10 + 3) * 4 + 64 * 8, 64 * 8 * 8 * 4
    assert eager["peak_memory_bytes"] == held + samples + 3 * samples
    assert held + samples + 2 * samples <= compiled["peak_memory_bytes"] <= eager["peak_memory_bytes"]


def test_a_missing_compiler_is_an_entry(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Compilation needs a C++ compiler, which not every machine has; eager figures are there all the same."""
    import torch._inductor.config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    eager, compiled = measure_speed({"tiny": Tiny()}, parse_settings([3], modes=["eager", "compiled"]), repeats=1)
    assert "error" not in eager
    assert "No working C++ compiler found" in compiled["error"]
    assert "\n" not in compiled["error"]
    assert not FIGURES & set(compiled)


def test_a_model_that_would_run_eagerly_in_part_is_an_entry() -> None:
    """Its time would stand under the name of compiled."""
    (row,) = measure_speed({"breaking": Breaking()}, [SpeedSetting(1, "float32", mode="compiled")], repeats=1)
    assert row["error"].startswith("Unsupported: ")


def test_many_models_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo compiles one function 8 times and then runs it eagerly, or fails; here each of 10 models is a version of one."""
    import torch._dynamo

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    limit = torch._dynamo.config.recompile_limit
    models = {str(width): Wide(width=width) for width in range(2, 12)}
    rows = measure_speed(models, [SpeedSetting(1, "float32", mode="compiled")], repeats=1, warmup=1)
    assert len(rows) == 10
    assert all("error" not in row for row in rows)
    assert torch._dynamo.config.recompile_limit == limit < 10


# --- settings ----------------------------------------------------------------------------------------------------------


def test_settings_are_the_product_of_words() -> None:
    """The last list varies fastest; short names of dtypes are accepted; duplicates are measured once."""
    found = parse_settings([1, 8], ["fp32", "bf16", "float32"], ["eager", "compiled"], ["channels_last"])
    assert found == [
        SpeedSetting(1, "float32", "eager", True),
        SpeedSetting(1, "float32", "compiled", True),
        SpeedSetting(1, "bfloat16", "eager", True),
        SpeedSetting(1, "bfloat16", "compiled", True),
        SpeedSetting(8, "float32", "eager", True),
        SpeedSetting(8, "float32", "compiled", True),
        SpeedSetting(8, "bfloat16", "eager", True),
        SpeedSetting(8, "bfloat16", "compiled", True),
    ]
    assert parse_settings([4]) == [SpeedSetting(4, "float32")]
    assert parse_settings([4], ["fp16"])[0].dtype == "float16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0],), "batch_size=0 must be a whole number"),
        (([1.5],), "batch_size=1.5 must be a whole number"),
        (([],), r"batch_sizes=\[\] must have"),
        (([1], []), r"dtypes=\[\] must have"),
        (([1], ["int8"]), "dtypes=int8 must be one of float32, bfloat16, float16"),
        (([1], ["float32"], ["fast"]), "modes=fast must be one of eager, compiled, onnxruntime, openvino"),
        (([1], ["float32", "bf16"], ["eager", "openvino"]), "dtypes=bfloat16 must be float32 with modes=openvino: measure"),
        (
            ([1], ["float32"], ["onnxruntime"], ["channels_last"]),
            "memory_formats=channels_last must be contiguous with modes=onnxruntime",
        ),
        (([1], ["float32"], ["eager"], ["nhwc"]), "memory_formats=nhwc must be one of contiguous, channels_last"),
    ],
)
def test_unknown_words_are_refused(arguments: tuple, message: str) -> None:
    """The message lists what there is."""
    with pytest.raises(ValueError, match=message):
        parse_settings(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": True, "dtype": "float32"}, "batch_size=True"),
        ({"batch_size": 1, "dtype": "float64"}, "dtype='float64' must be one of"),
        ({"batch_size": 1, "dtype": torch.float32}, "dtype=torch.float32 must be one of"),
        ({"batch_size": 1, "dtype": "float32", "mode": "fast"}, "mode='fast' must be one of eager, compiled, onnxruntime"),
        ({"batch_size": 1, "dtype": "float16", "mode": "openvino"}, "dtype=float16 must be float32 in openvino"),
        (
            {"batch_size": 1, "dtype": "float32", "mode": "openvino", "channels_last": True},
            "memory_format=channels_last must be contiguous in openvino",
        ),
        ({"batch_size": 1, "dtype": "float32", "channels_last": 1}, "channels_last=1 must be True or False"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict, message: str) -> None:
    """Where they are made, not after an hour of measuring others."""
    with pytest.raises(ValueError, match=message):
        SpeedSetting(**arguments)


@pytest.mark.parametrize(
    ("models", "settings", "options", "message"),
    [
        ({}, [EAGER], {}, "models is empty"),
        ({"tiny": Tiny()}, [], {}, "settings is empty"),
        ({"tiny": Tiny()}, [(2, "float32")], {}, "each must be a SpeedSetting"),
        ({"tiny": Tiny()}, [EAGER], {"repeats": 0}, "repeats=0 must be at least 1"),
        ({"tiny": Tiny()}, [EAGER], {"warmup": 0}, "warmup=0 must be at least 1"),
        ({"tiny": Tiny().to("meta")}, [EAGER], {}, "on meta: they must be on a CPU or on a CUDA device"),
        ({"tiny": Tiny(), "other": Tiny().to("meta")}, [EAGER], {}, "on cpu and meta: put all of them on one device"),
    ],
)
def test_impossible_measurements_are_refused(models: dict, settings: list, options: dict, message: str) -> None:
    """In one line, before anything is measured."""
    with pytest.raises(ValueError, match=message):
        measure_speed(models, settings, **options)


def test_a_model_without_a_size_is_refused() -> None:
    """As everywhere where a size is needed."""
    tiny = Tiny()
    tiny.config.sample_size = None
    with pytest.raises(ValueError, match="sample_size=None: pass sample_size"):
        measure_speed({"tiny": tiny}, [EAGER])
