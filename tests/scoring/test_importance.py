"""Importance: gradient-flow scores predict loss changes, other scores have known answers, and scoring has no side effects."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import interpolate

from diffusers_gfprune import criteria as registry
from diffusers_gfprune.configuration import GFPruneConfig
from diffusers_gfprune.criteria import criteria, find_criterion, register_criterion
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.pruning import masking
from diffusers_gfprune.pruning.channel_groups import ChannelGroup, trace_channel_groups
from diffusers_gfprune.scoring.importance import score_units
from helpers.architectures import build, random_masks

Batches = list[tuple[Tensor, ...]]

# Every criterion, with both ways to multiply by the Hessian.
CRITERIA = {
    "predictions": {"criterion": "gradient-flow"},
    "exact": {"criterion": "gradient-flow-weights", "hvp": "exact"},
    "finite-difference": {"criterion": "gradient-flow-weights", "hvp": "finite-difference"},
    "taylor": {"criterion": "taylor"},
    "diff-pruning": {"criterion": "diff-pruning"},
    "magnitude": {"criterion": "magnitude"},
    "random": {"criterion": "random"},
}
# Gradient flow as the paper states it, at dense weights.
PAPER = {
    **{"criterion": "gradient-flow-weights", "aggregation": "signed", "hessian_batches": "mean"},
    "score_at": "dense",
}


def smooth_images(count: int, generator: torch.Generator) -> Tensor:
    """Images in [-1, 1] that a small model learns fast, with shape `(count, 1, 8, 8)`."""
    return interpolate(torch.rand(count, 1, 2, 2, generator=generator) * 2 - 1, size=8, mode="bilinear")


def draw_batch(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A batch `(clean_images, noise, timesteps)`."""
    noise = torch.randn(images.shape, generator=generator)
    return images, noise, torch.randint(0, 1000, (len(images),), generator=generator)


@dataclass(repr=False)
class Setting:
    """A model and what is needed to score it."""

    unet: UNet2DModel
    groups: list[ChannelGroup]
    batches: Batches
    scheduler: DDPMScheduler

    def scores(self, **options) -> dict[str, Tensor]:
        """Scores with some options changed."""
        batches = [DiffusionBatch.of(batch) for batch in self.batches]
        return score_units(self.unet, self.groups, batches, self.scheduler, GFPruneConfig(**{"ranking": "group", **options}))


