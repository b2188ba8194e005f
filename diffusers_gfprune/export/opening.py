"""Exported files opened by their runtimes: each as a function of tensors, after a check that it is the file described.

Runtimes are imported when they are used. `torch.export.load` unpickles, evaluates text of the archive and may run compiled
code, so that archives need trust, as code does; the other formats are data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import first_line
from ..runtimes.requirements import check_runtime
from ..runtimes.sessions import FULL_PRECISION, openvino_core
from .description import COMPILED_FILE, ExportDescription
from .program import MOST_SAMPLES

__all__ = ["Runner", "open_export"]

# Tensors by input name -> output
Runner = Callable[[Mapping[str, Tensor]], Tensor]


def open_export(
    folder: Path, description: ExportDescription, *, trust_remote_code: bool, compiled: bool, options: Mapping[str, Any]
) -> Runner:
    """Open the file of an export.

    Args:
        folder: Folder of the export.
        description: Content of its `export.json`.
        trust_remote_code: Whether archives of PyTorch may be loaded.
        compiled: Whether to run the program that AOTInductor compiled; only in format `torch`.
        options: Further arguments of the runtime.

    Raises:
        ImportError: The runtime is not installed.
        ValueError: The file is missing, damaged, not trusted or that of another model.
    """
    if compiled and not description.compiled:
        raise ValueError(f"compiled=True: folder={folder} has no {COMPILED_FILE}: export with compile=True and format torch")
    file = COMPILED_FILE if compiled else description.file
    path = folder / file
    if not path.is_file():
        raise ValueError(f"folder={folder} has no {file}, which its export.json names")
    if description.format == "torch" and not trust_remote_code:
        raise ValueError(
            f"{file} is an archive of PyTorch, and loading one can run code: pass trust_remote_code=True if you trust its "
            f"source, or use an export to onnx or openvino"
        )
    check_runtime(description.format)
    opener = {"onnx": _open_onnx, "openvino": _open_openvino, "torch": _open_compiled if compiled else _open_torch}
    try:
        run, inputs = opener[description.format](path, description, options)
    except TypeError:  # an unknown option of the runtime
        raise
    except Exception as error:  # runtimes have errors of their own
        raise ValueError(f"{path} cannot be loaded by its runtime: {first_line(error)}") from error
    if inputs is not None:
        _check_inputs(path, description, inputs)
    return run


def _check_inputs(path: Path, description: ExportDescription, inputs: Mapping[str, tuple]) -> None:
    """Check that a file has the inputs of its description."""
    for name, expected in description.inputs.items():
        if name not in inputs or not expected.fits(inputs[name]):
            found = list(inputs[name]) if name in inputs else "nothing"
            raise ValueError(
                f"{path} is of another model or batch size: export.json says {name} of {list(expected.shape)}, the file has "
                f"{found}"
            )


def _open_onnx(path: Path, description: ExportDescription, options: Mapping[str, Any]) -> tuple[Runner, dict[str, tuple]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, **{"providers": ["CPUExecutionProvider"], **options})

    def run(tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run(None, {name: values.numpy() for name, values in tensors.items()})[0])

    return run, {entry.name: tuple(entry.shape) for entry in session.get_inputs()}


def _open_openvino(path: Path, description: ExportDescription, options: Mapping[str, Any]) -> tuple[Runner, dict[str, tuple]]:
    precision = {} if description.dtype == "fp16" else FULL_PRECISION
    options = {"device_name": "CPU", **options, "config": {**precision, **options.get("config", {})}}
    model = openvino_core().compile_model(path, **options)

    def run(tensors: Mapping[str, Tensor]) -> Tensor:
        found = model({name: values.numpy() for name, values in tensors.items()})
        return torch.from_numpy(found[0].copy())  # the next call writes to the same memory

    lengths = {
        name: tuple(axis.get_length() if axis.is_static else None for axis in port.partial_shape)
        for port in model.inputs
        for name in port.names  # the compiler adds names of what it merges with an input
    }
    return run, lengths


def _open_torch(path: Path, description: ExportDescription, options: Mapping[str, Any]) -> tuple[Runner, dict[str, tuple]]:
    program = torch.export.load(path, **options)
    module = program.module()
    names = set(program.graph_signature.user_inputs)
    shapes = [
        tuple(length if isinstance(length, int) else None for length in node.meta["val"].shape)
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names
    ]
    return _in_order(module, description), dict(zip(description.inputs, shapes))


def _open_compiled(path: Path, description: ExportDescription, options: Mapping[str, Any]) -> tuple[Runner, None]:
    return _in_order(torch._inductor.aoti_load_package(str(path), **options), description), None


def _in_order(function: Callable[..., Tensor], description: ExportDescription) -> Runner:
    """A function of positional tensors as one of named tensors; larger batches than it was traced for are split."""

    def run(tensors: Mapping[str, Tensor]) -> Tensor:
        ordered = [tensors[name] for name in description.inputs]
        if description.batch_size is not None or len(ordered[0]) <= MOST_SAMPLES:
            return function(*ordered)
        return torch.cat([function(*parts) for parts in zip(*(values.split(MOST_SAMPLES) for values in ordered))])

    return run
