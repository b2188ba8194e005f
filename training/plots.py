"""Pictures of a run: the sample grid, and the pruning curves with their phases."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from torch import Tensor  # noqa: E402
from torchvision.utils import make_grid, save_image  # noqa: E402

__all__ = ["plot_pruning", "plot_widths", "save_sample_grid"]


def save_sample_grid(path: Path, dense: Tensor, pruned: Tensor, columns: int = 16, rows: int = 2) -> None:
    """Samples of the dense model above those of the pruned one, each column from the same noise.

    Args:
        path: PNG file.
        dense: Images in [0, 1] with shape `(n, channels, height, width)`.
        pruned: Likewise.
        columns: Pairs side by side.
        rows: Rows of pairs.
    """
    columns = min(columns, len(dense))
    scale = max(1, 48 // dense.shape[-1])
    strips = []
    for row in range(rows):
        chunk = slice(row * columns, (row + 1) * columns)
        if len(dense[chunk]) == columns:
            strips.extend([*dense[chunk], *pruned[chunk]])
    enlarged = [image.repeat_interleave(scale, 1).repeat_interleave(scale, 2) for image in strips]
    save_image(make_grid(enlarged, nrow=columns, padding=2, pad_value=0.5), path)


def plot_pruning(path: Path, report: dict) -> None:
    """Schedules, kept and revived channels, and losses over steps, with the phases marked.

    Args:
        path: PNG file.
        report: Content of `pruning_report.json`.
    """
    curves, updates = report["curves"], report["mask_updates"]
    soft, end = report["phases"]["soft_end_step"], report["phases"]["hard_end_step"]
    figure, axes = plt.subplots(3, 2, figsize=(11, 9), constrained_layout=True)
    steps = curves["schedule_steps"]
    axes[0, 0].plot(steps, curves["sparsity"], label="s_t (share of the cost removed)")
    axes[0, 0].plot(steps, curves["mask_value"], label="p_t (mask value)")
    axes[0, 0].set_title("schedules")
    axes[0, 0].legend()
    update_steps = [update["step"] for update in updates]
    axes[0, 1].plot(update_steps, [update["kept_channels"] for update in updates], marker=".")
    axes[0, 1].set_title("kept channels")
    axes[1, 0].bar(update_steps, [update["revived_channels"] for update in updates], width=max(1, end / 40))
    axes[1, 0].set_title("channels that came back at a ranking")
    axes[1, 1].plot(update_steps, [update["macs"] / 1e6 for update in updates], marker=".")
    axes[1, 1].set_title("MACs of the kept channels (millions)")
    axes[2, 0].plot(curves["train_steps"], curves["train_loss"], linewidth=0.8)
    axes[2, 0].set_title("training loss (mean of neighbouring steps)")
    axes[2, 1].plot(curves["validation_steps"], curves["validation_loss"], marker=".")
    axes[2, 1].axhline(report["dense_step_loss"], color="gray", linestyle=":", label="dense")
    axes[2, 1].set_title("step loss on held-out images")
    axes[2, 1].legend()
    for index, axis in enumerate(axes.flat):
        early = index < 4  # what happens only while pruning is shown up to shortly after it
        axis.set_xlim(0, max(1, 1.25 * end) if early and end else None)
        axis.axvspan(0, soft, color="tab:blue", alpha=0.08)
        axis.axvspan(soft, end, color="tab:orange", alpha=0.10)
        axis.set_xlabel("step (blue: soft phase, orange: hard phase)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_widths(path: Path, report: dict) -> None:
    """Channels of every group, kept in front of dense.

    Args:
        path: PNG file.
        report: Content of `pruning_report.json`.
    """
    groups = report["channel_groups"]
    dense, kept = ([group[key] for group in groups] for key in ("dense_channels", "kept_channels"))
    places = range(len(groups))
    figure, axis = plt.subplots(figsize=(9, 1 + 0.24 * len(groups)), constrained_layout=True)
    axis.barh(places, dense, color="0.85", label="dense")
    axis.barh(places, kept, color="tab:blue", label="kept")
    for place, (before, after) in enumerate(zip(dense, kept)):
        axis.text(before, place, f" {after} of {before}", va="center", fontsize=7)
    axis.set_yticks(places, [group["name"] for group in groups], fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.12, y=0.01)
    axis.set_xlabel("channels")
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)