@pytest.fixture(scope="module")
def trained() -> Setting:
    """A small model after some optimizer steps, and two batches of calibration images."""
    generator = torch.Generator().manual_seed(3)
    scheduler, unet = DDPMScheduler(), build("fine-units")
    images = smooth_images(32, generator)
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-3)
    for _ in range(30):
        clean, noise, timesteps = draw_batch(images, generator)
        loss = ((unet(scheduler.add_noise(clean, noise, timesteps), timesteps).sample - noise) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    batches = [draw_batch(images[start : start + 4], generator) for start in (0, 4)]
    return Setting(unet, trace_channel_groups(unet), batches, scheduler)


def masked(setting: Setting, soft: bool = False) -> Setting:
    """A copy of the setting with masks on: a random half of the units or so at 0, or at 0.4."""
    unet = copy.deepcopy(setting.unet)
    masking.attach(unet, setting.groups)
    masks = random_masks(setting.groups, seed=2)
    unet.channel_masks.set({name: mask.clamp_min(0.4) if soft else mask for name, mask in masks.items()})
    return Setting(unet, setting.groups, setting.batches, setting.scheduler)


def differ(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of scores differ by more than rounding."""
    return any(not torch.allclose(first[name], second[name], rtol=1e-3) for name in first)


# --- gradient flow -----------------------------------------------------------------------------------------------------


def squared_gradient_norm(setting: Setting) -> float:
    """||dL/dtheta||^2 of the mean loss over the batches, over all parameters, in the dtype of the model."""
    losses = []
    for clean, noise, timesteps in setting.batches:
        noisy = setting.scheduler.add_noise(clean, noise, timesteps)
        losses.append(((setting.unet(noisy, timesteps).sample - noise) ** 2).mean())
    gradients = torch.autograd.grad(sum(losses) / len(losses), list(setting.unet.parameters()))
    return sum(gradient.square().sum().item() for gradient in gradients)


def scale_unit(unet: nn.Module, group: ChannelGroup, unit: Sequence[int], factor: float) -> None:
    """Scale every slice of the channels of one unit, those that produce them and those that read them."""
    with torch.no_grad():
        for piece in group.slices:
            for channel in unit:
                unet.get_parameter(piece.name).select(piece.dim, piece.positions[channel]).mul_(factor)


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize(
    "name",
    [
        "conv_in",  # a residual stream that crosses skips, norms and attentions
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.1.attentions.0.to_q",
        "up_blocks.1.resnets.0.conv2",
        "mid_block.resnets.0.conv1",
    ],
)
def test_gradient_flow_predicts_the_change_of_the_gradient_norm(trained: Setting, name: str) -> None:
    """The paper's first check: scaling unit c by 1 - eps changes ||g||^2 by -2 eps I_c.

    Double precision, because the change is a small difference of large numbers.
    """
    unet = copy.deepcopy(trained.unet).double()
    batches = [(clean.double(), noise.double(), timesteps) for clean, noise, timesteps in trained.batches]
    setting = Setting(unet, trained.groups, batches, trained.scheduler)
    score = setting.scores(hvp="exact", **PAPER)[name]
    group = next(group for group in trained.groups if group.name == name)
    saved = copy.deepcopy(unet.state_dict())
    before, epsilon, measured = squared_gradient_norm(setting), 1e-4, []
    for unit in group.units:
        scale_unit(setting.unet, group, unit, 1 - epsilon)
        measured.append((squared_gradient_norm(setting) - before) / (-2 * epsilon))
        setting.unet.load_state_dict(saved)
    measured = torch.tensor(measured)
    assert spearmanr(measured, score).statistic >= 0.95
    assert (measured - score).abs().max() <= 0.05 * score.abs().max()
    # both signs occur, or the sign convention would not be tested
    assert score.min() < 0 < score.max()


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize("score_at", ["dense", "masked"])
@pytest.mark.parametrize("hessian_batches", ["mean", "each"])
def test_exact_and_finite_difference_scores_agree(trained: Setting, score_at: str, hessian_batches: str) -> None:
    """The first-order way stands in for the exact one where double backward is impossible."""
    setting = masked(trained) if score_at == "masked" else trained
    options = {**PAPER, "score_at": score_at, "hessian_batches": hessian_batches}
    exact = setting.scores(hvp="exact", **options)
    difference = setting.scores(hvp="finite-difference", **options)
    correlation = {name: torch.corrcoef(torch.stack([exact[name], difference[name]]))[0, 1].item() for name in exact}
    assert min(correlation.values()) >= 0.99, correlation


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_have_one_finite_value_per_unit(trained: Setting, criterion: str) -> None:
    """Budgets and masks rely on names, shapes and dtype."""
    scores = trained.scores(**CRITERIA[criterion])
    assert {name: values.shape for name, values in scores.items()} == {g.name: (g.num_units,) for g in trained.groups}
    for values in scores.values():
        assert values.dtype == torch.float32
        assert torch.isfinite(values).all()
        assert values.unique().numel() > 1
        assert not values.requires_grad


@pytest.mark.fast_variants(4)
@pytest.mark.parametrize("score_at", ["dense", "masked"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_scoring_leaves_no_trace(trained: Setting, criterion: str, score_at: str) -> None:
    """Ranking happens in the middle of training: nothing of the model may be touched, not by one bit."""
    setting = masked(trained, soft=True)
    unet = setting.unet.train()
    for parameter in unet.parameters():
        parameter.grad = torch.randn(parameter.shape)
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    gradients = {name: (parameter.grad, parameter.grad.clone()) for name, parameter in unet.named_parameters()}
    masks = unet.channel_masks.as_dict()

    setting.scores(score_at=score_at, **CRITERIA[criterion])

    assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())
    for name, parameter in unet.named_parameters():
        held, before = gradients[name]
        assert parameter.grad is held and torch.equal(held, before), name
    assert all(torch.equal(mask, masks[name]) for name, mask in unet.channel_masks.as_dict().items())
    assert not unet.channel_masks.all_ones
    assert all(module.training for module in unet.modules())


def test_mode_is_restored_after_an_error(trained: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training can continue with masks after the error."""
    monkeypatch.setattr(registry, "_CRITERIA", dict(registry._CRITERIA))

    @register_criterion("failing")
    def failing(context):
        assert not context.unet.training and context.unet.channel_masks.all_ones
        raise KeyError("on purpose")

    setting = masked(trained)
    setting.unet.train()
    with pytest.raises(KeyError, match="on purpose"):
        setting.scores(criterion="failing", score_at="dense")
    assert setting.unet.training
    assert not setting.unet.channel_masks.all_ones


# --- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("aggregation", ("signed", "abs", "sum_abs")),
        ("hessian_batches", ("mean", "each")),
    ],
)
def test_every_variant_scores_differently(trained: Setting, option: str, values: tuple[str, ...]) -> None:
    """An option that changes nothing is not connected."""
    scores = {value: trained.scores(**{**PAPER, option: value}) for value in values}
    assert all(torch.isfinite(values).all() for found in scores.values() for values in found.values())
    for first, second in combinations(values, 2):
        assert differ(scores[first], scores[second]), (first, second)


