"""Sessions of runtimes with bound inputs, for timing.

A call of a session costs Python a few microseconds, since inputs lie where the runtime reads them. It has as many threads as
PyTorch on the CPU, and computes in float32. onnxruntime's threads wait for more work in a loop. They are told to stop after a
call, since they would take time from the model that is timed next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["FULL_PRECISION", "onnx_call", "openvino_call", "openvino_core"]

Call = Callable[[], object]

# Without it, CPUs with bfloat16 compute in it
FULL_PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}


@functools.cache
def openvino_core():
    """The one `openvino.Core` of this process, which is never freed.

    Its CPU plugin gives the main thread an alternate stack for signals, which Python's handlers run on. If two cores are freed
    in the order in which they were made, that stack is freed while it is in use, and the next Ctrl-C is a segmentation fault
    (OpenVINO 2026.4.1).
    """
    import openvino

    return openvino.Core()


def onnx_call(model: bytes | Path, tensors: Mapping[str, Tensor]) -> Call:
    """A call of an ONNX model in onnxruntime.

    Args:
        model: The model, serialized, or its file.
        tensors: Its inputs by name, on the CPU.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, values in tensors.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(values.numpy()))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    return lambda: session.run_with_iobinding(binding)


def openvino_call(model, tensors: Mapping[str, Tensor]) -> Call:
    """A call of an `openvino.Model` on the CPU.

    Args:
        model: The model.
        tensors: Its inputs by name, on the CPU.
    """
    import openvino

    config = {**FULL_PRECISION, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = openvino_core().compile_model(model, "CPU", config).create_infer_request()
    for name, values in tensors.items():
        request.set_tensor(name, openvino.Tensor(values.numpy(), shared_memory=True))
    return lambda: request.infer(share_outputs=True)
