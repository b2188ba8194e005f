"""Cost and speed-up of pruning, as ratios: steps and forwards of masked, compacted and dense models, scoring, loading.

    python benchmarks/cost.py                     writes benchmarks/results/cost.json (about ten minutes)

Torch-Pruning's model at the same MACs is included. Times are medians of interleaved pairs (A B A B ...), so that changes of
the machine's speed affect both sides. Ratios are medians of the ratios of the pairs. Peak memory is the largest resident set
of a separate process, minus its resident set before it built the model (Linux).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from models import batches_for, build, dense_config, torch_pruning_model

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.diffusion.schedulers import training_process
from diffusers_gfprune.metrics.model_size import count_macs, count_parameters
from diffusers_gfprune.pruning.channel_groups import trace_channel_groups
from diffusers_gfprune.pruning.masking import attach, detach
from diffusers_gfprune.scoring.importance import score_units

ROOT = Path(__file__).resolve().parent.parent
BATCH_SIZES = {"digits": 64, "cifar10": 8}
MODELS = [*BATCH_SIZES, "deep"]
STEP_BATCH_SIZES = {"digits": [64], "cifar10": [8, 16]}
FORWARD_BATCH_SIZES = {"digits": [16, 128], "cifar10": [16]}
SCORING_BATCHES = {"digits": 4, "cifar10": 2}
REPEATS = {"digits": 25, "cifar10": 7}


class Trainer:
    """Plain training steps of a model, masked or not."""

    def __init__(self, unet: UNet2DModel, batches) -> None:
        self.unet, self.batches = unet.train(), batches
        self.process = training_process(DDPMScheduler())
        self.optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5)

    def steps(self) -> None:
        """One step on every batch."""
        for batch in map(DiffusionBatch.of, self.batches):
            noisy, timesteps, _ = batch.inputs(self.process)
            loss = torch.nn.functional.mse_loss(self.unet(noisy, timesteps).sample, batch.noise)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def paired(first: Callable[[], object], second: Callable[[], object], repeats: int) -> dict[str, float]:
    """Medians of interleaved runs in milliseconds, and the median ratio first / second."""

    def timed(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    first(), second()
    pairs = [(timed(first), timed(second)) for _ in range(repeats)]
    return {
        "ms": 1000 * statistics.median(pair[0] for pair in pairs),
        "baseline_ms": 1000 * statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(pair[0] / pair[1] for pair in pairs),
        "repeats": repeats,
    }


def half_masked(unet: UNet2DModel, **options) -> GradientFlowPruner:
    """A pruner with binary masks at half the MACs, by magnitude, as in the hard phase."""
    config = GFPruneConfig.from_preset("one-shot", **{"total_steps": 1, "ratio": 0.5, "criterion": "magnitude", **options})
    pruner = GradientFlowPruner(unet, config)
    pruner.step(0, [])
    return pruner


def measure_masked_step(model: str, batch: int) -> dict[str, float]:
    """A training step with masks against one without."""
    dense = build(model)
    masked = copy.deepcopy(dense)
    batches = batches_for(dense, batch, 1)
    half_masked(masked)
    return paired(Trainer(masked, batches).steps, Trainer(dense, batches).steps, REPEATS[model])


def scorer(unet: UNet2DModel, batches, hvp: str = "none", hessian_batches: str = "each") -> Callable[[], object]:
    """A function that computes gradient-flow scores: in the metric of predictions, without a Hessian, or of weights."""
    options = {} if hvp == "none" else {"criterion": "gradient-flow-weights", "hvp": hvp, "hessian_batches": hessian_batches}
    config = GFPruneConfig(**options)
    pruner = GradientFlowPruner(unet, config)
    batches = [DiffusionBatch.of(batch) for batch in batches]
    return lambda: score_units(unet, pruner.groups, batches, pruner.process, config)


def measure_scoring(model: str, hvp: str, hessian_batches: str = "each") -> dict[str, float]:
    """Scoring on k batches against k plain training steps."""
    dense = build(model)
    batches = batches_for(dense, BATCH_SIZES[model], SCORING_BATCHES[model])
    score = scorer(copy.deepcopy(dense), batches, hvp, hessian_batches)
    return paired(score, Trainer(dense, batches).steps, max(3, REPEATS[model] // 3))


def measure_compacted_step(model: str, batch: int) -> dict[str, float]:
    """A training step of the dense model against one of the compacted model."""
    dense = build(model)
    batches = batches_for(dense, batch, 1)
    small = half_masked(copy.deepcopy(dense)).compact()
    return paired(Trainer(dense, batches).steps, Trainer(small, batches).steps, REPEATS[model])


def measure_compacted_forward(model: str, batch: int, compiled: bool) -> dict[str, float]:
    """Speed-up of the compacted forward, against the ratio of MACs and against the reachable speed-up.

    The time that does not depend on widths, such as launching operations, is measured on the same layers with 8 channels each.
    """
    dense = build(model).eval()
    pruner = half_masked(copy.deepcopy(dense))
    small = pruner.compact().eval()
    narrow = {"block_out_channels": [8] * len(dense.config.block_out_channels), "norm_num_groups": 8}
    if dense.config.attention_head_dim is not None:
        narrow["attention_head_dim"] = 8
    fixed = UNet2DModel(**{**dense_config(dense), **narrow}).eval()
    promised = 1 / (1 - pruner.history[-1].sparsity)
    size = dense.config.sample_size
    x, t = torch.randn(batch, dense.config.in_channels, size, size), torch.full((batch,), 500)
    if compiled:
        dense, small, fixed = (torch.compile(unet) for unet in (dense, small, fixed))
    with torch.no_grad():
        times = paired(lambda: dense(x, t), lambda: small(x, t), 3 * REPEATS[model])
        fixed_ms = paired(lambda: fixed(x, t), lambda: fixed(x, t), REPEATS[model])["ms"]
    return {
        "batch_size": batch,
        "compiled": compiled,
        "dense_ms": times["ms"],
        "compacted_ms": times["baseline_ms"],
        "fixed_ms": fixed_ms,
        "speed_up": times["ratio"],
        "promised_by_macs": promised,
        "share_of_promise": times["ratio"] / promised,
        "in_reach": times["ms"] / (fixed_ms + (times["ms"] - fixed_ms) / promised),
        "repeats": times["repeats"],
    }


def measure_rival_forward(model: str, batch: int) -> dict[str, float]:
    """A forward of Torch-Pruning's model against one of ours with equal MACs."""
    dense = build(model).eval()
    rival = torch_pruning_model(dense, count_macs(dense) / 2).eval()
    removed = 1 - count_macs(rival) / count_macs(dense)
    pruner = half_masked(copy.deepcopy(dense), ratio=removed)
    small = pruner.compact().eval()
    size = dense.config.sample_size
    x, t = torch.randn(batch, dense.config.in_channels, size, size), torch.full((batch,), 500)
    with torch.no_grad():
        times = paired(lambda: rival(x, t), lambda: small(x, t), 3 * REPEATS[model])
    return {**times, "batch_size": batch, "rival_macs_removed": removed, "our_macs_removed": pruner.history[-1].sparsity}


