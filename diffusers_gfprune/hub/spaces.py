"""A Space that shows a pruned model, beside the dense one if the Hub has it: the page of `diffusers_gfprune.demo`, on the Hub.

    app.py              opens the page for the model's repository
    README.md           settings of the Space: SDK and its version, model
    requirements.txt    packages that the page needs
    diffusers_gfprune/  the source of this package, so that the page is the one of this version

The Space holds no weights: it loads those of the model's repository, and the dense model from where its report says.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from huggingface_hub import HfApi, SpaceCardData
from packaging.requirements import Requirement

from ..errors import HUB_ERRORS
from ..loading.pipeline_layouts import PACKAGE
from ..version import __version__
from .pushing import check_repo_id, failed_push, prepare_repo
from .selection import read_json

__all__ = ["GRADIO_VERSION", "prepare_space", "push_space", "write_space"]

DISTRIBUTION, EXTRA, SDK = "diffusers-gfprune", "demo", "gradio"
# The version that the page is tested with; Spaces install it
GRADIO_VERSION = "6.31.0"
PYTHON_VERSION = "3.11"
# Folders of the package that the page does not need
LEFT_OUT = ("data", "evaluation", "export", "model_cards", "objectives", "scripts", "training")
APP = '''\
"""Images of {repo_id}{beside}. Written by diffusers-gfprune {version}."""

from diffusers_gfprune.demo.models import load_models
from diffusers_gfprune.demo.page import launch, make_page

launch(make_page(load_models({arguments})))
'''
README = """\
---
{metadata}
---

# {title}

Images of [{repo_id}](https://huggingface.co/{repo_id}), a pruned diffusion model{beside}.

The page is that of `python -m diffusers_gfprune.demo {repo_id}`. `diffusers_gfprune/` is the source of diffusers-gfprune
{version} (Apache-2.0), without what only training needs.
"""


def requirements() -> list[str]:
    """Packages that the page needs, as in this package's metadata, without gradio, which a Space installs itself."""
    named = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or []]
    needed = [line for line in named if line.marker is None or line.marker.evaluate({"extra": EXTRA})]
    return sorted({f"{line.name}{line.specifier}" for line in needed if line.name != SDK})


def write_space(
    folder: str | os.PathLike, repo_id: str, space_id: str, report: Mapping, revision: str | None = None
) -> list[str]:
    """Write the files of a Space.

    Args:
        folder: Folder to write to; created if it does not exist.
        repo_id: Repository of the pruned model.
        space_id: The Space.
        report: Content of the run's `pruning_report.json`.
        revision: Branch, tag or commit of the repository (default: `main`).

    Returns:
        Relative paths of the files, sorted.

    Raises:
        ImportError: The package has no metadata, since it is not installed.
    """
    root, source, base = Path(folder), Path(str(files(PACKAGE))), report["base_model"]["hub_id"]
    for path in source.rglob("*.py"):
        name = path.relative_to(source)
        if name.parts[0] not in LEFT_OUT:
            (root / PACKAGE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, root / PACKAGE / name)
    title = space_id.split("/")[-1]
    metadata = SpaceCardData(
        title=title,
        emoji="✂️",
        colorFrom="gray",
        colorTo="blue",
        sdk=SDK,
        sdk_version=GRADIO_VERSION,
        python_version=PYTHON_VERSION,
        app_file="app.py",
        license="apache-2.0",
        models=[repo_id, *([base] if base else [])],
        short_description=f"A pruned diffusion model{' beside the dense one' if base else ''}",
    ).to_yaml()
    arguments = repr(repo_id) if revision is None else f"{repo_id!r}, revision={revision!r}"
    words = {"repo_id": repo_id, "version": __version__}
    app = APP.format(**words, beside=_beside("") if base else "", arguments=arguments)
    (root / "app.py").write_text(app, "utf-8")
    beside = _beside(f" ([{base}](https://huggingface.co/{base}))") if base else ""
    readme = README.format(**words, beside=beside, metadata=metadata, title=title)
    (root / "README.md").write_text(readme, "utf-8")
    (root / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements()), "utf-8")
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def _beside(link: str) -> str:
    """What a page shows beside the pruned model, if the dense one is on the Hub."""
    return f", beside those of the dense model{link}, from the same noise"


def prepare_space(space_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Create a Space if it does not exist, and check write access (see `prepare_repo`); returns its full id."""
    return prepare_repo(space_id, token=token, private=private, space_sdk=SDK)


def push_space(
    folder: str | os.PathLike,
    repo_id: str,
    space_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload the page of a pruned pipeline",
) -> str:
    """Push a Space that shows a pushed run. The Hub then builds and starts it.

    Args:
        folder: The run.
        repo_id: Repository that the run was pushed to.
        space_id: The Space, as `name` or `namespace/name`; created if it does not exist.
        token: Access token (default: that of the logged-in client).
        private: Whether the Space must be private; None: an existing one is unchanged, a new one is public.
        revision: Branch of the model's repository (default: `main`).
        commit_message: Commit message.

    Returns:
        URL of the Space.

    Raises:
        ValueError: A name is malformed, or the Space is public although `private` is set.
        ImportError: The package has no metadata, since it is not installed.
        PushError: The server or the connection failed; the folder is intact.
    """
    check_repo_id(space_id, "space")
    report, api = read_json(Path(folder) / "pruning_report.json"), HfApi(token=token)
    again = {"space_id": space_id, "private": private, "revision": revision, "failed": f"the Space {space_id}"}
    try:
        full_id = prepare_space(space_id, token=token, private=private)
        model_id = prepare_repo(repo_id, token=token)
        with tempfile.TemporaryDirectory() as place:
            write_space(place, model_id, full_id, report, revision)
            api.upload_folder(
                repo_id=full_id,
                repo_type="space",
                folder_path=place,
                delete_patterns=f"{PACKAGE}/*",  # modules of another version
                commit_message=commit_message,
            )
    except HUB_ERRORS as error:
        raise failed_push(error, folder, repo_id, **again) from error
    return f"{api.endpoint}/spaces/{full_id}"
