"""The command line: `python -m diffusers_gfprune.export runs/digits-gfpruned --format onnx --output_dir exports/digits`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..errors import one_line_errors
from ..formatting import format_size
from ..pipeline_parts import PipelineParts
from .card import describe_errors
from .description import DTYPES, FORMATS, NAME
from .exporting import ExportOptions, export_parts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_gfprune.export",
        description="Export the denoiser of a pipeline, dense or pruned.",
        allow_abbrev=False,
    )
    default = ExportOptions()
    parser.add_argument("pretrained_model_name_or_path", help="folder or Hub id of the pipeline")
    parser.add_argument("--output_dir", required=True, help="folder of the export; it appears when it is complete")
    parser.add_argument("--format", required=True, help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--dtype", default=default.dtype, help=f"precision inside, one of {', '.join(DTYPES)} (default: fp32)")
    parser.add_argument("--batch", default=default.batch, help="number of samples of a forward pass (default: dynamic)")
    parser.add_argument("--compile", action="store_true", help="torch: compile for this machine, too, with AOTInductor")
    samples = parser.add_argument_group("samples", "of fp16 and int8: how far they are from those of fp32 is printed")
    samples.add_argument("--prompts", nargs="+", default=list(default.prompts), help="their prompts (default: empty)")
    samples.add_argument("--num_images", type=int, default=default.num_images, help="number of samples (default: 16)")
    samples.add_argument(
        "--num_inference_steps", type=int, default=default.num_inference_steps, help="number of sampling steps (default: 20)"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace an existing folder")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    arguments = vars(parser.parse_args(argv))
    name, revision = arguments.pop("pretrained_model_name_or_path"), arguments.pop("revision")
    output_dir = arguments.pop("output_dir")
    with one_line_errors(parser.prog):
        options = ExportOptions(**arguments)
        options.check_installed()
        if Path(name, NAME).is_file():
            raise ValueError(
                f"pretrained_model_name_or_path={name} is an export: it must be the pipeline that it was made from"
            )
        try:
            from ..families.lookup import family_of
            from ..trained_pipelines import load_pipeline
        except ModuleNotFoundError as error:
            raise ImportError(f"{error.name} not installed: pip install 'diffusers-gfprune[training]'") from error
        trained = load_pipeline(name, revision, pruned=True)
        parts = PipelineParts(family_of(trained.denoiser), trained.denoiser, trained.scheduler, trained.codec, trained.prompts)
        description = export_parts(parts, output_dir, options)
        size = sum(path.stat().st_size for path in Path(output_dir).expanduser().rglob("*") if path.is_file())
        print(f"exported to {output_dir}: {options.format}, {options.dtype}, {format_size(size)}")
        print(describe_errors(description))


if __name__ == "__main__":
    main()
