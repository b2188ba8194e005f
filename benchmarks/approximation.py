"""Accuracy of the first-order approximation of gradient flow: -2 theta_c . (H g)_c against the change of ||g||^2.

    python benchmarks/approximation.py              writes benchmarks/results/approximation.json and a picture (ten minutes)

arXiv 2501.09464 scores a unit by the first-order change of the squared gradient norm when its weights go to zero. Here the
weights of single units are scaled by a share a, theta_c -> (1 - a) theta_c, and

    predicted(a) = -2 a theta_c . (H g)_c        measured(a) = ||g(theta_c -> (1 - a) theta_c)||^2 - ||g||^2

are compared over units of all groups, on the same calibration batches, for the trained digits DDPM and for the same network
before training. Then the lowest-scored share of the units of every group is removed at once, as in pruning.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from diffusers import UNet2DModel
from scipy.stats import pearsonr, spearmanr
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_gfprune import GFPruneConfig
from diffusers_gfprune.data.batches import BrokenImages, calibration_batches
from diffusers_gfprune.data.images import DataArguments, load_images
from diffusers_gfprune.model_spec import ModelSpec
from diffusers_gfprune.pruning.channel_groups import ChannelGroup, trace_channel_groups
from diffusers_gfprune.scoring.context import ScoringContext
from diffusers_gfprune.scoring.hessian_product import HESSIAN_PRODUCTS
from diffusers_gfprune.scoring.mode import scoring_mode
from diffusers_gfprune.trained_pipelines import load_pipeline

matplotlib.use("Agg")

ROOT = Path(__file__).resolve().parent.parent


SHARES = (0.001, 0.01, 0.1, 0.5, 1.0)
REMOVED = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


class Measure:
    """Squared gradient norms of a model on fixed batches, with some units scaled.

    Args:
        unet: The model.
        process: Process of the model's training.
        batches: Calibration batches.
    """

    def __init__(self, unet: UNet2DModel, process, batches: list) -> None:
        self.groups = trace_channel_groups(unet)
        self.context = ScoringContext(unet, self.groups, batches, process, GFPruneConfig())
        self.unet, self.parameters = unet.eval(), self.context.parameters
        with scoring_mode(unet, list(self.parameters.values()), True, 2):
            product = HESSIAN_PRODUCTS["exact"](self.context, batches)
            theta_hg = {name: value * self.parameters[name].detach() for name, value in product.items()}
            self.scores = self.context.reduce(theta_hg, "signed")
            self.base = self.squared_norm()

    def squared_norm(self) -> float:
        """||g||^2 of the mean loss over all batches, over the parameters of all groups."""
        with scoring_mode(self.unet, list(self.parameters.values()), True, 1):
            gradient = self.context.mean_gradient(self.context.batches)
            return sum(value.double().square().sum().item() for value in gradient.values())

    def loss(self) -> float:
        """The mean loss over all batches."""
        with torch.no_grad():
            return statistics.mean(self.context.loss(batch).item() for batch in self.context.batches)

    @torch.no_grad()
    def _scale(self, units: Iterable[tuple[ChannelGroup, int]], factor: float) -> None:
        # Scale each weight once, even if two units share it
        masks: dict[str, Tensor] = {}
        for group, unit in units:
            for piece in group.slices:
                mask = masks.setdefault(piece.name, torch.zeros_like(self.parameters[piece.name], dtype=torch.bool))
                for channel in group.units[unit]:
                    mask.select(piece.dim, piece.positions[channel])[...] = True
        for name, mask in masks.items():
            self.parameters[name][mask] *= factor

    def change(self, units: list[tuple[ChannelGroup, int]], share: float) -> tuple[float, float]:
        """Changes of ||g||^2 and of the loss when units are scaled by 1 - share."""
        kept = copy.deepcopy({name: p.detach() for name, p in self.parameters.items()})
        before = self.loss()
        self._scale(units, 1 - share)
        found = self.squared_norm() - self.base, self.loss() - before
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(kept[name])
        return found


def single_units(measure: Measure, count: int) -> dict:
    """Predicted and measured changes of single units."""
    everything = [(group, unit) for group in measure.groups for unit in range(group.num_units)]
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [everything[index] for index in order[:count]]
    scores = [measure.scores[group.name][unit].item() for group, unit in chosen]
    rows, changes = {}, {}
    for share in SHARES:
        predicted = [-2 * share * score for score in scores]
        measured = [measure.change([item], share)[0] for item in tqdm(chosen, desc=f"units, a = {share}")]
        agree = statistics.mean((p > 0) == (m > 0) for p, m in zip(predicted, measured))
        rows[str(share)] = {
            "pearson": float(pearsonr(predicted, measured).statistic),
            "spearman": float(spearmanr(predicted, measured).statistic),
            "same_sign": agree,
            "median_ratio": statistics.median(m / p for p, m in zip(predicted, measured)),
        }
        changes[str(share)] = {"predicted": predicted, "measured": measured}
    return {"units": count, "by_share": rows, "changes": changes}


def many_units(measure: Measure) -> list[dict]:
    """Predicted and measured changes when the lowest-scored units of every group are removed together."""
    rows = []
    for share in tqdm(REMOVED, desc="units together"):
        chosen = []
        for group in measure.groups:
            lowest = measure.scores[group.name].argsort()[: max(1, round(share * group.num_units))].tolist()
            chosen += [(group, unit) for unit in lowest]
        predicted = -2 * sum(measure.scores[group.name][unit].item() for group, unit in chosen)
        measured, loss = measure.change(chosen, 1.0)
        rows.append({"share": share, "predicted": predicted, "measured": measured, "loss_change": loss})
    return rows


def plot(path: Path, results: dict) -> None:
    """Plot predicted against measured changes, by share."""
    names, shares = list(results["models"]), ("0.01", "0.1", "1.0")
    figure, axes = plt.subplots(len(names), 3, figsize=(10.5, 3.3 * len(names)), squeeze=False, constrained_layout=True)
    for row, name in zip(axes, names):
        for axis, share in zip(row, shares):
            changes = results["models"][name]["single"]["changes"][share]
            axis.scatter(changes["predicted"], changes["measured"], s=8)
            ends = max(map(abs, changes["predicted"]))
            axis.plot([-ends, ends], [-ends, ends], color="gray", linewidth=0.8)
            axis.set_xscale("symlog", linthresh=ends / 1000)
            axis.set_yscale("symlog", linthresh=ends / 1000)
            power = 10.0 ** math.floor(math.log10(ends))
            axis.set_xticks([-power, -power / 100, 0, power / 100, power])
            axis.tick_params(labelsize=7)
            rank = results["models"][name]["single"]["by_share"][share]["spearman"]
            axis.set_title(f"{name}: a = {share}, rank correlation {rank:.2f}", fontsize=9)
            axis.set_xlabel("predicted change of ||g||²", fontsize=8)
            axis.set_ylabel("measured", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, default=50, help="Number of single units.")
    parser.add_argument("--batches", type=int, default=4, help="Number of calibration batches of 64 images.")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/approximation.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "benchmarks/pictures/approximation.png")
    args = parser.parse_args(argv)
    pipeline = load_pipeline(str(ROOT / "training/digits/teacher"))
    images, _ = load_images(DataArguments(dataset_name=str(ROOT / "training/digits")), ModelSpec.of(pipeline.denoiser))
    batches = calibration_batches(
        images, args.batches, 64, process=pipeline.process, seed=0, step=0, rank=0, world_size=1, broken=BrokenImages(0)
    )
    torch.manual_seed(0)
    models = {"trained": pipeline.denoiser, "before training": UNet2DModel.from_config(pipeline.denoiser.config)}
    results: dict = {"batches": args.batches, "batch_size": 64, "models": {}}
    for name, unet in models.items():
        measure = Measure(unet, pipeline.process, batches)
        results["models"][name] = {
            "squared_gradient_norm": measure.base,
            "loss": measure.loss(),
            "single": single_units(measure, args.units),
            "together": many_units(measure),
        }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    plot(args.picture, results)
    for name, found in results["models"].items():
        print(f"\n{name}: loss {found['loss']:.4f}, ||g||^2 {found['squared_gradient_norm']:.3e}")
        for share, row in found["single"]["by_share"].items():
            print(f"  a = {share:6} " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
        for row in found["together"]:
            print("  together " + ", ".join(f"{key} {value:.3e}" for key, value in row.items()))


if __name__ == "__main__":
    main()
