"""Speed of exports at half the MACs, and likeness of samples in lower precision.

    python benchmarks/export_speed.py             writes benchmarks/results/export_speed.json (about fifteen minutes)
    python benchmarks/export_speed.py --table     prints the tables of that file

The dense model and the one without half of its MACs (by magnitude) run eagerly, in onnxruntime and in OpenVINO, in float32,
with the batch size fixed at export. In a round, all six run once, so that other load on the machine affects all alike. Ratios
are medians over rounds, with the distribution-free interval of `metrics.speedup`. Threads of a runtime that wait for more
work would take time from the next one: onnxruntime is told to stop them, and a pause comes before every forward.

The second table compares samples of the digits teacher, exported in float16 and in 8 bits, with those of PyTorch in float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from cost import half_masked
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from models import ROOT, build

from diffusers_gfprune.export import export_pipeline, load_exported
from diffusers_gfprune.metrics.model_size import count_macs, hardware_name, spatial_size
from diffusers_gfprune.metrics.speedup import median_interval
from diffusers_gfprune.run_folder import write_json

OUTPUT = ROOT / "benchmarks/results/export_speed.json"
BATCH_SIZES = {"digits": (16,), "cifar10": (1, 16)}
RUNTIMES = {"eager": None, "onnxruntime": "onnx", "openvino": "openvino"}  # and the format of its exports
ROUNDS = {("digits", 16): 101, ("cifar10", 1): 31, ("cifar10", 16): 13}
PAUSE = 0.01  # seconds
# Wanted of a runtime: the dense model's time over the pruned one's, and the eager dense model's over the exported pruned one's
WANTED = {"digits": 1.5, "cifar10": 1.9}
WANTED_OVER_EAGER = {"digits": 3.0}
PRECISIONS = (("onnx", "fp16"), ("onnx", "int8"), ("openvino", "fp16"), ("openvino", "int8"), ("torch", "fp16"))
Forward = Callable[[], object]


def options(runtime: str, threads: int) -> dict:
    """Arguments of a runtime for a number of threads."""
    if runtime == "onnxruntime":
        import onnxruntime

        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads = threads
        session.add_session_config_entry("session.force_spinning_stop", "1")
        return {"sess_options": session}
    return {"config": {"INFERENCE_NUM_THREADS": threads}}


def forwards(models: Mapping[str, UNet2DModel], batch_size: int, threads: int, folder: Path) -> dict[tuple[str, str], Forward]:
    """A forward pass of each model in each runtime, by the names of both, and exports in a folder."""
    found: dict[tuple[str, str], Forward] = {}
    for name, unet in models.items():
        sample = torch.randn(batch_size, unet.config.in_channels, *spatial_size(unet))
        for runtime, format in RUNTIMES.items():
            model = unet
            if format is not None:
                pipe = DDPMPipeline(unet=unet, scheduler=DDPMScheduler())
                path = folder / f"{name}-{runtime}"
                export_pipeline(pipe, path, format=format, batch=batch_size)
                model = load_exported(path, **options(runtime, threads))
            found[runtime, name] = lambda model=model, sample=sample: model(sample, 500)
    return found


def times(functions: Mapping[tuple[str, str], Forward], rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of each function in each round, after a warm-up."""
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in functions}
    with torch.no_grad():
        for function in functions.values():
            function(), function()
        for _ in range(rounds):
            for key, function in functions.items():
                time.sleep(PAUSE)
                start = time.perf_counter()
                function()
                seconds[key].append(time.perf_counter() - start)
    return seconds


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict:
    """Median of the ratios of the rounds, and its confidence interval."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"ratio": statistics.median(ratios), "interval": median_interval(ratios)}


def measure(model: str, batch_size: int, rounds: int, threads: int) -> list[dict]:
    """A row for each runtime."""
    dense = build(model).eval()
    small = half_masked(copy.deepcopy(dense)).compact().eval()
    with tempfile.TemporaryDirectory() as folder:
        seconds = times(forwards({"dense": dense, "pruned": small}, batch_size, threads, Path(folder)), rounds)
    return [
        {
            "model": model,
            "batch_size": batch_size,
            "macs_removed": 1 - count_macs(small) / count_macs(dense),
            "runtime": runtime,
            "dense_ms": 1000 * statistics.median(seconds[runtime, "dense"]),
            "pruned_ms": 1000 * statistics.median(seconds[runtime, "pruned"]),
            "speed_up": ratio(seconds[runtime, "dense"], seconds[runtime, "pruned"]),
            "over_eager_dense": ratio(seconds["eager", "dense"], seconds[runtime, "pruned"]),
            "rounds": rounds,
        }
        for runtime in RUNTIMES
    ]


def likeness(num_images: int, num_inference_steps: int) -> list[dict]:
    """A row for each export of the digits teacher in lower precision."""
    pipe = DDPMPipeline.from_pretrained(ROOT / "training/digits/teacher")
    rows = []
    for format, dtype in PRECISIONS:
        with tempfile.TemporaryDirectory() as folder:
            sampling = {"num_images": num_images, "num_inference_steps": num_inference_steps}
            found = export_pipeline(pipe, Path(folder) / "export", format=format, dtype=dtype, **sampling)
            size = sum(path.stat().st_size for path in Path(folder, "export").glob("model.*"))
        error = found.max_relative_error
        rows.append({"format": format, "dtype": dtype, "bytes": size, "max_relative_error": error, **found.similarity})
    return rows


def table(found: dict) -> str:
    """The results as Markdown tables."""

    def words(value: dict) -> str:
        interval = "" if value["interval"] is None else " ({:.2f} to {:.2f})".format(*value["interval"])
        return f"{value['ratio']:.2f}{interval}"

    lines = [
        "| model and batch | runtime | dense | pruned | dense / pruned (wanted) | eager dense / pruned (wanted) |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["speed"]:
        exported = row["runtime"] != "eager"
        wanted = f" (≥ {WANTED[row['model']]:.1f})" if exported else ""
        over = f" (≥ {WANTED_OVER_EAGER[row['model']]:.1f})" if exported and row["model"] in WANTED_OVER_EAGER else ""
        lines.append(
            f"| {row['model']}, {row['batch_size']} | {row['runtime']} | {row['dense_ms']:.2f} ms | {row['pruned_ms']:.2f} ms "
            f"| {words(row['speed_up'])}{wanted} | {words(row['over_eager_dense'])}{over} |"
        )
    lines += ["", "| format | dtype | size | error | SSIM to fp32 | PSNR to fp32 |", "|---|---|---|---|---|---|"]
    for row in found["likeness"]:
        lines.append(
            f"| {row['format']} | {row['dtype']} | {row['bytes'] / 2**20:.1f} MiB | {row['max_relative_error']:.1e} "
            f"| {row['ssim_to_fp32']:.4f} | {row['psnr_to_fp32']:.1f} dB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=BATCH_SIZES, default=list(BATCH_SIZES))
    parser.add_argument("--rounds", type=int, help="rounds of every case (default: 13 to 101)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every runtime (default: PyTorch's)")
    parser.add_argument("--num_images", type=int, default=64, help="samples of the second table")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="DDIM steps of these samples")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--table", action="store_true", help="print the tables of an existing file and stop")
    args = parser.parse_args()
    if not args.table:
        torch.set_num_threads(args.threads)
        packages = ("torch", "onnx", "onnxruntime", "openvino", "nncf")
        machine = {"hardware": hardware_name(torch.device("cpu")), "threads": args.threads}
        machine |= {"python": platform.python_version(), **{name: version(name) for name in packages}}
        found: dict = {"machine": machine, "speed": [], "likeness": likeness(args.num_images, args.num_inference_steps)}
        for model in args.models:
            for batch_size in BATCH_SIZES[model]:
                rounds = ROUNDS[model, batch_size] if args.rounds is None else args.rounds
                rows = measure(model, batch_size, rounds, args.threads)
                print(json.dumps(rows, indent=2), flush=True)
                found["speed"] += rows
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, found)
    print(table(json.loads(args.output.read_text())))


if __name__ == "__main__":
    main()
