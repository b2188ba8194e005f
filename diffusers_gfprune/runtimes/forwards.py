"""Forward passes in a runtime, of whole models and of many single layers, for timing.

Tracing and converting a model takes a second at least, of whatever size. Layers are therefore converted together: one program
with a branch for each layer, which is then split into models of one branch.

    layers (x_1 -> y_1), ..., (x_n -> y_n)  ->  one program (x_1, ..., x_n) -> (y_1, ..., y_n)  ->  n models
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import first_line
from .conversion import quiet_converters, to_onnx, to_openvino
from .requirements import check_runtimes
from .sessions import Call, onnx_call, openvino_call

__all__ = ["ConversionError", "Layer", "layer_calls", "model_call", "sequence_call"]

# Layers that are converted together: at most this many, with weights of at most so many bytes
MOST_LAYERS, MOST_BYTES = 256, 2**28


class ConversionError(ValueError):
    """A runtime cannot convert or load a model."""


class Layer(NamedTuple):
    """A layer with its inputs.

    Attributes:
        module: The layer, on the CPU.
        inputs: Its positional arguments, on the CPU. They may share memory.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]

    @property
    def weight_bytes(self) -> int:
        """Size of the weights."""
        return sum(parameter.nbytes for parameter in self.module.parameters())


class _Branches(nn.Module):
    """Layers side by side: all inputs to all outputs."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer.module for layer in layers)
        ends = list(itertools.accumulate(len(layer.inputs) for layer in layers))
        self.spans = [slice(start, end) for start, end in zip([0, *ends], ends)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(*tensors[span]) for layer, span in zip(self.layers, self.spans))


class _Sequence(_Branches):
    """Layers one after the other: one value of each output, so that outputs are freed as in a model."""

    def forward(self, *tensors: Tensor) -> Tensor:
        return torch.cat([output.flatten()[:1] for output in super().forward(*tensors)])


def model_call(module: nn.Module, tensors: Mapping[str, Tensor], runtime: str) -> Call:
    """A forward pass of a model in a runtime, in float32 and for inputs of these shapes.

    Args:
        module: The model on the CPU, in evaluation mode. It returns a tensor.
        tensors: Its positional arguments, in order, by the name that they get.
        runtime: One of `RUNTIMES`.

    Raises:
        ImportError: The runtime is not installed.
        ConversionError: The runtime cannot convert or load the model.
    """
    check_runtimes([runtime])
    with _one_error(runtime), tempfile.TemporaryDirectory() as folder:
        program, outputs = _trace(module, tensors.values()), ["output"]
        if runtime == "openvino":
            return openvino_call(to_openvino(program, _shapes(tensors), outputs), tensors)
        path = Path(folder, "model.onnx")  # serialized models are limited to 2 GB
        to_onnx(program, list(tensors), outputs).save(path, external_data=False)
        return onnx_call(path, tensors)


def sequence_call(layers: Sequence[Layer], runtime: str) -> Call:
    """A call of layers one after the other, in one session of a runtime.

    Args:
        layers: The layers.
        runtime: One of `RUNTIMES`.

    Raises:
        ImportError, ConversionError: As in `model_call`.
    """
    return model_call(_Sequence(layers).eval(), _named_inputs(layers), runtime)


def layer_calls(layers: Iterable[Layer], runtime: str) -> Iterator[Call]:
    """Calls of single layers, each in a session of its own. Layers are taken and converted as calls are asked for.

    Args:
        layers: The layers.
        runtime: One of `RUNTIMES`.

    Raises:
        ImportError, ConversionError: As in `model_call`.
    """
    check_runtimes([runtime])
    for chunk in _chunks(layers):
        with _one_error(runtime):
            models = _split(chunk, runtime)
        for model, tensors in models:
            with _one_error(runtime):
                call = openvino_call(model, tensors) if runtime == "openvino" else onnx_call(model, tensors)
            yield call


def _chunks(layers: Iterable[Layer]) -> Iterator[list[Layer]]:
    """Groups of consecutive layers within the limits."""
    chunk: list[Layer] = []
    weights = 0
    for layer in layers:
        if chunk and (len(chunk) == MOST_LAYERS or weights + layer.weight_bytes > MOST_BYTES):
            yield chunk
            chunk, weights = [], 0
        chunk.append(layer)
        weights += layer.weight_bytes
    if chunk:
        yield chunk


def _split(layers: Sequence[Layer], runtime: str) -> list[tuple[Any, dict[str, Tensor]]]:
    """Models of single layers in the format of a runtime, and their inputs by name."""
    branches, tensors, outputs = _Branches(layers), _named_inputs(layers), [f"y{index}" for index in range(len(layers))]
    program = _trace(branches.eval(), tensors.values())
    inputs = [dict(list(tensors.items())[span]) for span in branches.spans]
    if runtime == "openvino":
        import openvino

        model = to_openvino(program, _shapes(tensors), outputs)
        parameters, results = dict(zip(tensors, model.get_parameters())), model.get_results()
        models = [
            openvino.Model([result], [parameters[name] for name in named], "layer") for result, named in zip(results, inputs)
        ]
    else:
        from onnx.utils import Extractor

        extractor = Extractor(to_onnx(program, list(tensors), outputs).model_proto)
        models = [extractor.extract_model(list(named), [output]).SerializeToString() for named, output in zip(inputs, outputs)]
    return list(zip(models, inputs))


def _named_inputs(layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Inputs of all layers, in order, by made-up names."""
    return {f"x{index}": values for index, values in enumerate(values for layer in layers for values in layer.inputs)}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(values.shape) for name, values in tensors.items()}


@torch.no_grad()
def _trace(module: nn.Module, tensors: Iterable[Tensor]) -> torch.export.ExportedProgram:
    return torch.export.export(module, tuple(tensors))


@contextmanager
def _one_error(runtime: str) -> Iterator[None]:
    """Errors of converters and runtimes, which have types of their own, as one line."""
    try:
        with quiet_converters():
            yield
    except Exception as error:
        raise ConversionError(f"{runtime} cannot run this model: {first_line(error)}") from error
