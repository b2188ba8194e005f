"""training/estimate.py: bytes counted on fake tensors match real steps and rankings; timing respects its limit."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.scoring.importance import score_units
from diffusers_gfprune.training.estimate import (
    StepEstimate,
    _time,
    count_activations,
    estimate_step,
    machine_memory,
    memory_plan,
)
from helpers.architectures import build, inputs

ROOT = Path(__file__).resolve().parents[2]


GIB = 2**30
WEIGHTS = {"criterion": "gradient-flow-weights"}
BOUND = 1.5


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations inside made and that are still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[weakref.ref, int]] = {}
        self.now = self.peak = 0

    def forget(self, key: int) -> None:
        self.now -= self.alive.pop(key)[1]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = (weakref.ref(storage, lambda _, key=key: self.forget(key)), storage.nbytes())
                    self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result


@pytest.fixture(scope="module")
def teacher() -> UNet2DModel:
    return UNet2DModel.from_pretrained(ROOT / "training/digits/teacher/unet")


def model_of(name: str, teacher: UNet2DModel) -> UNet2DModel:
    return copy.deepcopy(teacher) if name == "digits" else build(name)


def batch_for(unet: UNet2DModel, size: int) -> DiffusionBatch:
    sample = inputs(unet, size)["sample"]
    return DiffusionBatch(sample, torch.randn_like(sample), torch.randint(0, 1000, (size,)))


def bytes_of(unet: UNet2DModel) -> int:
    return sum(parameter.numel() * 4 for parameter in unet.parameters())


# --- activations -------------------------------------------------------------------------------------------------------


def saved_bytes(unet: UNet2DModel, size: int, precision: str) -> int:
    """What a real forward keeps for the backward."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            prediction = unet(**inputs(unet, size)).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), torch.zeros(prediction.shape))
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.fast_variants(3)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["digits", "three-levels-two-layers"])
def test_counted_activations_are_those_of_a_real_forward(name, precision, checkpointing, teacher) -> None:
    unet = model_of(name, teacher).train()
    counted = count_activations(unet, 4, mixed_precision=precision, gradient_checkpointing=checkpointing)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    assert counted == pytest.approx(saved_bytes(unet, 4, precision), rel=0.02)


def test_activations_grow_with_the_batch_and_shrink_with_precision_and_checkpointing(teacher) -> None:
    full = count_activations(teacher, 64)
    assert count_activations(teacher, 128) == pytest.approx(2 * full, rel=0.01)
    assert 0.4 < count_activations(teacher, 64, mixed_precision="bf16") / full < 0.6
    assert 0.3 < count_activations(teacher, 64, gradient_checkpointing=True) / full < 0.6


# --- peaks -------------------------------------------------------------------------------------------------------------


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "size"), [("digits", 32), ("digits", 4), ("three-levels-two-layers", 32)])
def test_training_holds_what_the_plan_says(name, size, masked, teacher) -> None:
    unet = model_of(name, teacher)
    estimate = StepEstimate(size, 0.0, 1, bytes_of(unet), count_activations(unet, size), size, 0)
    if masked:
        pruner = GradientFlowPruner(unet, GFPruneConfig.from_preset("one-shot", total_steps=1, criterion="magnitude"))
        pruner.step(0, [])
    optimizer = torch.optim.AdamW(unet.train().parameters())
    clean, noise, timesteps = batch_for(unet, size).tensors()

    def step() -> None:
        noisy = DDPMScheduler().add_noise(clean, noise, timesteps)
        torch.nn.functional.mse_loss(unet(noisy, timesteps).sample, noise).backward()

    step()
    optimizer.step()
    optimizer.zero_grad()
    with LiveBytes() as live:
        step()
    held = 3 * estimate.weight_bytes  # weights and moments were there before
    assert 1 / BOUND < memory_plan(estimate, 0).training / (held + live.peak) < BOUND


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize("hvp", ["exact", "finite-difference", None])
@pytest.mark.parametrize(("name", "size"), [("digits", 24), ("three-levels-two-layers", 16)])
def test_scoring_holds_what_the_plan_says(name, size, hvp, teacher) -> None:
    unet = model_of(name, teacher)
    estimate = StepEstimate(size, 0.0, 1, bytes_of(unet), 0, size, count_activations(unet, size))
    options = {**WEIGHTS, "hvp": hvp} if hvp else {}
    config = GFPruneConfig(**options, hessian_batches="mean")
    pruner = GradientFlowPruner(unet, config)
    batches = [batch_for(unet, size), batch_for(unet, size)]
    with LiveBytes() as live:
        score_units(unet, pruner.groups, batches, pruner.process, config)
    held = 3 * estimate.weight_bytes  # weights, and the moments of a run under way
    assert 1 / BOUND < memory_plan(estimate, 0, **options).scoring / (held + live.peak) < BOUND


