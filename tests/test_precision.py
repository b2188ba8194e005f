"""precision.py: float32 without TF32 inside, and what was there before afterwards; step losses and recovery are inside."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_gfprune import precision
from diffusers_gfprune.latency.layer_times import machine_description
from diffusers_gfprune.metrics.step_loss import StepLoss
from diffusers_gfprune.one_shot import prune_unet
from diffusers_gfprune.precision import check_float64, float32_description, ieee_float32
from helpers.architectures import build


def newer() -> list[str]:
    """Precision settings of matrix products and convolutions in torch >= 2.9, on CUDA and CPU."""
    b = torch.backends
    owners = (b.cuda.matmul, b.cudnn.conv, b.mkldnn.matmul, b.mkldnn.conv)
    return [owner.fp32_precision for owner in owners if hasattr(owner, "fp32_precision")]


def older() -> list[str | bool]:
    """The older flags, which every torch has."""
    return [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()]


@pytest.fixture(params=["highest", "high", "medium"])
def training_precision(request: pytest.FixtureRequest):
    """What a training script may have asked for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


def test_no_tf32_inside(training_precision: None):
    """Also where convolutions may use it by default; without a word from torch, and put back after an error."""
    before = [*newer(), *older()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError, match="on purpose"), ieee_float32():
            assert {*newer(), "ieee"} == {"ieee"} and older() == [False, False, "highest"]
            raise KeyError("on purpose")
    assert [*newer(), *older()] == before


@pytest.mark.skipif(not newer(), reason="before torch 2.9 there are only the older flags")
def test_no_tf32_inside_where_only_the_newer_flags_are_in_use():
    """Torch then refuses to read the older ones."""
    owner, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    owner.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError, match="mix of the legacy and new"):
            older()
        with ieee_float32():
            assert set(newer()) == {"ieee"}
        assert owner.fp32_precision == "tf32"
    finally:
        owner.fp32_precision = before


def test_no_tf32_inside_with_the_flags_of_older_torch(training_precision: None, monkeypatch: pytest.MonkeyPatch):
    """Before torch 2.9, there are only these."""
    before, backends = older(), torch.backends
    matmul = SimpleNamespace(allow_tf32=backends.cuda.matmul.allow_tf32)
    monkeypatch.setattr(
        precision.torch, "backends", SimpleNamespace(cuda=SimpleNamespace(matmul=matmul), cudnn=backends.cudnn)
    )
    with pytest.raises(KeyError, match="on purpose"), ieee_float32():
        assert not backends.cuda.matmul.allow_tf32 and not backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
        raise KeyError("on purpose")
    monkeypatch.undo()
    assert older() == before


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CONVOLUTION, MATMUL = {"float32_convolution": "tf32"}, {"float32_matmul": "tf32"}


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """That of the only GPU, Ampere if it is not changed."""
    version = [8, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(version))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "loom")
    return version


@pytest.fixture
def flags():
    """The defaults of all flags, before and after a test."""
    precision._set_older_flags("highest", True)
    yield
    for owner in (torch.backends.cuda.matmul,) if newer() else ():
        owner.fp32_precision = "ieee"  # otherwise torch refuses to set the older ones
    precision._set_older_flags("highest", True)


def test_products_and_convolutions_are_described_separately(capability: list[int], flags: None) -> None:
    """Convolutions use TF32 by default, and products with `--allow_tf32`."""
    assert float32_description(GPU) == {"tf32": True, **CONVOLUTION}
    torch.backends.cuda.matmul.allow_tf32 = True
    assert float32_description(GPU) == {"tf32": True, **CONVOLUTION, **MATMUL}
    assert machine_description(GPU).items() >= {**CONVOLUTION, **MATMUL}.items()
    torch.backends.cudnn.allow_tf32 = False
    assert float32_description(GPU) == {"tf32": True, **MATMUL}
    torch.backends.cuda.matmul.allow_tf32 = False
    assert float32_description(GPU) == {"tf32": False}
    torch.backends.cudnn.allow_tf32 = True
    capability[:] = 7, 5  # an older GPU has none
    assert float32_description(GPU) == {"tf32": False}


def test_products_on_the_cpu_may_be_in_bfloat16(flags: None) -> None:
    assert float32_description(CPU) == float32_description(torch.device("mps")) == {"tf32": False}
    torch.set_float32_matmul_precision("medium")
    assert float32_description(CPU) == {"tf32": False, "float32_matmul": "bf16"}
    assert machine_description(CPU)["float32_matmul"] == "bf16"


@pytest.mark.skipif(not newer(), reason="before torch 2.9 there are only the older flags")
def test_the_newer_flags_are_described(capability: list[int], flags: None) -> None:
    """Torch refuses to read the older ones then."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="mix of the legacy and new"):
        older()
    assert float32_description(GPU) == {"tf32": True, **CONVOLUTION, **MATMUL}
    assert float32_description(CPU) == {"tf32": False}


@pytest.mark.parametrize(
    ("words", "on_gpu", "on_cpu"), [("highest", {}, {}), ("high", MATMUL, {}), ("medium", MATMUL, {"float32_matmul": "bf16"})]
)
def test_the_flags_of_older_torch_are_described(
    capability: list[int], monkeypatch: pytest.MonkeyPatch, words: str, on_gpu: dict, on_cpu: dict
) -> None:
    """Before torch 2.9, there are only these."""
    backends = SimpleNamespace(cuda=SimpleNamespace(matmul=None), cudnn=SimpleNamespace(allow_tf32=True))
    monkeypatch.setattr(precision.torch, "backends", backends)
    monkeypatch.setattr(precision.torch, "get_float32_matmul_precision", lambda: words)
    assert float32_description(GPU) == {"tf32": True, **CONVOLUTION, **on_gpu}
    assert float32_description(CPU) == {"tf32": False, **on_cpu}


def test_step_losses_and_recovery_are_inside(training_precision: None) -> None:
    """As scores are."""
    unet, images, seen = build("base"), torch.rand(4, 1, 8, 8), []

    def look(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if len(inputs[0]) > 2:  # traces have fewer rows
            seen.append(older())

    unet.conv_in.register_forward_hook(look)
    StepLoss(images, DDPMScheduler(), grid=2)(unet)
    assert seen and all(flags == [False, False, "highest"] for flags in seen)
    seen.clear()
    prune_unet(unet, DDPMScheduler(), images, ratio=0.3, criterion="magnitude")  # which needs no forward pass itself
    assert seen and all(flags == [False, False, "highest"] for flags in seen)


def test_apple_gpus_are_refused() -> None:
    """Before anything is scored or measured: a TypeError would end the run at its first sum in float64."""
    check_float64(torch.device("cpu"))
    check_float64(torch.device("cuda", 1))
    with pytest.raises(ValueError, match="device=mps has no float64, .*: use the CPU, in scripts by accelerate launch --cpu"):
        check_float64(torch.device("mps", 0))
