"""Gradient norms in the metric of predictions: definition, predictions and invariances."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from scipy.stats import spearmanr
from torch import Tensor

from diffusers_gfprune.configuration import GFPruneConfig
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.pruning import masking
from diffusers_gfprune.pruning.blocks import trace_groups
from diffusers_gfprune.pruning.channel_groups import trace_channel_groups
from diffusers_gfprune.scoring import natural_gradient
from diffusers_gfprune.scoring.context import JointScores, ScoringContext
from diffusers_gfprune.scoring.importance import average_scores, score_units, score_units_jointly
from helpers.architectures import ARCHITECTURES, BASE, build, inputs
from helpers.processes import ddpm

ROOT = Path(__file__).resolve().parents[2]
SCHEDULER = ddpm()
CONFIG = GFPruneConfig()


def batch_of(unet: UNet2DModel, size: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Random images, noise and timesteps, and class labels where the model wants them."""
    generator = torch.Generator().manual_seed(seed)
    example = inputs(unet, batch_size=size)
    shape = example["sample"].shape
    clean, noise = torch.rand(shape, generator=generator) * 2 - 1, torch.randn(shape, generator=generator)
    labels = () if example.get("class_labels") is None else (example["class_labels"],)
    return (clean, noise, torch.randint(0, 1000, (size,), generator=generator), *labels)


def scores(unet: UNet2DModel, batches: list, config: GFPruneConfig = CONFIG) -> dict[str, Tensor]:
    batches = [DiffusionBatch.of(batch) for batch in batches]
    return score_units(unet, trace_channel_groups(unet), batches, SCHEDULER, config)


def predict(unet: UNet2DModel, batch: tuple[Tensor, ...]) -> Tensor:
    clean, noise, timesteps = batch[:3]
    with torch.no_grad():
        return unet(SCHEDULER.add_noise(clean, noise, timesteps), timesteps).sample


@pytest.mark.fast_variants(1)
@pytest.mark.parametrize(
    "name", ["conv_in", "down_blocks.1.attentions.0.to_q", "up_blocks.1.resnets.0.conv2", "time_embedding.linear_1"]
)
def test_score_is_the_squared_derivative_of_predictions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed over the channels of a unit: by moving the weights that produce a channel a little, in double precision; 8 x 100
    probes leave a few percent."""
    monkeypatch.setattr(natural_gradient, "PROBES", 100)
    unet = build("fine-units").double().eval()
    (group,) = (group for group in trace_channel_groups(unet) if group.name == name)
    batch = tuple(c.double() if c.is_floating_point() else c for c in batch_of(unet, 8))
    found = scores(unet, [batch])[name]
    expected = torch.zeros(group.num_channels)
    for channel in range(group.num_channels):
        moved = []
        for factor in (1.001, 0.999):
            pieces = [(unet.get_parameter(p.name), p) for p in group.slices if p.role != "input"]
            saved = [parameter.detach().clone() for parameter, _ in pieces]
            with torch.no_grad():
                for parameter, piece in pieces:
                    parameter.select(piece.dim, piece.positions[channel]).mul_(factor)
            moved.append(predict(unet, batch))
            for (parameter, _), value in zip(pieces, saved):
                parameter.data.copy_(value)
        expected[channel] = ((moved[0] - moved[1]) / 0.002).square().mean()
    ratio = found / group.unit_sums(expected)
    assert ratio.mean().item() == pytest.approx(1, abs=0.05)
    assert 0.5 < ratio.min() and ratio.max() < 1.5 and ratio.std() < 0.2


@pytest.mark.slow
def test_scores_tell_the_damage_of_single_units() -> None:
    """On the trained digits model, over units of whole norm groups; within the middle block, these differ little."""
    unet = UNet2DModel.from_pretrained(ROOT / "training/digits/teacher/unet", use_safetensors=True).eval()
    groups = [g for g in trace_channel_groups(unet) if g.name in ("up_blocks.1.resnets.1.conv1", "mid_block.resnets.0.conv1")]
    assert len(groups) == 2
    batches = [batch_of(unet, 32, seed) for seed in range(3)]
    found = scores(unet, batches, CONFIG)
    masks = masking.attach(unet, trace_channel_groups(unet))
    before, damage = predict(unet, batches[0]), []
    for group in groups:
        for unit in range(group.num_units):
            mask = torch.ones(group.num_units)
            mask[unit] = 0
            masks.set({group.name: mask})
            damage.append((predict(unet, batches[0]) - before).square().mean())
        masks.set({group.name: torch.ones(group.num_units)})
    assert spearmanr(torch.cat([found[group.name] for group in groups]), torch.stack(damage)).statistic > 0.8


@pytest.mark.fast_variants(9)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_unit_of_every_architecture_has_a_score(name: str) -> None:
    unet = build(name)
    found = scores(unet, [batch_of(unet, 2)])
    for group, values in ((group, values) for group, values in found.items() if len(values)):  # some are fixed as a whole
        assert torch.isfinite(values).all() and (values >= 0).all() and values.max() > 0, group


def test_scores_belong_to_images_not_to_batches() -> None:
    """In whatever order and however cut."""
    unet = build("fine-units")
    batch = batch_of(unet, 8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    whole = scores(unet, [batch])
    for other in ([tuple(c[order] for c in batch)], [tuple(c[:4] for c in batch), tuple(c[4:] for c in batch)]):
        for name, values in scores(unet, other).items():
            torch.testing.assert_close(values, whole[name], rtol=1e-3, atol=1e-6 * whole[name].max().item())
    elsewhere = scores(unet, [batch_of(unet, 8, seed=1)])
    assert not torch.allclose(elsewhere["conv_in"], whole["conv_in"], rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batches_in_half_precision_are_scored_in_full(dtype: torch.dtype) -> None:
    """Images and noise of a run in half precision, for a model in float32."""
    unet = build("fine-units")
    halved = tuple(c.to(dtype) if c.is_floating_point() else c for c in batch_of(unet, 4))
    for values in scores(unet, [halved]).values():
        assert values.dtype == torch.float32 and torch.isfinite(values).all() and values.max() > 0


def test_a_prediction_of_another_shape_is_refused() -> None:
    """Only twice the channels are a prediction with its variances."""
    unet = UNet2DModel(**{**BASE, "out_channels": 3})
    with pytest.raises(ValueError, match=r"the prediction has shape \(4, 3, 8, 8\), its target has \(4, 1, 8, 8\)"):
        scores(unet, [batch_of(unet, 4)])


def test_more_probes_bring_scores_closer_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of probes is what two sets of them differ by, on the same images at other noise."""
    unet = build("fine-units")
    agreement = {}
    for probes in (1, 16):
        monkeypatch.setattr(natural_gradient, "PROBES", probes)
        first = scores(unet, [batch_of(unet, 8)])
        monkeypatch.setattr(
            natural_gradient, "_probe", lambda batch, number, p=natural_gradient._probe: p(batch, number + 100)
        )
        second = scores(unet, [batch_of(unet, 8)])
        monkeypatch.undo()
        together = (torch.cat([s[name] / s[name].mean() for name in s]) for s in (first, second))
        agreement[probes] = torch.corrcoef(torch.stack(list(together)))[0, 1]
    assert agreement[16] > max(0.9, agreement[1])


