"""Pictures of a run: samples, pruning curves with their phases, widths, step losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

SHOWN_QUALITY = ("fid", "ssim_to_dense")

__all__ = ["plot_pruning", "plot_step_loss", "plot_widths", "sample_grid", "save_sample_grid", "save_sample_rows"]


def save_sample_grid(path: Path, dense: Tensor, pruned: Tensor, columns: int = 16, rows: int | None = 2) -> None:
    """Samples of the dense model above those of the pruned one, each column from the same noise.

    Args:
        path: PNG file.
        dense: Images in [0, 1] with shape `(n, channels, height, width)`.
        pruned: Images of the same range and shape.
        columns: Number of pairs in a row.
        rows: Number of full rows of pairs, at most; None: all pairs, the last row filled up with grey.
    """
    columns = min(columns, len(dense))
    if rows is None:
        grey = dense.new_full((-len(dense) % columns, *dense.shape[1:]), 0.5)
        dense, pruned = torch.cat([dense, grey]), torch.cat([pruned, grey])
    pairs = list(zip(dense.split(columns), pruned.split(columns)))[: len(dense) // columns][:rows]
    save_sample_rows(path, [row for pair in pairs for row in pair], columns=columns)


def sample_grid(images: Sequence[Tensor], columns: int, pixels: int = 48) -> Tensor:
    """A grid of images on grey.

    Args:
        images: Images in [0, 1], each with shape `(channels, height, width)`.
        columns: Number of images in a row.
        pixels: Size to which small images are enlarged, by a whole factor.

    Returns:
        A picture in [0, 1] with shape `(3, height, width)`.
    """
    scale = max(1, pixels // images[0].shape[-1])
    enlarged = [image.repeat_interleave(scale, 1).repeat_interleave(scale, 2) for image in images]
    return make_grid(enlarged, nrow=columns, padding=2, pad_value=0.5)


def save_sample_rows(path: Path, rows: Sequence[Tensor], titles: Sequence[str] = (), columns: int = 16) -> None:
    """Samples of several models, one row each; the images of a column start from the same noise.

    Args:
        path: PNG file.
        rows: Images in [0, 1], each with shape `(n, channels, height, width)`.
        titles: Titles above the rows, if given.
        columns: Number of samples of each model.
    """
    columns = min(columns, *(len(row) for row in rows))
    if not titles:
        save_image(sample_grid([image for row in rows for image in row[:columns]], columns), path)
        return
    figure, axes = plt.subplots(len(rows), 1, figsize=(0.6 * columns, 0.9 * len(rows)), squeeze=False)
    for axis, row, title in zip(axes[:, 0], rows, titles):
        axis.imshow(sample_grid(list(row[:columns]), columns).permute(1, 2, 0).numpy())
        axis.set_title(title, fontsize=7, loc="left", pad=2)
        axis.axis("off")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def plot_step_loss(path: Path, losses: Mapping[str, Mapping[str, float]]) -> None:
    """Step loss over timesteps, and its ratio to that of the last model.

    Args:
        path: PNG file.
        losses: Losses by timestep, by model name; a dense reference comes last. Where its losses are 0, since they are
            distances to its own outputs, it is left out, and so are ratios.
    """
    is_distance = not any(list(losses.values())[-1].values())
    losses = dict(list(losses.items())[:-1]) if is_distance and len(losses) > 1 else losses
    figure, axes = plt.subplots(1, 1 if is_distance else 2, figsize=(10, 3.4), constrained_layout=True, squeeze=False)
    axes, reference = axes[0], list(losses.values())[-1]
    for name, by_timestep in losses.items():
        timesteps = [float(timestep) for timestep in by_timestep]
        axes[0].semilogy(timesteps, list(by_timestep.values()), marker=".", label=name)
        if not is_distance:
            both = [t for t in by_timestep if t in reference]  # continuous times of another schedule are others
            axes[1].plot([float(t) for t in both], [by_timestep[t] / reference[t] for t in both], marker=".", label=name)
    axes[0].set_title("step loss on held-out images")
    if not is_distance:
        axes[1].set_title(f"the same, divided by that of {list(losses)[-1]}")
    for axis in axes:
        axis.set_xlabel("timestep (high: much noise)")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_pruning(path: Path, report: dict) -> None:
    """Schedules, kept and revived units, and losses over steps, with the phases marked, and the density of timesteps.

    Args:
        path: PNG file.
        report: Content of `pruning_report.json`.
    """
    curves, updates = report["curves"], report["mask_updates"]
    soft, end = report["phases"]["soft_end_step"], report["phases"]["hard_end_step"]
    quality = {name: values for name, values in curves["quality"].items() if name.startswith("fd_") or name in SHOWN_QUALITY}
    density = report.get("timestep_density")  # older reports have none
    panels = 6 + len(quality) + (density is not None)
    rows = (panels + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(11, 3 * rows), constrained_layout=True)
    steps = curves["schedule_steps"]
    axes[0, 0].plot(steps, curves["sparsity"], label="s_t (share of the cost removed)")
    axes[0, 0].plot(steps, curves["mask_value"], label="p_t (mask value)")
    axes[0, 0].set_title("schedules")
    axes[0, 0].legend()
    update_steps = [update["step"] for update in updates]
    axes[0, 1].plot(update_steps, [update["kept_units"] for update in updates], marker=".")
    axes[0, 1].set_title("kept units")
    axes[1, 0].bar(update_steps, [update["revived_units"] for update in updates], width=max(1, end / 40))
    axes[1, 0].set_title("units that came back at a ranking")
    axes[1, 1].plot(update_steps, [update["macs"] / 1e6 for update in updates], marker=".")
    axes[1, 1].set_title("MACs of the kept units (millions)")
    axes[2, 0].plot(curves["train_steps"], curves["train_loss"], linewidth=0.8)
    axes[2, 0].set_title("training loss (mean of neighbouring steps)")
    axes[2, 1].plot(curves["validation_steps"], curves["validation_loss"], marker=".")
    axes[2, 1].axhline(report["dense_step_loss"], color="gray", linestyle=":", label="dense")
    axes[2, 1].set_title("step loss on held-out images")
    axes[2, 1].legend()
    for axis, (name, values) in zip(axes[3:].flat, quality.items()):
        axis.plot(curves["quality_steps"], [math.nan if value is None else value for value in values], marker=".")
        axis.set_title(f"{name} of samples")
    for axis in axes.flat[panels:]:
        axis.set_visible(False)
    if density is not None:
        axis = axes.flat[panels - 1]
        axis.plot(density["timesteps"], density["density"], marker=".", label="density")
        axis.axhline(1, color="gray", linestyle=":", label="all alike")
        axis.set_title("how often timesteps were drawn at the end")
        axis.set_xlabel("timestep (high: much noise)")
        axis.legend()
    for index, axis in enumerate(axes.flat[: 6 + len(quality)]):
        early = index < 4  # curves of the pruning phases end shortly after them
        axis.set_xlim(0, max(1, 1.25 * end) if early and end else None)
        axis.axvspan(0, soft, color="tab:blue", alpha=0.08)
        axis.axvspan(soft, end, color="tab:orange", alpha=0.10)
        axis.set_xlabel("step (blue: soft phase, orange: hard phase)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_widths(path: Path, report: dict) -> None:
    """Channels of every group: kept ones in front of those of the dense model. The title names removed blocks.

    Args:
        path: PNG file.
        report: Content of `pruning_report.json`.
    """
    groups = report["channel_groups"]
    dense, pruned = ([group[key] for group in groups] for key in ("dense_channels", "kept_channels"))
    places = range(len(groups))
    figure, axis = plt.subplots(figsize=(9, 1 + 0.24 * len(groups)), constrained_layout=True)
    axis.barh(places, dense, color="0.85", label="dense")
    axis.barh(places, pruned, color="tab:blue", label="kept")
    for place, (before, after) in enumerate(zip(dense, pruned)):
        axis.text(before, place, f" {after} of {before}", va="center", fontsize=7)
    axis.set_yticks(places, [group["name"] for group in groups], fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.12, y=0.01)
    if removed := report.get("removed_blocks"):  # older reports have none
        axis.set_title("\n".join(["removed blocks:", *removed]), fontsize=7, loc="left")
    axis.set_xlabel("channels")
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)
