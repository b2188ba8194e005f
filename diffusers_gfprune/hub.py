"""Push pruning runs to the Hub: selection of files, model card and error messages.

    python -m diffusers_gfprune.hub push runs/digits-gfpruned me/ddpm-digits-gfpruned [--private] [--dry_run]

Only the files of the pipeline and of the run are uploaded, after a check that they contain no access tokens or local paths.
Weights of an earlier push that are not replaced are deleted from the repository, so that it never holds a mixture of two
models. Files that the repository already has are not uploaded again.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from .errors import HUB_ERRORS, TOKEN, hub_error_reason, one_line, one_line_errors
from .formatting import format_size
from .loading.pipeline_files import file_patterns, is_unchanged, weight_patterns
from .loading.pipeline_layouts import PACKAGE, components_of
from .remote.pipeline_prune_ddpm import COMPANIONS, EVAL_RESULTS, rename_in_card
from .reports.model_card import check_card, is_as_rendered, render_card, render_eval_results
from .reports.results import read_results

__all__ = [
    "PushError",
    "check_repo_id",
    "files_to_push",
    "prepare_repo",
    "push_checkpoint",
    "push_folder",
    "update_card",
]

PICTURES = {"samples": "samples.png", "widths": "widths.png", "pruning": "pruning.png"}
NEEDED = ("model_index.json", "scheduler/scheduler_config.json", "pruning_report.json", "results.json")


class PushError(OSError):
    """A push failed. The folder is intact, and the message contains the command to try again."""


def files_to_push(folder: str | os.PathLike) -> tuple[list[str], list[str]]:
    """Select the files of a run to push.

    Args:
        folder: A finished run: a pruned pipeline with `results.json` and `pruning_report.json`.

    Returns:
        Relative paths of the files to push, and of the files to leave out, sorted.

    Raises:
        ValueError: The folder is not a finished run, or its weights are damaged.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"folder={folder} is not a folder")
    going, left_out = _selected(root)
    present = [*going, *left_out]
    _check_there(folder, NEEDED, present)
    components = components_of(_read_json(root / "model_index.json"))
    denoisers = [name for name, (library, _) in components.items() if library == PACKAGE]
    if not denoisers:
        classes = ", ".join(f"{name}: {class_name}" for name, (_, class_name) in components.items())
        raise ValueError(f"folder={folder} does not contain a pruned model: its model_index.json has {classes}")
    denoiser = denoisers[0]
    _check_there(folder, (f"{denoiser}/config.json", f"{denoiser}/{PACKAGE}.py"), present)
    if not any(fnmatch.fnmatchcase(name, f"{denoiser}/*.safetensors") for name in going):
        raise ValueError(f"folder={folder} has no weights: {denoiser}/diffusion_pytorch_model.safetensors is missing")
    for name in [name for name in going if name.endswith(".safetensors")]:
        try:
            with safe_open(root / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{root / name} is damaged: {one_line(error)}") from error
    return going, left_out


def _check_there(folder: str | os.PathLike, needed: Sequence[str], present: Sequence[str]) -> None:
    missing = [name for name in needed if name not in present]
    if missing:
        raise ValueError(f"folder={folder} is not a finished pruning run: it has no {missing[0]}")


def _index(root: Path) -> dict:
    """The content of `model_index.json`; empty if there is none."""
    path = root / "model_index.json"
    return _read_json(path) if path.is_file() else {}


def _selected(root: Path) -> tuple[list[str], list[str]]:
    """Relative paths of the files of a run that are pushed, and of the others, sorted."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    patterns = (*COMPANIONS, *file_patterns(_index(root)))
    going = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    return going, [name for name in names if name not in going]


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not contain a JSON object")
    return content


def _strings(value: object) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def check_nothing_private(folder: str | os.PathLike, names: Sequence[str], token: str | None = None) -> None:
    """Check that files contain no access token and no path of this machine.

    Args:
        folder: Folder of the files.
        names: Relative paths; only cards, JSON and YAML are read.
        token: The token in use, which is searched for as well.

    Raises:
        ValueError: A file contains a token or a path.
    """
    root = Path(folder).absolute()
    # Short paths such as / or /root would match unrelated text
    places = {str(place) for place in (Path.home(), Path.cwd(), root, root.resolve()) if len(place.parts) > 2}
    index = _index(root)
    for name in names:
        if not name.endswith((".md", ".json", ".yaml")):
            continue
        text = (root / name).read_text("utf-8")
        if TOKEN.search(text) or (token and token in text):
            raise ValueError(f"{root / name} contains an access token: remove it before you push")
        private = [place for place in sorted(places) if place in text]
        if name.endswith(".json") and not is_unchanged(index, name):
            private += [string for string in _strings(_read_json(root / name)) if os.path.isabs(string)]
        if private:
            raise ValueError(f"{root / name} contains the path {private[0]} of this machine: remove it before you push")


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
    results, report = read_results(root), _read_json(root / "pruning_report.json")
    pictures = {what: name for what, name in PICTURES.items() if (root / name).is_file()}
    card, readme = render_card(results, report, repo_id, pictures), root / "README.md"
    if readme.exists() and not is_as_rendered(readme.read_text("utf-8")):
        card = rename_in_card(readme.read_text("utf-8"), repo_id)
        check_card(card)
    entries = render_eval_results(results, report)
    (root / EVAL_RESULTS).unlink(missing_ok=True)
    if entries is not None:
        (root / EVAL_RESULTS).parent.mkdir(exist_ok=True)
        (root / EVAL_RESULTS).write_text(entries, "utf-8")
    complete = readme.with_name(".README.md.incomplete")
    complete.write_text(card, "utf-8")
    os.replace(complete, readme)


def _failed(
    error: Exception, folder: str | os.PathLike, repo_id: str, private: bool | None, revision: str | None
) -> PushError:
    words = ["python", "-m", "diffusers_gfprune.hub", "push", str(folder), repo_id]
    again = shlex.join([*words, *(["--private"] if private else []), *(["--revision", revision] if revision else [])])
    return PushError(f"push to {repo_id} failed: {hub_error_reason(error)}. {folder} is intact; try again: {again}")


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


def prepare_repo(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Create a repository if it does not exist, and check write access.

    Args:
        repo_id: `name` or `namespace/name`.
        token: Access token (default: that of the logged-in client).
        private: Whether the repository must be private; None: an existing one is unchanged, a new one is public.

    Returns:
        The full id.

    Raises:
        ValueError: The name is malformed, or the repository is public although `private` is set.
        huggingface_hub.errors.HfHubHTTPError: The server refused the request.
    """
    check_repo_id(repo_id)
    api = HfApi(token=token)
    full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    api.auth_check(full_id, write=True)  # create_repo with exist_ok succeeds with read access only
    if private and not api.model_info(full_id).private:
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
) -> str:
    """Push a finished run. A retry uploads only the missing files.

    Args:
        folder: The run.
        repo_id: `name` or `namespace/name`; created if it does not exist.
        token: Access token (default: that of the logged-in client).
        private: Whether the repository must be private; None: an existing one is unchanged, a new one is public.
        revision: Branch to commit to (default: `main`).
        commit_message: Commit message.

    Returns:
        URL of the commit.

    Raises:
        ValueError: The folder is not a finished run, its card is not valid, or a file contains a token or a local path.
            Nothing is pushed.
        PushError: The server or the connection failed; the folder is intact.
    """
    # All local checks run before anything is created on the Hub.
    check_repo_id(repo_id)
    files_to_push(folder)
    update_card(folder, repo_id)
    names, _ = files_to_push(folder)
    check_nothing_private(folder, names, token or get_token())
    try:
        full_id = prepare_repo(repo_id, token=token, private=private)
    except HUB_ERRORS as error:
        raise _failed(error, folder, repo_id, private, revision) from error
    if full_id != repo_id:  # now with its namespace
        update_card(folder, full_id)
    try:
        commit = HfApi(token=token).upload_folder(
            repo_id=full_id,
            folder_path=folder,
            allow_patterns=names,
            delete_patterns=[*weight_patterns(names), EVAL_RESULTS],
            revision=revision,
            commit_message=commit_message,
        )
    except (*HUB_ERRORS, ValueError) as error:  # ValueError: an invalid response
        raise _failed(error, folder, full_id, private, revision) from error
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
    names = [name for name in _selected(Path(folder))[0] if name not in COMPANIONS]
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


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m diffusers_gfprune.hub", description="Share pruned models on the Hub.")
    commands = parser.add_subparsers(dest="command", required=True)
    push = commands.add_parser("push", help="push a finished pruning run", allow_abbrev=False)
    push.add_argument("folder", help="output_dir of the pruning run")
    push.add_argument("repo_id", help="repository: namespace/name, or a name in your namespace")
    push.add_argument("--token", help="access token (default: that of `hf auth login`, or HF_TOKEN)")
    push.add_argument("--private", action="store_true", default=None, help="make the repository private")
    push.add_argument("--revision", help="branch to commit to (default: main)")
    push.add_argument("--commit_message", default="Upload pruned pipeline", help="commit message")
    push.add_argument("--dry_run", action="store_true", help="list the files without uploading them")
    args = parser.parse_args(argv)
    args.token = args.token.strip() if args.token else None
    with one_line_errors(parser.prog):
        if args.dry_run:
            check_repo_id(args.repo_id)
            names, left = files_to_push(args.folder)
            check_nothing_private(args.folder, names, args.token or get_token())
            names = sorted({*names, "README.md"})
            print(f"would push to {args.repo_id}{' (private)' if args.private else ''}:")
            for name in names:
                path = Path(args.folder, name)
                print(f"  {format_size(path.stat().st_size) if path.exists() else 'new':>12}  {name}")
            if left:
                print(f"would leave out: {', '.join(left)}")
            return
        url = push_folder(
            args.folder,
            args.repo_id,
            token=args.token,
            private=args.private,
            revision=args.revision,
            commit_message=args.commit_message,
        )
        print(f"pushed: {url}")


if __name__ == "__main__":
    main()