# --- time --------------------------------------------------------------------------------------------------------------


def test_step_of_the_digits_teacher_is_timed_whole(teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which each forward and backward takes a quarter of a second."""

    def quarter(step: Callable[[], None], device: torch.device) -> float:
        step()
        return 0.25

    monkeypatch.setattr("diffusers_gfprune.training.estimate.seconds_of", quarter)
    estimate = estimate_step(teacher, DDPMScheduler(), 8, device="cpu", scoring_batch_size=4)
    assert (estimate.batch_size, estimate.timed_batch_size, estimate.scoring_batch_size) == (8, 8, 4)
    assert estimate.seconds == 0.25
    assert estimate.weight_bytes == bytes_of(teacher)
    assert estimate.activation_bytes == count_activations(teacher, 8)
    assert estimate.scoring_activation_bytes == count_activations(teacher, 4)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_model_and_random_state_are_not_touched(precision, teacher) -> None:
    unet = copy.deepcopy(teacher).eval().requires_grad_(False)
    before, state = copy.deepcopy(unet.state_dict()), torch.get_rng_state()
    estimate_step(unet, DDPMScheduler(), 2, device="cpu", mixed_precision=precision, gradient_checkpointing=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert not unet.training and not unet.is_gradient_checkpointing
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in unet.parameters())


@pytest.mark.parametrize("name", ["class-embedding", "class-identity", "non-square", "rgb"])
def test_every_kind_of_model_can_be_estimated(name) -> None:
    estimate = estimate_step(build(name), DDPMScheduler(prediction_type="v_prediction"), 2, device="cpu")
    assert estimate.seconds > 0 and estimate.activation_bytes > 0


class Clock:
    """A step of a fixed time per image, which records how many images it was asked for."""

    def __init__(self, per_image: float, first: float = 0.0) -> None:
        self.per_image, self.first, self.sizes = per_image, first, []

    def __call__(self, size: int) -> float:
        self.sizes.append(size)
        return self.per_image * size + (self.first if self.sizes.count(size) == 1 else 0)


def test_slow_model_is_timed_on_a_single_image() -> None:
    step = Clock(20.0)
    assert _time(step, 64, lambda size: True, 5.0) == (1280.0, 1)
    assert step.sizes == [1]


def test_fast_model_is_timed_on_the_whole_batch_without_what_is_set_up_once() -> None:
    step = Clock(0.001, first=0.5)
    seconds, size = _time(step, 24, lambda size: True, 5.0)
    assert (seconds, size) == (pytest.approx(0.024), 24)
    assert step.sizes == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 24, 24]


def test_setup_that_takes_most_of_the_limit_is_not_extrapolated() -> None:
    """As in the first run after an installation: a few seconds for each of the first shapes."""
    seconds, size = _time(Clock(0.001, first=2.0), 64, lambda size: True, 5.0)
    assert (seconds, size) == (pytest.approx(0.064), 8)


def test_timing_ends_in_time() -> None:
    step = Clock(0.2)
    seconds, size = _time(step, 128, lambda size: True, 5.0)
    assert (seconds, size) == (pytest.approx(25.6), 8)  # 23 images in 4.6 s; 8 more would be too many
    assert step.sizes == [1, 1, 2, 2, 4, 4, 8]


def test_timing_stops_where_memory_would_not_do() -> None:
    step = Clock(0.001)
    assert _time(step, 64, lambda size: size <= 4, 5.0)[1] == 4
    assert max(step.sizes) == 4


# --- output ------------------------------------------------------------------------------------------------------------


def an_estimate(batch_size: int = 8, weights: int = GIB, activations: int = 8 * GIB) -> StepEstimate:
    return StepEstimate(batch_size, 1.0, batch_size, weights, activations, batch_size, activations)


def test_plan_adds_up() -> None:
    plan = memory_plan(an_estimate(), 100 * GIB, use_ema=True, teacher=True, **WEIGHTS)
    assert plan.training == pytest.approx(1.1 * (4 + 8) * GIB + 2 * GIB)
    assert plan.scoring == pytest.approx(2.4 * 1.1 * (4 + 8) * GIB + 2 * GIB)
    assert plan.fits
    assert plan.lines == (
        "memory     about 33.7 GiB while scoring (hvp=exact), 15.2 GiB while training; this machine has 100.0 GiB free",
    )


def test_what_changes_the_sum() -> None:
    plain = memory_plan(an_estimate(), 100 * GIB, **WEIGHTS)
    small = memory_plan(an_estimate(), 100 * GIB, use_8bit_adam=True)
    assert plain.training - small.training == pytest.approx(1.1 * 1.5 * GIB)
    differences = memory_plan(an_estimate(), 100 * GIB, hvp="finite-difference", **WEIGHTS)
    assert differences.scoring / plain.scoring == pytest.approx(0.5)
    predictions = memory_plan(an_estimate(), 100 * GIB)
    assert "(criterion=gradient-flow)" in predictions.lines[0]
    assert predictions.scoring == pytest.approx(1.1 * (3 + 3.2 * 8) * GIB)  # without gradients of the weights
    taylor = memory_plan(an_estimate(), 100 * GIB, criterion="taylor")
    assert taylor.scoring == plain.training and "(criterion=taylor)" in taylor.lines[0]
    random = memory_plan(an_estimate(), 100 * GIB, criterion="random")
    assert random.scoring == pytest.approx(1.1 * 4 * GIB)
    assert "; this GPU has" in memory_plan(an_estimate(), GIB, device="cuda").lines[0]


def test_small_sizes_are_said_in_mib() -> None:
    line = memory_plan(an_estimate(8, 2**20, 2 * 2**20), GIB, **WEIGHTS).lines[0]
    assert line == "memory     about 16 MiB while scoring (hvp=exact), 7 MiB while training; this machine has 1.0 GiB free"


def advice(free: float, **options) -> str:
    plan = memory_plan(an_estimate(), int(free * GIB), **WEIGHTS, **options)
    assert not plan.fits and len(plan.lines) == 2
    return plan.lines[1].strip()


def test_advice_names_numbers_that_fit() -> None:
    assert advice(20) == "too little; to reduce it: hvp=finite-difference (15.8 GiB)"
    assert advice(15) == "too little; to reduce it: hvp=finite-difference (15.8 GiB), calibration_batch_size=7"
    assert advice(15, hvp="finite-difference") == "too little; to reduce it: calibration_batch_size=7"
    text = advice(10, hvp="finite-difference", gradient_accumulation_steps=2)
    found = re.search(r"train_batch_size=(\d+) with gradient_accumulation_steps=(\d+), gradient_checkpointing", text)
    assert found is not None and found.groups() == ("4", "4")
    follows = StepEstimate(4, 1.0, 4, GIB, 4 * GIB, 3, 3 * GIB)
    assert (
        text.endswith("calibration_batch_size=3") and memory_plan(follows, 10 * GIB, hvp="finite-difference", **WEIGHTS).fits
    )


def test_sums_of_damage_curves_follow_the_scoring() -> None:
    """Weights, gradients and moments stay, activations do not: 1.1 x 4 GiB, against 1.1 x (4 + 0.5) GiB while scoring."""
    several = {"criterion": "taylor", "teacher": True}
    without = memory_plan(an_estimate(activations=GIB // 2), GIB, **several)
    few = memory_plan(an_estimate(activations=GIB // 2), GIB, **several, curve_bytes=2**20)
    many = memory_plan(an_estimate(activations=GIB // 2), 7 * GIB, **several, curve_bytes=2 * GIB)
    assert few.scoring == without.scoring == pytest.approx((1.1 * 4.5 + 1) * GIB)
    assert many.scoring == pytest.approx((1.1 * 4 + 2 + 1) * GIB)
    assert many.lines[1].strip() == "too little; to reduce it: ranking=sensitivity"
    # A smaller batch alone would not do where the sums do not fit either
    both = memory_plan(an_estimate(activations=8 * GIB), 6 * GIB, **several, use_8bit_adam=True, curve_bytes=3 * GIB)
    assert both.lines[1].strip().endswith("calibration_batch_size=2, ranking=sensitivity")


def test_memory_of_recovery() -> None:
    """Beside weights, gradients and moments: two copies of the weights, their changes, and the dense model, or the teacher."""
    given = {"criterion": "magnitude", "recovery_bytes": GIB}
    alone, taught = (memory_plan(an_estimate(activations=0), 6 * GIB, **given, teacher=teacher) for teacher in (False, True))
    assert alone.scoring == taught.scoring == pytest.approx((1.1 * 4 + 1 + 4) * GIB)
    assert alone.lines[1].strip() == "too little; to reduce it: recovery=none"


def test_no_advice_that_was_taken_already() -> None:
    options = {"hvp": "finite-difference", "gradient_checkpointing": True, "use_8bit_adam": True}
    assert advice(1, **options) == "too little, even for single images; use a larger device"


def test_free_memory() -> None:
    assert 0 < machine_memory("cpu") < psutil.virtual_memory().total
