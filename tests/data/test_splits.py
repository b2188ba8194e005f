"""data/splits.py and data/images.py: which splits are used for training and held out."""

from __future__ import annotations

import logging
from pathlib import Path

import datasets
import pytest

from diffusers_gfprune.data.splits import DataSummary
from helpers.images import load, model_spec, numbered, numbers_of

SPLITS = {"train": [0, 1, 2, 3, 4, 5], "validation": [10, 11], "test": [20, 21, 22], "extra": [30, 31, 32, 33]}


def write(folder: Path, labels: dict[str, list[int | None]]) -> Path:
    """A data set with some of the splits, and labels in turn; no column of these for splits without any."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, wanted in labels.items():
        columns = {"image": [{"bytes": numbered(number), "path": None} for number in SPLITS[name]]}
        features = datasets.Features(image=datasets.Image())
        if wanted:
            columns["label"] = [wanted[row % len(wanted)] for row in range(len(SPLITS[name]))]
            features["label"] = datasets.ClassLabel(num_classes=4)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"data/{name}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_are_chosen_by_name(streaming: bool, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", {name: [0] for name in SPLITS})

    def chosen(**arguments) -> tuple[list[int], list[int], str, str]:
        train, (held_out, _) = load(folder, streaming=streaming, **arguments)
        return numbers_of(train.head(99)), numbers_of(held_out), train.summary.train, train.summary.held_out

    assert chosen() == ([0, 1, 2, 3, 4, 5], [10, 11], "train", "validation")
    assert chosen(validation_split_name="test") == ([0, 1, 2, 3, 4, 5], [20, 21], "train", "test")
    assert chosen(train_split_name="test") == ([20, 21, 22], [10, 11], "test", "validation")
    assert chosen(train_split_name="extra", validation_split_name="train") == ([30, 31, 32, 33], [0, 1], "extra", "train")
    train, held_out, *names = chosen(validation_split_name="train")  # as if there were no other
    assert sorted(train + held_out) == [0, 1, 2, 3, 4, 5] and len(held_out) == 2 and names == ["train", "train"]
    for argument in ("train_split_name", "validation_split_name"):
        with pytest.raises(ValueError, match=f"^{argument}=valid is not a split of dataset_name=.*, which has train, va"):
            chosen(**{argument: "valid"})


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("unlabelled", [[-1], [None], []])
def test_split_without_labels_is_passed_over_with_a_warning(
    unlabelled: list, streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only where the model needs labels; and where it is asked for, the error names it."""
    folder = write(tmp_path / "data", {"train": [0, 1, 2], "test": unlabelled})
    with caplog.at_level(logging.WARNING):
        train, (held_out, labels) = load(folder, model_spec(classes=3), streaming=streaming)
    assert train.summary.held_out == "train" and sorted(numbers_of(train.head(9)) + numbers_of(held_out)) == SPLITS["train"]
    assert labels.tolist() == [number % 3 for number in numbers_of(held_out)]
    assert "split test has no class labels in column label of dataset_name=" in caplog.text
    with pytest.raises(ValueError, match="^validation_split_name=test: split test has no class labels in column label of "):
        load(folder, model_spec(classes=3), streaming=streaming, validation_split_name="test")
    train, (held_out, labels) = load(folder, streaming=streaming)
    assert numbers_of(held_out) == [20, 21] and labels is None and train.summary.held_out == "test"


@pytest.mark.parametrize("streaming", [False, True])
def test_label_that_the_model_lacks_is_an_error_that_names_the_split(streaming: bool, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", {"train": [0, 1], "test": [1, -1]})
    with pytest.raises(
        ValueError, match="^split test: label -1 of row 1.* must be at least 0 and less than num_class_embeds=2"
    ):
        load(folder, model_spec(classes=2), streaming=streaming)
    with pytest.raises(
        ValueError, match="^split train: label 1 of row [0-9].* must be at least 0 and less than num_class_embeds=1"
    ):
        load(folder, model_spec(classes=1), streaming=streaming, validation_split_name="train")


def test_summary_says_what_is_not_used_or_not_known() -> None:
    known = DataSummary("dataset_name=x", {"train": 1500, "test": 10, "extra": 5}, "train", "test", 1500, 9)
    assert known.lines() == [
        "dataset_name=x, splits train (1,500), test (10), extra (5): 1,515 images in all",
        "1,500 training images of train, 9 held-out images of test; not used: extra",
    ]
    stream = DataSummary("dataset_name=x (a stream)", {"train": None}, "train", "train", None, 9, enlarged=True)
    assert stream.lines() == [
        "dataset_name=x (a stream), split train: an unknown number of images in all",
        "an unknown number of training images of train, 9 held-out images of train; all are scaled up to the model's size",
    ]