def measure_setup(model: str) -> dict[str, float]:
    """Seconds for tracing, units and attaching, and for compaction (medians of five), and loading against a stock pipeline."""
    attaching, compacting = [], []
    for _ in range(5):
        unet = build(model)
        start = time.perf_counter()
        groups = trace_channel_groups(unet)
        attach(unet, groups)
        attaching.append(time.perf_counter() - start)
        detach(unet)
        pruner = half_masked(unet)
        start = time.perf_counter()
        small = pruner.compact()
        compacting.append(time.perf_counter() - start)
    found = {"trace_attach_seconds": statistics.median(attaching), "compaction_seconds": statistics.median(compacting)}
    with tempfile.TemporaryDirectory() as folder:
        # A stock model with about as many parameters: the same share of every width
        groups, share = dense_config(unet)["norm_num_groups"], math.sqrt(count_parameters(small) / count_parameters(unet))
        widths = [max(1, round(share * width / groups)) * groups for width in unet.config.block_out_channels]
        stock = UNet2DModel(**{**dense_config(unet), "block_out_channels": widths})
        found["stock_parameters_ratio"] = count_parameters(stock) / count_parameters(small)
        DDPMPipeline(small, DDPMScheduler()).save_pretrained(f"{folder}/pruned")
        DDPMPipeline(stock, DDPMScheduler()).save_pretrained(f"{folder}/stock")

        def load(kind: str) -> Callable[[], object]:
            return lambda: DiffusionPipeline.from_pretrained(f"{folder}/{kind}")

        found["load"] = paired(load("pruned"), load("stock"), 11)
    return found


