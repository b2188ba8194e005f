"""Conversion of traced programs by the libraries of the runtimes. What one of them gets wrong is left out of the program."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence

import torch

__all__ = ["quiet_converters", "remove_idle_squeezes", "to_onnx", "to_openvino"]


def to_onnx(program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]):
    """Convert a program to ONNX.

    Args:
        program: The program. Operations that do nothing are removed from it.
        inputs: Names of its inputs, in order.
        outputs: Names of its outputs, in order.

    Returns:
        A `torch.onnx.ONNXProgram`.
    """
    remove_idle_squeezes(program.graph_module)
    return torch.onnx.export(program, dynamo=True, verbose=False, input_names=list(inputs), output_names=list(outputs))


def remove_idle_squeezes(graph_module: torch.fx.GraphModule) -> None:
    """Remove calls of `squeeze(dim)` on axes that are longer than 1, in place.

    They do nothing in PyTorch, but onnxscript 0.7.2 writes them as ONNX's Squeeze, which refuses such axes. PixArt has one.
    """
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.squeeze.dim:
            source, dim = node.args
            length = source.meta["val"].shape[dim]
            if isinstance(length, int) and length != 1:
                node.replace_all_uses_with(source)
                graph_module.graph.erase_node(node)
    graph_module.recompile()


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
