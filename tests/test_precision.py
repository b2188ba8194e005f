"""precision.py: float32 without TF32 inside, and what was there before afterwards; step losses and recovery are inside."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_gfprune import precision
from diffusers_gfprune.metrics.step_loss import StepLoss
from diffusers_gfprune.one_shot import prune_unet
from diffusers_gfprune.precision import check_float64, ieee_float32
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
