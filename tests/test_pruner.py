"""The life of a pruning run: rankings when due, masks as the schedule says, a budget met, a small model that trains on."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from architectures import build, inputs
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffusers_gfprune import GFPruneConfig, GFPrunedUNet2DModel, GradientFlowPruner, register_criterion
from diffusers_gfprune.cost_model import CostModel
from diffusers_gfprune.evaluation.cost import count_macs, count_parameters
from diffusers_gfprune.evaluation.step_loss import StepLoss
from diffusers_gfprune.importance import ScoringContext
from diffusers_gfprune.masking import dense_parameters
from diffusers_gfprune.one_shot import calibration_batches

SCHEDULER = DDPMScheduler(num_train_timesteps=100)
Script = Callable[[str, int], Tensor]  # group name, number of channels -> scores

# Scores of the rankings to come, one entry each; the last one serves all later rankings.
script: list[Script] = []


@register_criterion("scripted")
def scripted_criterion(context: ScoringContext) -> dict[str, Tensor]:
    """Scores that a test wrote down."""
    current = script.pop(0) if len(script) > 1 else script[0]
    return {group.name: current(group.name, group.num_channels) for group in context.groups}


@pytest.fixture
def scripted() -> Iterator[list[Script]]:
    """The script, empty before and after."""
    script.clear()
    yield script
    script.clear()


def rising(name: str, channels: int) -> Tensor:
    """The first channels are the least important; the mean is 1."""
    return torch.linspace(0.1, 1.9, channels)


def falling(name: str, channels: int) -> Tensor:
    """The last channels are the least important; the mean is 1."""
    return torch.linspace(1.9, 0.1, channels)


@functools.lru_cache
def images(count: int = 8) -> Tensor:
    """Training images in [-1, 1] with shape `(count, 1, 8, 8)`."""
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@functools.lru_cache
def batches() -> list[tuple[Tensor, ...]]:
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
    }
    return GFPruneConfig(**{**defaults, **options})


def one_shot(**options) -> GFPruneConfig:
    """Everything at step 0."""
    return GFPruneConfig.from_preset("one-shot", **{"total_steps": 1, "criterion": "magnitude", **options})


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


# --- the whole life ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolate", [False, True], ids=["jumps", "interpolated"])
def test_whole_life(interpolate: bool):
    """Soft, hard, compaction, fine-tuning, with AdamW and an average: nothing is lost on the way."""
    unet = build().train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    pruner = GradientFlowPruner(
        unet, config(criterion="gradient-flow", ratio=0.5, interpolate_masks=interpolate), noise_scheduler=SCHEDULER
    )
    ema = EMAModel(unet.parameters(), decay=0.9)
    calls, losses = [], []
    for step in range(pruner.config.total_steps):
        pruner.step(step, lambda step=step: calls.append(step) or batches())
        if pruner.finished:
            break
        losses.append(train_step(unet, optimizer, ema, seed=step))
    assert step == pruner.schedule.end_steps == 20
    assert calls == [update.step for update in pruner.history] == pruner.schedule.update_steps()
    assert [update.phase for update in pruner.history] == ["soft" if step < 10 else "hard" for step in calls]

    # The budget is met by what would be compacted, and by the model itself.
    assert mask_values(pruner) == [0.0, 1.0]
    last = pruner.history[-1]
    assert last.sparsity == pytest.approx(0.5, abs=0.01)
    dense_macs = count_macs(build())
    step_loss = StepLoss(images(), SCHEDULER, grid=8)
    masked_loss = step_loss(unet)
    small = pruner.compact(optimizer=optimizer, ema=ema)
    assert isinstance(small, GFPrunedUNet2DModel)
    assert 1 - count_macs(small) / dense_macs == pytest.approx(0.5, abs=0.01)
    assert (count_macs(small), count_parameters(small)) == (last.macs, last.params)

    # No sudden loss of information, and training goes on where it was.
    assert step_loss(small) == pytest.approx(masked_loss, rel=1e-4)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(ours is theirs for ours, theirs in zip(held, small.parameters(), strict=True))
    assert all(optimizer.state[parameter]["step"].item() == 20 for parameter in held)
    before = run(small)
    losses += [train_step(small, optimizer, ema, seed=step) for step in range(20, 40)]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert not torch.equal(run(small), before)
    ema.copy_to(small.parameters())
    assert torch.isfinite(run(small)).all()


def test_published_masks_jump_at_rankings_and_hold_in_between():
    """As in the paper: pruned channels have p_t of their ranking, kept ones 1, and after N everything is binary."""
    pruner = GradientFlowPruner(build(), config(interpolate_masks=False, mask_schedule="linear"))
    assert pruner.schedule.update_steps() == [3, 6, 9, 10, 13, 16, 19]
    for step in range(21):
        update = pruner.step(step, [])
        if step < 3:
            assert mask_values(pruner) == [1.0]
        elif step < 10:
            p_t = 1 - (step // 3 * 3) / 10
            assert mask_values(pruner) == pytest.approx([p_t, 1.0])
            assert pruner.history[-1].mask_value == pytest.approx(p_t)
        else:
            assert mask_values(pruner) == [0.0, 1.0]
        if update is not None:
            kept = sum(int((mask == 1).sum()) for mask in pruner.masks.values())
            assert (update.step, update.kept_channels) == (step, kept)
            assert update.mask_value == pruner.schedule.mask_value(step)


@pytest.mark.parametrize(
    ("interval", "rankings"),
    [(1, list(range(10)) + list(range(11, 20))), (3, [0, 3, 6, 9, 13, 16, 19]), (5, [0, 5, 15]), (20, [0])],
)
def test_interpolated_masks_move_in_straight_lines(interval: int, rankings: list[int]):
    """Each ranking says where masks are at the next one, and they arrive there: no mask falls faster than p_t."""
    pruner = GradientFlowPruner(build(), config(update_interval=interval, interpolate_masks=True, mask_schedule="linear"))
    assert pruner.schedule.update_steps() == rankings
    path = []
    for step in range(21):
        pruner.step(step, [])
        path.append(torch.cat(list(pruner.masks.values())))
    assert path[0].unique().tolist() == [1.0]
    soft = [step for step in rankings if step < 10]
    for start, goal in zip(soft, [*soft[1:], 10]):
        assert path[goal].unique().tolist() == pytest.approx([1 - goal / 10, 1.0])
        for step in range(start, goal + 1):
            torch.testing.assert_close(path[step], torch.lerp(path[start], path[goal], (step - start) / (goal - start)))
    for step in range(10, 21):
        assert path[step].unique().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("interpolate", [False, True], ids=["jumps", "interpolated"])
@pytest.mark.parametrize("attention_unit", ["head_dim", "heads"])
def test_sparsity_rises_to_the_target(interpolate: bool, attention_unit: str):
    """s_t of the schedule is what is gone at each ranking, as far as whole channels allow."""
    options = {"ratio": 0.6, "sparsity_schedule": "cubic", "attention_unit": attention_unit, "interpolate_masks": interpolate}
    pruner = GradientFlowPruner(build(), config(**options))
    for step in range(21):
        pruner.step(step, [])
    schedule = pruner.schedule
    for update in pruner.history:
        assert update.sparsity == pytest.approx(0.6 * schedule.sparsity(schedule.goal_step(update.step)), abs=0.01)
    sparsities = [update.sparsity for update in pruner.history]
    assert sparsities == sorted(sparsities)


def test_history_is_what_the_masks_did(scripted: list[Script]):
    """Revived and newly pruned channels, counted on the masks from ranking to ranking."""
    scripted += [rising, falling, rising, rising, falling, rising, falling]
    options = {"criterion": "scripted", "interpolate_masks": False, "revival_margin": 0.0, "score_decay": 0.0}
    pruner = GradientFlowPruner(build(), config(**options))
    total = sum(group.num_channels for group in pruner.groups)
    before = torch.ones(total, dtype=torch.bool)
    cost = CostModel(build(), pruner.groups)
    for step in range(21):
        update = pruner.step(step, batches())
        if update is None:
            continue
        kept = torch.cat([mask == 1 for mask in pruner.masks.values()])
        assert update.kept_channels == int(kept.sum())
        assert update.revived_channels == int((kept & ~before).sum())
        assert update.newly_pruned_channels == int((before & ~kept).sum())
        widths = np.array([int((mask == 1).sum()) for mask in pruner.masks.values()])
        assert (update.macs, update.params) == (cost.macs(widths), cost.params(widths))
        assert update.sparsity == pytest.approx(1 - cost.macs(widths) / cost.macs(cost.dense))
        assert update.to_dict() == {field: getattr(update, field) for field in update.__dataclass_fields__}
        before = kept
    assert sum(update.revived_channels for update in pruner.history) > 0


def test_revived_channels_known_answer(scripted: list[Script]):
    """Half of all channels go, then the other half: every pruned channel comes back, every kept one goes."""
    scripted += [rising, falling]
    options = {"criterion": "scripted", "target": "channels", "ratio": 0.5, "revival_margin": 0.0, "score_decay": 0.0}
    pruner = GradientFlowPruner(build(), config(soft_fraction=0.0, **options))
    total = sum(group.num_channels for group in pruner.groups)  # all groups are even
    first, second = pruner.step(0, batches()), pruner.step(3, batches())
    assert (first.kept_channels, first.revived_channels, first.newly_pruned_channels) == (total // 2, 0, total // 2)
    assert (second.kept_channels, second.revived_channels, second.newly_pruned_channels) == (total // 2,) * 3
    mask = pruner.masks["conv_in"]
    assert torch.equal(mask, torch.tensor([1.0] * 8 + [0.0] * 8))
    heads = pruner.masks["mid_block.attentions.0.to_q"].view(4, 8)  # scores fall within each head
    assert torch.equal(heads, torch.tensor([1.0] * 4 + [0.0] * 4).expand(4, 8))


@pytest.mark.parametrize(("advantage", "revived"), [(0.1, 0), (0.3, 1)])
def test_revival_needs_clear_evidence(scripted: list[Script], advantage: float, revived: int):
    """With a margin of 0.2, a pruned channel comes back only if it beats a kept one by 0.2 of the mean score."""

    def first(name: str, channels: int) -> Tensor:
        return torch.cat([torch.full((channels // 2,), 0.5), torch.full((channels - channels // 2,), 1.5)])

    def second(name: str, channels: int) -> Tensor:
        scores = first(name, channels)
        if name == "conv_in":
            scores[0], scores[-1] = 1.0 + advantage / 2, 1.0 - advantage / 2  # the mean stays 1
        return scores

    scripted += [first, second]
    options = {"criterion": "scripted", "target": "channels", "ratio": 0.5, "revival_margin": 0.2, "score_decay": 0.0}
    pruner = GradientFlowPruner(build(), config(soft_fraction=0.0, **options))
    pruner.step(0, batches())
    # Attention groups hold whole heads of low and of high scores; they are the same in both rankings.
    assert pruner.step(3, batches()).revived_channels == revived
    assert pruner.masks["conv_in"][0] == revived
    assert pruner.masks["conv_in"][-1] == 1 - revived


@pytest.mark.parametrize("decay", [0.0, 0.75])
def test_scores_are_averaged_over_rankings(scripted: list[Script], decay: float):
    """score_t = d score_{t-1} + (1 - d) new, so that one noisy ranking does not decide."""
    scripted += [rising, falling, falling]
    options = {"criterion": "scripted", "score_decay": decay, "soft_fraction": 0.0}
    pruner = GradientFlowPruner(build(), config(**options))
    expected = None
    for step, new in ((0, rising), (3, falling), (6, falling)):
        pruner.step(step, batches())
        fresh = {group.name: new(group.name, group.num_channels) for group in pruner.groups}
        expected = fresh if expected is None else {n: decay * expected[n] + (1 - decay) * fresh[n] for n in fresh}
        for name, scores in pruner.scores.items():
            torch.testing.assert_close(scores, expected[name], rtol=1e-4, atol=1e-4)


def test_batches_are_asked_for_only_when_due():
    """Calibration data may be expensive: a function is called at rankings, and never after the last."""
    calls = []
    pruner = GradientFlowPruner(build(), config())
    for step in range(40):
        update = pruner.step(step, lambda step=step: calls.append(step) or [])
        assert (update is not None) == (calls[-1:] == [step])
        assert pruner.finished == (step >= 20)
    assert calls == pruner.schedule.update_steps()


def test_nothing_changes_once_finished():
    """A training loop that goes on calling `step` must not move the masks that were compacted."""
    pruner = GradientFlowPruner(build(), one_shot(ratio=0.4))
    pruner.step(0, [])
    assert pruner.finished
    masks, output = pruner.masks, run(pruner.unet)
    assert pruner.step(0, pytest.fail) is None
    assert pruner.step(1, pytest.fail) is None
    assert len(pruner.history) == 1
    assert all(torch.equal(mask, masks[name]) for name, mask in pruner.masks.items())
    assert torch.equal(run(pruner.unet), output)


def test_one_shot_preset():
    """One ranking, binary masks, done."""
    pruner = GradientFlowPruner(build(), one_shot(criterion="gradient-flow", ratio=0.3), SCHEDULER)
    update = pruner.step(0, batches())
    assert pruner.finished
    assert (update.step, update.phase, update.mask_value) == (0, "hard", 0.0)
    assert mask_values(pruner) == [0.0, 1.0]
    assert count_macs(pruner.compact()) == update.macs


def test_ranking_leaves_weights_gradients_and_mode_alone():
    """Scoring happens between training steps: accumulated gradients are not its to touch."""
    unet = build().train()
    pruner = GradientFlowPruner(unet, one_shot(criterion="gradient-flow", ratio=0.3), SCHEDULER)
    for parameter in unet.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    weights = {name: parameter.detach().clone() for name, parameter in dense_parameters(unet).items()}
    pruner.step(0, batches())
    assert unet.training
    for name, parameter in dense_parameters(unet).items():
        assert torch.equal(parameter, weights[name])
        assert torch.equal(parameter.grad, torch.full_like(parameter, 0.5))


# --- invariant 3: budgets are met --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.2, 0.7])
@pytest.mark.parametrize("ranking", ["group", "global"])
@pytest.mark.parametrize("target", ["macs", "params", "channels"])
def test_budget_is_met_by_the_compacted_model(target: str, ranking: str, ratio: float):
    """Counted on the small model, not on the plan for it."""
    pruner = GradientFlowPruner(build(), one_shot(target=target, ratio=ratio, ranking=ranking))
    update = pruner.step(0, [])
    small = pruner.compact()
    if target == "channels":
        kept = torch.cat(list(pruner.masks.values()))
        removed = 1 - kept.sum().item() / len(kept)
    else:
        count = {"macs": count_macs, "params": count_parameters}[target]
        removed = 1 - count(small) / count(build())
    assert removed == pytest.approx(ratio, abs=0.01)
    assert update.sparsity == pytest.approx(removed, abs=1e-9)


@pytest.mark.parametrize("multiple", [4, 8])
@pytest.mark.parametrize("ranking", ["group", "global"])
def test_channel_multiple(ranking: str, multiple: int):
    """Widths that suit hardware: multiples, or the dense width."""
    pruner = GradientFlowPruner(build(), one_shot(ratio=0.5, ranking=ranking, channel_multiple=multiple))
    pruner.step(0, [])
    widths = {group.name: int(pruner.masks[group.name].sum()) for group in pruner.groups}
    assert {group.name for group in pruner.groups if widths[group.name] < group.num_channels}
    for group in pruner.groups:
        assert widths[group.name] == group.num_channels or widths[group.name] % multiple == 0


@pytest.mark.parametrize(("multiple", "warned"), [(1, False), (16, True)])
def test_a_budget_that_the_multiple_cannot_meet_is_said_aloud(multiple: int, warned: bool, caplog):
    """The nearest is taken, but nobody should believe that it is what was asked for."""
    with caplog.at_level(logging.WARNING, logger="diffusers_gfprune"):
        pruner = GradientFlowPruner(build(), one_shot(target="channels", ratio=0.012, channel_multiple=multiple))
    update = pruner.step(0, [])
    assert (abs(update.sparsity - 0.012) > 0.01) == warned  # 16 of 656 channels are 0.024
    assert any(f"{update.sparsity:.3f}" in record.getMessage() for record in caplog.records) == warned


def test_heads_are_removed_whole_when_asked():
    """attention_unit="heads" leaves full heads; "head_dim" leaves all of them, narrower."""
    for unit in ("heads", "head_dim"):
        pruner = GradientFlowPruner(build(), one_shot(ratio=0.5, attention_unit=unit))
        pruner.step(0, [])
        kept = pruner.masks["mid_block.attentions.0.to_q"].view(4, 8).sum(dim=1)
        assert 0 < kept.sum() < 32
        assert set(kept.tolist()) <= {0.0, 8.0} if unit == "heads" else len(set(kept.tolist())) == 1


def test_global_ranking_takes_the_lowest_of_all_groups(scripted: list[Script]):
    """One group without importance goes down to its floor, and the most important one stays whole."""
    worthless, precious = "down_blocks.1.resnets.0.conv1", "mid_block.resnets.0.conv1"

    def scores(name: str, channels: int) -> Tensor:
        return rising(name, channels) * {worthless: 1e-3, precious: 1e3}.get(name, 1.0)

    scripted.append(scores)
    options = {"criterion": "scripted", "ratio": 0.3, "min_keep_ratio": 0.25}
    kept = {}
    for ranking in ("group", "global"):
        pruner = GradientFlowPruner(build(), one_shot(ranking=ranking, normalization="none", **options))
        pruner.step(0, batches())
        kept[ranking] = {name: int(mask.sum()) for name, mask in pruner.masks.items()}
    assert kept["global"][worthless] in (8, 9)  # the last step of the search may give one channel back
    assert kept["global"][precious] in (31, 32)
    assert abs(kept["group"][worthless] - kept["group"][precious]) <= 1


def test_an_unreachable_ratio_leaves_the_model_without_masks():
    """An error before any training, and the model as it was."""
    unet = build()
    before, names = run(unet), list(unet.state_dict())
    with pytest.raises(ValueError, match=r"ratio=0.9 of macs cannot be removed: at most 0\.\d+ can"):
        GradientFlowPruner(unet, config(ratio=0.9, min_keep_ratio=0.5))
    assert not hasattr(unet, "channel_masks")
    assert list(unet.state_dict()) == names
    assert torch.equal(run(unet), before)


def test_a_model_without_a_sample_size_needs_one():
    """MACs depend on it; the error comes before the masks."""
    unet = UNet2DModel(**{**build().config, "sample_size": None})
    with pytest.raises(ValueError, match="sample_size"):
        GradientFlowPruner(unet, config())
    assert not hasattr(unet, "channel_masks")
    pruner = GradientFlowPruner(unet, one_shot(ratio=0.4), sample_size=16)
    pruner.step(0, [])
    removed = 1 - count_macs(pruner.compact(), sample_size=16) / count_macs(unet_of_size(None), sample_size=16)
    assert removed == pytest.approx(0.4, abs=0.01)


def unet_of_size(sample_size: int | None) -> UNet2DModel:
    """A dense model."""
    return UNet2DModel(**{**build().config, "sample_size": sample_size})


def test_an_unknown_criterion_leaves_the_model_without_masks():
    """A misspelt name is an error before any training."""
    unet = build()
    with pytest.raises(ValueError, match="criterion=nonsense must be one of gradient-flow"):
        GradientFlowPruner(unet, one_shot(criterion="nonsense", ratio=0.3))
    assert not hasattr(unet, "channel_masks")


def test_a_ranking_without_batches_is_refused():
    """And masks stay as they were."""
    pruner = GradientFlowPruner(build(), one_shot(criterion="taylor", ratio=0.3))
    with pytest.raises(ValueError, match="taylor needs calibration batches"):
        pruner.step(0, [])
    assert mask_values(pruner) == [1.0]
    assert not pruner.history
    assert not pruner.finished


# --- masks by hand, compaction, the way back ---------------------------------------------------------------------------


def test_masks_by_hand_then_compact():
    """The library may be used without any schedule."""
    pruner = GradientFlowPruner(build(), config())
    mask = (torch.arange(16) % 2).float()
    pruner.set_masks({"down_blocks.0.resnets.0.conv1": mask})
    assert torch.equal(pruner.masks["down_blocks.0.resnets.0.conv1"], mask)
    assert torch.equal(pruner.kept["down_blocks.0.resnets.0.conv1"], mask.bool())
    small = pruner.compact()
    assert small.config.layer_channels["down_blocks.0.resnets.0.conv1"] == [16, 8]
    torch.testing.assert_close(run(small), run(pruner.unet), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("interval", "step"), [(3, 1), (3, 4), (3, 8), (3, 9), (5, 5), (5, 7)])
def test_masks_by_hand_on_the_way_are_taken_over(interval: int, step: int):
    """The schedule starts from what was set, and arrives where it would have: binary at N, on budget."""
    pruner = GradientFlowPruner(build(), config(ratio=0.5, update_interval=interval))
    heads = torch.ones(4, 8)
    heads[1] = 0
    chosen = {"conv_in": (torch.arange(16) >= 4).float(), "mid_block.attentions.0.to_q": heads.view(-1)}
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
        ({"conv_in": torch.zeros(16)}, "leaves none"),
        ({"nowhere": torch.ones(16)}, "no channel group"),
        ({"mid_block.attentions.0.to_q": (torch.arange(32) > 2).float()}, "heads"),
    ],
    ids=["empty", "unknown", "uneven-heads"],
)
def test_masks_that_could_not_be_compacted_are_refused(masks: dict[str, Tensor], message: str):
    """Nothing is changed, what is kept included."""
    pruner = GradientFlowPruner(build(), config())
    with pytest.raises(ValueError, match=message):
        pruner.set_masks({"time_embedding.linear_1": torch.zeros(64).index_fill(0, torch.tensor([3]), 1.0), **masks})
    assert mask_values(pruner) == [1.0]
    assert all(kept.all() for kept in pruner.kept.values())


def test_masks_are_copies():
    """Writing to what `masks` returns changes nothing: `set_masks` checks."""
    pruner = GradientFlowPruner(build(), config())
    before = run(pruner.unet)
    pruner.masks["conv_in"].zero_()
    assert torch.equal(run(pruner.unet), before)


def test_soft_masks_are_not_compacted():
    """Half-way, with an optimizer at stake: an error, and the optimizer still holds the masked model."""
    unet = build()
    optimizer = torch.optim.AdamW(unet.parameters())
    pruner = GradientFlowPruner(unet, config(ratio=0.5))
    for step in range(8):
        pruner.step(step, [])
    with pytest.raises(ValueError, match="only binary masks"):
        pruner.compact(optimizer=optimizer)
    assert all(ours is theirs for ours, theirs in zip(optimizer.param_groups[0]["params"], unet.parameters(), strict=True))


def test_a_refused_average_leaves_the_optimizer_whole():
    """`compact` carries both or neither: an optimizer of a model that nobody holds would train nothing."""
    unet = build()
    optimizer = torch.optim.AdamW(unet.parameters())
    pruner = GradientFlowPruner(unet, one_shot(ratio=0.4))
    pruner.step(0, [])
    with pytest.raises(ValueError, match="average"):
        pruner.compact(optimizer=optimizer, ema=EMAModel([nn.Parameter(torch.zeros(3))]))
    assert all(ours is theirs for ours, theirs in zip(optimizer.param_groups[0]["params"], unet.parameters(), strict=True))


def test_detach_gives_the_dense_model_back():
    """After soft and hard phases, bit for bit, under its own names, and it saves again."""
    unet = build()
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
    unet = build()
    pruner = GradientFlowPruner(unet, one_shot(ratio=0.4))
    pruner.step(0, [])
    train_step(unet, torch.optim.SGD(unet.parameters(), lr=1e-2), EMAModel(unet.parameters()), seed=0)
    trained = {name: parameter.detach().clone() for name, parameter in dense_parameters(unet).items()}
    dense = pruner.detach()
    fresh = build()
    fresh.load_state_dict(trained)
    assert torch.equal(run(dense), run(fresh))
    assert not torch.equal(run(dense), run(build()))