def test_absolute_value_of_the_sum_is_that_of_the_signed_score(trained: Setting) -> None:
    """Signed <= abs <= sum_abs, by definition."""
    signed, absolute, sums = (
        trained.scores(**{**PAPER, "aggregation": aggregation}) for aggregation in ("signed", "abs", "sum_abs")
    )
    for name in signed:
        torch.testing.assert_close(absolute[name], signed[name].abs())
        assert (sums[name] >= absolute[name]).all()


@pytest.mark.parametrize("hvp", ["exact", "finite-difference"])
def test_hessian_batches_do_not_matter_for_one_batch(trained: Setting, hvp: str) -> None:
    """The mean over one batch is that batch."""
    one = Setting(trained.unet, trained.groups, trained.batches[:1], trained.scheduler)
    mean, each = (one.scores(hvp=hvp, **{**PAPER, "hessian_batches": value}) for value in ("mean", "each"))
    assert all(torch.equal(mean[name], each[name]) for name in mean)


def test_mean_over_batches_is_that_of_one_large_batch(trained: Setting) -> None:
    """g and H of the mean loss do not depend on how images are cut into batches, also where the last one is short."""
    whole = tuple(torch.cat(column) for column in zip(*trained.batches))
    large = Setting(trained.unet, trained.groups, [whole], trained.scheduler)
    uneven = [tuple(column[:-3] for column in whole), tuple(column[-3:] for column in whole)]
    short = Setting(trained.unet, trained.groups, uneven, trained.scheduler)
    for setting, criterion in itertools.product((trained, short), ("exact", "taylor", "diff-pruning")):
        split, together = (each.scores(**{**PAPER, **CRITERIA[criterion]}) for each in (setting, large))
        for name in split:
            torch.testing.assert_close(split[name], together[name], rtol=1e-3, atol=1e-3 * together[name].abs().max().item())


@pytest.mark.parametrize("criterion", ["exact", "taylor"])
def test_score_at_matters_only_where_masks_are_not_ones(trained: Setting, criterion: str) -> None:
    """With masks on, dense scores are those of the model without masks, masked scores are not."""
    options = {**PAPER, **CRITERIA[criterion]}
    unmasked = trained.scores(**options)
    pruned = masked(trained)
    dense, sparse = (pruned.scores(**{**options, "score_at": score_at}) for score_at in ("dense", "masked"))
    assert all(torch.equal(dense[name], unmasked[name]) for name in dense)
    assert differ(dense, sparse)

    pruned.unet.channel_masks.set({group.name: torch.ones(group.num_units) for group in trained.groups})
    for score_at in ("dense", "masked"):
        ones = pruned.scores(**{**options, "score_at": score_at})
        assert all(torch.equal(ones[name], unmasked[name]) for name in ones)


