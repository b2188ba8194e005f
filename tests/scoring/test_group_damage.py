"""Measured damage of narrowing single groups, with the layers that read them mended."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.diffusion.ddpm import DDPMProcess
from diffusers_gfprune.diffusion.process import Sampler
from diffusers_gfprune.one_shot import calibration_batches
from diffusers_gfprune.pruning.blocks import RemovableBlock
from diffusers_gfprune.pruning.channel_groups import ChannelGroup, GroupSlice
from diffusers_gfprune.pruning.masking import attach, dense_parameters
from diffusers_gfprune.scoring import group_damage
from diffusers_gfprune.scoring.group_damage import curve_bytes, damage_curves
from helpers.architectures import build
from helpers.pruners import SCHEDULER, batches, images, quick_curves
from helpers.toy import Toy

CONFIG = GFPruneConfig(criterion="magnitude", total_steps=1, channel_multiple=1)
quick = pytest.mark.usefixtures(quick_curves.__name__)
CHANNELS = 4
TEACHER = Path(__file__).resolve().parents[2] / "training/digits/teacher/unet"


class Reader(Toy):
    """x -> B A x with 1x1 convolutions: `CHANNELS` channels of white noise in, as many in between, one out."""

    def __init__(self, a: Tensor, b: list[float]) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(a.view(CHANNELS, CHANNELS, 1, 1))
            self.second.weight.copy_(torch.tensor(b).diag().view(CHANNELS, CHANNELS, 1, 1))

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> UNet2DOutput:
        return UNet2DOutput(sample=self.second(self.first(sample)))


class OneStep(Sampler):
    """Takes the first prediction as the sample, so that damage in samples is damage of predictions."""

    timesteps = torch.tensor([999])

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, generators: list) -> Tensor:
        return model_output


class OnlyNoise(DDPMProcess):
    """A process whose noisy images are the noise."""

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise

    def sampler(self, *arguments, **options) -> Sampler:
        return OneStep()


@pytest.fixture
def many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """All images, for known answers."""
    monkeypatch.setattr(group_damage, "MEASURED_SAMPLES", 64)
    monkeypatch.setattr(group_damage, "SAMPLES", 64)


def curve_of(model: Reader) -> list[float]:
    """Damage without the first one, two and three channels in between."""
    places = tuple(range(CHANNELS))
    slices = GroupSlice("first", "weight", 0, places, "output"), GroupSlice("second", "weight", 1, places, "input")
    group = ChannelGroup("first", CHANNELS, slices, tuple((channel,) for channel in places))
    attach(model, [group])
    noise = torch.randn(64, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = DiffusionBatch(torch.zeros_like(noise), noise, torch.zeros(64, dtype=torch.int64))
    scores, process = {"first": torch.arange(CHANNELS).float()}, OnlyNoise(DDPMScheduler())
    curves = damage_curves(model, [group], [batch], process, CONFIG, scores, [[4, 3, 2, 1]])
    assert curves["first"].widths == (3, 2, 1)
    return list(curves["first"].damages)


def test_nothing_makes_up_for_independent_channels(many_samples: None) -> None:
    """What a channel of unit variance is read with is lost: sum of b^2 over removed channels, per value of an image."""
    assert curve_of(Reader(torch.eye(CHANNELS), [1.0, 2.0, 3.0, 4.0])) == pytest.approx([1 / 4, 5 / 4, 14 / 4], rel=0.05)


def test_what_others_know_of_a_channel_is_restored(many_samples: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channel 0 is channel 3 and noise of variance 1/4: only the noise is lost. Channel 1 is channel 2."""
    monkeypatch.setattr(group_damage, "RIDGE", 1e-6)
    a = torch.eye(CHANNELS)
    a[0], a[1] = torch.tensor([0.5, 0, 0, 1.0]), torch.tensor([0, 0, 1.0, 0])
    found = curve_of(Reader(a, [1.0, 2.0, 3.0, 4.0]))
    # without channels 0 to 2, of which 1 and 2 are read with 2 and 3
    assert found == pytest.approx([0.25 / 4, 0.25 / 4, (0.25 + 4 + 9) / 4], rel=0.05)


