"""runtimes/forwards.py: layers that are exported together compute what they did alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from diffusers_gfprune.latency.layer_workloads import (
    AttentionProducts,
    Convolution,
    CrossAttentionProducts,
    Inputs,
    LinearLayer,
    Norm,
)
from diffusers_gfprune.runtimes import forwards
from diffusers_gfprune.runtimes.forwards import ConversionError, Layer, layer_calls, model_call, sequence_call
from diffusers_gfprune.runtimes.requirements import RUNTIMES, runtime_versions
from diffusers_gfprune.runtimes.sessions import FULL_PRECISION, openvino_core

POINTS = [
    (Convolution((6, 4), (3, 3), (2, 2), (1, 1), True), 3, 8),
    (Convolution((6, 4), (1, 1), (1, 1), (0, 0), False), 8, 3),
    (LinearLayer(5, transposed=True, bias=True), 3, 8),
    (LinearLayer(0, transposed=False, bias=False), 3, 8),
    (Norm((6, 4), 4, silu=True), 0, 8),
    (Norm((5,), 4, silu=False), 0, 8),
    (AttentionProducts(5, heads=4), 0, 8),
    (CrossAttentionProducts(5, 4, keys=3), 0, 8),
]


def layers() -> list[Layer]:
    """A layer of each kind."""
    inputs = Inputs(2, torch.device("cpu"), torch.float32)
    return [workload.layer(wide_in, wide_out, inputs) for workload, wide_in, wide_out in POINTS]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_layers_compute_what_they_do_in_pytorch(runtime: str) -> None:
    """Split from one program, with their own inputs and weights, at fixed shapes."""
    wanted = layers()
    for (model, tensors), (module, inputs) in zip(forwards._split(wanted, runtime), wanted, strict=True):
        named = {name: values.numpy() for name, values in tensors.items()}
        if runtime == "openvino":
            assert not model.is_dynamic()
            found = openvino_core().compile_model(model, "CPU", FULL_PRECISION)(named)[0]
        else:
            import onnxruntime

            found = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, named)[0]
        with torch.no_grad():
            np.testing.assert_allclose(found, module(*inputs).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_calls_run(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each layer, taken in groups, and one for all of them."""
    monkeypatch.setattr(forwards, "MOST_LAYERS", 2)
    three = layers()[:3]
    for call in (*layer_calls(iter(three), runtime), sequence_call(three, runtime)):
        call()


def test_layers_are_taken_in_groups_of_limited_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their number and by their weights; a layer that is too large is alone."""
    monkeypatch.setattr(forwards, "MOST_LAYERS", 3)
    monkeypatch.setattr(forwards, "MOST_BYTES", 1000)
    taken = []

    def made() -> Iterator[Layer]:
        for width in (10, 10, 10, 10, 200, 100, 100, 100, 10):
            taken.append(width)
            yield Layer(nn.Linear(1, width, bias=False), (torch.ones(1, 1),))

    groups = forwards._chunks(made())
    assert [layer.module.out_features for layer in next(groups)] == [10, 10, 10] and taken == [10] * 4
    assert [[layer.module.out_features for layer in group] for group in groups] == [[10, 200], [100, 100], [100, 10]]


def test_what_cannot_be_converted_is_one_line() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ConversionError, match="^onnxruntime cannot run this model: .") as error:
        model_call(Branching(), {"x": torch.ones(2)}, "onnxruntime")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_versions_name_the_runtime(runtime: str) -> None:
    """They are in the key of cached tables."""
    assert runtime_versions(runtime)[runtime] == __import__(runtime).__version__
