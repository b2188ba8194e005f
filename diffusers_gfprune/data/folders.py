"""Loading of local folders: their files and splits, and names that `datasets` would treat as patterns.

- Hidden files, and everything in hidden folders (`.ipynb_checkpoints`, `__MACOSX`), are ignored.
- All image files form one split, regardless of their names. Folders define splits only if there are folders with the names
  of splits for training and for validation or test (`train/`, `test/`), as `datasets` documents. Images outside of them are
  then an error. `datasets` would also derive splits from file names, and then load only part of a set.
- Folders written by `save_to_disk` are loaded as such.
- Everything else (parquet files, a README that lists data files) is loaded by `datasets`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Sequence
from glob import has_magic
from pathlib import Path

import datasets
import yaml
from datasets.data_files import FILES_TO_IGNORE, DataFilesDict, DataFilesList, _get_data_files_patterns, sanitize_patterns
from datasets.load import infer_module_for_data_files_list
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from fsspec.utils import glob_translate
from huggingface_hub import metadata_load

from ..errors import one_line

__all__ = ["load_folder", "visible_files"]

logger = logging.getLogger(__name__)

SPLIT_OF_FOLDER = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Files that `save_to_disk` writes for a `Dataset` or a `DatasetDict`
SAVED = ("state.json", "dataset_dict.json")


def visible_files(folder: str | Path) -> list[Path]:
    """All files in a folder and its subfolders, without hidden ones, in the order of their paths.

    As in `datasets`, hidden are names that begin with a dot, folders whose names begin with two underscores, and everything
    in them. Links to folders are followed, unless they lead to a parent folder.

    Raises:
        OSError: A folder cannot be read.
    """
    visible: list[str] = []
    for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        here = Path(os.path.realpath(parent))
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__")) and not here.is_relative_to(os.path.realpath(os.path.join(parent, name)))
        ]
        paths = (os.path.join(parent, name) for name in files if not name.startswith("."))
        visible += [path for path in paths if os.path.isfile(path)]
    return [Path(path) for path in sorted(visible)]


def _raise(error: OSError) -> None:
    raise error


def load_folder(
    folder: str, config_name: str | None, *, images_only: bool, cache_dir: str | None, streaming: bool
) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    """The splits of a local folder.

    Args:
        folder: Path of the folder.
        config_name: Name of the configuration, if a README in the folder lists several.
        images_only: Read only image files and folders written by `save_to_disk`.
        cache_dir: Cache folder of `datasets`.
        streaming: Read the splits as streams.

    Raises:
        ValueError: The folder has no such files, or the splits of the files are ambiguous.
    """
    root = Path(os.path.abspath(folder))
    if any((root / name).is_file() for name in SAVED):
        _refuse_config(config_name, "written by save_to_disk")
        return _load_saved(root, streaming)
    files = visible_files(root)
    nested = next((path for path in (root, *files) if "::" in str(path)), None)
    if nested is not None:
        raise ValueError(f"{nested} has '::' in its path, which `datasets` treats as a path inside an archive: rename it")
    options = {"cache_dir": cache_dir, "streaming": streaming}
    listed = [] if images_only else _listed_configs(root)
    if not listed:
        has_images = any(_is_image(path) or path.suffix == ".zip" for path in files)
        if images_only and not has_images:
            raise ValueError("there are no image files in it (pass a folder of parquet files as dataset_name)")
        kind = _kind([path for path in files if path.name not in FILES_TO_IGNORE])
        if has_images and (images_only or kind in ("imagefolder", "text")):  # text: captions
            _refuse_config(config_name, "of image files")
            return _load_image_files(files, options)
    if has_magic(str(root)) or root.suffix == ".py":  # `datasets` treats names ending in .py as loading scripts
        return _load_by_patterns(root, files, listed, config_name, options)
    splits = datasets.load_dataset(str(root), config_name, **options)
    if not listed:
        builder = datasets.load_dataset_builder(str(root), config_name, cache_dir=cache_dir)
        used = (builder.config.data_files or {}).values()
        _warn_of_left_out(root, files, {Path(path).resolve() for paths in used for path in paths})
    return splits


def _warn_of_left_out(root: Path, files: Sequence[Path], used: Collection[Path]) -> None:
    """Warn of files that `datasets` ignores, because other files have the name of a split and these do not."""
    kind = _kind(list(used))
    left_out = [path for path in files if path.resolve() not in used and kind is not None and _kind([path]) == kind]
    if left_out:
        logger.warning(
            "%d files of %s are not in a split and are not read, such as %s: a README can list the files of each split",
            *(len(left_out), root, left_out[0].relative_to(root)),
        )


def _refuse_config(config_name: str | None, kind: str) -> None:
    if config_name is not None:
        raise ValueError(f"dataset_config_name={config_name} cannot be used with a folder {kind}: it has no configurations")


def _load_saved(root: Path, streaming: bool) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    """Splits written by `save_to_disk`."""
    saved = datasets.load_from_disk(str(root))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    splits = {name: rows.with_format(None) for name, rows in splits.items()}  # columns may have been saved as tensors
    if not streaming:
        return splits
    shards = {name: min(len(rows), max(1, len(rows.cache_files))) for name, rows in splits.items()}
    return {name: rows.to_iterable_dataset(num_shards=max(1, shards[name])) for name, rows in splits.items()}


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ImageFolder.EXTENSIONS


def _data_files(paths: Sequence[Path]) -> DataFilesList:
    """Files in the form that `datasets` does not search for patterns. It detects changes by time and size."""
    states = [os.stat(path) for path in paths]
    return DataFilesList([str(path) for path in paths], [(str(s.st_mtime_ns), str(s.st_size)) for s in states])


def _kind(paths: Sequence[Path]) -> str | None:
    """The module of `datasets` that reads most of the given files."""
    return infer_module_for_data_files_list(_data_files(paths))[0]


def _load_image_files(files: Sequence[Path], options: dict) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Splits of image files, with class folders, metadata files and archives."""
    splits = _split_folders(files)
    # Folders of splits are not classes
    direct = any(path.parent.name.lower() in SPLIT_OF_FOLDER for paths in splits.values() for path in paths if _is_image(path))
    data_files = DataFilesDict({name: _data_files(paths) for name, paths in splits.items()})
    no_labels = {"drop_labels": True} if len(splits) > 1 and direct else {}
    return datasets.load_dataset("imagefolder", data_files=data_files, **no_labels, **options)


