"""Budgets, explicit masks, compaction and its inverse, through the pruner."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffusers_gfprune import GradientFlowPruner
from diffusers_gfprune.metrics.model_size import count_macs, count_parameters
from diffusers_gfprune.one_shot import prune_unet
from diffusers_gfprune.pruning.masking import dense_parameters
from helpers.architectures import build
from helpers.pruners import Script, batches, config, mask_values, one_shot, rising, run, train_step

# --- invariant 3: budgets are met --------------------------------------------------------------------------------------


@pytest.mark.fast_variants(6)
@pytest.mark.parametrize("ratio", [0.2, 0.7])
@pytest.mark.parametrize("ranking", ["group", "sensitivity", "global"])
@pytest.mark.parametrize("target", ["macs", "params", "channels"])
def test_budget_is_met_by_the_compacted_model(target: str, ranking: str, ratio: float):
    """Counted on the small model, not on the plan for it."""
    pruner = GradientFlowPruner(build("fine-units"), one_shot(target=target, ratio=ratio, ranking=ranking))
    update = pruner.step(0, [])
    small = pruner.compact()
    if target == "channels":
        kept = torch.cat(list(pruner.masks.values()))
        removed = 1 - kept.sum().item() / len(kept)
    else:
        count = {"macs": count_macs, "params": count_parameters}[target]
        removed = 1 - count(small) / count(build("fine-units"))
    assert removed == pytest.approx(ratio, abs=0.01)
    assert update.sparsity == pytest.approx(removed, abs=1e-9)


@pytest.mark.parametrize("multiple", [4, 8])
@pytest.mark.parametrize("ranking", ["group", "sensitivity", "global"])
def test_channel_multiple(ranking: str, multiple: int):
    """Widths that suit hardware: multiples, or the dense width."""
    pruner = GradientFlowPruner(build("fine-units"), one_shot(ratio=0.5, ranking=ranking, channel_multiple=multiple))
    pruner.step(0, [])
    widths = {group.name: int(pruner.masks[group.name].sum()) for group in pruner.groups}
    assert {group.name for group in pruner.groups if widths[group.name] < group.num_channels}
    for group in pruner.groups:
        assert widths[group.name] == group.num_channels or widths[group.name] % multiple == 0


@pytest.mark.parametrize(("multiple", "warned"), [(1, False), (32, True)])
def test_a_budget_that_the_multiple_cannot_meet_is_said_aloud(multiple: int, warned: bool, caplog):
    """The nearest budget is used, with a warning."""
    with caplog.at_level(logging.WARNING, logger="diffusers_gfprune"):
        pruner = GradientFlowPruner(build("fine-units"), one_shot(target="channels", ratio=0.02, channel_multiple=multiple))
    update = pruner.step(0, [])
    assert (abs(update.sparsity - 0.02) > 0.01) == warned
    assert any(f"{update.sparsity:.3f}" in record.getMessage() for record in caplog.records) == warned


def test_heads_are_removed_whole_when_asked():
    """attention_unit="heads" leaves full heads; "head_dim" leaves all of them, narrower."""
    for unit in ("heads", "head_dim"):
        pruner = GradientFlowPruner(build("fine-units"), one_shot(ratio=0.5, attention_unit=unit))
        pruner.step(0, [])
        kept = pruner.masks["mid_block.attentions.0.to_q"].view(4, 8).sum(dim=1)
        assert 0 < kept.sum() < 32
        assert set(kept.tolist()) <= {0.0, 8.0} if unit == "heads" else len(set(kept.tolist())) == 1


def test_rankings_that_compare_groups(scripted: list[Script]):
    """Two groups that cost the same, of 32 channels. Global, where scores of a group are relative to their mean: the one whose
    importance lies in a quarter of its units goes down to its floor, the one whose units are alike stays whole. By
    sensitivity: the share that each loses is determined by scores and exponent."""
    worthless, precious = "down_blocks.1.resnets.0.conv1", "mid_block.resnets.0.conv1"

    def scores(name: str, units: int) -> Tensor:
        if name == worthless:
            return torch.where(torch.arange(units) < 0.75 * units, 0.0, 4e-3)
        return torch.full((units,), 1e3) if name == precious else rising(name, units)

    scripted.append(scores)
    options = {"criterion": "scripted", "ratio": 0.3, "min_keep_ratio": 0.25}
    kept = {}
    for ranking in ("group", "sensitivity", "global"):
        config = one_shot(ranking=ranking, sensitivity_exponent=0.1, **options)
        pruner = GradientFlowPruner(build("fine-units"), config)
        pruner.step(0, batches())
        kept[ranking] = {name: int(mask.sum()) for name, mask in pruner.masks.items()}
    assert kept["global"][worthless] in (8, 9)  # the last step of the search may give one channel back
    assert kept["global"][precious] in (31, 32)
    assert abs(kept["group"][worthless] - kept["group"][precious]) <= 2  # of units of 2 channels
    lost = {name: 32 - kept["sensitivity"][name] for name in (worthless, precious)}
    assert lost[worthless] / lost[precious] == pytest.approx(1e6**0.1, rel=0.25)  # of whole channels


def test_widths_by_sensitivity_stand_once_the_budget_is_met(scripted: list[Script]):
    """Sensitivities that drift change widths until the budget is met; after it, units only swap within their groups."""

    def drifting(seed: int) -> Script:
        generator = torch.Generator().manual_seed(seed)
        return lambda name, units: torch.rand(units, generator=generator) * 10 ** torch.rand(1, generator=generator)

    scripted += [drifting(seed) for seed in range(8)]
    options = {"criterion": "scripted", "ranking": "sensitivity", "sensitivity_exponent": 1.0, "revival_margin": 0.0}
    pruner = GradientFlowPruner(build("fine-units"), config(score_decay=0.0, sparsity_schedule="linear", **options))
    met, widths = [], []
    for step in range(21):
        if (update := pruner.step(step, batches())) is not None:
            met.append(update.sparsity > 0.49)
            widths.append([int(kept.sum()) for kept in pruner.kept.values()])
            assert update.revived_units > 0 or step == 0
    first = met.index(True)
    assert 0 < first < len(met) - 2 and pruner.history[first].phase == "soft"  # the goal of the last soft ranking is N
    assert all(now == widths[first] for now in widths[first:])
    shares = [[kept / dense for kept, dense in zip(row, pruner.cost.dense)] for row in widths[: first + 1]]
    assert any(now > before for row, after in zip(shares, shares[1:]) for before, now in zip(row, after))


def test_the_head_start_of_kept_channels_changes_no_width(scripted: list[Script]):
    """What a group is worth does not depend on how many of its channels are kept so far, least of all on none being gone."""
    precious = "up_blocks.0.resnets.0.conv1"
    scripted.append(lambda name, channels: rising(name, channels) * (1e6 if name == precious else 1.0))
    widths = {}
    for margin in (0.0, 1e6):
        options = {"criterion": "scripted", "ranking": "sensitivity", "sparsity_schedule": "linear", "revival_margin": margin}
        pruner = GradientFlowPruner(build("fine-units"), config(**options))
        widths[margin] = []
        for step in range(21):
            if pruner.step(step, batches()) is not None:
                widths[margin].append({name: int(kept.sum()) for name, kept in pruner.kept.items()})
    assert widths[1e6] == widths[0.0]
    units = next(group.num_units for group in pruner.groups if group.name == precious)
    assert widths[0.0][0][precious] == units  # nothing of it goes at first, so that it has no head start


def test_an_unreachable_ratio_leaves_the_model_without_masks():
    """An error before any training, and the model as it was."""
    unet = build("fine-units")
    before, names = run(unet), list(unet.state_dict())
    with pytest.raises(ValueError, match=r"ratio=0.9 of macs cannot be removed: the maximum is 0\.\d+"):
        GradientFlowPruner(unet, config(ratio=0.9, min_keep_ratio=0.5))
    assert not hasattr(unet, "channel_masks")
    assert list(unet.state_dict()) == names
    assert torch.equal(run(unet), before)


def test_a_model_without_a_sample_size_needs_one():
    """MACs depend on it; the error comes before the masks."""
    unet = UNet2DModel(**{**build("fine-units").config, "sample_size": None})
    with pytest.raises(ValueError, match="sample_size"):
        GradientFlowPruner(unet, config())
    assert not hasattr(unet, "channel_masks")
    pruner = GradientFlowPruner(unet, one_shot(ratio=0.4), sample_size=16)
    pruner.step(0, [])
    removed = 1 - count_macs(pruner.compact(), sample_size=16) / count_macs(unet_of_size(None), sample_size=16)
    assert removed == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("size", [9, 0, -8, (16,), (8, 9), 16.0, True])
def test_sizes_that_the_model_cannot_halve_are_refused(size: object) -> None:
    """By the argument's name, before costs are counted; of images, by their size."""
    unet = unet_of_size(None)
    assert len(unet.config.block_out_channels) == 2
    message = rf"^sample_size={re.escape(repr(size))} must be one or two multiples of 2, up to 16384"
    with pytest.raises(ValueError, match=message):
        GradientFlowPruner(unet, config(), sample_size=size)
    assert not hasattr(unet, "channel_masks")


