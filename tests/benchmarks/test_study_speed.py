"""benchmarks/study_speed.py: speeds are read, and quality is compared at equal time, in tables and in the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import study_plots
import study_records
import study_report
import study_speed
from study_records import DEFAULT, Found, load, title_of
from study_speed import NOT_MEASURED, Outside, at_time

from helpers.figures import lines, saved_figures
from helpers.study import row_of, run_of

RIVAL = "one-shot-magnitude"


def measured(found: Found, speedups: dict[str, float], folder: Path) -> Path:
    """A file of `study_latency.py`."""
    rows = {name: {str(run["seed"]): row_of(run, speedup) for run in found[name]} for name, speedup in speedups.items()}
    path = folder / "latency.json"
    path.write_text(json.dumps({"machine": {}, "rows": {"digits": rows}}))
    return path


@pytest.fixture
def found() -> Found:
    """Our method and a rival at three budgets each, with two seeds, and a rival at one."""
    quality = {DEFAULT: (0.98, 0.96, 0.92), RIVAL: (0.99, 0.95, 0.85)}
    found = {}
    for name, values in quality.items():
        for ending, ssim in zip(study_records.BUDGETS, values):
            found[name + ending] = [run_of(name + ending, seed, ssim + seed * 0.002, 1 - ssim) for seed in (0, 1)]
    return {**found, "one-shot-taylor": [run_of("one-shot-taylor", 0, 0.9, 0.1)]}


SPEEDUPS = {
    **{f"{DEFAULT}-30": 1.25, DEFAULT: 1.6, f"{DEFAULT}-70": 2.5},  # times 0.8, 0.625, 0.4
    **{f"{RIVAL}-30": 1 / 0.9, RIVAL: 1 / 0.7, f"{RIVAL}-70": 2.0},  # times 0.9, 0.7, 0.5
    "one-shot-taylor": 1 / 0.7,
}


# --- interpolation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        (0.5, (10.0, None)),
        (0.6, (15.0, None)),
        (0.7, (20.0, None)),
        (0.85, (35.0, None)),
        (1.0, (50.0, None)),
        (0.4, (10.0, Outside("fastest", 0.5))),
        (1.1, (50.0, Outside("slowest", 1.0))),
    ],
)
def test_quality_is_linear_between_rows_and_not_extrapolated(time: float, expected: tuple) -> None:
    """Through (0.5, 10), (0.7, 20) and (1, 50), in any order."""
    value, outside = at_time([(1.0, 50.0), (0.5, 10.0), (0.7, 20.0)], time)
    assert (value, outside) == (pytest.approx(expected[0]), expected[1])


def test_rows_of_equal_time_and_single_rows_have_a_value() -> None:
    assert at_time([(0.5, 1.0)], 0.5) == (1.0, None)
    assert at_time([(0.5, 1.0), (0.5, 3.0)], 0.5)[0] in (1.0, 3.0)
    with pytest.raises(ValueError, match="points is empty"):
        at_time([], 0.5)


# --- reading ------------------------------------------------------------------------------------------------------------


def test_speeds_are_means_with_the_widest_interval(tmp_path: Path) -> None:
    found = {DEFAULT: [run_of(DEFAULT, seed, 0.9, width=40 + seed) for seed in (0, 1)]}
    rows = {str(run["seed"]): row_of(run, 1.4 + 0.2 * run["seed"]) for run in found[DEFAULT]}
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({"rows": {"digits": {DEFAULT: rows}}}))
    speed = study_speed.load_speeds(path, {"digits": found})["digits"][DEFAULT][16]
    assert (speed.ratio, speed.low, speed.high) == pytest.approx((1.5, 1.3, 1.7))
    assert speed.time == pytest.approx(1 / 1.5) and str(speed) == "1.50 (1.30 to 1.70)"


def test_rows_with_other_widths_than_measured_have_no_speed(found: Found, tmp_path: Path) -> None:
    """Seeds that were measured stand for those that were not. Without any, or without measurements, there is no speed."""
    path = measured(found, SPEEDUPS, tmp_path)
    before = study_speed.load_speeds(path, {"digits": found})["digits"]
    assert set(before) == set(SPEEDUPS)
    for run in found[DEFAULT]:
        run["widths"] = {"conv_in": 47}
    found[RIVAL].append(run_of(RIVAL, 2, 0.9))
    speeds = study_speed.load_speeds(path, {"digits": found})["digits"]
    assert set(SPEEDUPS) - set(speeds) == {DEFAULT} and speeds[RIVAL] == before[RIVAL]
    assert study_speed.series(DEFAULT, found, speeds) == [f"{DEFAULT}-30", f"{DEFAULT}-70"]
    assert study_speed.load_speeds(tmp_path / "none.json", {"digits": found}) == {"digits": {}}


# --- tables and the picture -------------------------------------------------------------------------------------------------


def test_tables_have_the_speed_of_measured_rows(found: Found, tmp_path: Path) -> None:
    speedups = {name: speedup for name, speedup in SPEEDUPS.items() if name != RIVAL}
    speeds = study_speed.load_speeds(measured(found, speedups, tmp_path), {"digits": found})["digits"]
    head, _, dense, default, rival = study_report.main_table(found, "digits", [DEFAULT, RIVAL], speeds).splitlines()
    assert head.endswith("| PSNR to dense | times as fast, batch 16 |") and dense.endswith("| - | 1 |")
    assert default.endswith("| 1.60 (1.50 to 1.70) |") and rival.endswith("| - |")
    assert "times as fast" not in study_report.main_table(found, "digits", [DEFAULT, RIVAL])  # nothing was measured
    assert "times as fast" not in study_report.main_table(found, "digits", [RIVAL], speeds)  # not in this table


def test_rivals_are_compared_at_equal_time(found: Found, tmp_path: Path) -> None:
    """Each seed is interpolated; what lies outside of a method's rows is that of the nearest one, and says so."""
    speeds = study_speed.load_speeds(measured(found, SPEEDUPS, tmp_path), {"digits": found})["digits"]
    rows = [line.strip("| ").split(" | ") for line in study_report.equal_time_table(found, "digits", speeds, 16).splitlines()]
    title = title_of(RIVAL)
    assert rows[0] == [f"Ours: {title_of(DEFAULT)}."]
    assert rows[4:] == [
        # at 0.8, the middle of 0.9 and 0.7
        [title, "0.80", "0.0200 ± 0.0000", "0.0300 ± 0.0000", "0.9810 ± 0.0014", "0.9710 ± 0.0014", "rival"],
        # at 0.625, 5 / 8 of the way from 0.5 to 0.7: 0.85 + 0.0625
        [title, "0.62", "0.0400 ± 0.0000", "0.0875 ± 0.0000", "0.9610 ± 0.0014", "0.9135 ± 0.0014", "rival"],
        [
            *(title, "0.40", "0.0800 ± 0.0000", "0.1500 ± 0.0000", "0.9210 ± 0.0014", "0.8510 ± 0.0014"),
            "none: the fastest row of rival is at 0.50",
        ],
        # one row: ours at 0.7, 3 / 7 of the way from 0.625 to 0.8
        [title_of("one-shot-taylor"), "0.70", "0.0314 ± 0.0000", "0.1000", "0.9696 ± 0.0014", "0.9000", "ours"],
    ]
    assert study_report.equal_time_table(found, "digits", speeds, 128) == NOT_MEASURED
    assert study_report.equal_time_table(found, "digits", {}, 16) == NOT_MEASURED
    del found[DEFAULT]  # no longer at all budgets
    assert study_report.equal_time_table(found, "digits", speeds, 16) == NOT_MEASURED
    with pytest.raises(ValueError, match="have no seed in common"):
        study_speed.quality_at([f"{DEFAULT}-30", "x"], {**found, "x": []}, "digits", speeds, 16, "distance", 0.5)


