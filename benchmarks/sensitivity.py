"""Do scores predict the damage of pruning, between groups of channels and between units of a group?

    python benchmarks/sensitivity.py --dataset digits
    python benchmarks/sensitivity.py --dataset cifar10 --dataset_name uoft-cs/cifar10
    python benchmarks/sensitivity.py --dataset digits-dit     also digits-ldm, digits-text: latent models of the digits

Widths by sensitivity (`--ranking sensitivity`, `pruning/budget.py`) use the sum S_g of absolute scores in a group as its
sensitivity. Here half of the channels of one group at a time is masked, for four random halves, and

    damage_g = mean of (eps_masked(x_t, t) - eps_dense(x_t, t))^2

on images that were not scored is compared with S_g of each criterion over all groups of a trained model. Halves are random,
not chosen by a criterion. Only gradient flow in the metric of predictions estimates this damage
(`scoring/natural_gradient.py`); other criteria were designed for other quantities. Within groups, single units are masked, and
their damage is compared with their scores, over all groups and by the kind of layer: convolutions, attention, feed-forward
layers of transformers, and embeddings of timesteps and labels.

Results are written to `benchmarks/results/sensitivity/<dataset>.json`, a picture of all data sets to `benchmarks/pictures`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
from scipy.stats import pearsonr, spearmanr
from study_settings import BASE, EVERY, SCORES
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner
from diffusers_gfprune.data.batches import calibration_batches
from diffusers_gfprune.data.images import load_images
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.errors import one_line_errors
from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.model_spec import ModelSpec
from diffusers_gfprune.pruning.budget import select_units, width_ladder
from diffusers_gfprune.pruning.channel_groups import ChannelGroup
from diffusers_gfprune.run_folder import write_json
from diffusers_gfprune.scoring.importance import score_units
from diffusers_gfprune.trained_pipelines import load_pipeline
from diffusers_gfprune.training.arguments import parse_arguments

matplotlib.use("Agg")

ROOT = Path(__file__).resolve().parent.parent


RESULTS = ROOT / "benchmarks/results/sensitivity"
PICTURE = ROOT / "benchmarks/pictures/sensitivity.png"
# Random halves per group; single units masked per group; minimum units of a group for a rank correlation
HALVES, UNITS, HANDFUL = 4, 16, 4
KINDS = {"convolutions": "tab:blue", "attention": "tab:orange", "feed-forward": "tab:green", "embeddings": "tab:gray"}


def kind_of(group: ChannelGroup, unet: nn.Module) -> str:
    """One of `KINDS`, by the layers that produce the channels of a group."""
    if group.attention is not None:
        return "attention"
    names = {piece.module for piece in group.slices if piece.role == "output"}
    if any(isinstance(unet.get_submodule(name), nn.Conv2d) for name in names):
        return "convolutions"
    return "feed-forward" if any(".ff." in name for name in names) else "embeddings"


def predictor(pruner: GradientFlowPruner, batch: DiffusionBatch) -> Callable[[], Tensor]:
    """A function that predicts noise on a batch with the current masks."""
    inputs = batch.inputs(pruner.process)
    pruner.unet.eval()
    return lambda: family_of(pruner.unet).predict(pruner.unet, inputs)


@torch.no_grad()
def damages(pruner: GradientFlowPruner, batch: DiffusionBatch, halves: int = HALVES) -> dict[str, float]:
    """Mean squared change of the noise prediction without half of a group's channels, over random halves, by group name."""
    predict = predictor(pruner, batch)
    masks, generator, found = pruner.unet.channel_masks, torch.Generator().manual_seed(0), {}
    dense = predict()
    for group in tqdm(pruner.groups, desc="channel groups"):
        ladder = width_ladder(group)
        if len(ladder) == 1:  # groups of one unit are never pruned
            continue
        half = min(ladder[1:], key=lambda width: abs(width - group.num_channels / 2))
        changes = []
        for _ in range(halves):
            masks.set({group.name: select_units(group, torch.rand(group.num_units, generator=generator), half).float()})
            changes.append((predict() - dense).square().mean().item())
        masks.set({group.name: torch.ones(group.num_units)})
        found[group.name] = sum(changes) / halves
    return found


@torch.no_grad()
def unit_damages(pruner: GradientFlowPruner, batch: DiffusionBatch, units: int = UNITS) -> dict[str, dict]:
    """The same without single units, at most `units` of each group, drawn at random: damage by unit, by group name."""
    predict = predictor(pruner, batch)
    masks, generator, found = pruner.unet.channel_masks, torch.Generator().manual_seed(0), {}
    dense = predict()
    for group in tqdm(pruner.groups, desc="units of groups"):
        found[group.name] = {}
        for unit in torch.randperm(group.num_units, generator=generator)[:units].tolist():
            masks.set({group.name: (torch.arange(group.num_units) != unit).float()}, check=False)  # heads may differ
            found[group.name][unit] = (predict() - dense).square().mean().item()
        masks.set({group.name: torch.ones(group.num_units)})
    return found