def test_images_that_the_model_cannot_halve_are_refused() -> None:
    with pytest.raises(ValueError, match="^images have 9x9 pixels: sample_size=9 must be one or two multiples of 2, up to"):
        prune_unet(unet_of_size(None), DDPMScheduler(), torch.zeros(2, 1, 9, 9))


def unet_of_size(sample_size: int | None) -> UNet2DModel:
    """A dense model."""
    return UNet2DModel(**{**build("fine-units").config, "sample_size": sample_size})


def test_an_unknown_criterion_leaves_the_model_without_masks():
    """A misspelt name is an error before any training."""
    unet = build("fine-units")
    with pytest.raises(ValueError, match="criterion=nonsense must be one of gradient-flow"):
        GradientFlowPruner(unet, one_shot(criterion="nonsense", ratio=0.3))
    assert not hasattr(unet, "channel_masks")


def test_a_ranking_without_batches_is_refused():
    """And masks stay as they were."""
    pruner = GradientFlowPruner(build("fine-units"), one_shot(criterion="taylor", ratio=0.3))
    with pytest.raises(ValueError, match="taylor needs calibration batches"):
        pruner.step(0, [])
    assert mask_values(pruner) == [1.0]
    assert not pruner.history
    assert not pruner.finished


# --- explicit masks, compaction and its inverse --------------------------------------------------------------------------