def test_the_picture_has_quality_over_measured_time(found: Found, tmp_path: Path) -> None:
    """A marker for each row, those of a method joined; rows that were not measured are not drawn."""
    speedups = {name: speedup for name, speedup in SPEEDUPS.items() if name != "one-shot-taylor"}
    speeds = study_speed.load_speeds(measured(found, speedups, tmp_path), {"digits": found})
    with saved_figures() as figures:
        study_plots.plot_speeds(tmp_path / "speed.png", {"digits": found}, speeds)
    distance, ssim = figures[0].axes
    assert distance.get_yscale() == "log" and "batch 16" in distance.get_title() and "SSIM" in ssim.get_title()
    assert "share of the dense model's" in distance.get_xlabel()
    drawn = lines(ssim)
    assert set(drawn) == {title_of(DEFAULT), title_of(RIVAL)}
    assert drawn[title_of(DEFAULT)] == (pytest.approx([0.8, 0.625, 0.4]), pytest.approx([0.981, 0.961, 0.921]))
    assert drawn[title_of(RIVAL)] == (pytest.approx([0.9, 0.7, 0.5]), pytest.approx([0.991, 0.951, 0.851]))
    assert lines(distance)[title_of(DEFAULT)][1] == pytest.approx([0.02, 0.04, 0.08])
    assert lines(distance)["dense"][1] == [0.03, 0.03]


def test_documents_have_the_picture_once_speeds_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Until then, they say how to measure them."""
    runs = {name: load("digits")[RIVAL][:1] for name in (DEFAULT, RIVAL)}
    (tmp_path / "study/digits").mkdir(parents=True)
    for name, (run,) in runs.items():
        (tmp_path / f"study/digits/{name}-seed0.json").write_text(json.dumps(run))
    words = ["--results", str(tmp_path / "study"), "--pictures", str(tmp_path), "--latencies"]
    study_report.main([*words, str(tmp_path / "none.json")])
    assert f"speed picture\n\n{NOT_MEASURED}" in capsys.readouterr().out
    assert not (tmp_path / study_report.SPEED_PICTURE).exists()
    study_report.main([*words, str(measured(runs, dict.fromkeys(runs, 1.5), tmp_path))])
    printed = capsys.readouterr().out
    assert f"![quality over measured time](pictures/{study_report.SPEED_PICTURE})" in printed
    assert "| 1.50 (1.40 to 1.60) |" in printed and (tmp_path / study_report.SPEED_PICTURE).exists()
