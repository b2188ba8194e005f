"""benchmarks/export_speed.py: rounds are interleaved, ratios have known values, and the table says what was wanted."""

from __future__ import annotations

import export_speed
import pytest

from helpers.scripts import run_script


def row(runtime: str, model: str = "digits") -> dict:
    ratio = {"ratio": 1.6, "interval": [1.55, 1.66]}
    times = {"dense_ms": 8.0, "pruned_ms": 5.0, "speed_up": ratio, "over_eager_dense": {"ratio": 3.2, "interval": None}}
    return {"model": model, "batch_size": 16, "runtime": runtime, "macs_removed": 0.5, "rounds": 3, **times}


def test_rounds_are_interleaved() -> None:
    calls = []
    functions = {key: lambda key=key: calls.append(key) for key in (("a", "dense"), ("a", "pruned"), ("b", "dense"))}
    seconds = export_speed.times(functions, rounds=4)
    assert calls[6:] == [*functions] * 4
    assert all(len(values) == 4 for values in seconds.values())


def test_ratios_are_of_rounds() -> None:
    """A median of ratios is not the ratio of medians."""
    found = export_speed.ratio([1.0, 20.0, 3.0], [1.0, 2.0, 2.0])
    assert found == {"ratio": 1.5, "interval": None}
    slow = [2.0] * 7
    assert export_speed.ratio(slow, [1.0] * 7) == {"ratio": 2.0, "interval": (2.0, 2.0)}


def test_the_tables_have_what_was_wanted() -> None:
    likeness = {"format": "onnx", "dtype": "int8", "bytes": 2**20, "max_relative_error": 0.09, "ssim_to_fp32": 0.99}
    speed = [row("eager"), row("openvino"), row("onnxruntime", "cifar10")]
    lines = export_speed.table({"speed": speed, "likeness": [{**likeness, "psnr_to_fp32": 33.26}]}).splitlines()
    assert lines[2:5] == [
        "| digits, 16 | eager | 8.00 ms | 5.00 ms | 1.60 (1.55 to 1.66) | 3.20 |",
        "| digits, 16 | openvino | 8.00 ms | 5.00 ms | 1.60 (1.55 to 1.66) (≥ 1.5) | 3.20 (≥ 3.0) |",
        "| cifar10, 16 | onnxruntime | 8.00 ms | 5.00 ms | 1.60 (1.55 to 1.66) (≥ 1.9) | 3.20 |",
    ]
    assert lines[-1] == "| onnx | int8 | 1.0 MiB | 9.0e-02 | 0.9900 | 33.3 dB |"


@pytest.mark.slow
def test_the_script_measures_the_digits(tmp_path) -> None:
    words = ["--models", "digits", "--rounds", "7", "--threads", "1", "--num_images", "4", "--num_inference_steps", "5"]
    run = run_script("benchmarks/export_speed.py", *words, "--output", tmp_path / "results.json")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("| digits, 16 |") == 3 and "| torch | fp16 |" in run.stdout
