"""Push runs to the Hub: model card, repository, upload, error messages."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import HUB_ERRORS, hub_error_reason, one_line
from ..loading.pipeline_files import weight_patterns
from ..remote.pipeline_prune_ddpm import COMPANIONS, EVAL_RESULTS, REPORT, is_as_rendered, rename_in_card, run_on_hub
from ..reports.model_card import check_card, render_card, render_eval_results
from ..reports.results import read_results
from .selection import check_measured, check_nothing_private, files_to_push, read_json, selected

__all__ = [
    "PICTURES",
    "PushError",
    "check_edited_card",
    "check_repo_id",
    "failed_push",
    "prepare_repo",
    "push_checkpoint",
    "push_folder",
    "update_card",
]

PICTURES = {"samples": "samples.png", "widths": "widths.png", "pruning": "pruning.png"}


class PushError(OSError):
    """A push failed. The folder is intact, and the message contains the command to try again."""


def update_card(folder: str | os.PathLike, repo_id: str) -> None:
    """Write README.md for `repo_id` and the evaluation results in the Hub's format, from the results and the report of a run.

    An edited card keeps its text; only the repository name in its loading examples is updated.

    Args:
        folder: A finished run.
        repo_id: The repository.

    Raises:
        ValueError: A field is missing, or the card is not valid.
    """
    root = Path(folder)
    results, report = read_results(root), read_json(root / "pruning_report.json")
    pictures = {what: name for what, name in PICTURES.items() if (root / name).is_file()}
    card, readme = render_card(results, report, repo_id, pictures), root / "README.md"
    if readme.exists() and not is_as_rendered(readme.read_text("utf-8")):
        check_edited_card(root)
        card = rename_in_card(readme.read_text("utf-8"), repo_id)
    entries = render_eval_results(results, report)
    (root / EVAL_RESULTS).unlink(missing_ok=True)
    if entries is not None:
        (root / EVAL_RESULTS).parent.mkdir(exist_ok=True)
        (root / EVAL_RESULTS).write_text(entries, "utf-8")
    complete = readme.with_name(".README.md.incomplete")
    complete.write_text(card, "utf-8")
    os.replace(complete, readme)


def check_edited_card(folder: str | os.PathLike) -> None:
    """Check that the Hub can show the card of a run, if it was edited.

    Args:
        folder: A finished run.

    Raises:
        ValueError: It cannot (see `check_card`).
    """
    readme = Path(folder, "README.md")
    if readme.exists() and not is_as_rendered(card := readme.read_text("utf-8")):
        try:
            check_card(card)
        except ValueError as error:
            raise ValueError(f"{readme} was edited: {error}") from error


def failed_push(
    error: Exception,
    folder: str | os.PathLike,
    repo_id: str,
    *,
    space_id: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    failed: str | None = None,
) -> PushError:
    """An error with the command that tries again.

    Args:
        error: What the client raised.
        folder: The run.
        repo_id: Repository of the model.
        space_id: Space that was to be pushed, too.
        private: Whether both were to be private.
        revision: Branch of the model.
        failed: What could not be pushed (default: the model).
    """
    words = ["python", "-m", "diffusers_gfprune.hub", "push", str(folder), repo_id]
    words += ["--space", space_id] if space_id else []
    again = shlex.join([*words, *(["--private"] if private else []), *(["--revision", revision] if revision else [])])
    what = failed or repo_id
    return PushError(f"push to {what} failed: {hub_error_reason(error)}. {folder} is intact; try again: {again}")


def check_repo_id(repo_id: str, argument: str = "repo_id") -> None:
    """Check a repository name.

    Args:
        repo_id: `name` or `namespace/name`.
        argument: Name of the argument, for the error message.

    Raises:
        ValueError: The name is malformed.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{argument}={repo_id} is not a valid repository name: {one_line(error)}") from error


