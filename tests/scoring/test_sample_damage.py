"""Damage in samples: exact where samples are linear in predictions, and near to that of sampling again elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner
from diffusers_gfprune.diffusion.ddpm import DDPMProcess
from diffusers_gfprune.diffusion.process import Sampler
from diffusers_gfprune.one_shot import calibration_batches
from diffusers_gfprune.pruning.channel_groups import ChannelGroup, GroupSlice
from diffusers_gfprune.pruning.masking import attach
from diffusers_gfprune.scoring.importance import scoring_context
from diffusers_gfprune.scoring.sample_damage import SampleDamage
from helpers.pruners import SCHEDULER, images
from helpers.toy import Toy

CONFIG = GFPruneConfig(criterion="magnitude", total_steps=1, channel_multiple=1)
TEACHER = Path(__file__).resolve().parents[2] / "training/digits/teacher/unet"
LENGTHS = (3.0, -1.0, 0.5)


class Constant(Toy):
    """Predicts t * (weight_0 + weight_1), whatever the image is: two channels that are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 1)
        with torch.no_grad():
            self.first.weight.zero_()
            self.first.bias.copy_(torch.tensor([2.0, 0.25]))

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> UNet2DOutput:
        return UNet2DOutput(sample=self.first(sample).sum(dim=1, keepdim=True) * timestep.view(-1, 1, 1, 1))


class Steps(Sampler):
    """x <- x + length * prediction."""

    timesteps = torch.tensor([3, 2, 1])

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, generators: list) -> Tensor:
        return sample + LENGTHS[3 - int(timestep)] * model_output


class Euler(DDPMProcess):
    """Sampled in three steps of known length."""

    def sampler(self, *arguments, **options) -> Sampler:
        return Steps()


def test_changes_of_steps_add_up_with_their_signs() -> None:
    """Without channel 1, predictions change by t / 4 and samples by the sum of that over steps: a is the length of a step, and
    nothing is left. Weights are measured without the other channel."""
    model = Constant()
    slices = (GroupSlice("first", "weight", 0, (0, 1), "output"), GroupSlice("first", "bias", 0, (0, 1), "output"))
    group = ChannelGroup("first", 2, slices, ((0,), (1,)))
    masks = attach(model, [group])
    process = Euler(DDPMScheduler())
    batch = calibration_batches(images(4), process, batch_size=4)
    with scoring_context(model, [group], batch, process, CONFIG) as (_, context), torch.no_grad():
        ones, narrower = {"first": torch.ones(2)}, {"first": torch.tensor([0.0, 1.0])}
        damage = SampleDamage(context, batch[0], ones, narrower, measured=3, rows=2)
        assert damage.along.tolist() == pytest.approx(LENGTHS) and damage.rest.tolist() == pytest.approx([0, 0, 0], abs=1e-6)
        with masks.replaced(ones):
            assert damage.of_present() == 0
        with masks.replaced({"first": torch.tensor([1.0, 0.0])}):
            assert damage.of_present() == pytest.approx((0.25 * (3 * 3.0 - 2 * 1.0 + 0.5)) ** 2, rel=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "scale", "clips"),
    [(DPMSolverMultistepScheduler, 1, True), (DPMSolverMultistepScheduler, 3, False), (DDPMScheduler, 3, True)],
)
def test_latents_are_not_clipped(scheduler: type, scale: float, clips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels are clipped to [-1, 1] in every step, latents only if their scheduler says so.

    Ten leading timesteps would leave out the noisiest of 15: their spacing is fitted."""
    model = Constant()
    slices = (GroupSlice("first", "weight", 0, (0, 1), "output"), GroupSlice("first", "bias", 0, (0, 1), "output"))
    group = ChannelGroup("first", 2, slices, ((0,), (1,)))
    attach(model, [group])
    samplers, process = [], DDPMProcess(scheduler(num_train_timesteps=15))
    make = process.sampler
    monkeypatch.setattr(process, "sampler", lambda *given, **options: samplers.append(make(*given, **options)) or samplers[-1])
    batch = calibration_batches(scale * images(4), process, batch_size=4)
    with scoring_context(model, [group], batch, process, CONFIG) as (_, context), torch.no_grad():
        ones, narrower = {"first": torch.ones(2)}, {"first": torch.tensor([0.0, 1.0])}
        SampleDamage(context, batch[0], ones, narrower, measured=3, rows=2)
    assert {sampler.ddim.config.clip_sample for sampler in samplers} == {clips}
    assert {len(sampler.timesteps) for sampler in samplers} == {10} and samplers[0].timesteps[0] == 14


@pytest.mark.slow
def test_estimates_are_near_the_change_of_samples() -> None:
    """Of the digits teacher, for groups whose removal changes predictions by factors of 50; within a factor of six."""
    pruner = GradientFlowPruner(UNet2DModel.from_pretrained(TEACHER), CONFIG, SCHEDULER)
    unet, groups = pruner.unet, pruner.groups
    [batch] = calibration_batches(images(16), SCHEDULER, batch_size=16)
    ones = {group.name: torch.ones(group.num_units) for group in groups}
    with scoring_context(unet, groups, [batch], SCHEDULER, CONFIG) as (_, context), torch.no_grad():
        slightly = ones | {g.name: (torch.arange(g.num_units) > 0).float() for g in groups if g.num_units > 1 and g.heads == 1}
        damage = SampleDamage(context, batch, ones, slightly, measured=16, rows=64)
        with unet.channel_masks.replaced(ones):
            sample, _, _ = damage._trajectory([])
        for name in ("mid_block.resnets.0.conv1", "up_blocks.1.resnets.1.conv2"):
            group = next(group for group in groups if group.name == name)
            with unet.channel_masks.replaced(ones | {name: (torch.arange(group.num_units) > 0).float()}):
                estimated, (changed, _, _) = damage.of_present(), damage._trajectory([])
            ratio = estimated / (changed - sample).double().square().mean().item()
            assert 1 / 6 < ratio < 6