def _split_folders(files: Sequence[Path]) -> dict[str, Sequence[Path]]:
    """Files of each split if every image lies in the folder (or archive) of a split; else all files, as training images."""
    images = [path for path in files if _is_image(path) or path.suffix == ".zip"]
    top = Path(os.path.commonpath([path.parent for path in images]))
    splits: dict[str, list[Path]] = {}
    for path in files:
        name = path.relative_to(top).parts[0] if path.is_relative_to(top) else ""
        if path.parent == top:  # the name of a file does not define a split; an archive counts as a folder
            name = path.stem if path.suffix == ".zip" else ""
        if name.lower() in SPLIT_OF_FOLDER:
            splits.setdefault(SPLIT_OF_FOLDER[name.lower()], []).append(path)
    if "train" not in splits or len(splits) == 1:
        return {"train": files}
    inside = {path for paths in splits.values() for path in paths}
    strays = [path for path in images if path not in inside]
    if strays:
        raise ValueError(
            f"there are folders of splits in {top} ({', '.join(sorted(splits))}), and {len(strays)} images outside of them, "
            f"such as {strays[0].relative_to(top)}: move these, or pass a folder without splits"
        )
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}


def _listed_configs(root: Path) -> list[dict]:
    """Configurations that list data files in the README of a folder."""
    readme = root / "README.md"
    try:
        configs = (metadata_load(readme) or {}).get("configs") if readme.is_file() else None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"the header of its README.md is not valid YAML: {one_line(error)}") from error
    return [config for config in configs or [] if isinstance(config, dict) and "data_files" in config]


def _load_by_patterns(
    root: Path, files: Sequence[Path], listed: Sequence[dict], config_name: str | None, options: dict
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Load a folder as `load_dataset` does, which would treat brackets in its name as a pattern."""
    names = {path.relative_to(root).as_posix(): path for path in files if path.name not in FILES_TO_IGNORE}

    def matching(pattern: str) -> list[str]:
        fits: Callable = re.compile(glob_translate(pattern)).match
        return [name for name in names if fits(name)]

    by_name = {config.get("config_name", "default"): config["data_files"] for config in listed}
    if config_name is not None and config_name not in by_name:
        raise ValueError(f"dataset_config_name={config_name} is not in the README of the folder, which has {list(by_name)}")
    if config_name is None and len(by_name) > 1:
        default = [config for config in listed if config.get("default") or config.get("config_name") == "default"]
        if not default:
            raise ValueError(f"dataset_config_name is needed: the README of the folder has {list(by_name)}")
        config_name = default[0].get("config_name", "default")
    chosen = by_name.get(config_name) if config_name else next(iter(by_name.values()), None)
    patterns = _get_data_files_patterns(matching) if chosen is None else sanitize_patterns(chosen)
    matches = {split: dict.fromkeys(n for p in listed for n in matching(p)) for split, listed in patterns.items()}
    splits = {split: [names[name] for name in matched] for split, matched in matches.items()}
    module = _kind([path for paths in splits.values() for path in paths])
    if module is None:
        raise ValueError("there are no data files in it")
    data_files = {split: _data_files([path for path in paths if _kind([path]) == module]) for split, paths in splits.items()}
    if not listed:
        _warn_of_left_out(root, files, {path.resolve() for paths in splits.values() for path in paths})
    return datasets.load_dataset(module, data_files=DataFilesDict(data_files), **options)