@pytest.mark.slow
def test_a_copy_of_a_kept_unit_is_free_to_remove(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a convolution of 3x3 pixels with a bias, behind a norm; without its reader's help, the removal does damage."""
    monkeypatch.setattr(group_damage, "RIDGE", 1e-7)
    dense = build("base").eval()
    name = "down_blocks.0.resnets.0.conv1"
    block = dense.down_blocks[0].resnets[0]
    with torch.no_grad():  # units are norm groups of 4 channels
        for parameter in (*block.conv1.parameters(), *block.time_emb_proj.parameters(), *block.norm2.parameters()):
            parameter[4:8] = parameter[:4]
    pruner = GradientFlowPruner(dense, CONFIG, SCHEDULER)
    group = next(group for group in pruner.groups if group.name == name)
    scores = {g.name: torch.arange(g.num_units).float() for g in pruner.groups}
    narrower = group.num_channels - 4
    ladders = [[group.num_channels, narrower] if g is group else [g.num_channels] for g in pruner.groups]
    calibration = calibration_batches(images(8), SCHEDULER, batch_size=8)
    found = damage_curves(dense, pruner.groups, calibration, SCHEDULER, CONFIG, scores, ladders)
    monkeypatch.setattr(group_damage, "_mended", lambda *arguments: nullcontext())
    plain = damage_curves(dense, pruner.groups, calibration, SCHEDULER, CONFIG, scores, ladders)
    assert found[name].widths == (narrower,) and found[name].damages[0] < 1e-4 * plain[name].damages[0]
    assert all(curve.widths == () for other, curve in found.items() if other != name)


@pytest.mark.parametrize("depth", ["allow", "only"])
def test_steps_are_weighed_by_a_model_with_all_its_blocks(depth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slightly narrower one. A block can only go whole, and without all of them nothing is left of the samples. Where no
    channels go, a part of each block does."""

    class Seen(Exception):
        pass

    def see(context, start, ones, narrower, *others):
        raise Seen(narrower)

    config = GFPruneConfig(criterion="magnitude", total_steps=1, depth=depth, channel_multiple=1)
    pruner = GradientFlowPruner(build("fine-units"), config, SCHEDULER)
    scores = {group.name: torch.arange(group.num_units).float() for group in pruner.groups}
    monkeypatch.setattr(group_damage, "SampleDamage", see)
    calibration = calibration_batches(images(8), SCHEDULER, batch_size=8)
    with pytest.raises(Seen) as seen:
        damage_curves(pruner.unet, pruner.groups, calibration, SCHEDULER, config, scores, pruner.ladders)
    (narrower,) = seen.value.args
    blocks = [group.name for group in pruner.groups if isinstance(group, RemovableBlock)]
    assert blocks and {narrower[name].item() for name in blocks} == {1.0 if depth == "allow" else 0.75}
    assert all(mask.all() for name, mask in narrower.items() if name not in blocks) == (depth == "only")


@pytest.mark.slow
@quick
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_weights_and_masks_are_as_before(dtype: torch.dtype) -> None:
    """Whatever the masks are, groups are measured with all others dense; blocks have one point, their measured damage."""
    config = GFPruneConfig(criterion="magnitude", total_steps=1, depth="allow", channel_multiple=1)
    pruner = GradientFlowPruner(build("fine-units").to(dtype), config, SCHEDULER)
    unet, groups, ladders = pruner.unet, pruner.groups, pruner.ladders
    scores = {group.name: torch.arange(group.num_units).float() for group in groups}
    first = damage_curves(unet, groups, batches(), SCHEDULER, config, scores, ladders)
    unet.channel_masks.set({group.name: torch.full((group.num_units,), 0.5) for group in groups}, check=False)
    masks = unet.channel_masks.as_dict()
    weights = {name: parameter.clone() for name, parameter in dense_parameters(unet).items()}
    again = damage_curves(unet, groups, batches(), SCHEDULER, config, scores, ladders)
    assert again == first
    assert all(torch.equal(mask, masks[name]) for name, mask in unet.channel_masks.as_dict().items())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in dense_parameters(unet).items())
    blocks = [group.name for group in groups if isinstance(group, RemovableBlock)]
    assert blocks and all(first[name].widths == (0,) and first[name].damages[0] > 0 for name in blocks)


@pytest.mark.slow
@quick
def test_sums_that_do_not_fit_are_taken_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = GradientFlowPruner(build("fine-units"), CONFIG, SCHEDULER)
    scores = {group.name: torch.arange(group.num_units).float() for group in pruner.groups}
    arguments = (pruner.groups, batches(), SCHEDULER, CONFIG, scores, pruner.ladders)
    whole = damage_curves(pruner.unet, *arguments)
    sizes = {  # two float64 matrices of a layer's features
        piece.module: 16 * pruner.unet.get_submodule(piece.module).weight[0].numel() ** 2
        for group in pruner.groups
        for piece in group.slices
        if piece.role == "input"
    }
    assert curve_bytes(pruner.unet, pruner.groups) == sum(sizes.values())
    monkeypatch.setattr(group_damage, "SUM_BYTES", 1)
    one_by_one = damage_curves(pruner.unet, *arguments)
    for name, curve in whole.items():
        assert one_by_one[name].damages == pytest.approx(curve.damages, rel=1e-6, abs=1e-12)
    assert max(sizes.values()) <= curve_bytes(pruner.unet, pruner.groups) < sum(sizes.values())


@pytest.mark.slow
def test_mending_lowers_the_damage_of_a_trained_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the digits teacher, on noise that layers were not fitted to; less so if only centres of kernels are mended."""
    pruner = GradientFlowPruner(UNet2DModel.from_pretrained(TEACHER), CONFIG, SCHEDULER)
    scores = {group.name: torch.arange(group.num_units).float() for group in pruner.groups}
    wanted = ("up_blocks.1.resnets.1.conv2", "mid_block.resnets.0.conv1")
    ladders = [[g.num_channels, g.num_channels // 2] if g.name in wanted else [g.num_channels] for g in pruner.groups]
    arguments = (pruner.groups, calibration_batches(images(16), SCHEDULER, batch_size=16), SCHEDULER, CONFIG, scores, ladders)
    mended = damage_curves(pruner.unet, *arguments)
    monkeypatch.setattr(group_damage, "MAX_FEATURES", 100)
    centre = damage_curves(pruner.unet, *arguments)
    monkeypatch.setattr(group_damage, "_mended", lambda *arguments: nullcontext())
    plain = damage_curves(pruner.unet, *arguments)
    assert all(mended[name].damages[0] < 0.5 * plain[name].damages[0] for name in wanted)
    assert all(mended[name].damages[0] < centre[name].damages[0] < plain[name].damages[0] for name in wanted)


def test_batches_are_needed() -> None:
    pruner = GradientFlowPruner(build("fine-units"), CONFIG, SCHEDULER)
    scores = {group.name: torch.ones(group.num_units) for group in pruner.groups}
    with pytest.raises(ValueError, match="damage curves need at least one calibration batch"):
        damage_curves(pruner.unet, pruner.groups, [], SCHEDULER, CONFIG, scores, pruner.ladders)
