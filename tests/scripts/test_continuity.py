"""Pruning the shipped teacher: the validation loss does not jump when masks become binary, freeze, or are compacted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner
from diffusers_gfprune.metrics.step_loss import StepLoss
from diffusers_gfprune.one_shot import calibration_batches, images_to_tensor

DIGITS = Path(__file__).resolve().parents[2] / "training/digits"
# Two thirds of the hundred and fifty soft steps of `make prune`, of a shorter run: masks fall half as fast again.
TOTAL_STEPS, SOFT_END, HARD_END = 200, 100, 115
WINDOW = 4  # steps around N and M at which the loss is measured


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Training and held-out digits in [-1, 1], each with shape `(images, 1, 8, 8)`."""
    files = {split: str(DIGITS / f"data/{split}.parquet") for split in ("train", "validation")}
    splits = datasets.load_dataset("parquet", data_files=files)
    return tuple(images_to_tensor(splits[split]["image"], channels=1) for split in ("train", "validation"))


@dataclass
class Losses:
    """Step losses at the measured steps."""

    before: dict[int, float]  # before the masks of a step were set
    after: dict[int, float]  # after that, before the weights moved

    def moves_of_masks(self, step: int) -> float:
        """What setting the masks changed."""
        return self.after[step] - self.before[step]

    def moves_of_weights(self) -> list[float]:
        """What ordinary training steps changed: the step-to-step noise."""
        return [abs(self.before[step + 1] - loss) for step, loss in self.after.items() if step + 1 in self.before]


@pytest.fixture(scope="module")
def losses(digits: tuple[Tensor, Tensor]) -> Losses:
    """Prune the teacher while it trains, with the default options."""
    torch.manual_seed(0)
    train, held_out = digits
    unet = UNet2DModel.from_pretrained(DIGITS / "teacher/unet").train()
    scheduler = DDPMScheduler.from_pretrained(DIGITS / "teacher/scheduler")
    config = GFPruneConfig(total_steps=TOTAL_STEPS, soft_fraction=SOFT_END / TOTAL_STEPS, hard_fraction=HARD_END / TOTAL_STEPS)
    pruner = GradientFlowPruner(unet, config, scheduler)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-4)
    step_loss = StepLoss(held_out[:64], scheduler, grid=4)
    calibration = calibration_batches(train[:64], scheduler, batch_size=64)
    found = Losses({}, {})
    for step in range(HARD_END + 2):
        measured = min(abs(step - SOFT_END), abs(step - HARD_END)) <= WINDOW
        if measured:
            found.before[step] = step_loss(unet)
        pruner.step(step, calibration)
        if pruner.finished and hasattr(unet, "channel_masks"):
            unet = pruner.compact(optimizer=optimizer)
        if measured:
            found.after[step] = step_loss(unet)
        clean = train[torch.randint(0, len(train), (16,))]
        noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (16,))
        prediction = unet(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
        torch.nn.functional.mse_loss(prediction, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("step", [SOFT_END, HARD_END], ids=["N", "M-and-compaction"])
def test_no_jump_where_phases_meet(losses: Losses, step: int) -> None:
    """What the masks do at N, and the compaction at M, changes the loss no more than ordinary training steps do."""
    assert abs(losses.moves_of_masks(step)) <= max(losses.moves_of_weights())


@pytest.mark.slow
def test_compaction_changes_nothing(losses: Losses) -> None:
    assert losses.after[HARD_END] == pytest.approx(losses.before[HARD_END], rel=1e-4)


@pytest.mark.slow
def test_one_shot_pruning_does_jump(digits: tuple[Tensor, Tensor], losses: Losses) -> None:
    """The measure sees a cliff where there is one: the same teacher, cut at once."""
    train, held_out = digits
    unet = UNet2DModel.from_pretrained(DIGITS / "teacher/unet")
    scheduler = DDPMScheduler.from_pretrained(DIGITS / "teacher/scheduler")
    step_loss = StepLoss(held_out[:64], scheduler, grid=4)
    before = step_loss(unet)
    pruner = GradientFlowPruner(unet, GFPruneConfig.from_preset("one-shot", total_steps=1), scheduler)
    pruner.step(0, calibration_batches(train[:64], scheduler, batch_size=64))
    assert step_loss(unet) - before > 10 * max(losses.moves_of_weights())
