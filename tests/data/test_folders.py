"""data/folders.py: all images of a folder are read, under any name, and splits are never guessed."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import datasets
import pytest
from PIL import Image

from diffusers_gfprune.data.folders import load_folder, visible_files
from diffusers_gfprune.data.images import DataArguments, load_images
from helpers.images import model_spec, numbered, numbers_of, write_folder, write_parquet


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def images(*numbers: int) -> list[bytes]:
    return [numbered(number) for number in numbers]


def read(folder: Path | str, cache: str, argument: str = "train_data_dir", classes: int | None = None, **arguments):
    """Numbers of the training images and of the held-out ones, both sorted, and the summary."""
    arguments = {"validation_images": 2, "cache_dir": cache, argument: str(folder), **arguments}
    train, kept = load_images(DataArguments(**arguments), model_spec(classes=classes))
    held_out, labels = kept.samples, kept.conditioning.get("class_labels")
    found = sorted(numbers_of(train.head(999))), sorted(numbers_of(held_out)), train.summary
    return found if classes is None else (*found, [image.label for image in train.in_order()], labels.tolist())


# which files count


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "b/c").mkdir(parents=True)
    for hidden in (".git", "b/.ipynb_checkpoints/deep", "__MACOSX/b", ".hidden"):
        write_folder(tmp_path / hidden, images(1))
    for name in ("a.png", "b.png", "b/1.png", "b/c/1.png", "b/.1.png", "b-1.png", "_.png"):
        (tmp_path / name).write_bytes(numbered(1))
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    found = [path.relative_to(tmp_path).as_posix() for path in visible_files(tmp_path)]
    assert found == ["_.png", "a.png", "b-1.png", "b.png", "b/1.png", "b/c/1.png"]
    assert visible_files(tmp_path / ".hidden") == [tmp_path / ".hidden/000.png"]  # the user asked for it


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", images(1, 2))
    (tmp_path / "data/a").mkdir(parents=True)
    (tmp_path / "data/a/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/up").symlink_to(tmp_path / "data")
    found = [path.relative_to(tmp_path / "data").as_posix() for path in visible_files(tmp_path / "data")]
    assert found == ["a/link/000.png", "a/link/001.png"]


# splits of folders


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("argument", ["train_data_dir", "dataset_name"])
def test_splits_are_not_guessed_from_file_names(argument: str, streaming: bool, tmp_path: Path, cache: str) -> None:
    """20 of each kind: `datasets` alone would train on 20, hold out 20 and drop 20."""
    for start, name in ((0, "img"), (20, "img_train"), (40, "img_test")):
        for number in range(start, start + 20):
            (tmp_path / f"{name}_{number - start:03}.png").write_bytes(numbered(number))
    write_folder(tmp_path / ".ipynb_checkpoints", images(200))
    train, held_out, summary = read(tmp_path, cache, argument, streaming=streaming, validation_images=20)
    assert len(train) == 40 and len(held_out) == 20 and sorted(train + held_out) == list(range(60))
    if streaming:
        assert summary.lines() == [
            f"{argument}={tmp_path} (a stream), split train: an unknown number of images in all",
            "an unknown number of training images of train, 20 held-out images of train",
        ]
    else:
        assert summary.lines() == [
            f"{argument}={tmp_path}, split train (60): 60 images in all",
            "40 training images of train, 20 held-out images of train",
        ]


@pytest.mark.parametrize("folders", [("bus", "car", "train"), ("train",), ("test",), ("train_1", "test_1"), ("test", "val")])
def test_folders_are_splits_only_where_they_are_named_as_such(folders: tuple[str, ...], tmp_path: Path, cache: str) -> None:
    """A train is also a means of transport."""
    for number, name in enumerate(folders):
        write_folder(tmp_path / name, images(*range(4 * number, 4 * number + 4)))
    train, held_out, summary = read(tmp_path, cache)
    assert sorted(train + held_out) == list(range(4 * len(folders))) and list(summary.splits) == ["train"]
    if len(folders) > 1:  # they are classes
        *_, labels, held_out_labels = read(tmp_path, cache, classes=3)
        assert sorted(labels + held_out_labels) == [number for number in range(len(folders)) for _ in range(4)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("root", [".", "unpacked/data"])
@pytest.mark.parametrize("names", [("train", "validation", "test"), ("Training", "val", "eval")])
def test_folders_of_splits_are_splits(names: tuple[str, ...], root: str, streaming: bool, tmp_path: Path, cache: str) -> None:
    for start, name in zip((0, 10, 20), names):
        for kind, extra in (("cat", 0), ("dog", 3)):
            write_folder(tmp_path / root / name / kind, images(*range(start + extra, start + extra + 3)))
    train, held_out, summary, labels, held_out_labels = read(
        tmp_path, cache, classes=2, streaming=streaming, validation_images=4
    )
    assert train == list(range(6)) and held_out == list(range(10, 14))
    assert labels == [0, 0, 0, 1, 1, 1] and held_out_labels == [0, 0, 0, 1]
    assert list(summary.splits) == ["train", "validation", "test"]
    assert summary.lines()[1].endswith("training images of train, 4 held-out images of validation; not used: test")
    _, held_out, summary = read(tmp_path, cache, streaming=streaming, validation_split_name="test")
    assert held_out == [20, 21] and summary.held_out == "test"


def test_folders_of_splits_are_no_classes(tmp_path: Path, cache: str) -> None:
    write_folder(tmp_path / "train", images(1, 2, 3))
    write_folder(tmp_path / "test", images(4, 5))
    assert read(tmp_path, cache)[:2] == ([1, 2, 3], [4, 5])
    with pytest.raises(ValueError, match=r"class conditional, but \['image'\] holds no class labels"):
        read(tmp_path, cache, classes=2)


def test_images_outside_of_the_folders_of_splits_are_refused(tmp_path: Path, cache: str) -> None:
    for name in ("train", "test", "more"):
        write_folder(tmp_path / name, images(1, 2, 3))
    with pytest.raises(
        ValueError, match=r"folders of splits in .* \(test, train\), and 3 images outside .* more/000.png: move"
    ):
        read(tmp_path, cache)


def test_metadata_files_are_read_and_changes_are_noticed(tmp_path: Path, cache: str) -> None:
    """Which images there are, and labels."""
    write_folder(tmp_path, images(0, 1, 2, 3, 4, 5))
    metadata = tmp_path / "metadata.csv"
    for kinds in ((3, 1, 2, 0, 1), (0, 0, 1, 1, 2)):
        metadata.write_text("file_name,kind\n" + "".join(f"{n:03}.png,{kind}\n" for n, kind in enumerate(kinds)))
        os.utime(metadata, ns=(kinds[0], kinds[0]))
        train, held_out, _, labels, held_out_labels = read(tmp_path, cache, classes=4, label_column="kind")
        assert sorted(train + held_out) == [0, 1, 2, 3, 4]
        assert sorted(labels + held_out_labels) == sorted(kinds)


def test_parquet_with_pictures_beside_it_is_parquet(tmp_path: Path, cache: str) -> None:
    """And image files with a README, or with captions, are image files; configurations are refused where there are none."""
    write_parquet(tmp_path / "a", [images(0, 1, 2, 3)])
    (tmp_path / "a/banner.png").write_bytes(numbered(9))
    train, held_out, _ = read(tmp_path / "a", cache, "dataset_name")
    assert sorted(train + held_out) == [0, 1, 2, 3]
    write_folder(tmp_path / "b", images(0, 1, 2, 3))
    for number in range(4):
        (tmp_path / f"b/{number:03}.txt").write_text("a caption")
    (tmp_path / "b/README.md").write_text("# Pictures\n")
    train, held_out, _ = read(tmp_path / "b", cache, "dataset_name")
    assert sorted(train + held_out) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="dataset_config_name=x cannot be used with a folder of image files"):
        read(tmp_path / "b", cache, "dataset_name", dataset_config_name="x")


def test_folder_without_images_is_one_line(tmp_path: Path, cache: str) -> None:
    write_parquet(tmp_path, [images(1, 2, 3, 4)])
    with pytest.raises(
        ValueError, match=r"train_data_dir=.* cannot be loaded: there are no image files in it \(pass a folder of parq"
    ):
        read(tmp_path, cache)
    (tmp_path / "README.md").write_text("---\nconfigs: [a: b: c\n---\n")
    with pytest.raises(
        ValueError, match="dataset_name=.* cannot be loaded: the header of its README.md is not valid YAML: while"
    ):
        read(tmp_path, cache, "dataset_name")
    with pytest.raises(ValueError, match="dataset_name=.*parquet is not a folder"):
        read(next(tmp_path.glob("*.parquet")), cache, "dataset_name")


# any name


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["r/i [v2]", "1 of 2", "x?*", "parquet", "imagefolder", "{a,b}", "old.py", "é:!"])
def test_any_name_of_a_folder(name: str, streaming: bool, tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative, with a slash at its end: glob characters, names of `datasets` modules, Python suffixes."""
    monkeypatch.chdir(tmp_path)
    for kind in ("cat", "dog"):
        write_folder(Path("images") / name / kind, images(*range(4)))
    train, held_out, summary = read(f"images/{name}/", cache, streaming=streaming)
    assert sorted(train + held_out) == sorted(2 * list(range(4))) and summary.source.startswith(
        f"train_data_dir=images/{name}/"
    )
    write_parquet(Path("files") / name, [images(0, 1), images(2)])
    write_parquet(Path("files") / name, [images(5, 6, 7)], split="test")
    (Path("files") / name / "notes.txt").write_text("no data")
    monkeypatch.chdir("files")
    train, held_out, summary = read(f"{name}/", cache, "dataset_name", streaming=streaming)
    assert (train, held_out, list(summary.splits)) == ([0, 1, 2], [5, 6], ["train", "test"])


