#!/usr/bin/env bash
# datasets.load_dataset on a folder of parquet files leaves out, without a word, files that have no split in their name.
#
# Versions:  datasets 5.2.0, pyarrow 25.0.0, Python 3.11
# Guess:     all parquet files of the folder are read, those without a split in their name into train.
# Seen:      as soon as one file has a split in its name (train-..., test-...), files without one are in no split. There is no
#            warning. Without such a file, all of them are train.
# Matters:   a shard that was added later under another name is missing from training, and nothing says so.
# Output seen:
#            extra, more: {'train': 7}
#            extra, test, train: {'train': 5, 'test': 2}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==25.0.0
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" venv/bin/python -W error::UserWarning - <<'PYTHON'
import datasets

datasets.disable_progress_bars()


def load(**rows):
    """Rows by the name of their file; how many are in each split."""
    folder = "-".join(rows)
    for name, count in rows.items():
        datasets.Dataset.from_dict({"x": list(range(count))}).to_parquet(f"{folder}/{name}-00000-of-00001.parquet")
    found = {name: len(split) for name, split in datasets.load_dataset(folder).items()}
    print(f"{', '.join(rows)}: {found}")
    return found


plain = load(extra=4, more=3)
named = load(extra=4, test=2, train=5)
if plain != {"train": 7} or named != {"train": 5, "test": 2}:
    raise SystemExit(f"the behaviour has changed: {plain}, {named}")
PYTHON
