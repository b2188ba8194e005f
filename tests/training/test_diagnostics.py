"""Failures cause warnings with a remedy; the published run of this repository causes none."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.pruner import MaskUpdate
from diffusers_gfprune.pruning.channel_groups import ChannelGroup, GroupSlice
from diffusers_gfprune.pruning.compaction import plan_compaction
from diffusers_gfprune.pruning.masking import dense_parameters
from diffusers_gfprune.pruning.recovery import recover
from diffusers_gfprune.scoring import hessian_product
from diffusers_gfprune.scoring.importance import ScoringContext
from diffusers_gfprune.training.diagnostics import (
    COMPARED_ROWS,
    check_hessian_gradient_product,
    compare_with_magnitude,
    diagnose,
)
from helpers.architectures import build
from helpers.pruners import SCHEDULER, batches, config

CARD = Path(__file__).resolve().parents[2] / "model_cards/digits-gfpruned/pruning_report.json"
DEFAULT, PAPER = GFPruneConfig(), GFPruneConfig.from_preset("paper")


# --- diagnose ----------------------------------------------------------------------------------------------------------


def history(revived: list[int], interval: int = 10, pruned: int = 40) -> list[MaskUpdate]:
    """Rankings of a model with 100 units, of which `pruned` are masked from the first one on."""
    updates = []
    for index, count in enumerate(revived):
        new = pruned if index == 0 else count
        updates.append(MaskUpdate(index * interval, "soft", 0.3, 0.5, 100 - pruned, count, new, 400, 1e6, 1e4))
    return updates


def calm(steps: int = 6) -> list[tuple[int, float]]:
    """A held-out loss that rises slowly, measured at every ranking."""
    return [(10 * index, 0.07 * 1.05**index) for index in range(steps)]


def kinds(*arguments, **options) -> list[str]:
    """What was found."""
    return [diagnosis.kind for diagnosis in diagnose(*arguments, **options)]


def test_the_published_run_is_healthy():
    """The default run of the digits, as its card records it."""
    report = json.loads(CARD.read_text())
    curves = report["curves"]
    validation = list(zip(curves["validation_steps"], curves["validation_loss"]))
    assert len(report["mask_updates"]) == 3 and len(validation) > 30  # as many rankings as the recipe has
    assert diagnose(report["mask_updates"], validation, GFPruneConfig.from_dict(report["config"])) == []


def test_nothing_recorded_yet():
    """At step 0."""
    assert diagnose([], [], DEFAULT) == []
    assert diagnose(history([0]), [(0, 0.07)], DEFAULT) == []


def test_histories_may_be_dictionaries():
    """As reports hold them."""
    updates = history([0, 20, 20, 20])
    assert diagnose([u.to_dict() for u in updates], [], DEFAULT) == diagnose(updates, [], DEFAULT) != []


@pytest.mark.parametrize(
    ("revived", "found"),
    [
        ([0, 9, 9], True),  # 9 of 40 pruned units
        ([0, 8, 8], False),  # 20 %, not more
        ([0, 9, 0], False),  # once
        ([0, 30, 30, 0, 0, 0, 0, 0], False),  # it has settled
        ([0, 30, 30, 0, 0, 0, 9, 9], True),
    ],
)
def test_flapping_masks(revived: list[int], found: bool):
    """A fifth of the pruned units back, at two of the last five rankings."""
    assert kinds(history(revived), calm(), DEFAULT) == ["masks-flap"] * found


def test_flapping_by_hand():
    """The share is one of the units pruned before the ranking, not after it; the message has the numbers and the remedy."""
    updates = [
        MaskUpdate(0, "soft", 0.1, 0.9, 90, 0, 10, 400, 1e6, 1e4),
        MaskUpdate(1, "soft", 0.3, 0.8, 70, 6, 26, 400, 1e6, 1e4),  # 6 of 10
        MaskUpdate(2, "soft", 0.5, 0.7, 50, 9, 29, 400, 1e6, 1e4),  # 9 of 30
    ]
    (diagnosis,) = diagnose(updates, [], PAPER)
    assert diagnosis.message == (
        "masks flap: at 2 of the last 2 rankings more than 20% of the pruned units were revived (up to 60%): raise "
        "--calibration_batches, --score_decay (now 0) or --revival_margin (now 0)"
    )


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([1.0, 1.05, 1.1, 1.15, 1.2, 1.25], False),
        ([1.0, 1.24, 1.0, 1.0, 1.0, 1.0], False),  # one jump that is not large
        ([1.0, 1.26, 1.0, 1.0, 1.0, 1.0], True),
        ([1.0, 1.11, 1.24, 1.0, 1.0, 1.0], False),  # two rises
        ([1.0, 1.11, 1.24, 1.38, 1.0, 1.0], True),
        ([1.0, float("nan"), 1.0, 1.0, 1.0, float("inf")], False),
    ],
)
def test_rising_losses_at_rankings(losses: list[float], found: bool):
    """One loss for each ranking, 10 steps apart."""
    validation = [(10 * index, loss) for index, loss in enumerate(losses)]
    assert kinds(history([0] * 6), validation, DEFAULT) == ["masks-fall-too-fast"] * found


def test_jumps_that_training_repairs_are_seen():
    """A sawtooth: measured after rankings alone it looks flat, with a loss before each it does not."""
    after = [(10 * index, 1.5) for index in range(6)]
    before = [(step, 1.0) for step, _ in after]
    both = [entry for pair in zip(before, after) for entry in pair]
    between = sorted([*after, *((step - 2, 1.0) for step, _ in after[1:])])
    assert kinds(history([0] * 6), after, PAPER) == []
    assert kinds(history([0] * 6), both, PAPER) == ["masks-fall-too-fast"]
    assert kinds(history([0] * 6), between, PAPER) == ["masks-fall-too-fast"]


def test_what_the_last_ranking_led_to_is_seen():
    """Interpolated masks arrive at their goal after it; what comes later is none of its business."""
    early = [(0, 1.0), (10, 1.0)]
    assert kinds(history([0, 0]), [*early, (20, 1.3)], DEFAULT) == ["masks-fall-too-fast"]
    assert kinds(history([0, 0]), [*early, (20, 1.0), (500, 1.4)], DEFAULT) == []


def test_the_first_ranking_counts():
    """Its jump is relative to the last loss before it."""
    updates = [MaskUpdate(10, "soft", 0.3, 0.5, 60, 0, 40, 400, 1e6, 1e4)]
    assert kinds(updates, [(0, 2.0), (5, 1.0), (10, 1.3)], DEFAULT) == ["masks-fall-too-fast"]
    assert kinds(updates, [(10, 1.3)], DEFAULT) == []


def test_remedy_of_rising_losses():
    """With the numbers of the run; masks that jump can be interpolated."""
    validation = [(0, 1.0), (10, 1.5), (20, 1.4)]
    (published,) = diagnose(history([0, 0, 0]), validation, PAPER)
    assert published.message == (
        "the held-out loss rises at rankings (by 50% at step 10, by more than 10% at 1 of 2): the mask value falls too fast; "
        "raise --soft_fraction (now 0.1), set --interpolate_masks true or choose a gentler --mask_schedule (now linear)"
    )
    (smooth,) = diagnose(history([0, 0, 0]), validation, DEFAULT)
    assert "interpolate" not in smooth.message


def test_one_shot_pruning_is_meant_to_jump():
    """There is no soft phase to make longer."""
    config = GFPruneConfig.from_preset("one-shot")
    assert kinds(history([0]), [(0, 1.0), (0, 5.0)], config) == []


@pytest.mark.parametrize(
    ("options", "check", "remedy"),
    [
        ({}, None, "raise --calibration_batches"),
        ({"criterion": "gradient-flow-weights"}, None, "check the Hessian-gradient product with --check_scores"),
        ({"criterion": "gradient-flow-weights"}, {"rank_correlation": 1.0, "group": "a"}, "or try another --aggregation"),
        ({"criterion": "taylor"}, None, "use --criterion gradient-flow or magnitude"),
    ],
)
def test_no_gain_over_magnitude(options: dict, check: dict | None, remedy: str):
    """What to do depends on what is known."""
    worse = {"loss_dense": 0.06, "loss_criterion": 0.3, "loss_magnitude": 0.2}
    (diagnosis,) = diagnose([], [], GFPruneConfig(**options), worse, check)
    assert diagnosis.kind == "no-gain-over-magnitude"
    assert remedy in diagnosis.message and "0.3000" in diagnosis.message and "0.2000" in diagnosis.message
    assert kinds([], [], DEFAULT, {**worse, "loss_criterion": 0.19}) == []
    assert kinds([], [], GFPruneConfig(criterion="random"), worse) == []


@pytest.mark.parametrize(("hvp", "other"), [("exact", "finite-difference"), ("finite-difference", "exact")])
def test_wrong_products(hvp: str, other: str):
    """The other way is the remedy."""
    config = GFPruneConfig(hvp=hvp)
    (diagnosis,) = diagnose(
        [], [], config, hessian_check={"rank_correlation": 0.42, "group": "conv_in", "relative_error": 1.0}
    )
    assert diagnosis.kind == "wrong-hessian-product"
    assert f"--hvp {other}" in diagnosis.message and "0.420" in diagnosis.message and "conv_in" in diagnosis.message
    assert kinds([], [], config, hessian_check={"rank_correlation": 0.995, "group": "conv_in"}) == []
    assert kinds([], [], config, hessian_check={"rank_correlation": float("nan"), "group": None}) == ["wrong-hessian-product"]


def test_every_message_is_one_line():
    """All at once, causes first."""
    found = diagnose(
        history([0, 30, 30]),
        [(0, 1.0), (10, 2.0)],
        PAPER,
        {"loss_criterion": 2.0, "loss_magnitude": 1.0},
        {"rank_correlation": 0.1, "group": "a"},
    )
    assert [diagnosis.kind for diagnosis in found] == [
        *("wrong-hessian-product", "no-gain-over-magnitude", "masks-flap", "masks-fall-too-fast")
    ]
    for diagnosis in found:
        assert "\n" not in diagnosis.message


# --- measures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruner() -> GradientFlowPruner:
    """In the middle of the soft phase, with masks between 0 and 1."""
    torch.manual_seed(0)
    found = GradientFlowPruner(build("fine-units"), config(criterion="gradient-flow", ratio=0.5), SCHEDULER)
    for step in range(5):
        found.step(step, batches())
    return found


def check(pruner: GradientFlowPruner, **options) -> dict:
    """Of the pruner's model."""
    return check_hessian_gradient_product(
        pruner.unet, pruner.groups, batches(), SCHEDULER, config(criterion="gradient-flow", **options)
    )


