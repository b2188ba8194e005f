"""Pruning without training: what each criterion leaves of the predictions and of the samples.

    python benchmarks/one_shot.py --dataset digits
    python benchmarks/one_shot.py --dataset cifar10 --dataset_name uoft-cs/cifar10
    python benchmarks/one_shot.py --dataset digits-dit      also digits-ldm, digits-text: latent models of the digits
    python benchmarks/one_shot.py --write

Each row prunes the trained model of a data set once, from four calibration batches, and stops there. Two figures tell what is
left:

    damage    mean of (f_pruned(x_t, t) - f_dense(x_t, t))^2 over held-out images, with fixed noise and timesteps; both models
              predict noise, whose mean square is 1
    SSIM      of samples from the same noise, by DDIM with 50 steps

The first row is `prune()` with its defaults: widths by sensitivity, and the layers that read removed channels make up for them
by least squares (`recovery`), with the images of the calibration batches. The next row has the recovery of training runs, with
fewer images and rows, and the third has none. In two rows, units are chosen together. Two have widths by measured damage
curves. Two more remove whole residual blocks as well, or nothing else, and may miss a budget, which the table says. The other
criteria remove the same share of every group, as published. Random is the mean over three seeds.

Results are written to `benchmarks/results/one_shot/<dataset>.json`; `--rows recovery` measures only the rows with this word in
their title and keeps the others of the file. `--write` updates the tables in `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from documents import write_table
from study_settings import BASE, DATASETS, LATENT
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner
from diffusers_gfprune.data.batches import calibration_batches
from diffusers_gfprune.data.images import load_images
from diffusers_gfprune.data.sources import HeldOut
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.diffusion.process import DiffusionProcess
from diffusers_gfprune.errors import one_line_errors
from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.metrics.conditions import text_conditions
from diffusers_gfprune.metrics.fidelity import ssim_to_reference
from diffusers_gfprune.metrics.quality import SamplingSettings
from diffusers_gfprune.model_spec import ModelSpec
from diffusers_gfprune.one_shot import recovery_batches
from diffusers_gfprune.pruning.budget import BUDGET_TOLERANCE
from diffusers_gfprune.run_folder import write_json
from diffusers_gfprune.trained_pipelines import load_pipeline
from diffusers_gfprune.training.arguments import parse_arguments
from diffusers_gfprune.training.recovery import mend

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/one_shot"
RATIOS = (0.1, 0.2, 0.3, 0.5)
SEEDS = (0, 1, 2)  # of random scores
BATCHES, IMAGES, STEPS = 4, 128, 50
UNIFORM = {"ranking": "group"}
TOGETHER = {"criterion": "gradient-flow", "ranking": "joint"}
BY_CURVES = {"criterion": "gradient-flow", "ranking": "curves"}
BY_SENSITIVITY, RECOVERED = "gradient flow, widths by sensitivity", ", with recovery"
ROWS = {
    f"{BY_SENSITIVITY}{RECOVERED} (default of `prune()`)": {"criterion": "gradient-flow", "recovery": True},
    f"{BY_SENSITIVITY}{RECOVERED} as in training runs": {"criterion": "gradient-flow", "recovery": "runs"},
    BY_SENSITIVITY: {"criterion": "gradient-flow"},
    f"gradient flow, chosen together{RECOVERED}": {**TOGETHER, "recovery": True},
    "gradient flow, chosen together": TOGETHER,
    f"gradient flow, widths by damage curves{RECOVERED}": {**BY_CURVES, "recovery": True},
    "gradient flow, widths by damage curves": BY_CURVES,
    "gradient flow, channels and blocks together": {"criterion": "gradient-flow", "ranking": "joint", "depth": "allow"},
    "gradient flow, blocks only": {"criterion": "gradient-flow", "ranking": "joint", "depth": "only"},
    f"Diff-Pruning{RECOVERED}": {"criterion": "diff-pruning", **UNIFORM, "recovery": True},
    "Diff-Pruning": {"criterion": "diff-pruning", **UNIFORM},
    "Taylor": {"criterion": "taylor", **UNIFORM},
    f"magnitude{RECOVERED}": {"criterion": "magnitude", **UNIFORM, "recovery": True},
    "magnitude": {"criterion": "magnitude", **UNIFORM},
    "random": {"criterion": "random", **UNIFORM},
}


def held_out_batch(images: HeldOut, count: int, process: DiffusionProcess) -> DiffusionBatch:
    """The first held-out images with fixed noise, at timesteps spread evenly."""
    clean = images.samples[:count]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    timesteps = torch.linspace(*process.timestep_range, len(clean)).long()
    return DiffusionBatch(clean, noise, timesteps, {name: rows[:count] for name, rows in images.conditioning.items()})


@torch.no_grad()
def predict(unet: nn.Module, batch: DiffusionBatch, process: DiffusionProcess) -> Tensor:
    """Predictions for a batch."""
    return family_of(unet).predict(unet.eval(), batch.inputs(process))


def measure(dataset: str, words: list[str], ratios: tuple[float, ...], num_images: int, titles: Sequence[str]) -> dict:
    """Damage and SSIM of some rows at every ratio."""
    args = parse_arguments([*BASE[dataset], *words])
    pipeline = load_pipeline(args.model.pretrained_model_name_or_path, args.model.revision)
    unet, process, codec = pipeline.denoiser, pipeline.process, pipeline.codec
    images, held_out = load_images(args.data, ModelSpec.of(unet, codec, pipeline.prompts))
    images.prepare()
    batches = calibration_batches(
        *(images, BATCHES, args.training.train_batch_size),
        process=process,
        seed=0,
        step=0,
    )
    batch = held_out_batch(held_out, 2 * num_images, process)
    settings = SamplingSettings(num_images, STEPS, seed=0)
    prompts = None if pipeline.prompts is None else text_conditions(held_out.conditioning, images.null_conditioning())

    def sample(model: nn.Module) -> Tensor:
        return settings.sample(model, pipeline.scheduler, codec=codec, conditions=prompts)

    dense, samples = predict(unet, batch, process), sample(unet)

    def row(ratio: float, options: dict) -> dict:
        options = dict(options)
        recovery = options.pop("recovery", False)
        config = GFPruneConfig.from_preset("one-shot", total_steps=1, ratio=ratio, **options)
        pruner = GradientFlowPruner(copy.deepcopy(unet), config, process)
        update = pruner.step(0, batches)
        if recovery == "runs":
            mend(unet, pruner, pruner.compaction_plan(), batches)
        elif recovery:
            pruner.recover(unet, recovery_batches(batches, process))
        small = pruner.compact()
        damage = (predict(small, batch, process) - dense).square().mean().item()
        return {"macs_removed": update.sparsity, "damage": damage, "ssim": ssim_to_reference(sample(small), samples)}

    cases = [(ratio, title) for ratio in ratios for title in titles]
    rows: dict[str, dict] = {title: {} for title in titles}
    for ratio, title in tqdm(cases, desc=dataset):
        seeds = SEEDS if title == "random" else SEEDS[:1]
        runs = [row(ratio, {**ROWS[title], "pruning_seed": seed}) for seed in seeds]
        rows[title][str(ratio)] = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
    return {
        "calibration_images": sum(len(batch) for batch in batches),
        "images": num_images,
        "num_inference_steps": STEPS,
        "rows": rows,
    }


def merged(earlier: dict, measured: dict) -> dict:
    """Results with the rows of earlier ones that were not measured again.

    Raises:
        ValueError: The earlier results are of other images or steps.
    """
    for name in ("calibration_images", "images", "num_inference_steps"):
        if earlier[name] != measured[name]:
            raise ValueError(f"{name}={measured[name]} must be {earlier[name]}, as for the other rows in the results")
    rows = {**earlier["rows"], **measured["rows"]}
    return {**measured, "rows": {title: rows[title] for title in ROWS if title in rows}}


def cell(ratio: float, figures: dict) -> str:
    """Figures of a row at a ratio, with the removed share of the MACs if it is another one."""
    removed = figures["macs_removed"]
    missed = f" (at {removed:.0%})" if abs(removed - ratio) > BUDGET_TOLERANCE else ""
    return f"{figures['damage']:.5f}, {figures['ssim']:.3f}{missed}"


def table(results: dict[str, dict]) -> str:
    """Markdown tables, one for each data set."""
    parts = []
    for dataset, measured in results.items():
        ratios = list(max(measured["rows"].values(), key=len))
        names = [f"{float(ratio):.0%}" for ratio in ratios]
        parts.append(f"{dataset}: damage, SSIM to the dense samples, at the removed share of the MACs\n")
        parts += [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(ratios)}"]
        for title, row in measured["rows"].items():
            parts.append(f"| {title} | {' | '.join(cell(float(ratio), row[ratio]) for ratio in ratios)} |")
        parts.append("")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=(*DATASETS, *LATENT), help="model to measure, by its data set")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS), help="removed shares of the MACs, in (0, 1)")
    parser.add_argument("--images", type=int, default=IMAGES, help="number of samples for SSIM (>= 1)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--rows", default="", help="measure only rows with this in their title; others stay as they are")
    parser.add_argument("--write", action="store_true", help="update the tables in benchmarks/README.md")
    options, words = parser.parse_known_args(argv)
    if not options.dataset and not options.write:
        raise ValueError("dataset must be given, or write")
    if options.images < 1:
        raise ValueError(f"images={options.images} must be at least 1")
    titles = [title for title in ROWS if options.rows in title]
    if not titles:
        raise ValueError(f"rows={options.rows} must be a part of a title: {'; '.join(ROWS)}")
    if options.dataset:
        measured = measure(options.dataset, words, tuple(options.ratios), options.images, titles)
        options.results.mkdir(parents=True, exist_ok=True)
        file = options.results / f"{options.dataset}.json"
        if options.rows and file.is_file():
            measured = merged(json.loads(file.read_text()), measured)
        write_json(file, measured)
        print(table({options.dataset: measured}))
    if options.write:
        files = {name: options.results / f"{name}.json" for name in (*DATASETS, *LATENT)}
        write_table("one shot", table({name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}))


if __name__ == "__main__":
    with one_line_errors("one_shot.py"):
        main()