def within_groups(scores: dict[str, Tensor], damage: dict[str, dict]) -> dict[str, float]:
    """Spearman correlation of scores and damage of units, by name of the group, for groups of at least `HANDFUL` units."""
    return {
        name: float(spearmanr(scores[name][list(units)].numpy(), list(units.values())).statistic)
        for name, units in damage.items()
        if len(units) >= HANDFUL
    }


def measure(dataset: str, words: list[str], halves: int = HALVES, units: int = UNITS) -> dict:
    """Sums of scores and damages of all groups of a data set's model, and their correlations."""
    args = parse_arguments([*BASE[dataset], *words])
    pipeline = load_pipeline(args.model.pretrained_model_name_or_path, args.model.revision)
    unet, process = pipeline.denoiser, pipeline.process
    images, _ = load_images(args.data, ModelSpec.of(unet, pipeline.codec, pipeline.prompts))
    images.prepare("cpu")
    number, size = args.pruning.calibration_batches, args.training.train_batch_size
    *batches, unseen = calibration_batches(images, number + 1, size, process=process, seed=0, step=0)
    pruner = GradientFlowPruner(unet, GFPruneConfig(ratio=0.5), process)
    damage = damages(pruner, unseen, halves)
    of_units = unit_damages(pruner, unseen, units)
    kinds = {group.name: kind_of(group, unet) for group in pruner.groups}
    sums, rows = {}, {}
    for criterion in SCORES:
        scores = score_units(unet, pruner.groups, batches, process, GFPruneConfig(criterion=criterion))
        sums[criterion] = {name: values.abs().sum().item() for name, values in scores.items()}
        pairs = [(sums[criterion][name], damage[name]) for name in damage]
        logs = [[math.log10(value) for value in column] for column in zip(*pairs)]
        within = within_groups(scores, of_units)
        by_kind = {kind: [value for name, value in within.items() if kinds[name] == kind] for kind in KINDS}
        rows[criterion] = {
            "log_pearson": float(pearsonr(*logs).statistic),
            "spearman": float(spearmanr(*logs).statistic),
            "decades": max(logs[0]) - min(logs[0]),
            "within_groups": sum(within.values()) / len(within),
            "within_groups_by_kind": {kind: sum(some) / len(some) for kind, some in by_kind.items() if some},
        }
    decades = math.log10(max(damage.values()) / min(damage.values()))
    return {
        "calibration_batches": number,
        "calibration_batch_size": size,
        "halves": halves,
        "units": units,
        "groups": len(damage),
        "damage_decades": decades,
        "by_criterion": rows,
        "kinds": kinds,
        "damage": damage,
        "summed_scores": sums,
    }


def plot(path: Path, found: dict[str, dict]) -> None:
    """Plot summed scores against damage, with a row per data set."""
    shown = [name for name in SCORES if name != "random"]
    figure, axes = plt.subplots(
        len(found), len(shown), figsize=(2.7 * len(shown), 2.7 * len(found)), squeeze=False, constrained_layout=True
    )
    for row, (dataset, results) in zip(axes, found.items()):
        for axis, criterion in zip(row, shown):
            sums = results["summed_scores"][criterion]
            damage = results["damage"]  # of groups with more than one unit
            kinds = results.get("kinds", {})  # older results have none
            colours = [KINDS[kinds.get(name, "convolutions")] for name in damage]
            axis.scatter([sums[name] for name in damage], list(damage.values()), s=10, c=colours)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
            correlation = results["by_criterion"][criterion]["log_pearson"]
            axis.set_title(f"{dataset}\n{SCORES[criterion]}: {correlation:.2f}", fontsize=8)
            axis.set_xlabel("summed scores of a group", fontsize=8)
            axis.tick_params(labelsize=7)
        row[0].set_ylabel("damage without half of it", fontsize=8)
    figure.legend(
        handles=[Line2D([], [], marker="o", linestyle="", color=colour, label=kind) for kind, colour in KINDS.items()],
        loc="outside lower center",
        ncols=len(KINDS),
        fontsize=8,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=EVERY, required=True)
    parser.add_argument("--halves", type=int, default=HALVES, help="Number of random halves per group (>= 1).")
    parser.add_argument("--units", type=int, default=UNITS, help="Number of single units to mask per group (>= 4).")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options, words = parser.parse_known_args(argv)
    if options.halves < 1:
        raise ValueError(f"halves={options.halves} must be at least 1")
    if options.units < HANDFUL:
        raise ValueError(f"units={options.units} must be at least {HANDFUL}")
    found = measure(options.dataset, words, options.halves, options.units)
    options.results.mkdir(parents=True, exist_ok=True)
    write_json(options.results / f"{options.dataset}.json", found)
    files = {name: options.results / f"{name}.json" for name in EVERY}
    plot(options.picture, {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()})
    print(f"{options.dataset}: damage over {found['damage_decades']:.1f} decades")
    for criterion, row in found["by_criterion"].items():
        print(f"  {criterion:21} " + ", ".join(f"{key} {row[key]:.2f}" for key in row if key != "within_groups_by_kind"))


if __name__ == "__main__":
    with one_line_errors("sensitivity.py"):
        main()