@pytest.mark.parametrize("options", [{}, {"aggregation": "signed", "score_at": "masked", "hvp": "finite-difference"}])
def test_right_products_agree(pruner: GradientFlowPruner, options: dict):
    """Exact and by differences, whichever the run uses."""
    found = check(pruner, **options)
    assert found["rank_correlation"] > 0.99 and 0 < found["relative_error"] < 0.02
    assert found["group"] in {group.name for group in pruner.groups if group.num_units >= 16}


def test_wrong_products_are_found(pruner: GradientFlowPruner, monkeypatch: pytest.MonkeyPatch):
    """The gradient itself in place of H g."""
    monkeypatch.setitem(hessian_product.HESSIAN_PRODUCTS, "exact", lambda context, chosen: context.mean_gradient(chosen))
    found = check(pruner)
    assert found["rank_correlation"] < 0.9 and found["relative_error"] > 0.5
    assert kinds([], [], DEFAULT, hessian_check=found) == ["wrong-hessian-product"]


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_few_units_are_ranked_together(scale: float):
    """Groups of fewer than 16 units are too small on their own; a model without gradients has no ranks, and they agree."""
    unet = build("fine-units")
    with torch.no_grad():
        unet.conv_out.weight.mul_(scale)
        unet.conv_out.bias.mul_(scale)
    slices = (GroupSlice("conv_in", "weight", 0, tuple(range(6)), "output"),)
    clean, noise, timesteps = batches()[0].tensors()
    batch = DiffusionBatch(clean, noise * scale, timesteps)
    group = ChannelGroup("conv_in", 6, slices, tuple((channel,) for channel in range(6)))
    found = check_hessian_gradient_product(unet, [group], [batch], SCHEDULER, config(criterion="gradient-flow"))
    assert found["group"] is None
    assert found["rank_correlation"] > 0.9
    assert (found["relative_error"] == 0) == (scale == 0)