@pytest.mark.parametrize("name", ["plain", "with [brackets]"])
def test_files_that_are_in_no_split_are_said(name: str, tmp_path: Path, cache: str, caplog: pytest.LogCaptureFixture) -> None:
    """`datasets` passes over them."""
    for split in ("train", "test", "extra"):
        write_parquet(tmp_path / name, [images(1, 2, 3)], split=split)
    with caplog.at_level(logging.WARNING):
        assert list(read(tmp_path / name, cache, "dataset_name")[2].splits) == ["train", "test"]
    (record,) = caplog.records
    assert (
        f"1 files of {tmp_path / name} are not in a split and are not read, such as extra-00000-of-00001"
        in record.getMessage()
    )


def test_two_colons_are_refused(tmp_path: Path, cache: str) -> None:
    """fsspec has no way around them."""
    with pytest.raises(ValueError, match="/a::b has '::' in its path, .* rename it"):
        read(write_folder(tmp_path / "a::b", images(1, 2, 3, 4)), cache)


@pytest.mark.parametrize(
    "names",
    [
        ["train.parquet", "validation.parquet"],
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
        ["train/a.parquet", "train/b.parquet", "dev/a.parquet"],
        ["one.parquet", "two.parquet", ".hidden.parquet", "README.md"],
    ],
)
def test_names_with_brackets_are_read_as_others(names: list[str], tmp_path: Path, cache: str) -> None:
    """What `datasets` makes of the same files in a folder with a plain name."""
    options = {"images_only": False, "cache_dir": cache, "streaming": True}
    found = []
    for root in (tmp_path / "plain", tmp_path / "with [brackets]"):
        for number, name in enumerate(names):
            write_parquet(tmp_path / "made" / str(number), [images(number)])
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(tmp_path / "made" / str(number) / "train-00000-of-00001.parquet", root / name)
        if "README.md" in names:
            configs = (
                "- config_name: a\n  data_files: one.parquet\n- config_name: b\n  default: true\n  data_files: t*.parquet\n"
            )
            (root / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
        splits = load_folder(str(root), None, **options)
        found.append({name: [row["image"].getpixel((0, 0)) for row in rows] for name, rows in splits.items()})
    assert found[0] == found[1] and found[0]
    with pytest.raises(ValueError, match="nowhere"):
        load_folder(str(tmp_path / "with [brackets]"), "nowhere", **options)


# save_to_disk


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("argument", ["train_data_dir", "dataset_name"])
def test_what_save_to_disk_wrote(argument: str, streaming: bool, tmp_path: Path, cache: str) -> None:
    """A `Dataset` and a `DatasetDict`, also with columns that were formatted as tensors."""
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=4))
    pictures = [Image.frombytes("L", (8, 8), bytes([number] * 64)) for number in range(6)]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 2, 3, 0, 1]}, features=features)
    rows.save_to_disk(tmp_path / "rows [1]")
    datasets.DatasetDict(train=rows.with_format("torch"), test=rows.select([4, 5])).save_to_disk(tmp_path / "splits")
    train, held_out, summary = read(tmp_path / "rows [1]", cache, argument, streaming=streaming)
    assert sorted(train + held_out) == list(range(6)) and list(summary.splits) == ["train"]
    *numbers, summary, labels, held_out_labels = read(tmp_path / "splits", cache, argument, classes=4, streaming=streaming)
    assert numbers == [[0, 1, 2, 3, 4, 5], [4, 5]] and summary.held_out == "test"
    assert labels == [0, 1, 2, 3, 0, 1] and held_out_labels == [0, 1]
    with pytest.raises(ValueError, match="dataset_config_name=x cannot be used with a folder written by save_to_disk"):
        read(tmp_path / "splits", cache, argument, dataset_config_name="x")


# classes


@pytest.mark.parametrize(("names", "warned"), [(("8", "9", "10"), True), (("08", "09", "10"), False), (("a", "b10"), False)])
def test_numbered_classes_in_another_order_are_said(
    names: tuple[str, ...], warned: bool, tmp_path: Path, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`datasets` numbers class folders in the order of their names as texts: folder 10 has label 0."""
    for number, name in enumerate(names):
        write_folder(tmp_path / "images" / name, images(*range(10 * number, 10 * number + 4)))
    with caplog.at_level(logging.WARNING):
        rows, _ = load_images(
            DataArguments(train_data_dir=str(tmp_path / "images"), cache_dir=cache, validation_images=2),
            model_spec(classes=len(names)),
        )
    last = [image.label for image, number in zip(rows.in_order(), numbers_of(rows.head(99))) if number // 10 == len(names) - 1]
    assert set(last) == {0 if warned else len(names) - 1}
    said = [record.message for record in caplog.records if "in the order of their names as texts" in record.message]
    assert len(said) == warned and all("class 8 has label 1" in line for line in said)
