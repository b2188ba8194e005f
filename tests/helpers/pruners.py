"""Options, images and a controlled criterion, for tests of the pruner."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner, register_criterion
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.one_shot import calibration_batches
from diffusers_gfprune.scoring.importance import ScoringContext
from helpers.architectures import inputs

SCHEDULER = DDPMScheduler(num_train_timesteps=100)
Script = Callable[[str, int], Tensor]  # group name, number of units -> scores

# Scores of the rankings to come, one entry each; the last one serves all later rankings.
script: list[Script] = []


@register_criterion("scripted")
def scripted_criterion(context: ScoringContext) -> dict[str, Tensor]:
    """Scores that a test wrote down."""
    current = script.pop(0) if len(script) > 1 else script[0]
    return {group.name: current(group.name, group.num_units) for group in context.groups}


def rising(name: str, units: int) -> Tensor:
    """The first units are the least important; the mean is 1."""
    return torch.linspace(0.1, 1.9, units)


def falling(name: str, units: int) -> Tensor:
    """The last units are the least important; the mean is 1."""
    return torch.linspace(1.9, 0.1, units)


@functools.lru_cache
def images(count: int = 8) -> Tensor:
    """Training images in [-1, 1] with shape `(count, 1, 8, 8)`."""
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@functools.lru_cache
def batches() -> list[DiffusionBatch]:
    """Calibration batches."""
    return calibration_batches(images(), SCHEDULER, batch_size=8)


def config(**options) -> GFPruneConfig:
    """40 steps: soft until 10, hard until 20, ranked every 3 steps, by weights alone unless said otherwise."""
    defaults = {
        "criterion": "magnitude",
        "total_steps": 40,
        "soft_fraction": 0.25,
        "hard_fraction": 0.5,
        "update_interval": 3,
        "channel_multiple": 1,
    }
    return GFPruneConfig(**{**defaults, **options})


def one_shot(**options) -> GFPruneConfig:
    """Everything at step 0."""
    return GFPruneConfig.from_preset(
        "one-shot", **{"total_steps": 1, "criterion": "magnitude", "channel_multiple": 1, **options}
    )


@pytest.fixture
def quick_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage curves of few points, from few samples of few steps, and a small fit."""
    monkeypatch.setattr("diffusers_gfprune.pruning.damage_curves.SHARES", (0.5,))
    monkeypatch.setattr("diffusers_gfprune.scoring.sample_damage.SAMPLING_STEPS", 2)
    for name, value in (("FIT_SAMPLES", 16), ("SAMPLES", 2), ("MEASURED_SAMPLES", 2)):
        monkeypatch.setattr(f"diffusers_gfprune.scoring.group_damage.{name}", value)


def mask_values(pruner: GradientFlowPruner) -> list[float]:
    """All different mask values, in ascending order."""
    return torch.cat(list(pruner.masks.values())).unique().tolist()


@torch.no_grad()
def run(unet: nn.Module) -> Tensor:
    """The output for the standard inputs."""
    return unet(**inputs(unet)).sample


def train_step(unet: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel, seed: int) -> float:
    """One step of noise prediction."""
    generator = torch.Generator().manual_seed(seed)
    clean = images()
    noise = torch.randn(clean.shape, generator=generator)
    timesteps = torch.randint(0, 100, (len(clean),), generator=generator)
    prediction = unet(SCHEDULER.add_noise(clean, noise, timesteps), timesteps).sample
    loss = nn.functional.mse_loss(prediction, noise)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    ema.step(unet.parameters())
    return loss.item()
