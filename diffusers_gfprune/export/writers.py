"""Writes a traced denoiser in a format (`runtimes.conversion`)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import first_line
from ..runtimes.conversion import quiet_converters, to_onnx, to_openvino
from ..runtimes.program import OUTPUT
from .description import COMPILED_FILE, ExportDescription

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
        with quiet_converters():
            write(program, folder / description.file, description, calibration)
    except OSError:
        raise
    except Exception as error:  # converters have errors of their own
        raise ValueError(f"format={description.format}: the conversion failed: {first_line(error)}") from error


def _write_onnx(program, path: Path, description: ExportDescription, calibration: Calibration) -> None:
    exported = to_onnx(program, list(description.inputs), [OUTPUT])
    if description.dtype == "int8":
        import onnx

        quantized = _quantize(exported.model_proto, calibration)
        onnx.save(quantized, path)
    else:
        exported.save(path, external_data=False)  # weights of 2 GB and more go beside the file


def _write_openvino(program, path: Path, description: ExportDescription, calibration: Calibration) -> None:
    import openvino

    model = to_openvino(program, {name: entry.shape for name, entry in description.inputs.items()}, [OUTPUT])
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
    with quiet_converters():
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / COMPILED_FILE))