def losses_with(pruner: GradientFlowPruner, kept: dict[str, Tensor], dense: UNet2DModel | None = None) -> float:
    """Mean loss of a copy of the model with binary masks, mended where a dense model is given."""
    unet, masks = copy.deepcopy(pruner.unet), {name: flags.float() for name, flags in kept.items()}
    unet.channel_masks.set(masks)
    if dense is not None:
        recover(dense, unet, plan_compaction(unet, pruner.groups, masks), batches()[:1], SCHEDULER, rows=COMPARED_ROWS)
    context = ScoringContext(unet.eval(), pruner.groups, batches(), SCHEDULER, pruner.config)
    with torch.no_grad():
        return sum(context.loss(batch).item() for batch in batches()) / len(batches())


def test_comparison_with_magnitude(pruner: GradientFlowPruner):
    """Each loss is that of the model with the units that scores choose at the full budget; nothing is left behind."""
    before = pruner.unit_masks
    assert len(torch.cat(list(before.values())).unique()) > 2
    pruner.unet.train()
    found = compare_with_magnitude(pruner, batches())
    assert pruner.unet.training
    assert all(torch.equal(mask, before[name]) for name, mask in pruner.unit_masks.items())

    by_magnitude = GradientFlowPruner(build("fine-units"), config(ratio=0.5, soft_fraction=0.0), SCHEDULER)  # the same weights
    by_magnitude.step(0, [])
    everything = {name: torch.ones_like(mask) for name, mask in before.items()}
    chosen = pruner.choose_units(pruner.scores)
    assert found["loss_dense"] == pytest.approx(losses_with(pruner, everything), rel=1e-5)
    assert found["loss_criterion"] == pytest.approx(losses_with(pruner, chosen), rel=1e-5)
    assert found["loss_magnitude"] == pytest.approx(losses_with(pruner, by_magnitude.kept), rel=1e-5)
    assert len(set(found.values())) == 3