@pytest.mark.parametrize("criterion", ["gradient-flow", "exact", "taylor", "diff-pruning"])
def test_halved_units_are_scored_like_others(trained: Setting, criterion: str) -> None:
    """At the midpoint of a random choice, scores of the units that it removes change as much as those that it keeps."""
    halved = copy.deepcopy(trained)
    masking.attach(halved.unet, trained.groups)
    generator = torch.Generator().manual_seed(1)
    removed = {group.name: torch.rand(group.num_units, generator=generator) < 0.25 for group in trained.groups}
    halved.unet.channel_masks.set({name: torch.where(units, 0.5, 1.0) for name, units in removed.items()}, check=False)
    options = {"criterion": criterion, **CRITERIA.get(criterion, {})}
    dense, found = (halved.scores(**options, score_at=score_at) for score_at in ("dense", "midpoint"))
    change = torch.cat([found[name] / dense[name] for name in removed])
    units = torch.cat(list(removed.values()))
    assert change[units].median().item() == pytest.approx(change[~units].median().item(), rel=0.3)


def test_diff_pruning_with_threshold_zero_is_the_plain_sum(trained: Setting) -> None:
    """Without a threshold every timestep counts: sum_c |theta g| with g of the mean loss, up to the number of batches."""
    one = Setting(trained.unet, trained.groups, trained.batches[:1], trained.scheduler)
    scores = one.scores(criterion="diff-pruning", diff_pruning_threshold=0.0)
    clean, noise, timesteps = trained.batches[0]
    noisy = trained.scheduler.add_noise(clean, noise, timesteps)
    loss = ((trained.unet(noisy, timesteps).sample - noise) ** 2).mean()
    parameters = dict(trained.unet.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
    for group in trained.groups:
        expected = torch.zeros(group.num_units)
        for piece in group.slices:
            product = (parameters[piece.name].detach() * gradients[piece.name]).abs()
            for channel, position in enumerate(piece.positions):
                expected[group.unit_of[channel]] += product.select(piece.dim, position).sum()
        torch.testing.assert_close(scores[group.name], expected, rtol=1e-4, atol=1e-6)
    assert differ(scores, one.scores(criterion="diff-pruning", diff_pruning_threshold=0.95))


def test_random_scores_come_from_the_seed_alone(trained: Setting) -> None:
    """The baseline must be repeatable, whatever the state of the global generator."""
    first = trained.scores(criterion="random", pruning_seed=4)
    torch.rand(100)
    again, other = trained.scores(criterion="random", pruning_seed=4), trained.scores(criterion="random", pruning_seed=5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first)
    assert all(values.min() >= 0 and values.max() < 1 for values in first.values())


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_criteria_without_gradients_need_no_batches(trained: Setting, criterion: str) -> None:
    """Pruning by weights alone works without images."""
    bare = Setting(trained.unet, trained.groups, [], trained.scheduler)
    assert not differ(bare.scores(criterion=criterion), trained.scores(criterion=criterion))


# --- registry and refusals ---------------------------------------------------------------------------------------------


def test_registered_function_is_used(trained: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example in the module docstring: your own function of the weights."""
    monkeypatch.setattr(registry, "_CRITERIA", dict(registry._CRITERIA))

    @register_criterion("fourth-power")
    def fourth_power(context):
        return context.reduce({name: p.detach() ** 4 for name, p in context.parameters.items()}, "sum_abs")

    assert "fourth-power" in criteria()
    scores = trained.scores(criterion="fourth-power")
    resnet = trained.unet.mid_block.resnets[0]  # the time embedding is added to the channels that conv1 produces
    produced = [resnet.conv1.weight.flatten(1), resnet.time_emb_proj.weight, resnet.conv1.bias[:, None]]
    produced += [resnet.time_emb_proj.bias[:, None], resnet.norm2.weight[:, None], resnet.norm2.bias[:, None]]
    read = resnet.conv2.weight.transpose(0, 1).flatten(1)
    expected = sum((values.detach() ** 4).sum(dim=1) for values in (*produced, read))
    expected = expected.view(-1, 2).sum(dim=1)  # units are the norm groups of norm2, of two channels each
    torch.testing.assert_close(scores["mid_block.resnets.0.conv1"], expected)


def test_scores_of_a_criterion_are_checked(trained: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each unit, of every group; they are kept in float32, as checkpoints hold them."""
    monkeypatch.setattr(registry, "_CRITERIA", dict(registry._CRITERIA))
    right = {group.name: torch.ones(group.num_units, dtype=torch.float64) for group in trained.groups}
    first = trained.groups[0]
    given = dict(right)
    register_criterion("mine")(lambda context: given)
    assert {values.dtype for values in trained.scores(criterion="mine").values()} == {torch.float32}
    given[first.name] = torch.ones(first.num_channels)
    with pytest.raises(
        ValueError, match=f"the criterion gives {first.name} scores with shape .*, and not one for each of its"
    ):
        trained.scores(criterion="mine")
    del given[first.name]
    with pytest.raises(ValueError, match=f"the criterion gives {first.name} no scores"):
        trained.scores(criterion="mine")


@pytest.mark.parametrize("name", ["gradient-flow", "random"])
def test_name_of_a_criterion_is_not_taken_twice(name: str) -> None:
    """A second function of one name would silently change results."""
    before = criteria()
    with pytest.raises(ValueError, match=f"criterion {name} is already registered"):
        register_criterion(name)(lambda context: {})
    assert criteria() == before


def test_builtin_criteria() -> None:
    """Those that the help text of `criterion` names."""
    names = ("gradient-flow", "gradient-flow-weights", "taylor", "diff-pruning", "magnitude", "random")
    assert criteria()[:6] == names
    text = GFPruneConfig.__dataclass_fields__["criterion"].metadata["help"]
    assert all(name in text for name in names)


def test_records_of_builtin_criteria() -> None:
    """What takes no derivative needs no images and costs nothing; one takes the Hessian."""
    records = [find_criterion(name) for name in criteria()[:6]]
    assert [record.derivatives for record in records] == [1, 2, 1, 1, 0, 0]
    for record in records:
        assert record.needs_batches == (record.derivatives > 0) == (record.passes > 0)
        assert GFPruneConfig(criterion=record.name).takes_hessian == (record.name == "gradient-flow-weights")


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({"derivatives": 3}, "derivatives=3 must be one of 0, 1, 2"),
        ({"ranking": "layer"}, "ranking=layer must be one of joint, group, sensitivity, curves, global"),
        ({"sensitivity_exponent": -1}, "^sensitivity_exponent=-1 must be a number >= 0"),
        ({"passes": -1}, "^passes=-1 must be a number >= 0"),
        ({"passes": math.nan}, "^passes=nan must be a number >= 0"),
        ({"block_passes": -0.5}, "^block_passes=-0.5 must be a number >= 0"),
        ({"activation_memory": 0}, "^activation_memory=0 must be a number > 0"),
        ({"activation_memory": math.inf}, "^activation_memory=inf must be a number > 0"),
    ],
)
def test_records_out_of_range_are_refused(properties: dict, message: str) -> None:
    before = criteria()
    with pytest.raises(ValueError, match=message):
        register_criterion("wrong", **properties)(lambda context: {})
    assert criteria() == before


