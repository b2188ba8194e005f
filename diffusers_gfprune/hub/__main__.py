"""The command line: `python -m diffusers_gfprune.hub push runs/digits-gfpruned me/ddpm-digits-gfpruned`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import get_token

from ..errors import one_line_errors
from ..formatting import format_size
from .pushing import check_edited_card, check_repo_id, push_folder
from .selection import check_measured, check_nothing_private, files_to_push, read_json
from .spaces import push_space, write_space


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m diffusers_gfprune.hub", description="Share pruned models on the Hub.")
    commands = parser.add_subparsers(dest="command", required=True)
    push = commands.add_parser("push", help="push a finished pruning run", allow_abbrev=False)
    push.add_argument("folder", help="output_dir of the pruning run")
    push.add_argument("repo_id", help="repository: namespace/name, or a name in your namespace")
    push.add_argument("--space", help="also push a Space with a page that shows the model beside the dense one, by its name")
    push.add_argument("--token", help="access token (default: that of `hf auth login`, or HF_TOKEN)")
    push.add_argument("--private", action="store_true", default=None, help="make the repository and the Space private")
    push.add_argument("--revision", help="branch to commit to (default: main)")
    push.add_argument("--commit_message", default="Upload pruned pipeline", help="commit message")
    push.add_argument("--dry_run", action="store_true", help="list the files without uploading them")
    return parser


def _print_files(args: argparse.Namespace) -> None:
    """List what would be pushed."""
    names, left = files_to_push(args.folder)
    check_measured(args.folder)
    check_edited_card(args.folder)
    check_nothing_private(args.folder, names, args.token or get_token())
    names = sorted({*names, "README.md"})
    print(f"would push to {args.repo_id}{' (private)' if args.private else ''}:")
    for name in names:
        path = Path(args.folder, name)
        print(f"  {format_size(path.stat().st_size) if path.exists() else 'new':>12}  {name}")
    if left:
        print(f"would leave out: {', '.join(left)}")
    if args.space is not None:
        with tempfile.TemporaryDirectory() as place:
            report = read_json(Path(args.folder, "pruning_report.json"))
            written = write_space(place, args.repo_id, args.space, report, args.revision)
            size = sum(Path(place, name).stat().st_size for name in written)
        print(f"would push to the Space {args.space}: {len(written)} files, {format_size(size)}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    args = parser.parse_args(argv)
    args.token = args.token.strip() if args.token else None
    with one_line_errors(parser.prog):
        check_repo_id(args.repo_id)
        if args.space is not None:
            check_repo_id(args.space, "space")
        if args.dry_run:
            _print_files(args)
            return
        options = {"token": args.token, "private": args.private, "revision": args.revision}
        url = push_folder(args.folder, args.repo_id, **options, commit_message=args.commit_message, space_id=args.space)
        print(f"pushed: {url}")
        if args.space is not None:
            print(f"pushed: {push_space(args.folder, args.repo_id, args.space, **options)}")


if __name__ == "__main__":
    main()
