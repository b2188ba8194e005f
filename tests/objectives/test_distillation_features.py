"""objectives/distillation_features.py: output channels of blocks, and the distance between block outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.objectives.distillation_features import BlockOutputDistance, feature_channels
from diffusers_gfprune.objectives.objective import NoisePrediction
from diffusers_gfprune.pruning.channel_groups import ChannelGroup, GroupSlice, trace_channel_groups
from diffusers_gfprune.pruning.masking import ChannelMasks
from helpers import families
from helpers.architectures import build, inputs
from helpers.compaction import compacted, masked, relative_error, traced
from helpers.toy import Toy


@torch.no_grad()
def features(unet: nn.Module) -> dict[str, Tensor]:
    """Block outputs for the standard inputs."""
    arguments = inputs(unet)
    conditioning = {name: arguments[name] for name in arguments if name == "class_labels"}
    wrapper = NoisePrediction(unet, features=True)
    return wrapper(arguments["sample"], arguments["timestep"], conditioning, return_features=True)[1]


def block_masks(unet: nn.Module, name: str) -> dict[str, Tensor]:
    """The mask of each block's output, assembled from the groups explicitly."""
    found = {}
    for block, (group, positions) in feature_channels(build(name), traced(name)).items():
        found[block] = torch.full((len(positions),), -1.0)
        found[block][list(positions)] = unet.channel_masks.groups[group].per_channel(unet.channel_masks[group])
    return found


# One of every way that a block can end: downsampler or upsampler of either kind, residual block, attention.
ENDINGS = [
    *("base", "scale-shift", "decreasing-widths", "equal-widths", "one-level", "three-levels-two-layers", "mid-scale-factor"),
    *("no-mid-attention", "no-mid-block", "no-attention", "resnet-samplers", "resnet-sampler-blocks", "asymmetric-padding"),
]


@pytest.mark.fast_variants(4)
@pytest.mark.parametrize("name", ENDINGS)
def test_pruned_channels_are_those_of_the_blocks_group(name):
    unet = masked(0, name)
    small, expected = compacted(unet, name), block_masks(unet, name)
    outputs, small_outputs = features(unet), features(small)
    assert list(outputs) == list(small_outputs) == list(expected) == list(family_of(unet).block_outputs(unet))
    for block, output in outputs.items():
        assert torch.equal(output.abs().amax(dim=(0, 2, 3)) > 0, expected[block] > 0), block
        assert relative_error(small_outputs[block], output[:, expected[block] > 0]) < 1e-5, block
    # ... and the distance is the same before and after compaction.
    distance, dense = BlockOutputDistance(build(name), unet.channel_masks), features(build(name))
    far = distance(outputs, dense)
    assert (far > 0.01).all()
    torch.testing.assert_close(distance(small_outputs, dense), far, rtol=1e-4, atol=0)


def test_outputs_that_are_never_pruned_are_compared_as_they_are():
    """Those of transformer blocks, whose channels are the last dimension, and convolutions without a group."""
    producer = "up_blocks.1.resnets.1.conv2"
    groups = [group for group in traced() if not any(piece.module == producer for piece in group.slices)]
    assert set(feature_channels(build(), traced())) - set(feature_channels(build(), groups)) == {"up_blocks.1"}
    transformer = families.build("dit")
    distance = BlockOutputDistance(transformer, ChannelMasks(trace_channel_groups(transformer)))
    hidden = {name: torch.ones(2, 3, 4) for name in ("transformer_blocks.0", "transformer_blocks.1")}
    assert distance({name: 1.5 * values for name, values in hidden.items()}, hidden).tolist() == pytest.approx([0.25, 0.25])


def test_output_in_several_groups_is_refused():
    producer, groups = "up_blocks.1.resnets.1.conv2", list(traced())
    twice = next(group for group in groups if any((piece.module, piece.dim) == (producer, 0) for piece in group.slices))
    with pytest.raises(ValueError, match="the 16 output channels of up_blocks.1 are in 2 channel groups, not in one"):
        feature_channels(build(), [*groups, replace(twice, name="other")])


class Hand:
    """The distance for a model of one block with 4 channels, whose group has them in another order."""

    positions = (2, 0, 3, 1)

    def __init__(self, mask: list[float]) -> None:
        unet, resnet = Toy(), nn.Module()
        unet.down_blocks, unet.mid_block, unet.up_blocks = nn.ModuleList(), nn.Module(), nn.ModuleList()
        resnet.conv2, unet.mid_block.resnets = nn.Conv2d(1, 4, 1), nn.ModuleList([resnet])
        piece = GroupSlice("mid_block.resnets.0.conv2", "weight", 0, self.positions, "output")
        self.masks = ChannelMasks([ChannelGroup("group", 4, (piece,), tuple((channel,) for channel in range(4)))])
        self.distance = BlockOutputDistance(unet, self.masks)
        self.set(mask)

    def set(self, mask: list[float]) -> None:
        """A mask along the block's channels."""
        self.masks.set({"group": torch.tensor(mask)[list(self.positions)]})

    def __call__(self, student: Tensor, teacher: Tensor) -> float:
        """The mean over images."""
        return self.distance({"mid_block": student}, {"mid_block": teacher}).mean().item()


def test_known_answers():
    teacher = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1).expand(2, 4, 2, 2)
    soft = torch.tensor([1.0, 0.5, 0.0, 1.0]).view(1, 4, 1, 1)
    hand = Hand([1, 0.5, 0, 1])
    assert hand(soft * teacher, teacher) == 0  # a masked model whose layers make what the teacher's make
    assert hand(torch.zeros_like(teacher), teacher) == 1
    assert hand(2 * soft * teacher, teacher) == pytest.approx(1)
    # 1 + 1 + 16 is what the target weighs; the second channel is off by 1, the masked one counts as it is
    assert hand(soft * teacher + torch.tensor([0, 1, 0, 0]).view(1, 4, 1, 1), teacher) == pytest.approx(1 / 18)
    hand.set([1, 0, 0, 1])  # masks move, the distance follows
    kept = teacher[:, [0, 3]]
    assert hand(kept, teacher) == 0
    assert hand(teacher * torch.tensor([1, 0, 0, 1]).view(1, 4, 1, 1), teacher) == 0
    assert hand(kept + torch.tensor([1.0, 0.0]).view(1, 2, 1, 1), teacher) == pytest.approx(1 / 17)
    with pytest.raises(ValueError, match="mid_block has 3 channels, but its masks keep 2 of 4"):
        hand(teacher[:, :3], teacher)
    hand.set([1, 1, 1, 1])
    assert hand(teacher, teacher) == 0


def test_images_weigh_alike_however_large_their_features():
    teacher = torch.ones(2, 4, 2, 2) * torch.tensor([1.0, 100.0]).view(2, 1, 1, 1)
    student = teacher * torch.tensor([1.5, 1.0]).view(2, 1, 1, 1)
    assert Hand([1, 1, 1, 1])(student, teacher) == pytest.approx(0.125)


def test_student_that_is_the_teacher_is_at_no_distance():
    assert not BlockOutputDistance(build(), ChannelMasks(traced()))(features(build()), features(build())).any()