def test_unknown_criterion_is_refused(trained: Setting) -> None:
    """The message lists what there is."""
    with pytest.raises(ValueError, match="criterion=hessian must be one of .*gradient-flow"):
        trained.scores(criterion="hessian")


@pytest.mark.parametrize("criterion", ["exact", "finite-difference", "taylor", "diff-pruning"])
def test_no_batches_are_refused(trained: Setting, criterion: str) -> None:
    """Criteria that need gradients need images."""
    bare = Setting(trained.unet, trained.groups, [], trained.scheduler)
    with pytest.raises(ValueError, match="needs calibration batches, got none"):
        bare.scores(**CRITERIA[criterion])


@pytest.mark.parametrize("criterion", ["exact", "finite-difference", "taylor", "diff-pruning", "magnitude"])
def test_scores_of_nan_weights_are_refused(trained: Setting, criterion: str) -> None:
    """A diverged model would be pruned at random without a word."""
    broken = Setting(copy.deepcopy(trained.unet), trained.groups, trained.batches, trained.scheduler)
    with torch.no_grad():
        broken.unet.mid_block.resnets[0].conv1.weight[3, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        broken.scores(**CRITERIA[criterion])


def test_nan_images_are_refused(trained: Setting) -> None:
    """The same, with the fault in the calibration images."""
    clean, noise, timesteps = trained.batches[0]
    broken = Setting(trained.unet, trained.groups, [(clean * float("nan"), noise, timesteps)], trained.scheduler)
    with pytest.raises(ValueError, match="calibration images contain NaN"):
        broken.scores()
