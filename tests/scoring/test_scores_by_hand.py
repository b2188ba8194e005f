"""Scores of every criterion, against values worked out by hand for a model of two channels."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from diffusers_gfprune.configuration import GFPruneConfig
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.diffusion.ddpm import DDPMProcess
from diffusers_gfprune.pruning.channel_groups import ChannelGroup, GroupSlice
from diffusers_gfprune.pruning.masking import attach
from diffusers_gfprune.scoring.importance import score_units
from helpers.toy import Toy

Batches = list[tuple[Tensor, ...]]

# Every criterion, with both ways to multiply by the Hessian.
# --- known answers -----------------------------------------------------------------------------------------------------


class TwoChannels(Toy):
    """x -> sum_c b_c (a_c x + d_c), with two channels in between: small enough to do by hand."""

    def __init__(self, a: tuple[float, float], b: tuple[float, float], d: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 1, bias=d is not None)
        self.second = nn.Conv2d(2, 1, 1, bias=False)
        self.dtype = torch.float32
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor(a).view(2, 1, 1, 1))
            self.second.weight.copy_(torch.tensor(b).view(1, 2, 1, 1))
            if d is not None:
                self.first.bias.copy_(torch.tensor(d))

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> UNet2DOutput:
        return UNet2DOutput(sample=self.second(self.first(sample)))


class Noiseless(DDPMProcess):
    """A process that adds no noise."""

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return clean


def two_channel_scores(
    model: TwoChannels,
    images: Sequence[float] = (1.0,),
    timesteps: Sequence[int] = (0,),
    units=((0,), (1,)),
    masks: Sequence[float] | None = None,
    **options,
) -> list[float]:
    """Scores of the two channels, or of the units that they make up, for images of one pixel, no noise (so that the target is
    0), all in one batch."""
    slices = [GroupSlice("first", "weight", 0, (0, 1), "output"), GroupSlice("second", "weight", 1, (0, 1), "input")]
    if model.first.bias is not None:
        slices.append(GroupSlice("first", "bias", 0, (0, 1), "output"))
    group = ChannelGroup("first", 2, tuple(slices), units)
    if masks is not None:
        attach(model, [group]).set({"first": torch.tensor(masks)})
    clean = torch.tensor(images).view(-1, 1, 1, 1)
    batch = DiffusionBatch(clean, torch.zeros_like(clean), torch.tensor(timesteps))
    return score_units(model, [group], [batch], Noiseless(DDPMScheduler()), GFPruneConfig(**options))["first"].tolist()


def hand_model() -> TwoChannels:
    """With x = 1: s = a.b = 1 and L = s^2 = 1, hence dL/da = 2 s b = (6, -2) and dL/db = 2 s a = (2, 4)."""
    return TwoChannels(a=(1.0, 2.0), b=(3.0, -1.0))


def test_taylor_by_hand() -> None:
    """|sum_c theta g| over a and b."""
    expected = [1 * 6 + 3 * 2, abs(2 * -2 + -1 * 4)]
    assert two_channel_scores(hand_model(), criterion="taylor") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # s = a.(m b) = -1/2, L = s^2 and dL/dm = 2 s a b = (-3, 2), once by what produces a channel, once by what reads it
        ({"criterion": "taylor"}, [6, 4]),
        ({"criterion": "diff-pruning"}, [6, 4]),
        ({"criterion": "taylor", "score_at": "masked"}, [3, 4]),  # as they are
        ({"criterion": "taylor", "score_at": "dense"}, [12, 8]),
        ({"criterion": "magnitude"}, [1 + 9, 4 + 1]),
    ],
)
def test_scores_at_the_midpoint_by_hand(options: dict, expected: list[float]) -> None:
    """Derivatives by weights have the factor 1/2 of a mask, which says nothing of the unit."""
    found = two_channel_scores(hand_model(), masks=(0.5, 1.0), **{"score_at": "midpoint", **options})
    assert found == pytest.approx(expected)


def test_channels_of_one_unit_by_hand() -> None:
    """A norm group that holds both channels makes them one unit: terms are summed before absolute values are taken."""
    both = {"units": ((0, 1),)}
    assert two_channel_scores(hand_model(), criterion="taylor", **both) == pytest.approx([12 - 8])
    assert two_channel_scores(hand_model(), criterion="magnitude", **both) == pytest.approx([1 + 9 + 4 + 1])
    options = {"criterion": "gradient-flow-weights", "aggregation": "signed"}
    assert two_channel_scores(hand_model(), **options, **both) == pytest.approx([400 - 220], rel=0.02)


@pytest.mark.parametrize("hvp", ["exact", "finite-difference"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # ||g||^2 = 4 s^2 Q with Q = |a|^2 + |b|^2 = 15, and H g = grad ||g||^2 / 2 = 4 s Q (b, a) + 4 s^2 (a, b):
        # (H g)_a = (184, -52), (H g)_b = (72, 116)
        ({"aggregation": "signed"}, [1 * 184 + 3 * 72, 2 * -52 + -1 * 116]),
        ({"aggregation": "abs"}, [400, 220]),
        ({"aggregation": "sum_abs"}, [400, 220]),
    ],
)
def test_gradient_flow_by_hand(hvp: str, options: dict, expected: list[float]) -> None:
    """sum_c theta (H g); the loss is a polynomial of degree 4, so that differences are nearly exact too."""
    found = two_channel_scores(hand_model(), criterion="gradient-flow-weights", hvp=hvp, **options)
    assert found == pytest.approx(expected, rel=0.02)


def test_magnitude_by_hand() -> None:
    """sum_c theta^2, over both weights and the bias."""
    model = TwoChannels(a=(1.0, 2.0), b=(3.0, -1.0), d=(0.5, 0.0))
    assert two_channel_scores(model, criterion="magnitude") == pytest.approx([1 + 9 + 0.25, 4 + 1 + 0])


@pytest.mark.parametrize(
    ("threshold", "share"),
    [
        (0.0, (1 + 0.01) / 2),  # both samples count
        (0.05, 1 / 2),  # the loss at timestep 500 is 1 % of the largest: left out
        (0.005, (1 + 0.01) / 2),
    ],
)
def test_diff_pruning_leaves_out_timesteps_under_the_threshold(threshold: float, share: float) -> None:
    """Two samples with losses 1 and 0.01: sum_c |theta g| is (12, 8) times the mean over those that count."""
    scores = two_channel_scores(
        hand_model(), [1.0, 0.1], [10, 500], criterion="diff-pruning", diff_pruning_threshold=threshold
    )
    assert scores == pytest.approx([12 * share, 8 * share])


def test_diff_pruning_orders_timesteps_and_keeps_the_largest_so_far() -> None:
    """Timesteps count from 0 up to the first whose loss falls under the threshold, in whatever order the batch has them."""
    images, timesteps = [1.0, 0.1, 0.1, 1.0], [800, 600, 100, 200]  # 600 falls under 5 % of the largest, 100 does not
    scores = two_channel_scores(hand_model(), images, timesteps, criterion="diff-pruning", diff_pruning_threshold=0.05)
    share = (0.01 + 1.0) / 4
    assert scores == pytest.approx([12 * share, 8 * share])