def peak_memory(model: str, what: str) -> float:
    """Peak memory of this process in MiB above its start, for training steps (`plain`) or for scoring."""

    def resident() -> float:
        # getrusage is not used: its peak survives exec and would include the parent's.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    before = resident()
    unet = build(model)
    batches = batches_for(unet, BATCH_SIZES[model], SCORING_BATCHES[model])
    if what == "plain":
        Trainer(unet, batches).steps()
    else:
        # A run that scores also holds optimizer state, as the plain step does.
        trainer = Trainer(unet, batches[:1])
        for parameter in unet.parameters():
            trainer.optimizer.state[parameter] = {
                "step": torch.tensor(1.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter).add_(0),
            }
        scorer(unet, batches, what, "mean")()
    return resident() - before


def memory_in_process(model: str, what: str) -> float:
    command = [sys.executable, __file__, "--memory", model, what]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_steps_and_forwards(model: str) -> dict[str, object]:
    """All measurements of training steps and forwards."""
    rows: dict[str, object] = {
        "masked_step": {batch: measure_masked_step(model, batch) for batch in STEP_BATCH_SIZES[model]},
        "compacted_forward": [
            measure_compacted_forward(model, batch, compiled)
            for batch in FORWARD_BATCH_SIZES[model]
            for compiled in (False, True)
        ],
        "compacted_step": measure_compacted_step(model, STEP_BATCH_SIZES[model][-1]),
        "rival_forward": measure_rival_forward(model, 16),
        "scoring_none": measure_scoring(model, "none"),
    }
    for hvp in ("exact", "finite-difference"):
        for batches in ("mean", "each"):
            rows[f"scoring_{hvp}_{batches}"] = measure_scoring(model, hvp, batches)
    memory = {what: memory_in_process(model, what) for what in ("plain", "none", "exact", "finite-difference")}
    return {**rows, "peak_memory_mib": memory, "peak_memory_ratio": {what: memory[what] / memory["plain"] for what in memory}}


