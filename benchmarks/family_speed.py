"""Speed-up of a forward pass at half the MACs, for conditional UNets and diffusion transformers, against what MACs promise.

    python benchmarks/family_speed.py                            writes benchmarks/results/family_speed.json (15 minutes)
    python benchmarks/family_speed.py --attention_unit heads     measures these rows and keeps the others
    python benchmarks/family_speed.py --write                    updates the table in benchmarks/README.md

The models have random weights in the layout of published ones, at a size that a CPU can run:

    sd         the UNet of Stable Diffusion 1.5 at a quarter of its widths, on latents of 32x32 with 77 tokens of text
    dit        DiT-S/2: 12 blocks of 384 channels in 6 heads, on latents of 32x32

Half of the MACs go, by magnitude; attention loses channels of every head, or whole heads. A forward of the dense model and one
of the pruned model are timed in turn, eagerly, in float32. The table gives the median of the ratios, and its share of
1 / (1 - removed share of the MACs).
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from cost import half_masked, paired
from diffusers import DiTTransformer2DModel, ModelMixin, UNet2DConditionModel
from documents import write_table

from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.metrics.model_size import count_macs, count_parameters, spatial_size

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "benchmarks/results/family_speed.json"
MODELS: dict[str, Callable[[], ModelMixin]] = {
    "sd": lambda: UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(80, 160, 320, 320),
        norm_num_groups=16,
        attention_head_dim=4,
        cross_attention_dim=192,
    ),
    "dit": lambda: DiTTransformer2DModel(num_attention_heads=6, attention_head_dim=64, num_layers=12, out_channels=8),
}
TITLES = {"sd": "Stable Diffusion 1.5's UNet, a quarter of the widths", "dit": "DiT-S/2"}
ATTENTION_UNITS = {"head_dim": "channels of every head (default)", "heads": "whole heads"}
BATCH_SIZES = (1, 16)
REPEATS = {1: 31, 16: 11}  # pairs by batch size
WANTED = 0.93  # of the promise, at batch 16


def measure(model: str, batch_size: int, attention_unit: str) -> dict[str, float | str]:
    """A dense forward against a pruned one.

    Args:
        model: A key of `MODELS`.
        batch_size: Number of samples (>= 1).
        attention_unit: A key of `ATTENTION_UNITS`.
    """
    torch.manual_seed(0)
    dense = MODELS[model]().eval()
    pruner = half_masked(copy.deepcopy(dense), attention_unit=attention_unit)
    small = pruner.compact().eval()
    family = family_of(dense)
    inputs = family.example_inputs(dense, *spatial_size(dense), batch_size)
    inputs = inputs._replace(sample=torch.randn_like(inputs.sample))

    def forward(unet: ModelMixin) -> Callable[[], object]:
        return lambda: family.predict(unet, inputs)

    with torch.no_grad():
        times = paired(forward(dense), forward(small), REPEATS[batch_size])
    removed = 1 - count_macs(small) / count_macs(dense)
    return {
        "attention_unit": attention_unit,
        "batch_size": batch_size,
        "dense_ms": times["ms"],
        "pruned_ms": times["baseline_ms"],
        "repeats": times["repeats"],
        "parameters": count_parameters(dense),
        "parameters_pruned": count_parameters(small),
        "macs": count_macs(dense),
        "macs_removed": removed,
        "speed_up": times["ratio"],
        "share_of_promise": times["ratio"] * (1 - removed),
    }


def table(found: dict) -> str:
    """The results as a Markdown table."""
    lines = [
        f"| model | attention loses | batch | speed-up | promised by MACs | share (wanted at batch 16: ≥ {WANTED}) |",
        "|---" * 6 + "|",
    ]
    for model, rows in found["models"].items():
        for row in rows:
            promised = 1 / (1 - row["macs_removed"])
            lines.append(
                f"| {TITLES[model]} | {ATTENTION_UNITS[row['attention_unit']]} | {row['batch_size']} | {row['speed_up']:.2f} "
                f"| {promised:.2f} | {row['share_of_promise']:.2f} |"
            )
    return "\n".join(lines)


def merged(before: list[dict], rows: list[dict]) -> list[dict]:
    """Rows in the order of the table; new ones replace earlier ones of the same unit and batch size."""
    by_setting = {(row["attention_unit"], row["batch_size"]): row for row in [*before, *rows]}
    return [by_setting[key] for unit in ATTENTION_UNITS for size in BATCH_SIZES if (key := (unit, size)) in by_setting]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--attention_unit", nargs="+", choices=ATTENTION_UNITS, default=list(ATTENTION_UNITS))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--write", action="store_true", help="update the table of the document and stop")
    args = parser.parse_args()
    if args.write:
        write_table("family speed", table(json.loads(args.output.read_text())))
        return
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}
    found = json.loads(args.output.read_text()) if args.output.is_file() else {}
    if found.get("machine") != machine:
        found = {"machine": machine, "models": {}}
    for model in args.models:
        for unit in args.attention_unit:
            rows = [measure(model, size, unit) for size in BATCH_SIZES]
            found["models"][model] = merged(found["models"].get(model, []), rows)
            print(model, json.dumps(rows, indent=2), flush=True)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