def test_comparison_of_mended_models(pruner: GradientFlowPruner):
    """As in runs with recovery; the dense model is as it was, and the weights are, too."""
    dense, before = build("fine-units"), {name: p.clone() for name, p in dense_parameters(pruner.unet).items()}
    found, plain = compare_with_magnitude(pruner, batches(), dense), compare_with_magnitude(pruner, batches())
    chosen = pruner.choose_units(pruner.scores)
    assert found["loss_criterion"] == pytest.approx(losses_with(pruner, chosen, dense), rel=1e-5)
    assert found["loss_dense"] == plain["loss_dense"]
    assert all(abs(found[name] / plain[name] - 1) > 1e-4 for name in ("loss_criterion", "loss_magnitude"))
    assert all(torch.equal(p, before[name]) for name, p in dense_parameters(pruner.unet).items())


def test_masks_are_put_back_after_an_error(pruner: GradientFlowPruner):
    """A run can continue with the masks of the schedule."""
    before = pruner.masks
    clean, noise, timesteps = batches()[0].tensors()
    with pytest.raises(RuntimeError):
        compare_with_magnitude(pruner, [DiffusionBatch(clean, noise[:, :, :3], timesteps)])
    assert all(torch.equal(mask, before[name]) for name, mask in pruner.masks.items())


def test_comparisons_that_cannot_be_made(pruner: GradientFlowPruner):
    """Errors name the reason."""
    with pytest.raises(ValueError, match="batches is empty"):
        compare_with_magnitude(pruner, [])
    unranked = GradientFlowPruner(build("fine-units"), config(), SCHEDULER)
    with pytest.raises(ValueError, match="not ranked yet"):
        compare_with_magnitude(unranked, batches())
    unranked.step(0, batches())
    unranked.detach()
    with pytest.raises(ValueError, match="the model has no masks"):
        compare_with_magnitude(unranked, batches())
