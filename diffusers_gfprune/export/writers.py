"""Writes a traced denoiser in a format. The libraries convert; nothing is converted by hand."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import first_line
from .description import COMPILED_FILE, ExportDescription
from .program import OUTPUT

__all__ = ["compile_program", "has_compiler", "write_program"]

Calibration = Sequence[dict[str, Tensor]]


def write_program(
    program: torch.export.ExportedProgram,
    folder: Path,
    description: ExportDescription,
    calibration: Calibration,
) -> None:
    """Write the file of an export.

    Args:
        program: The denoiser, with weights in float16 for `onnx` and `torch` at fp16, else float32.
        folder: Folder to write to.
        description: Format, precision and inputs of the export.
        calibration: Inputs by name, for int8.

    Raises:
        ValueError: The conversion failed, or its result cannot be written.
    """
    write = {"onnx": _write_onnx, "openvino": _write_openvino, "torch": _write_torch}[description.format]
    try:
        with _quiet():
            write(program, folder / description.file, description, calibration)
    except OSError:
        raise
    except Exception as error:  # converters have errors of their own
        raise ValueError(f"format={description.format}: the conversion failed: {first_line(error)}") from error


def _write_onnx(program, path: Path, description: ExportDescription, calibration: Calibration) -> None:
    names = {"input_names": list(description.inputs), "output_names": [OUTPUT]}
    exported = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    if description.dtype == "int8":
        import onnx

        quantized = _quantize(exported.model_proto, calibration)
        onnx.save(quantized, path)
    else:
        exported.save(path, external_data=False)  # weights of 2 GB and more go beside the file


def _write_openvino(program, path: Path, description: ExportDescription, calibration: Calibration) -> None:
    import openvino

    model = openvino.convert_model(program)
    for port, name in zip(model.inputs, description.inputs):  # conditioning has made-up names
        port.tensor.set_names({name})
    model.outputs[0].tensor.set_names({OUTPUT})
    # With one free axis, the converter takes all for free
    model.reshape({name: [-1 if axis is None else axis for axis in entry.shape] for name, entry in description.inputs.items()})
    if description.dtype == "int8":
        model = _quantize(model, calibration)
    openvino.save_model(model, path, compress_to_fp16=description.dtype == "fp16")


def _write_torch(program, path: Path, description: ExportDescription, calibration: Calibration) -> None:
    examples, program.example_inputs = program.example_inputs, None  # they would be saved as a pickle
    content = io.BytesIO()  # PyTorch's own writer ends the process if the disk is full
    torch.export.save(program, content)
    program.example_inputs = examples
    path.write_bytes(content.getbuffer())


def _quantize(model, calibration: Calibration):
    """Weights and activations of convolutions and linear layers in 8 bits, with scales from calibration inputs."""
    import nncf

    inputs = [{name: values.numpy() for name, values in entry.items()} for entry in calibration]
    return nncf.quantize(model, nncf.Dataset(inputs), subset_size=len(inputs))


def has_compiler() -> bool:
    """Whether there is a C++ compiler for AOTInductor."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:  # torch._inductor.exc.InvalidCxxCompiler is private
        return False
    return True


def compile_program(program: torch.export.ExportedProgram, folder: Path) -> None:
    """Compile a program for this machine, by AOTInductor."""
    with _quiet():
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / COMPILED_FILE))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Converters report on themselves at length."""
    loggers = [logging.getLogger(name) for name in ("nncf", "torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
