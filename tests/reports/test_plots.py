"""reports/plots.py: pictures show the values of the report and the samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_gfprune.reports.plots import plot_pruning, plot_step_loss, plot_widths, save_sample_grid, save_sample_rows
from helpers.figures import cells, lines, saved_figures

REPORT = Path(__file__).resolve().parents[2] / "model_cards/digits-gfpruned/pruning_report.json"


@pytest.fixture
def report() -> dict:
    return json.loads(REPORT.read_text())


def shades(*values: float) -> torch.Tensor:
    """An image of one shade for each value."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)


def test_dense_samples_are_above_pruned_ones(tmp_path: Path) -> None:
    """In pairs, and in a second row of pairs where there are enough of them; what does not fill a row is left out."""
    save_sample_grid(tmp_path / "grid.png", shades(0, 0.2, 0.4, 0.6, 0.8), shades(0.1, 0.3, 0.5, 0.7, 0.9), columns=2)
    drawn = cells(tmp_path / "grid.png", columns=2)
    assert drawn[:, :, 0, 0, 0].tolist() == [[0, 51], [26, 77], [102, 153], [128, 179]]
    assert (drawn == drawn[:, :, :1, :1, :1]).all()


def test_grids_of_all_rows_are_filled_up_with_grey(tmp_path: Path) -> None:
    save_sample_grid(tmp_path / "grid.png", shades(0, 0.2, 0.4), shades(0.1, 0.3, 0.6), columns=2, rows=None)
    drawn = cells(tmp_path / "grid.png", columns=2)
    assert drawn[:, :, 0, 0, 0].tolist() == [[0, 51], [26, 77], [102, 128], [153, 128]]


def test_rows_of_samples_are_models(tmp_path: Path) -> None:
    save_sample_rows(tmp_path / "rows.png", [shades(0, 1, 0), shades(1, 0.2)])
    assert cells(tmp_path / "rows.png", columns=2)[:, :, 0, 0, 0].tolist() == [[0, 255], [255, 51]]
    with saved_figures() as figures:
        save_sample_rows(tmp_path / "titled.png", [shades(0, 1), shades(1, 0.2)], ["dense", "pruned"])
    axes = figures[0].axes
    assert [axis.get_title("left") for axis in axes] == ["dense", "pruned"]
    assert [[int(axis.images[0].get_array()[10, x, 0]) for x in (10, 60)] for axis in axes] == [[0, 1], [1, 0]]


def test_step_losses_and_their_ratio(tmp_path: Path) -> None:
    losses = {"pruned": {"5": 0.5, "95": 0.25}, "dense": {"5": 0.25, "95": 0.2}}
    with saved_figures() as figures:
        plot_step_loss(tmp_path / "loss.png", losses)
    left, right = figures[0].axes
    assert lines(left) == {"pruned": ([5, 95], [0.5, 0.25]), "dense": ([5, 95], [0.25, 0.2])}
    assert lines(right) == {"pruned": ([5, 95], [2, 1.25]), "dense": ([5, 95], [1, 1])}
    assert left.get_yscale() == "log" and right.get_title() == "the same, divided by that of dense"


def test_step_losses_of_other_noise_levels_have_no_ratio(tmp_path: Path) -> None:
    """Continuous levels depend on the schedule of the model."""
    with saved_figures() as figures:
        plot_step_loss(tmp_path / "loss.png", {"pruned": {"0.5": 0.5, "0.9": 0.3}, "dense": {"0.5": 0.25, "0.8": 0.2}})
    left, right = figures[0].axes
    assert lines(left)["pruned"] == ([0.5, 0.9], [0.5, 0.3]) and lines(right)["pruned"] == ([0.5], [2])


def test_curves_of_a_run(tmp_path: Path, report: dict) -> None:
    """Each in its own axes, with the phases behind it."""
    curves, updates = report["curves"], report["mask_updates"]
    curves |= {"quality_steps": [750, 1500], "quality": {"fd_pixels": [0.5, None], "psnr_to_dense": [20, 21]}}
    with saved_figures() as figures:
        plot_pruning(tmp_path / "pruning.png", report)
    axes = {axis.get_title(): axis for axis in figures[0].axes if axis.get_visible()}
    assert lines(axes["schedules"]) == {
        "s_t (share of the cost removed)": (curves["schedule_steps"], curves["sparsity"]),
        "p_t (mask value)": (curves["schedule_steps"], curves["mask_value"]),
    }
    drawn = {title: axis.get_lines()[0].get_ydata().tolist() for title, axis in axes.items() if axis.get_lines()}
    assert drawn["kept units"] == [update["kept_units"] for update in updates]
    assert drawn["training loss (mean of neighbouring steps)"] == curves["train_loss"]
    assert drawn["step loss on held-out images"] == curves["validation_loss"]
    np.testing.assert_equal(drawn["fd_pixels of samples"], [0.5, np.nan])
    assert "psnr_to_dense of samples" not in axes
    bars = [bar.get_height() for bar in axes["units that came back at a ranking"].patches[: len(updates)]]
    assert bars == [update["revived_units"] for update in updates]
    soft, hard = axes["kept units"].patches
    ends = report["phases"]["soft_end_step"], report["phases"]["hard_end_step"]
    assert (soft.get_x() + soft.get_width(), hard.get_x() + hard.get_width()) == ends


def test_how_often_timesteps_were_drawn(tmp_path: Path, report: dict) -> None:
    """Over timesteps, so that no phases stand behind it."""
    density = {"timesteps": [125, 875], "density": [0.5, 1.5]}
    with saved_figures() as figures:
        plot_pruning(tmp_path / "without.png", report | {"timestep_density": None})
        plot_pruning(tmp_path / "with.png", report | {"timestep_density": density})
    without, drawn = ({axis.get_title(): axis for axis in figure.axes if axis.get_visible()} for figure in figures)
    (title,) = {*drawn} - {*without}
    assert title == "how often timesteps were drawn at the end"
    assert lines(drawn[title])["density"] == ([125, 875], [0.5, 1.5])
    assert not drawn[title].patches


def test_widths_of_groups(tmp_path: Path, report: dict) -> None:
    groups = report["channel_groups"]
    with saved_figures() as figures:
        plot_widths(tmp_path / "widths.png", report)
    (axis,) = figures[0].axes
    bars = [bar.get_width() for bar in axis.patches]
    assert bars == [*(group["dense_channels"] for group in groups), *(group["kept_channels"] for group in groups)]
    assert [label.get_text() for label in axis.get_yticklabels()] == [group["name"] for group in groups]
    assert axis.texts[0].get_text() == f" {groups[0]['kept_channels']} of {groups[0]['dense_channels']}"