def prepare_repo(repo_id: str, *, token: str | None = None, private: bool | None = None, space_sdk: str | None = None) -> str:
    """Create a repository if it does not exist, and check write access.

    Args:
        repo_id: `name` or `namespace/name`.
        token: Access token (default: that of the logged-in client).
        private: Whether the repository must be private; None: an existing one is unchanged, a new one is public.
        space_sdk: SDK of a Space (`"gradio"`); None: the repository is that of a model.

    Returns:
        The full id.

    Raises:
        ValueError: The name is malformed, or the repository is public although `private` is set.
        huggingface_hub.errors.HfHubHTTPError: The server refused the request.
    """
    check_repo_id(repo_id)
    api, kind = HfApi(token=token), "model" if space_sdk is None else "space"
    full_id = api.create_repo(repo_id, private=private, exist_ok=True, repo_type=kind, space_sdk=space_sdk).repo_id
    api.auth_check(full_id, repo_type=kind, write=True)  # create_repo with exist_ok succeeds with read access only
    if private and not api.repo_info(full_id, repo_type=kind).private:
        raise ValueError(f"{full_id} exists and is public: make it private on the Hub, or push to another repository")
    return full_id


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload pruned pipeline",
    space_id: str | None = None,
) -> str:
    """Push a finished run. A retry uploads only the missing files.

    Args:
        folder: The run.
        repo_id: `name` or `namespace/name`; created if it does not exist.
        token: Access token (default: that of the logged-in client).
        private: Whether the repository must be private; None: an existing one is unchanged, a new one is public.
        revision: Branch to commit to (default: `main`).
        commit_message: Commit message.
        space_id: Space that is pushed after it (see `push_space`), for the command in error messages.

    Returns:
        URL of the commit.

    Raises:
        ValueError: The folder is not a finished run, its results are of other weights, its card is not valid, or a file
            contains a token or a local path. Nothing is pushed.
        PushError: The server or the connection failed; the folder is intact.
    """
    # All local checks run before anything is created on the Hub.
    check_repo_id(repo_id)
    files_to_push(folder)
    check_measured(folder)
    update_card(folder, repo_id)
    names, _ = files_to_push(folder)
    check_nothing_private(folder, names, token or get_token())
    again = {"space_id": space_id, "private": private, "revision": revision}
    try:
        full_id = prepare_repo(repo_id, token=token, private=private)
    except HUB_ERRORS as error:
        raise failed_push(error, folder, repo_id, **again) from error
    if full_id != repo_id:  # now with its namespace
        update_card(folder, full_id)
    api, card = HfApi(token=token), (Path(folder) / "README.md").read_text("utf-8")
    try:
        report, theirs = run_on_hub(full_id, token, revision)
        of_this_run = theirs is not None and report == (Path(folder) / REPORT).read_bytes()
        if of_this_run and is_as_rendered(card) and not is_as_rendered(theirs):
            names.remove("README.md")
            print(
                f"warning: the card of {full_id} was edited on the Hub and stays: to replace it by {folder}/README.md, delete "
                f"it there first",
                file=sys.stderr,
            )
        commit = api.upload_folder(
            repo_id=full_id,
            folder_path=folder,
            allow_patterns=names,
            delete_patterns=[*weight_patterns(names), EVAL_RESULTS],
            revision=revision,
            commit_message=commit_message,
        )
    except (*HUB_ERRORS, ValueError) as error:  # ValueError: an invalid response
        raise failed_push(error, folder, full_id, **again) from error
    return commit.commit_url


def push_checkpoint(folder: str | os.PathLike, repo_id: str, *, token: str | None = None, commit_message: str) -> None:
    """Push the pipeline of an unfinished run: model, scheduler and code.

    Card and results follow with `push_folder`. Those of an earlier run are deleted, since they do not describe these weights.

    Args:
        folder: A saved pipeline.
        repo_id: An existing repository (see `prepare_repo`).
        token: Access token (default: that of the logged-in client).
        commit_message: Commit message.

    Raises:
        PushError: The server or the connection failed.
        ValueError: A file contains a token or a path of this machine.
    """
    names = [name for name in selected(Path(folder))[0] if name not in COMPANIONS]
    check_nothing_private(folder, names, token or get_token())
    try:
        HfApi(token=token).upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=names,
            delete_patterns=[*weight_patterns(names), *COMPANIONS],
            commit_message=commit_message,
        )
    except (*HUB_ERRORS, ValueError) as error:
        raise PushError(f"push to {repo_id} failed: {hub_error_reason(error)}") from error
