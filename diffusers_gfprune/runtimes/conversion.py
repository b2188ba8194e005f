"""Conversion of traced programs by the libraries of the runtimes. What one of them gets wrong is left out of the program."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence

import torch

__all__ = ["lower_channel_sums", "quiet_converters", "remove_idle_squeezes", "to_onnx", "to_openvino"]


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
        program: The program. Sums of a number and values of channels change their place in it.
        inputs: Shapes of its inputs by name, in order, with None for axes of any length.
        outputs: Names of its outputs, in order.

    Returns:
        An `openvino.Model`.
    """
    import openvino

    lower_channel_sums(program.graph_module)
    model = openvino.convert_model(program)
    for ports, names in ((model.inputs, inputs), (model.outputs, outputs)):  # the converter makes names up
        for port, name in zip(ports, names, strict=True):
            port.tensor.set_names({name})
    # The converter takes axes for free (OpenVINO 2026.4.1)
    model.reshape({name: [-1 if axis is None else axis for axis in shape] for name, shape in inputs.items()})
    return model


def lower_channel_sums(graph_module: torch.fx.GraphModule) -> None:
    """Add numbers to values of channels before these get axes of length 1 for pixels, in place.

    In a `resnet_time_scale_shift="scale_shift"` block, the scale `1 + s` of a norm is such a sum, `(batch, channels, 1, 1)`.
    For inputs of fixed shapes in float32, OpenVINO 2026.4.1 fuses it with the norm, and ends the process with a segmentation
    fault where the model is compiled for the CPU. It does not fuse a sum over `(batch, channels)`.
    """
    graph, aten = graph_module.graph, torch.ops.aten
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target != aten.add.Tensor:
            continue
        values = [argument for argument in node.args if isinstance(argument, torch.fx.Node)]
        shape = values[0].meta["val"].shape if len(values) == 1 else ()
        if len(shape) == 4 and tuple(shape[2:]) == (1, 1):
            with graph.inserting_before(node):
                node.replace_input_with(values[0], graph.call_function(aten.squeeze.dims, (values[0], [2, 3])))
            with graph.inserting_after(node):
                row = graph.call_function(aten.unsqueeze.default, (node, 2))
            with graph.inserting_after(row):
                pixel = graph.call_function(aten.unsqueeze.default, (row, 3))
            node.replace_all_uses_with(pixel, delete_user_cb=lambda user, row=row: user is not row)
    graph_module.recompile()


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
