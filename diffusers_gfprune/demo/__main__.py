"""The command line: `python -m diffusers_gfprune.demo runs/digits-gfpruned [--reference google/ddpm-cifar10-32]`."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Sequence

from ..errors import one_line_errors
from ..extras import check_extra


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_gfprune.demo",
        description="Open a page that shows images of a pruned model beside those of the dense one.",
        allow_abbrev=False,
    )
    parser.add_argument("pretrained_model_name_or_path", help="folder or Hub id of the pruned pipeline")
    parser.add_argument(
        "--reference", help="folder or Hub id of the dense pipeline (default: the one that the report of the run names)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the pruned pipeline on the Hub")
    parser.add_argument("--reference_revision", help="branch, tag or commit of --reference on the Hub")
    parser.add_argument("--device", help="device to sample on (default: a GPU, if there is one)")
    parser.add_argument("--dtype", default="float32", help="float32 (default), float16 or bfloat16")
    parser.add_argument("--server_name", help="address to serve at (default: 127.0.0.1, this machine only)")
    parser.add_argument("--server_port", type=int, help="port to serve at (default: the first free one from 7860)")
    return parser


def check_address(server_name: str | None, server_port: int | None) -> None:
    """Check an address before models are loaded.

    Raises:
        ValueError: Nothing can be served there.
    """
    if server_port is not None and not 1 <= server_port <= 65535:
        raise ValueError(f"server_port={server_port} must be from 1 to 65535")
    address = server_name or "127.0.0.1"
    try:
        socket.create_server((address, server_port or 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
    except OSError as error:
        given = f"server_name={server_name}" if server_port is None else f"server_port={server_port}"
        raise ValueError(f"{given} cannot be used: {error.strerror or error}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    arguments = vars(parser.parse_args(argv))
    name, options = arguments.pop("pretrained_model_name_or_path"), {}
    for argument in ("server_name", "server_port"):
        options[argument] = arguments.pop(argument)
    with one_line_errors(parser.prog):
        check_extra("demo")
        check_address(**options)
        from .models import load_models

        models = load_models(name, **arguments)
        from .page import launch, make_page

        launch(make_page(models), **options)


if __name__ == "__main__":
    main()
