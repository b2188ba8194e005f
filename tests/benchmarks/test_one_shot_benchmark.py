"""benchmarks/one_shot.py: what is measured, and what its tables say."""

from __future__ import annotations

from pathlib import Path

import one_shot
import pytest


@pytest.mark.slow
def test_joint_choices_leave_the_least_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the digits at 20 %: the model that is pruned is the trained one, and both figures agree on the order."""
    mended, as_in_runs, sensitivity, recovered, joint, _, _, with_blocks, _, _, rival, *_ = one_shot.ROWS
    titles = (recovered, joint, with_blocks, mended, as_in_runs, sensitivity, rival)
    monkeypatch.setattr(one_shot, "ROWS", {title: one_shot.ROWS[title] for title in titles})
    words = ["--dataset", "digits", "--ratios", "0.2", "--images", "8", "--results", str(tmp_path)]
    one_shot.main([*words, "--train_batch_size", "16"])
    measured = one_shot.json.loads((tmp_path / "digits.json").read_text())
    rows = {title: row["0.2"] for title, row in measured["rows"].items()}
    assert list(rows) == list(one_shot.ROWS)
    assert all(row["macs_removed"] == pytest.approx(0.2, abs=0.01) for row in rows.values())
    recovered, joint, with_blocks, mended, as_in_runs, *others = rows.values()
    assert recovered["damage"] < joint["damage"] / 2 and recovered["ssim"] > joint["ssim"]
    assert all(row["damage"] < others[0]["damage"] / 4 for row in (mended, as_in_runs))  # the same widths without recovery
    assert with_blocks["damage"] < 1.3 * joint["damage"]
    assert all(joint["damage"] < 0.7 * row["damage"] and joint["ssim"] > row["ssim"] + 0.05 for row in others)
    assert measured["calibration_images"] == 64 and measured["images"] == 8
    assert f"| {joint['damage']:.5f}, {joint['ssim']:.3f} |" in capsys.readouterr().out


@pytest.mark.slow
def test_some_rows_are_measured_and_others_kept(tmp_path: Path) -> None:
    words = ["--dataset", "digits", "--ratios", "0.2", "--images", "8", "--results", str(tmp_path), "--train_batch_size", "16"]
    one_shot.main([*words, "--rows", "magnitude"])
    file = tmp_path / "digits.json"
    first = one_shot.json.loads(file.read_text())
    recovered, plain = (row["0.2"] for row in first["rows"].values())
    assert recovered["macs_removed"] == plain["macs_removed"] and recovered["damage"] < plain["damage"] / 2
    one_shot.main([*words, "--rows", "Diff-Pruning, with"])
    then = one_shot.json.loads(file.read_text())
    assert [title for title in one_shot.ROWS if title in then["rows"]] == list(then["rows"]) and len(then["rows"]) == 3
    assert all(then["rows"][title] == row for title, row in first["rows"].items())


def test_rows_of_other_images_are_not_merged() -> None:
    first, last = list(one_shot.ROWS)[0], list(one_shot.ROWS)[-1]
    earlier = {"calibration_images": 64, "images": 8, "num_inference_steps": 50, "rows": {last: {"0.2": 1}, first: {"0.2": 2}}}
    again = one_shot.merged(earlier, {**earlier, "rows": {last: {"0.2": 3}}})
    assert list(again["rows"].items()) == [(first, {"0.2": 2}), (last, {"0.2": 3})]
    with pytest.raises(ValueError, match="images=9 must be 8, as for the other rows"):
        one_shot.merged(earlier, {**earlier, "images": 9})


def test_the_table_has_a_row_for_each_criterion() -> None:
    met, missed = (
        {"macs_removed": removed, "damage": damage, "ssim": 0.5} for removed, damage in ((0.1, 0.01234), (0.45, 1.0))
    )
    rows = {"a": {"0.1": met, "0.5": missed}}
    lines = one_shot.table({"digits": {"rows": rows}}).splitlines()
    assert lines[2:5] == ["| | 10% | 50% |", "|---|---:|---:|", "| a | 0.01234, 0.500 | 1.00000, 0.500 (at 45%) |"]


def test_the_readme_says_what_was_measured() -> None:
    """On CIFAR-10 images: samples at each share of the MACs."""
    rows = one_shot.json.loads((one_shot.RESULTS / "cifar10.json").read_text())["rows"]
    text = (one_shot.ROOT / "README.md").read_text()
    shown = {
        "`prune()`": next(iter(one_shot.ROWS)),
        "Diff-Pruning's criterion, with the same least squares": f"Diff-Pruning{one_shot.RECOVERED}",
        "Diff-Pruning's criterion": "Diff-Pruning",
    }
    for title, name in shown.items():
        cells = " | ".join(f"{rows[name][str(ratio)]['ssim']:.3f}" for ratio in one_shot.RATIOS)
        assert f"| {title} | {cells} |" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "dataset must be given, or write"),
        (["--dataset", "digits", "--images", "0"], "images=0 must be at least 1"),
        (["--dataset", "digits", "--rows", "luck"], "rows=luck must be a part of a title: gradient flow"),
    ],
)
def test_bad_arguments_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one_shot.main(words)