def table(found: dict) -> str:
    """Markdown table of targets and measured values."""
    lines = ["| | wanted (digits / CIFAR-10) | digits teacher | CIFAR-10 configuration |", "|---|---|---|---|"]

    def row(title: str, wanted: str, value: Callable[[dict], str]) -> None:
        lines.append(
            "| " + " | ".join([title, wanted, *(value(found[model]) for model in BATCH_SIZES if model in found)]) + " |"
        )

    row("batch size of scoring", "", lambda m: str(m["batch_size"]))
    row(
        "masked step / plain step (at batch size)",
        "≤ 1.05 / ≤ 1.02",
        lambda m: ", ".join(f"{step['ratio']:.2f} ({size})" for size, step in m["masked_step"].items()),
    )
    row(
        "scoring k batches / k plain steps: in predictions (default)",
        "≤ 5",
        lambda m: f"{m['scoring_none']['ratio']:.2f}" if "scoring_none" in m else "-",
    )
    for hvp, most in (("exact", "≤ 5"), ("finite-difference", "≤ 4")):
        for batches, title in (("mean", "of the mean loss"), ("each", "batch by batch")):
            name = f"scoring k batches / k plain steps: in weights, {hvp}, {title}"
            row(name, most, lambda m, key=f"scoring_{hvp}_{batches}": f"{m[key]['ratio']:.2f}")
    for hvp, most in (("none", "≤ 2.5"), ("exact", "≤ 2.5"), ("finite-difference", "≤ 1.2")):
        title = "in predictions (default)" if hvp == "none" else f"in weights, {hvp}"
        row(
            f"peak memory of scoring / of a step: {title}",
            most,
            lambda m, key=hvp: f"{m['peak_memory_ratio'][key]:.2f}" if key in m["peak_memory_ratio"] else "-",
        )

    def forward(batch: int, compiled: bool) -> Callable[[dict], str]:
        def cell(m: dict) -> str:
            for found in m["compacted_forward"]:
                if (found["batch_size"], found["compiled"]) == (batch, compiled):
                    return "{speed_up:.2f} of {promised_by_macs:.2f} ({in_reach:.2f}): {share:.0f} %".format(
                        **found, share=100 * found["share_of_promise"]
                    )
            return "-"

        return cell

    for batch, compiled, wanted in (
        (16, False, "≥ 1.30 / ≥ 1.93"),
        (16, True, "- / ≥ 1.93"),
        (128, False, "≥ 1.60"),
        (128, True, ""),
    ):
        title = f"speed-up of the compacted forward, batch {batch}{', compiled' if compiled else ''}"
        row(title, wanted, forward(batch, compiled))
    row("plain training step / step of the compacted model", "- / ≥ 1.85", lambda m: f"{m['compacted_step']['ratio']:.2f}")
    row(
        "forward of Torch-Pruning's model / of ours, batch 16, at its MACs",
        "≥ 1.00",
        lambda m: "{ratio:.2f} ({rival_macs_removed:.1%} removed, ours {our_macs_removed:.1%})".format(**m["rival_forward"]),
    )
    row("tracing, units, attaching", "≤ 1.0 s", lambda m: f"{m['setup']['trace_attach_seconds']:.2f} s")
    row("loading the pruned pipeline / a stock one of its size", "≤ 1.2", lambda m: f"{m['setup']['load']['ratio']:.2f}")
    row("compaction", "≤ 5 s", lambda m: f"{m['setup']['compaction_seconds']:.1f} s")
    if "deep" in found:
        setup = found["deep"]["setup"]
        lines.append("")
        lines.append(
            f"A deep model of many small layers: tracing, units, attaching {setup['trace_attach_seconds']:.2f} s (wanted: "
            f"≤ 1.5), compaction {setup['compaction_seconds']:.2f} s, loading {setup['load']['ratio']:.2f} times as long as a "
            f"stock one of its size."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/cost.json")
    parser.add_argument("--memory", nargs=2, metavar=("MODEL", "WHAT"), help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="print the table of an existing file and stop")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.output.read_text())))
        return
    if args.memory:
        print(peak_memory(*args.memory))
        return

    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}
    # Other models keep their earlier values if they are from the same machine.
    found: dict[str, dict] = json.loads(args.output.read_text()) if args.output.exists() else {}
    found = {**found, "machine": machine} if found.get("machine") == machine else {"machine": machine}
    for model in args.models:
        rows = found[model] = {"batch_size": BATCH_SIZES.get(model), "scoring_batches": SCORING_BATCHES.get(model)}
        rows["setup"] = measure_setup(model)
        if model != "deep":  # for this model, only tracing, compaction and loading are measured
            rows |= measure_steps_and_forwards(model)
        print(model, json.dumps(rows, indent=2))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
