"""Removable blocks through the pruner: budgets, training, checkpoints, distillation, and the default without them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner
from diffusers_gfprune.metrics.model_size import count_macs, count_parameters
from diffusers_gfprune.objectives.distillation_features import BlockOutputDistance
from diffusers_gfprune.objectives.objective import NoisePrediction
from diffusers_gfprune.pruning.blocks import RemovableBlock
from helpers.architectures import build
from helpers.pruners import Script, batches, config, one_shot, run

NAME = "two-layers"


def scores_with_blocks(level: float) -> Script:
    """Rising scores of units, a few of them equal to 1 on average; blocks, which have one unit, are worth `level` of that."""
    generator = torch.Generator().manual_seed(0)

    def scores(name: str, units: int) -> Tensor:
        if units == 1 and not name.rpartition(".")[2].startswith(("conv", "to_", "linear")):
            return level * torch.rand(1, generator=generator)
        return torch.linspace(0.1, 1.9, units)

    return scores


def blocks_of(pruner: GradientFlowPruner) -> list[str]:
    return [group.name for group in pruner.groups if isinstance(group, RemovableBlock)]


def test_the_default_has_no_blocks() -> None:
    """A choice by the same scores is the same as before there were blocks."""
    assert GFPruneConfig().depth == "none"
    pruner = GradientFlowPruner(build(NAME), one_shot(ratio=0.4))
    assert blocks_of(pruner) == [] and pruner.cost.inner == {}
    pruner.step(0, [])
    assert pruner.compact().config.removed_blocks == []
    with pytest.raises(ValueError, match="^depth=deep must be one of none, allow, only"):
        GFPruneConfig(depth="deep")


def test_blocks_that_are_worth_too_much_change_no_width(scripted: list[Script]) -> None:
    kept = {}
    for depth in ("none", "allow"):
        scripted[:] = [scores_with_blocks(1e6)]
        options = {"criterion": "scripted", "ranking": "sensitivity", "ratio": 0.4, "depth": depth}
        pruner = GradientFlowPruner(build(NAME), one_shot(**options))
        pruner.step(0, batches())
        kept[depth] = {name: mask for name, mask in pruner.masks.items() if name not in blocks_of(pruner)}
        assert all(pruner.masks[name].item() == 1 for name in blocks_of(pruner))
    assert kept["none"].keys() == kept["allow"].keys()
    assert all(torch.equal(mask, kept["allow"][name]) for name, mask in kept["none"].items())


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize("ranking", ["group", "sensitivity", "global"])
@pytest.mark.parametrize("depth", ["allow", "only"])
def test_budget_is_met_by_the_compacted_model(depth: str, ranking: str, scripted: list[Script]) -> None:
    """Counted on the small model; with `only`, no layer changes its width."""
    scripted.append(scores_with_blocks(0.2))
    options = {"criterion": "scripted", "ranking": ranking, "ratio": 0.4, "depth": depth}
    pruner = GradientFlowPruner(build(NAME), one_shot(**options))
    update = pruner.step(0, batches())
    small = pruner.compact()
    removed = 1 - count_macs(small) / count_macs(build(NAME))
    assert removed == pytest.approx(0.4, abs=0.01)
    assert update.sparsity == pytest.approx(removed, abs=1e-9)
    assert update.params == count_parameters(small)
    torch.testing.assert_close(run(small), run(pruner.unet), rtol=1e-4, atol=1e-5)
    assert small.config.removed_blocks
    if depth == "only":
        assert (small.config.layer_channels, small.config.attention_heads) == ({}, {})
    else:
        assert small.config.layer_channels


@pytest.mark.slow
@pytest.mark.parametrize("depth", ["allow", "only"])
def test_joint_choice_with_blocks(depth: str) -> None:
    options = {"criterion": "gradient-flow", "ranking": "joint", "ratio": 0.4, "depth": depth}
    pruner = GradientFlowPruner(build(NAME), one_shot(**options))
    assert pruner.step(0, batches()).sparsity == pytest.approx(0.4, abs=0.01)
    small = pruner.compact()
    torch.testing.assert_close(run(small), run(pruner.unet), rtol=1e-4, atol=1e-5)
    assert (small.config.removed_blocks != []) if depth == "only" else True


def test_what_blocks_alone_cannot_reach_is_refused_before_training() -> None:
    unet = build("no-attention")
    with pytest.raises(ValueError, match=r"^ratio=0.95 of macs cannot be removed: .* with depth=only"):
        GradientFlowPruner(unet, one_shot(ratio=0.95, depth="only"))
    assert not hasattr(unet, "channel_masks")


@pytest.mark.slow
def test_masks_of_blocks_fall_softly_and_a_run_resumes_bit_for_bit(scripted: list[Script]) -> None:
    """Through both phases, with a checkpoint in the soft one."""
    options = {"criterion": "scripted", "ranking": "sensitivity", "ratio": 0.4, "depth": "allow"}
    runs = []
    for resumed in (False, True):
        scripted[:] = [scores_with_blocks(0.01)]
        pruner, values = GradientFlowPruner(build(NAME), config(**options)), set()
        for step in range(21):
            if resumed and step == 8:
                state = pruner.state_dict()
                state = {"tensors": state["tensors"], "values": json.loads(json.dumps(state["values"]))}
                pruner = GradientFlowPruner(build(NAME), config(**options))
                pruner.load_state_dict(state)
            scripted[:] = [scores_with_blocks(0.01)]
            pruner.step(step, batches())
            values |= {pruner.masks[name].item() for name in blocks_of(pruner)}
        assert pruner.finished
        assert {0.0, 1.0} < values  # and values in between
        runs.append(pruner.compact())
    first, second = runs
    assert first.config.removed_blocks == second.config.removed_blocks != []
    assert first.config.layer_channels == second.config.layer_channels
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_groups_inside_of_removed_blocks_keep_nothing() -> None:
    """In costs and reports; their masks may have any value that can be compacted."""
    pruner = GradientFlowPruner(build(NAME), one_shot(ratio=0.4, depth="allow"))
    block = "mid_block.resnets.0"
    inside = next(name for name in pruner.masks if name.startswith(block) and name != block)
    mask = torch.ones_like(pruner.masks[inside])
    pruner.set_masks({block: torch.zeros(1), inside: mask})
    present = dict(zip(pruner.masks, pruner.cost.present(pruner.kept_channels())))
    assert present[inside] == 0 and present[block] == 0
    small = pruner.compact()
    assert count_macs(small) == pruner.cost.macs(pruner.kept_channels())
    torch.testing.assert_close(run(small), run(pruner.unet), rtol=1e-4, atol=1e-5)


def test_block_outputs_are_compared_with_removed_blocks() -> None:
    """Outputs of the big blocks are streams, which are still there; the distance is the same before and after compaction."""
    dense = build("resnet-samplers")
    pruner = GradientFlowPruner(copy.deepcopy(dense), one_shot(ratio=0.4, depth="allow"))
    gone = {name: torch.zeros(1) for name in blocks_of(pruner)[::2]}
    pruner.set_masks({**gone, "up_blocks.0.resnets.1.conv1": _half(pruner, "up_blocks.0.resnets.1.conv1")})
    small, distance = pruner.compact(), BlockOutputDistance(dense, pruner.unet.channel_masks)
    sample, timesteps = torch.randn(2, 1, 8, 8), torch.tensor([10, 500])
    outputs = [
        NoisePrediction(model, features=True)(sample, timesteps, return_features=True)[1]
        for model in (dense, pruner.unet, small)
    ]
    assert (distance(outputs[1], outputs[0]) > 0.01).all()
    torch.testing.assert_close(distance(outputs[2], outputs[0]), distance(outputs[1], outputs[0]), rtol=1e-4, atol=0)


def _half(pruner: GradientFlowPruner, name: str) -> Tensor:
    """A mask that keeps the first half of the units of a group."""
    group = next(group for group in pruner.groups if group.name == name)
    return group.per_channel((torch.arange(group.num_units) < group.num_units / 2).float())