def test_nothing_is_left_behind() -> None:
    unet = build("fine-units").train()
    unet.enable_gradient_checkpointing()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    plain = scores(build("fine-units"), [batch_of(unet, 4)])
    found = scores(unet, [batch_of(unet, 4)])
    assert all(torch.allclose(found[name], plain[name], rtol=1e-4) for name in plain)
    assert not any(module._forward_hooks for module in unet.modules())
    assert unet.training and all(p.grad is None and p.requires_grad for p in unet.parameters())
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


# --- what units change together ----------------------------------------------------------------------------------------


def joint(unet: UNet2DModel, batches: list) -> JointScores:
    batches = [DiffusionBatch.of(batch) for batch in batches]
    return score_units_jointly(unet, trace_channel_groups(unet), batches, SCHEDULER, CONFIG)


def remove_a_little(unet: UNet2DModel, chosen: dict[str, Tensor], share: float) -> None:
    """Scale the weights that produce the channels of chosen units by 1 - share, in place."""
    for group in trace_channel_groups(unet):
        factors = 1 - share * (group.per_channel(chosen[group.name].float()) if group.name in chosen else 0)
        for piece in (piece for piece in group.slices if piece.role != "input" and group.name in chosen):
            parameter = unet.get_parameter(piece.name)
            shape = [-1 if axis == piece.dim else 1 for axis in range(parameter.ndim)]
            whole = torch.ones(parameter.shape[piece.dim], dtype=torch.float64)
            whole[list(piece.positions)] = factors.double()
            parameter.data.mul_(whole.view(shape))