def test_masks_by_hand_then_compact():
    """The library may be used without any schedule."""
    pruner = GradientFlowPruner(build("fine-units"), config())
    mask = (torch.arange(32) // 2 % 2).float()
    pruner.set_masks({"down_blocks.0.resnets.0.conv1": mask})
    assert torch.equal(pruner.masks["down_blocks.0.resnets.0.conv1"], mask)
    assert torch.equal(pruner.kept["down_blocks.0.resnets.0.conv1"], mask[::2].bool())  # units are pairs
    small = pruner.compact()
    assert small.config.layer_channels["down_blocks.0.resnets.0.conv1"] == [32, 16]
    torch.testing.assert_close(run(small), run(pruner.unet), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("interval", "step"), [(3, 1), (3, 4), (3, 8), (3, 9), (5, 5), (5, 7)])
def test_masks_by_hand_on_the_way_are_taken_over(interval: int, step: int):
    """The schedule starts from what was set, and arrives where it would have: binary at N, on budget."""
    pruner = GradientFlowPruner(build("fine-units"), config(ratio=0.5, update_interval=interval))
    heads = torch.ones(4, 8)
    heads[1] = 0
    chosen = {"conv_in": (torch.arange(32) >= 4).float(), "mid_block.attentions.0.to_q": heads.view(-1)}
    for current in range(21):
        if current == step:
            pruner.set_masks(chosen)
        pruner.step(current, [])
        if current == step:  # a ranking starts a path from here, other steps leave what was set
            for name, mask in chosen.items():
                torch.testing.assert_close(pruner.masks[name], mask)
    assert mask_values(pruner) == [0.0, 1.0]
    assert pruner.history[-1].sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"conv_in": torch.zeros(32)}, "leaves none"),
        ({"nowhere": torch.ones(16)}, "not a channel group"),
        (
            {"conv_in": (torch.arange(32) > 2).float()},
            r"has \[0.0, 1.0\] for channels \[0, 1, 2, 3\], which share a norm group",
        ),
        ({"mid_block.attentions.0.to_q": (torch.arange(32) > 2).float()}, "heads"),
    ],
    ids=["empty", "unknown", "part-of-a-norm-group", "uneven-heads"],
)
def test_masks_that_could_not_be_compacted_are_refused(masks: dict[str, Tensor], message: str):
    """Nothing is changed, what is kept included."""
    pruner = GradientFlowPruner(build("fine-units"), config())
    with pytest.raises(ValueError, match=message):
        pruner.set_masks({"time_embedding.linear_1": torch.zeros(128).index_fill(0, torch.tensor([3]), 1.0), **masks})
    assert mask_values(pruner) == [1.0]
    assert all(kept.all() for kept in pruner.kept.values())


