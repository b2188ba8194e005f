"""Memory of a pruning run on published models, and the batch size that fits one GPU of 80 GB.

    python benchmarks/memory.py                   writes benchmarks/results/memory.json (a minute, on a CPU)

The models are built on the meta device from their published configurations, so that no weights are needed. Memory is the
estimate that a run prints in its plan (`training/estimate.py`): weights, gradients and Adam's moments in float32, averaged
weights, the dense model as teacher, and the activations that autograd keeps, counted on fake tensors under bfloat16 autocast.
Scoring runs in float32. The memory of a ranking is that of its larger part: scores, or recovery, which follows them at every
ranking by default. VAE and text encoders are off the device, since images and captions are encoded before training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import DiTTransformer2DModel, ModelMixin, UNet2DConditionModel, UNet2DModel

from diffusers_gfprune.formatting import format_size
from diffusers_gfprune.metrics.model_size import count_parameters, parameter_bytes
from diffusers_gfprune.pruning.recovery import recovery_bytes
from diffusers_gfprune.training.estimate import StepEstimate, count_activations, memory_plan

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "benchmarks/results/memory.json"
CARD_BYTES = 80 * 10**9
SIZES = [2**power for power in range(9)]  # batch sizes to try
# Options of a run, by their title in the table
VARIANTS: dict[str, dict[str, bool]] = {
    "default, with averaged weights": {"use_ema": True},
    "and `--gradient_checkpointing`": {"use_ema": True, "gradient_checkpointing": True},
    "`--gradient_checkpointing --use_8bit_adam`": {"gradient_checkpointing": True, "use_8bit_adam": True},
}


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        name: Repository on the Hub.
        kind: Its class.
        config: Arguments of the class that differ from its defaults.
    """

    name: str
    kind: type[ModelMixin]
    config: dict


PUBLISHED = [
    Published(
        "CompVis/ldm-celebahq-256",
        UNet2DModel,
        {
            "sample_size": 64,
            "block_out_channels": (224, 448, 672, 896),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 32,
        },
    ),
    Published("facebook/DiT-XL-2-256", DiTTransformer2DModel, {"out_channels": 8}),
    Published(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", UNet2DConditionModel, {"sample_size": 64, "cross_attention_dim": 768}
    ),
    Published(
        "stabilityai/stable-diffusion-xl-base-1.0",
        UNet2DConditionModel,
        {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "cross_attention_dim": 2048,
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
]


def measure(published: Published, options: Mapping[str, bool]) -> dict[str, dict[str, int]]:
    """Memory of a model's run.

    Args:
        published: The model.
        options: A value of `VARIANTS`.

    Returns:
        For `"training"` and `"scoring"`: the bytes for one image, `one_image`, and the largest batch size in `SIZES` that
        fits the card, `largest_batch`, 0 if none does.
    """
    with torch.device("meta"):
        model = published.kind(**published.config)
    found = {}
    for phase, counted in (
        ("training", {"mixed_precision": "bf16", "gradient_checkpointing": options.get("gradient_checkpointing", False)}),
        ("scoring", {}),
    ):
        # Two counts separate what grows with the batch from what is kept once, such as weights in bfloat16
        one, two = (count_activations(model, size, **counted) for size in (1, 2))

        def peak(size: int, phase: str = phase, one: int = one, two: int = two) -> int:
            activations = one + (size - 1) * (two - one)
            estimate = StepEstimate(size, 0.0, size, parameter_bytes(model), activations, size, activations)
            plan = memory_plan(
                *(estimate, CARD_BYTES), teacher=True, recovery_bytes=recovery_bytes(model), device="cuda", **options
            )
            return getattr(plan, phase)

        fitting = [size for size in SIZES if peak(size) <= CARD_BYTES]
        found[phase] = {"one_image": peak(1), "largest_batch": max(fitting, default=0)}
    return found


def table(found: dict) -> str:
    """The results as a Markdown table."""
    lines = [
        "| model | parameters | options | training, 1 image | largest batch | ranking, 1 image | largest batch |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in found["models"].items():
        for title in VARIANTS:
            cells = [
                cell
                for phase in ("training", "scoring")
                for cell in (
                    format_size(rows[title][phase]["one_image"], 0),
                    str(rows[title][phase]["largest_batch"] or "does not fit"),
                )
            ]
            lines.append(f"| {name} | {rows['parameters'] / 1e6:,.0f}M | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--table", action="store_true", help="print the table of an existing file and stop")
    args = parser.parse_args()
    if not args.table:
        found = {"card_bytes": CARD_BYTES, "torch": torch.__version__, "diffusers": diffusers.__version__, "models": {}}
        for published in PUBLISHED:
            with torch.device("meta"):
                parameters = count_parameters(published.kind(**published.config))
            rows = {title: measure(published, options) for title, options in VARIANTS.items()}
            found["models"][published.name] = {"parameters": parameters, **rows}
            print(published.name, json.dumps(found["models"][published.name]), flush=True)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=2) + "\n")
    print(table(json.loads(args.output.read_text())))


if __name__ == "__main__":
    main()
