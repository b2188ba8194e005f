"""Conversion of traced programs. The libraries convert; nothing is converted by hand."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence

import torch

__all__ = ["quiet_converters", "to_onnx", "to_openvino"]


def to_onnx(program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]):
    """Convert a program to ONNX.

    Args:
        program: The program.
        inputs: Names of its inputs, in order.
        outputs: Names of its outputs, in order.

    Returns:
        A `torch.onnx.ONNXProgram`.
    """
    return torch.onnx.export(program, dynamo=True, verbose=False, input_names=list(inputs), output_names=list(outputs))


def to_openvino(program: torch.export.ExportedProgram, inputs: Mapping[str, Sequence[int | None]], outputs: Sequence[str]):
    """Convert a program to OpenVINO.

    Args:
        program: The program.
        inputs: Shapes of its inputs by name, in order, with None for axes of any length.
        outputs: Names of its outputs, in order.

    Returns:
        An `openvino.Model`.
    """
    import openvino

    model = openvino.convert_model(program)
    for ports, names in ((model.inputs, inputs), (model.outputs, outputs)):  # the converter makes names up
        for port, name in zip(ports, names, strict=True):
            port.tensor.set_names({name})
    # The converter takes axes for free (OpenVINO 2026.4.1)
    model.reshape({name: [-1 if axis is None else axis for axis in shape] for name, shape in inputs.items()})
    return model


@contextlib.contextmanager
def quiet_converters() -> Iterator[None]:
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
