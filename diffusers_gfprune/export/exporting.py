"""Exports of denoisers: written to a hidden folder, checked against PyTorch, and moved to their name when all is right."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers import DiffusionPipeline

from ..argument_fields import at_least, check_fields
from ..formatting import format_size
from ..metrics.model_size import count_parameters, parameter_bytes
from ..pipeline_parts import PipelineParts
from ..run_folder import RunFolder, write_json
from ..runtimes.program import to_tensors
from ..runtimes.requirements import check_runtime
from .card import export_card
from .description import COMPILED_FILE, NAME, ExportDescription, check_format, installed_versions, parse_batch
from .model import ExportedModel, load_exported
from .program import describe_inputs, random_inputs, trace
from .verification import LIMIT, Reference, relative_errors, sampled_reference
from .writers import compile_program, has_compiler, write_program

__all__ = ["ExportOptions", "export_parts", "export_pipeline"]


# Options of the samples of fp16 and int8
OF_SAMPLES = ("prompts", "num_images", "num_inference_steps")
# nncf quantizes ONNX models that are one protobuf message, weights included
PROTOBUF_LIMIT = 2**31


@dataclass(frozen=True)
class ExportOptions:
    """What to export.

    Attributes:
        format: `"onnx"`, `"openvino"` or `"torch"` (a `torch.export` archive).
        dtype: Precision inside: `"fp32"`, `"fp16"`, or `"int8"` (not with `torch`). Inputs and outputs are float32.
        batch: `"dynamic"`, or the number of samples of every forward pass (>= 1), which some runtimes run faster.
        compile: Whether to compile the model for this machine, too, with AOTInductor; only with `torch`.
        prompts: Prompts for the samples of fp16 and int8, for models of text.
        num_images: Number of samples (>= 1) that fp16 and int8 are compared by, and that calibrate int8. Like `prompts` and
            `num_inference_steps`, it is not for `"fp32"`, which draws none.
        num_inference_steps: Number of sampling steps of these samples (>= 1); consistency models are sampled in one.
        overwrite_output_dir: Whether to replace an existing folder.

    Raises:
        ValueError: A value is not allowed.
    """

    format: str = "onnx"
    dtype: str = "fp32"
    batch: str | int = "dynamic"
    compile: bool = False
    prompts: Sequence[str] = ("",)
    num_images: int = 16
    num_inference_steps: int = 20
    overwrite_output_dir: bool = False

    def __post_init__(self) -> None:
        check_format(self.format, self.dtype)
        parse_batch(self.batch)
        check_fields(self, at_least(1), "num_images", "num_inference_steps")
        if isinstance(self.prompts, str) or not self.prompts:
            raise ValueError(f"prompts={self.prompts!r} must be a list of texts")
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if self.dtype == "fp32":
            for name in OF_SAMPLES:
                if (value := getattr(self, name)) != ExportOptions.__dataclass_fields__[name].default:
                    raise ValueError(f"{name}={value} needs dtype=fp16 or int8: no samples are drawn for fp32")
        if self.compile and self.format != "torch":
            raise ValueError(f"compile=True must be False with format={self.format}: AOTInductor compiles for format=torch")

    def check_installed(self) -> None:
        """Check for runtimes and compilers.

        Raises:
            ImportError: A package is not installed.
            ValueError: There is no compiler.
        """
        check_runtime(self.format, self.dtype)
        if self.compile and not has_compiler():
            raise ValueError("compile=True needs a C++ compiler, and none was found: install g++ or clang, or set CXX")


def export_pipeline(pipe: DiffusionPipeline, output_dir: str | os.PathLike, **options) -> ExportDescription:
    """Export the denoiser of a pipeline, dense or pruned, with the configuration of its scheduler.

    The other components (VAE, text encoders) stay where they are: `load_exported` returns a denoiser for a pipeline that has
    them.

    Args:
        pipe: A pipeline of a supported class; it is not modified.
        output_dir: Folder of the export, which appears when it is complete.
        **options: Fields of `ExportOptions`.

    Returns:
        What was exported, with its errors.

    Raises:
        ImportError: A runtime is not installed. The message has the command that installs it.
        ValueError: The pipeline or an option is not supported, the folder exists or cannot be written, or the export differs
            from the model.
    """
    chosen = ExportOptions(**options)
    chosen.check_installed()
    return export_parts(PipelineParts.of(pipe, pruned=True), output_dir, chosen)


def export_parts(parts: PipelineParts, output_dir: str | os.PathLike, options: ExportOptions) -> ExportDescription:
    """Export the denoiser of a pipeline by its parts (see `export_pipeline`)."""
    options.check_installed()
    if any(options.prompts) and parts.prompts is None:
        name = type(parts.denoiser).__name__
        raise ValueError(f"prompts={options.prompts} must be left out: this {name} is not a model of text")
    size = 4 * count_parameters(parts.denoiser)
    if (options.format, options.dtype) == ("onnx", "int8") and size >= PROTOBUF_LIMIT:
        raise ValueError(
            f"dtype=int8 with format=onnx takes models of less than 2 GiB in float32, and this one has {format_size(size)}: "
            f"take format=openvino"
        )
    inputs = [parts.denoiser.config.get("_name_or_path")]
    output = RunFolder(os.fspath(output_dir), options.overwrite_output_dir, inputs, marker=NAME)
    output.check_not_training()
    output.check()
    output.prepare(parameter_bytes(parts.denoiser) * (2 if options.compile else 1))
    with output:
        parts = parts._replace(denoiser=copy.deepcopy(parts.denoiser).cpu().float().eval().requires_grad_(False))
        reference = None if options.dtype == "fp32" else _reference(parts, options)
        description = _write(parts, output.staging, options, reference)
        description = _checked(parts, output.staging, options, description, reference)
        output.publish()
    return description


def _reference(parts: PipelineParts, options: ExportOptions) -> Reference:
    """Samples of the model in float32, and its inputs meanwhile."""
    batch_size = parse_batch(options.batch)
    return sampled_reference(parts, batch_size, options.num_images, options.num_inference_steps, options.prompts)


def _write(parts: PipelineParts, folder: Path, options: ExportOptions, reference: Reference | None) -> ExportDescription:
    """Write the export without its errors."""
    batch_size = parse_batch(options.batch)
    description = ExportDescription(
        format=options.format,
        dtype=options.dtype,
        batch_size=batch_size,
        model_class=type(parts.denoiser).__name__,
        inputs=describe_inputs(to_tensors(random_inputs(parts, batch_size or 1)), batch_size),
        versions=installed_versions(options.format, options.dtype),
        compiled=options.compile,
    )
    # OpenVINO converts to float16 itself, and computes in what the device is fast in
    halved = options.dtype == "fp16" and options.format != "openvino"
    program = trace(parts, copy.deepcopy(parts.denoiser).half() if halved else parts.denoiser, batch_size)
    write_program(program, folder, description, [] if reference is None else reference.recorded)
    if options.compile:
        compile_program(program, folder)
    description.save(folder)
    config = json.loads(parts.denoiser.to_json_string())
    write_json(folder / ExportedModel.config_name, {key: value for key, value in config.items() if key != "_name_or_path"})
    parts.scheduler.save_pretrained(folder / "scheduler")
    return description


def _checked(
    parts: PipelineParts,
    folder: Path,
    options: ExportOptions,
    description: ExportDescription,
    reference: Reference | None,
) -> ExportDescription:
    """Load the written files as users do, measure their errors, and write these.

    Raises:
        ValueError: An error is above the limit, or not finite.
    """
    limit, checks = LIMIT if options.dtype == "fp32" else math.inf, []
    for file in [COMPILED_FILE, description.file] if options.compile else [description.file]:
        exported = load_exported(folder, trust_remote_code=True, compiled=file == COMPILED_FILE)
        checks += [{"file": file, **row} for row in relative_errors(parts, exported, description.batch_size)]
    for row in checks:
        if not math.isfinite(row["max_relative_error"]):
            advice = "" if options.dtype == "fp32" else ": use fp32"
            raise ValueError(
                f"dtype={options.dtype}: the export gives values that are not finite at timestep {row['timestep']:g}{advice}"
            )
    worst = max(row["max_relative_error"] for row in checks)
    if worst >= limit:
        raise ValueError(
            f"the export differs from PyTorch by a relative error of {worst:.1e}, but must differ by less than {limit:g}: "
            f"nothing was written"
        )
    similarity = None if reference is None else reference.similarity(exported)
    description = replace(description, checks=tuple(checks), max_relative_error=worst, similarity=similarity)
    description.save(folder)
    (folder / "README.md").write_text(export_card(description, parts.family.component))
    return description
