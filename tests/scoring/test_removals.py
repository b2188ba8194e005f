"""Measured damage of removals: that of the compacted models, whatever the masks are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.one_shot import calibration_batches
from diffusers_gfprune.pruning.blocks import RemovableBlock
from diffusers_gfprune.scoring.removals import removal_damage
from helpers.architectures import build
from helpers.processes import ddpm
from helpers.pruners import images

PROCESS = ddpm(100)
CONFIG = GFPruneConfig(total_steps=1, depth="allow", ratio=0.3)


def predict(unet: nn.Module, batch: DiffusionBatch) -> Tensor:
    with torch.no_grad():
        return family_of(unet).predict(unet, batch.inputs(PROCESS))


def choices(pruner: GradientFlowPruner) -> list[dict[str, Tensor]]:
    """Nothing removed; half of the units of every group; one block."""
    everything = {group.name: torch.ones(group.num_units, dtype=torch.bool) for group in pruner.groups}
    block = next(group for group in pruner.groups if isinstance(group, RemovableBlock))
    half = {
        group.name: torch.arange(group.num_units) % 2 == 0
        for group in pruner.groups
        if not isinstance(group, RemovableBlock) and group.attention is None
    }
    return [everything, everything | half, everything | {block.name: torch.zeros(1, dtype=torch.bool)}]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_damage_is_that_of_the_compacted_models(dtype: torch.dtype) -> None:
    """Masks in use do not matter, and are the same afterwards; half precision is measured in float32."""
    dense = build("fine-units").to(dtype).eval()
    pruner = GradientFlowPruner(copy.deepcopy(dense), CONFIG, PROCESS)
    batches = calibration_batches(images(12), PROCESS, batch_size=8)
    expected = []
    for kept in choices(pruner):
        pruner.set_masks({group.name: group.per_channel(kept[group.name].float()) for group in pruner.groups})
        small = pruner.compact().float()
        changes = [(predict(small, batch) - predict(dense.float(), batch)).square() for batch in batches]  # 8 and 4 images
        expected.append(float(torch.cat(changes).mean()))
    before = {name: mask * 0.5 for name, mask in pruner.masks.items()}
    pruner.unet.channel_masks.set({name: mask * 0.5 for name, mask in pruner.unit_masks.items()}, check=False)
    measured = removal_damage(pruner.unet, pruner.groups, batches, PROCESS, CONFIG, choices(pruner))
    assert measured == pytest.approx(expected, rel=1e-3, abs=1e-9) and measured[0] == 0 < min(measured[1:])
    assert all(torch.equal(mask, before[name]) for name, mask in pruner.masks.items())


def test_batches_are_checked() -> None:
    pruner = GradientFlowPruner(build("fine-units"), CONFIG, PROCESS)
    with pytest.raises(ValueError, match="needs calibration batches, got none"):
        removal_damage(pruner.unet, pruner.groups, [], PROCESS, CONFIG, choices(pruner))