@pytest.mark.slow
def test_rows_give_the_joint_change_of_units_of_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moving half of the units of every group a little, in double precision."""
    monkeypatch.setattr(natural_gradient, "PROBES", 200)
    unet = build("fine-units").double().eval()
    batch = tuple(c.double() if c.is_floating_point() else c for c in batch_of(unet, 8))
    generator = torch.Generator().manual_seed(0)
    chosen = {g.name: torch.rand(g.num_units, generator=generator) < 0.5 for g in trace_channel_groups(unet)}
    measured = joint(unet, [batch])
    together = sum(measured.changes[name][:, units].sum(dim=1) for name, units in chosen.items())
    alone = sum(float(measured.scores[name][units].sum()) for name, units in chosen.items())
    before = predict(unet, batch)
    remove_a_little(unet, {name: 1 - units.float() == 0 for name, units in chosen.items()}, 1e-4)
    expected = ((predict(unet, batch) - before) / 1e-4).square().mean().item()
    assert together.square().sum().item() == pytest.approx(expected, rel=0.15)
    assert abs(alone - expected) > 0.3 * expected  # a sum of single changes is another number


def test_changes_of_masked_units_are_those_of_their_mask_values() -> None:
    """At masks of 1/2, by moving the masks."""
    unet = build("fine-units").double().eval()
    masks = masking.attach(unet, trace_channel_groups(unet))
    name = "mid_block.resnets.0.conv1"
    masks.set({name: torch.full_like(masks[name], 0.5)})
    batch = tuple(c.double() if c.is_floating_point() else c for c in batch_of(unet, 8))
    rows = score_units_jointly(unet, list(masks.groups.values()), [DiffusionBatch.of(batch)], SCHEDULER, CONFIG).changes
    moved = []
    for value in (0.501, 0.499):
        masks.set({name: torch.full_like(masks[name], value)})
        moved.append(predict(unet, batch))
    expected = ((moved[0] - moved[1]) / 0.002).square().mean().item()
    assert rows[name].sum(dim=1).square().sum().item() == pytest.approx(expected, rel=0.5)  # 32 probes


def test_more_rows_than_are_kept_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = build("fine-units")
    whole = joint(unet, [batch_of(unet, 8), batch_of(unet, 8, seed=1)]).changes["conv_in"]
    assert whole.shape == (64, trace_channel_groups(unet)[0].num_units)
    monkeypatch.setattr(natural_gradient, "ROWS", 16)
    folded = joint(unet, [batch_of(unet, 8), batch_of(unet, 8, seed=1)]).changes["conv_in"]
    torch.testing.assert_close(folded, whole.view(4, 16, -1).sum(dim=0))


def test_averages_of_rows_have_the_averaged_square() -> None:
    """In expectation; 4,000 rows leave a few percent. Scores are averaged as they are, with the same scale."""
    generator = torch.Generator().manual_seed(0)

    def ranking(size: float) -> tuple[dict, dict]:
        changes = torch.randn(4000, 3, generator=generator) * torch.tensor([1.0, 2.0, 4.0]) * size
        return {"a": changes.square().sum(dim=0)}, {"a": changes}

    first, second = ranking(1.0), ranking(10.0)
    once = average_scores((None, None), first, 0.9)
    assert once[0]["a"].mean() == pytest.approx(1)
    scores, changes = average_scores(once, second, 0.9)
    torch.testing.assert_close(changes["a"].square().sum(dim=0), scores["a"], rtol=0.1, atol=0)
    assert average_scores(once, (second[0], None), 0.9)[1] is None
    longer = average_scores(once, (second[0], {"a": torch.cat([second[1]["a"]] * 2)}), 0.9)
    assert longer[1]["a"].shape == (8000, 3)


def test_rankings_on_the_same_images_have_their_own_directions() -> None:
    """With the same ones, rows would add up coherently: to 38 times the square after many rankings with a decay of 0.9."""
    unet, averaged = build("fine-units").eval(), (None, None)
    groups, batches = trace_channel_groups(unet), [DiffusionBatch.of(batch_of(unet, 8))]
    for ranking in range(12):
        found = score_units_jointly(unet, groups, batches, SCHEDULER, CONFIG, ranking)
        averaged = average_scores(averaged, (found.scores, found.changes), 0.9)
        sizes = [sum(float(values.square().sum()) for values in averaged[1].values())]
        if ranking == 0:
            (first,) = sizes
    assert sizes[0] == pytest.approx(first, rel=0.5)


def test_a_criterion_without_joint_changes_is_refused() -> None:
    unet = build("fine-units")
    with pytest.raises(ValueError, match="criterion=magnitude does not measure joint changes"):
        score_units_jointly(unet, trace_channel_groups(unet), [], SCHEDULER, GFPruneConfig(criterion="magnitude"))


# --- removable blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.0, 0.5, 0.0])
def test_the_change_of_a_block_is_measured(value: float) -> None:
    """f(m_b = 1) - f(m_b = 0), whatever its mask is now; with 0 it is as for masked channels."""
    unet = build()
    groups = trace_groups(unet, "allow")
    masks = masking.attach(unet, groups)
    block = next(group for group in groups if group.name == "mid_block.resnets.0")
    batch = DiffusionBatch.of(batch_of(unet, 4))
    context = ScoringContext(unet, groups, [batch], SCHEDULER, CONFIG)
    predictions = []
    for mask in (1.0, 0.0):
        masks.set({block.name: torch.tensor([mask])})
        with torch.no_grad():
            predictions.append(context.predictions(batch))
    change = predictions[0] - predictions[1]
    masks.set({block.name: torch.tensor([value])})
    found = natural_gradient.joint_changes(context)
    expected = change.square().mean() if value else torch.tensor(0.0)
    torch.testing.assert_close(found.scores[block.name], expected.view(1), rtol=1e-4, atol=1e-9)
    along = [(change * natural_gradient._probe(batch, number)).flatten(1).sum(1) for number in range(natural_gradient.PROBES)]
    rows = torch.cat(along) / change[0].numel() ** 0.5 / (len(batch) * len(along)) ** 0.5
    rows = rows if value else torch.zeros_like(rows)
    torch.testing.assert_close(found.changes[block.name][:, 0], rows, rtol=1e-3, atol=1e-6)
