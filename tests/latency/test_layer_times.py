"""latency/layer_times.py: tables from known times, and their cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from diffusers_gfprune.latency import layer_times
from diffusers_gfprune.latency.layer_forwards import EagerLayers, RuntimeLayers
from diffusers_gfprune.latency.layer_times import Grid, layer_shares, measure_shares
from diffusers_gfprune.latency.layer_workloads import Inputs, Norm
from diffusers_gfprune.metrics.cache import TensorCache
from diffusers_gfprune.metrics.speed import PreparedForward, SpeedSetting
from diffusers_gfprune.runtimes.forwards import Layer
from helpers.architectures import build

CPU = torch.device("cpu")
INPUTS = Inputs(1, CPU, torch.float32)


class Machine:
    """A clock that calls move on, by their seconds times the load of the moment."""

    def __init__(self, load: Iterator[float]) -> None:
        self.now, self.load = 0.0, load

    def call(self, seconds: float):
        def run() -> None:
            self.now += seconds

        return run

    def timer(self, call, device: torch.device) -> float:
        before = self.now
        call()
        return (self.now - before) * next(self.load)


class Product:
    """A workload that takes `unit` seconds for each pair of channels."""

    def __init__(self, machine: Machine, unit: float) -> None:
        self.machine, self.unit = machine, unit

    def layer(self, wide_in: int, wide_out: int, inputs: Inputs) -> Layer:
        return Layer(self.machine.call(self.unit * wide_in * wide_out), ())


@pytest.mark.parametrize("load", [itertools.repeat(1.0), itertools.cycle([1.0] * 11 + [3.0])])
def test_shares_are_those_of_the_dense_forward(load) -> None:
    """Two layers take 0.4 s of a forward of 1 s, one of them three times as long as the other; load comes and goes."""
    machine = Machine(load)
    grids = [Grid(Product(machine, 0.001), (5, 10), (5, 10)), Grid(Product(machine, 0.003), (10,), (5, 10))]
    calls = [(0, 10, 10), (1, 10, 10)]
    first, second = measure_shares(machine.call(1.0), grids, calls, EagerLayers(INPUTS), CPU, machine.timer)
    assert first == pytest.approx(np.array([[0.025, 0.05], [0.05, 0.1]]))
    assert second == pytest.approx(np.array([[0.15, 0.3]]))


def test_tables_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Again for another batch size, or where the file is damaged."""
    measured = []

    def fake(dense, grids, calls, layers, device, progress) -> list[np.ndarray]:
        measured.append(layers.inputs.batch)
        return [np.array([[0.1, 0.3]])]

    monkeypatch.setattr(layer_times, "measure_shares", fake)
    unet, grids, calls = build("one-level"), [Grid(Norm((8, 8), 4, silu=True), (0,), (8, 16))], [(0, 0, 16)]

    def get(batch_size: int = 1) -> None:
        setting = SpeedSetting(batch_size, "float32")
        (shares,) = layer_shares(unet, grids, calls, setting, cache=TensorCache(tmp_path))
        assert shares.tolist() == [[0.1, 0.3]]

    get(), get(), get(2)
    assert measured == [1, 2]
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-4])
    get()
    assert measured == [1, 2, 1] and "is made again" in capsys.readouterr().err
    get()
    assert measured == [1, 2, 1]


def test_tables_are_those_of_their_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that times depend on is another table. What a model was loaded from is not."""
    measured = []

    def fake(dense, grids, calls, layers, device, progress) -> list[np.ndarray]:
        measured.append(None)
        return [np.array([[0.1, 0.3]])]

    monkeypatch.setattr(layer_times, "measure_shares", fake)
    monkeypatch.setattr(layer_times, "prepare_forward", lambda *args: PreparedForward(lambda: None, []))
    norm = Grid(Norm((8, 8), 4, silu=True), (0,), (8, 16))
    known = {"unet": build("one-level"), "grids": [norm], "calls": [(0, 0, 16)], "setting": SpeedSetting(1, "float32")}

    def is_measured(**changes) -> bool:
        before = len(measured)
        for _ in range(2):  # the second time, it is in the cache
            layer_shares(**{**known, **changes}, cache=TensorCache(tmp_path))
        return len(measured) == before + 1

    assert is_measured() and not is_measured()
    assert is_measured(setting=SpeedSetting(1, "bfloat16")) and is_measured(sample_size=16)
    assert is_measured(unet=UNet2DModel.from_config({**known["unet"].config, "attention_head_dim": 4}))
    assert is_measured(calls=[(0, 0, 8)]) and is_measured(grids=[Grid(norm.workload, (0,), (4, 16))])
    assert is_measured(grids=[Grid(Norm((8, 8), 2, silu=True), (0,), (8, 16))])
    for place, other in (
        ("torch.get_num_threads", lambda: 999),
        ("torch.__version__", "99.0.0"),
        ("hardware_name", lambda device: "abacus"),
        ("float32_description", lambda device: {"tf32": True, "float32_matmul": "tf32"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"diffusers_gfprune.latency.layer_times.{place}", other)
            assert is_measured(), place
    known["unet"].register_to_config(_name_or_path="elsewhere")
    assert not is_measured()


def test_tables_of_a_runtime_depend_on_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels change. Eager and compiled models share a table, as before there were runtimes."""
    measured = []

    def fake(dense, grids, calls, layers, device, progress) -> list[np.ndarray]:
        measured.append(layers.runtime if isinstance(layers, RuntimeLayers) else "eager")
        return [np.array([[0.1, 0.3]])]

    monkeypatch.setattr(layer_times, "measure_shares", fake)
    monkeypatch.setattr(layer_times, "prepare_forward", lambda *args: PreparedForward(lambda: None, []))
    unet, grids, calls = build("one-level"), [Grid(Norm((8, 8), 4, silu=True), (0,), (8, 16))], [(0, 0, 16)]

    def get(mode: str, version: str) -> None:
        monkeypatch.setattr(layer_times, "runtime_versions", lambda runtime: {runtime: version})
        layer_shares(unet, grids, calls, SpeedSetting(1, "float32", mode), cache=TensorCache(tmp_path))

    get("onnxruntime", "1.0"), get("onnxruntime", "1.0"), get("openvino", "1.0"), get("onnxruntime", "1.1")
    assert measured == ["onnxruntime", "openvino", "onnxruntime"]
    get("eager", ""), get("compiled", ""), get("onnxruntime", "1.1")
    assert measured[3:] == ["eager"]
