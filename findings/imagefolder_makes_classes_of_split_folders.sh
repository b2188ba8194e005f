#!/usr/bin/env bash
# datasets' imagefolder gives images that lie directly in train/ and test/ the names of these folders as class labels.
#
# Versions:  datasets 5.2.0, Pillow 12.3.0, Python 3.11
# Guess:     folders of splits are no classes: images directly in them have no label column, or no label.
# Seen:      with the images of both splits directly in train/ and test/, there is a label column with the classes test and
#            train. Images of test are labelled test; those of train have None. There is no warning.
# Matters:   a class-conditional model is trained on labels that say nothing, or meets None.
# Output seen:
#            classes ['test', 'train'], labels of train {None}, labels of test {'test'}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pillow==12.3.0
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" venv/bin/python -W error::UserWarning - <<'PYTHON'
from pathlib import Path

import datasets
from PIL import Image

datasets.disable_progress_bars()
for split, count in (("train", 4), ("test", 2)):
    Path("images", split).mkdir(parents=True)
    for number in range(count):
        Image.new("L", (8, 8), number).save(Path("images", split, f"{number}.png"))
splits = datasets.load_dataset("imagefolder", data_dir="images")
feature = splits["train"].features.get("label")
classes = None if feature is None else feature.names
found = {
    name: {None if label is None else classes[label] for label in rows["label"]} if feature is not None else None
    for name, rows in splits.items()
}
print(f"classes {classes}, labels of train {found['train']}, labels of test {found['test']}")
if (classes, found) != (["test", "train"], {"train": {None}, "test": {"test"}}):
    raise SystemExit(f"the behaviour has changed: {classes}, {found}")
PYTHON
