"""Speed on a GPU of the dense, the masked and the compacted model: training steps and forwards, in fp32 and bf16.

    python benchmarks/gpu.py                                writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --modes eager graph compiled   compiled models, too (minutes, most of them compilation)
    python benchmarks/gpu.py --channel_multiple 64          widths that fill the tiles of tensor cores
    python benchmarks/gpu.py --table                        prints the table of that file

The model is the configuration of google/ddpm-cifar10-32 with random weights, pruned to half its MACs with widths that are
multiples of `--channel_multiple`. The masked model has all channels, with the pruned ones at zero, as in the hard phase. A
training step is forward, backward, clipping and AdamW, with weights in fp32 and, for bf16, autocast. A forward has weights in
the dtype itself. Eager is the default of the scripts: the CPU launches each operation and may be slower than the GPU. A CUDA
graph records the same work and launches it at once, so that only the GPU's time counts (with a capturable AdamW). Times are
medians of interleaved rounds (A B C A B C ...), speed-ups medians of the rounds' ratios. fp32 uses PyTorch's default: TF32 in
convolutions.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from cost import half_masked
from models import batches_for, build
from torch import nn

from diffusers_gfprune.errors import one_line
from diffusers_gfprune.metrics.model_size import hardware_name
from diffusers_gfprune.metrics.speed import seconds_of

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "benchmarks/results/gpu.json"
DTYPES = ("float32", "bfloat16")
MODES = ("eager", "graph", "compiled")
PARTS = ("forwards", "steps")


def three_models(device: torch.device, channel_multiple: int = 8) -> tuple[dict[str, nn.Module], float]:
    """The dense, masked and compacted model on a device, by name, and the removed share of MACs."""
    dense = build("cifar10")
    masked = copy.deepcopy(dense)
    half_masked(masked, channel_multiple=channel_multiple)
    pruner = half_masked(copy.deepcopy(dense), channel_multiple=channel_multiple)
    removed = pruner.history[-1].sparsity
    models = {"dense": dense, "masked": masked, "compacted": pruner.compact()}
    return {name: unet.to(device) for name, unet in models.items()}, removed


def replayed(action: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Capture an action in a CUDA graph, and return a function that replays it."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # warm-up: a graph cannot capture compilation and new optimizer states
        for _ in range(3):
            action()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        action()

    def replay(owner=action) -> None:  # `owner` keeps weights and optimizer states alive for the graph
        graph.replay()

    return replay


def callable_of(unet: nn.Module, mode: str) -> Callable:
    return torch.compile(unet, fullgraph=True, dynamic=False) if mode == "compiled" else unet


def step_of(unet: nn.Module, batch: tuple[torch.Tensor, ...], dtype: str, mode: str) -> Callable[[], None]:
    """A function that runs one training step per call."""
    noisy, noise, timesteps = batch
    optimizer = torch.optim.AdamW(unet.train().parameters(), lr=1e-5, capturable=mode == "graph")
    forward = callable_of(unet, mode)
    autocast = contextlib.nullcontext() if dtype == "float32" else torch.autocast(noisy.device.type, getattr(torch, dtype))

    def step() -> None:
        with autocast:
            loss = nn.functional.mse_loss(forward(noisy, timesteps).sample.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return replayed(step, noisy.device) if mode == "graph" else step


def forward_of(unet: nn.Module, batch: tuple[torch.Tensor, ...], dtype: str, mode: str) -> Callable[[], None]:
    """A function that runs one forward without gradients per call."""
    noisy, _, timesteps = batch
    noisy = noisy.to(getattr(torch, dtype))
    model = callable_of(copy.deepcopy(unet).eval().to(noisy.dtype), mode)

    @torch.no_grad()
    def forward() -> None:
        model(noisy, timesteps)

    return replayed(forward, noisy.device) if mode == "graph" else forward


def measure(models: dict[str, nn.Module], make: Callable, batch_size: int, dtype: str, mode: str, repeats: int) -> list[dict]:
    """Time the function that `make` (`step_of` or `forward_of`) returns for each model; one row per model."""
    device = next(models["dense"].parameters()).device
    torch.compiler.reset()
    batch = tuple(tensor.to(device) for tensor in batches_for(models["dense"], batch_size, 1)[0])
    actions = {name: make(unet, batch, dtype, mode) for name, unet in models.items()}
    for action in (action for action in actions.values() for _ in range(3)):
        action()
    rounds = [{name: seconds_of(action, device) for name, action in actions.items()} for _ in range(repeats)]
    return [
        {
            "model": name,
            "batch_size": batch_size,
            "dtype": dtype,
            "mode": mode,
            "milliseconds": 1000 * statistics.median(times[name] for times in rounds),
            "samples_per_second": batch_size / statistics.median(times[name] for times in rounds),
            "speedup": statistics.median(times["dense"] / times[name] for times in rounds),
        }
        for name in models
    ]


def table(found: dict) -> str:
    """Markdown table of samples per second and speed-ups over the dense model."""
    lines = ["| | batch | dense | masked | compacted |", "|---|---|---|---|---|"]
    short = {"float32": "fp32", "bfloat16": "bf16"}
    for what, title in (("steps", "training step"), ("forwards", "forward")):
        rows: dict[tuple, dict] = {}
        for row in found[what]:
            rows.setdefault((row["dtype"], row["mode"], row["batch_size"]), {})[row["model"]] = row
        for (dtype, mode, batch_size), models in rows.items():
            cells = []
            for name in ("dense", "masked", "compacted"):
                row = models.get(name)
                ratio = "" if row is None or name == "dense" else f" ({row['speedup']:.2f})"
                cells.append("-" if row is None else f"{row['samples_per_second']:,.0f}{ratio}")
            ending = {"eager": "", "graph": ", CUDA graph", "compiled": ", compiled"}[mode]
            lines.append(f"| {title}, {short[dtype]}{ending} | {batch_size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def save(found: dict, output: Path) -> None:
    """Write a file atomically."""
    output.parent.mkdir(parents=True, exist_ok=True)
    complete = output.with_suffix(".tmp")
    complete.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(complete, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_batch_size", type=int, default=128, help="Number of images per training step (>= 1).")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[256], help="Number of samples per forward (>= 1).")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["eager", "graph"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="What to measure.")
    parser.add_argument("--channel_multiple", type=int, default=8, help="Widths of pruned models are multiples of this.")
    parser.add_argument("--repeats", type=int, default=20, help="Number of rounds (>= 1).")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--table", action="store_true", help="Print the table of an existing file and stop.")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.output.read_text())))
        return
    for name in ("train_batch_size", "batch_sizes", "channel_multiple", "repeats"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={args.device}: no CUDA device is available")
    if "graph" in args.modes and not args.device.startswith("cuda"):
        raise ValueError(f"modes={args.modes}: a graph needs a CUDA device, got device={args.device}")
    device = torch.device(args.device)
    models, removed = three_models(device, args.channel_multiple)
    found: dict = {
        "machine": {"gpu": hardware_name(device), "torch": torch.__version__, "python": platform.python_version()},
        "channel_multiple": args.channel_multiple,
        "promised_by_macs": 1 / (1 - removed),
        "steps": [],
        "forwards": [],
    }
    inference = {name: models[name] for name in ("dense", "compacted")}
    partial = args.output.with_suffix(".partial.json")  # results so far, in case a long compilation is stopped
    save(found, partial)
    for mode in args.modes:
        for dtype, size in itertools.product(DTYPES, args.batch_sizes if "forwards" in args.parts else ()):
            found["forwards"] += measure(inference, forward_of, size, dtype, mode, args.repeats)
            save(found, partial)
        for dtype in DTYPES if "steps" in args.parts else ():
            found["steps"] += measure(models, step_of, args.train_batch_size, dtype, mode, args.repeats)
            save(found, partial)
    os.replace(partial, args.output)
    print(table(found))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: from the device or the compiler
        sys.exit(f"gpu.py: error: {one_line(error)}")