def test_masks_are_copies():
    """Writing to what `masks` returns changes nothing: `set_masks` checks."""
    pruner = GradientFlowPruner(build("fine-units"), config())
    before = run(pruner.unet)
    pruner.masks["conv_in"].zero_()
    assert torch.equal(run(pruner.unet), before)


def test_soft_masks_are_not_compacted():
    """Half-way, with an optimizer at stake: an error, and the optimizer still holds the masked model."""
    unet = build("fine-units")
    optimizer = torch.optim.AdamW(unet.parameters())
    pruner = GradientFlowPruner(unet, config(ratio=0.5))
    for step in range(8):
        pruner.step(step, [])
    with pytest.raises(ValueError, match="only binary masks"):
        pruner.compact(optimizer=optimizer)
    assert all(ours is theirs for ours, theirs in zip(optimizer.param_groups[0]["params"], unet.parameters(), strict=True))


def test_a_refused_average_leaves_the_optimizer_whole():
    """`compact` carries both or neither: an optimizer of an unused model would train nothing."""
    unet = build("fine-units")
    optimizer = torch.optim.AdamW(unet.parameters())
    pruner = GradientFlowPruner(unet, one_shot(ratio=0.4))
    pruner.step(0, [])
    with pytest.raises(ValueError, match="ema has 1 parameters, but the model"):
        pruner.compact(optimizer=optimizer, ema=EMAModel([nn.Parameter(torch.zeros(3))]))
    assert all(ours is theirs for ours, theirs in zip(optimizer.param_groups[0]["params"], unet.parameters(), strict=True))


def test_detach_gives_the_dense_model_back():
    """After soft and hard phases, bit for bit, under its own names, and it saves again."""
    unet = build("fine-units")
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    before = run(unet)
    pruner = GradientFlowPruner(unet, config(ratio=0.5))
    for step in range(21):
        pruner.step(step, [])
    assert not torch.equal(run(unet), before)
    assert pruner.detach() is unet
    assert list(unet.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
    assert torch.equal(run(unet), before)


def test_detach_keeps_what_was_trained():
    """The weights of the masked model, at masks of one."""
    unet = build("fine-units")
    pruner = GradientFlowPruner(unet, one_shot(ratio=0.4))
    pruner.step(0, [])
    train_step(unet, torch.optim.SGD(unet.parameters(), lr=1e-2), EMAModel(unet.parameters()), seed=0)
    trained = {name: parameter.detach().clone() for name, parameter in dense_parameters(unet).items()}
    dense = pruner.detach()
    fresh = build("fine-units")
    fresh.load_state_dict(trained)
    assert torch.equal(run(dense), run(fresh))
    assert not torch.equal(run(dense), run(build("fine-units")))
