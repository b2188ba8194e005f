"""What the package promises of every family: free masks, lossless compaction, exact costs, files that load bit for bit."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoModel
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.metrics.model_size import count_parameters, spatial_size
from diffusers_gfprune.pruning.compaction import compact, plan_compaction
from diffusers_gfprune.pruning.cost_model import CostModel
from diffusers_gfprune.pruning.masking import attach, detach
from diffusers_gfprune.scoring.context import ScoringContext
from diffusers_gfprune.scoring.natural_gradient import PROBES, _probe, joint_changes
from helpers.architectures import random_masks
from helpers.compaction import relative_error
from helpers.families import ALL, ARCHITECTURES, BASES, build, inputs, pruned, run, traced
from helpers.processes import ddpm


@pytest.mark.fast_variants(8)
@pytest.mark.parametrize(("family", "name"), ALL)
def test_masks_are_free_and_compaction_is_lossless(family: str, name: str) -> None:
    """Masks of ones change nothing, binary masks are the small model, and detached masks leave no trace."""
    model, groups = build(family, name), traced(family, name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    dense = run(model)
    attach(model, groups)
    assert relative_error(run(model), dense) <= 1e-6
    for seed in (0, 1, 2):
        model.channel_masks.set(random_masks(list(groups), seed))
        masked = run(model)
        assert relative_error(masked, dense) > 0.01  # or the masks would not matter
        small = compact(model, plan_compaction(model, groups, model.channel_masks.as_dict()))
        assert count_parameters(small) < sum(value.numel() for value in state.values())
        assert relative_error(run(small), masked) <= 1e-4
        for key, module in small.named_modules():
            if isinstance(module, nn.GroupNorm):
                assert type(module) is nn.GroupNorm, key
    detach(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(run(model), dense)


@torch.no_grad()
def flops(model: nn.Module) -> int:
    """Of a forward at batch size 1, with the products of attention, by PyTorch's counter."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        family_of(model).predict(model, family_of(model).example_inputs(model, *spatial_size(model)))
    return counter.get_total_flops()


@pytest.mark.fast_variants(8)
@pytest.mark.parametrize(("family", "name"), ALL)
def test_costs_are_those_of_the_dense_and_of_the_compacted_model(family: str, name: str) -> None:
    model, groups = build(family, name), list(traced(family, name))
    cost = CostModel(model, groups)
    assert cost.parameters(cost.dense) == count_parameters(model)
    assert 2 * cost.macs(cost.dense) == pytest.approx(flops(model), rel=0.01)
    masks = random_masks(groups, seed=0)
    kept = np.array([int(group.per_channel(masks[group.name]).sum()) for group in groups])
    small = pruned(family, name)
    assert cost.parameters(kept) == count_parameters(small) < count_parameters(model)
    assert 2 * cost.macs(kept) == pytest.approx(flops(small), rel=0.01)


@pytest.mark.fast_variants(8)
@pytest.mark.parametrize(("family", "name"), ALL)
def test_saved_models_load_bit_for_bit(family: str, name: str, tmp_path: Path) -> None:
    """Also with memory for all weights at once, by AutoModel, and from the config alone."""
    small = pruned(family, name)
    kind, known = type(small), run(small)
    small.save_pretrained(tmp_path)
    for loaded in (
        kind.from_pretrained(tmp_path),
        kind.from_pretrained(tmp_path, low_cpu_mem_usage=False),
        AutoModel.from_pretrained(str(tmp_path)),
    ):
        assert type(loaded) is kind and not loaded.training
        assert torch.equal(run(loaded), known)
    twin = kind.from_config(json.loads(json.dumps(dict(small.config)))).eval()
    assert torch.isfinite(run(twin)).all()
    twin.load_state_dict(small.state_dict())
    assert torch.equal(run(twin), known)


@pytest.mark.parametrize("family", BASES)
def test_the_shipped_file_loads_the_model_by_itself(family: str, tmp_path: Path) -> None:
    """Without this package, Diffusers runs the file beside the weights."""
    small = pruned(family)
    small.save_pretrained(tmp_path)
    path = tmp_path / "diffusers_gfprune.py"
    spec = importlib.util.spec_from_file_location(f"shipped_{family}", path)
    shipped = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shipped)
    kind = getattr(shipped, type(small).__name__)
    assert kind is not type(small)
    loaded = kind.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(family_of(small).output(loaded, inputs(small)), run(small))
    before = path.read_bytes()
    loaded.save_pretrained(tmp_path)  # its own file onto itself
    assert path.read_bytes() == before == type(small).source().encode()


@pytest.mark.fast_variants(4)
@pytest.mark.parametrize("criterion", ["gradient-flow", "gradient-flow-weights", "taylor", "magnitude"])
@pytest.mark.parametrize("family", BASES)
def test_the_pruner_scores_and_meets_a_budget(family: str, criterion: str) -> None:
    model = build(family)
    config = GFPruneConfig.from_preset("one-shot", total_steps=1, criterion=criterion, target="macs", ratio=0.3)
    pruner = GradientFlowPruner(model, config)
    sample, timesteps, conditioning = inputs(model, batch_size=4)
    noise = torch.randn(sample.shape)
    update = pruner.step(0, [DiffusionBatch(sample.clamp(-1, 1), noise, timesteps, conditioning)])
    assert update.sparsity == pytest.approx(0.3, abs=0.01)
    small = pruner.compact()
    assert relative_error(run(small), run(model)) <= 1e-4
    assert type(small) is family_of(model).pruned_class


@pytest.mark.parametrize(("family", "name"), [*((family, "base") for family in BASES), ("pixart", "sizes")])
def test_scores_are_derivatives_by_masks(family: str, name: str) -> None:
    """E (r^T df/dm_c)^2 with the same probes r, also for layers that the forward calls twice, or with two rows an image."""
    model, groups, process = build(family, name), list(traced(family, name)), ddpm()
    sample, timesteps, conditioning = inputs(model, batch_size=1)
    batch = DiffusionBatch(sample, torch.randn(sample.shape), timesteps, conditioning)
    context = ScoringContext(model, groups, [batch], process, GFPruneConfig(total_steps=10))
    joint = joint_changes(context)
    assert {name: tuple(rows.shape) for name, rows in joint.changes.items()} == {
        group.name: (PROBES, group.num_units) for group in groups
    }
    for group in groups:
        mask = torch.ones(group.num_channels, requires_grad=True)
        weights = dict(model.named_parameters())
        for piece in (piece for piece in group.slices if piece.role != "input"):
            weight = weights[piece.name]
            factor = torch.ones(weight.shape[piece.dim]).index_put((torch.tensor(piece.positions),), mask)
            weights[piece.name] = weight * factor.view([-1 if dim == piece.dim else 1 for dim in range(weight.ndim)])
        masked = functools.partial(functional_call, model, weights)
        found = family_of(model).predict(lambda *args, **kwargs: masked(args, kwargs), batch.inputs(process))  # noqa: B023
        changes = [
            torch.autograd.grad(found, mask, _probe(batch, number), retain_graph=True)[0].square() for number in range(PROBES)
        ]
        wanted = group.unit_sums(sum(changes) / PROBES / found.numel())
        torch.testing.assert_close(joint.scores[group.name], wanted, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("family", BASES)
def test_masks_follow_the_schedule_while_training(family: str) -> None:
    """Soft, then hard, then compact, with optimizer steps in between."""
    model = build(family).train()
    config = GFPruneConfig(target="params", ratio=0.3, total_steps=10, soft_fraction=0.3, hard_fraction=0.6, update_interval=2)
    pruner = GradientFlowPruner(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    sample, timesteps, conditioning = inputs(model, batch_size=4)
    batch = DiffusionBatch(sample.clamp(-1, 1), torch.randn(sample.shape), timesteps, conditioning)
    process = ddpm()
    for step in range(10):
        pruner.step(step, [batch])
        if pruner.finished:
            break
        prediction = family_of(model).predict(model, batch.inputs(process))
        (prediction - batch.target(process)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert pruner.finished
    small = pruner.compact(optimizer=optimizer)
    assert relative_error(run(small.eval()), run(model.eval())) <= 1e-4
    assert pruner.cost.removed("params", pruner.kept_channels()) == pytest.approx(0.3, abs=0.01)


@pytest.mark.fast_variants(8)
@pytest.mark.parametrize(("family", "name"), ALL)
def test_example_inputs_are_taken_and_checked(family: str, name: str) -> None:
    model = build(family, name)
    found = family_of(model)
    found.check_arguments({key: value for key, value in model.config.items() if not key.startswith("_")})
    found.check_supported(model.config)
    examples = found.example_inputs(model, *found.tracing_size(model.config), batch_size=2)
    found.check_conditioning(model, examples.conditioning, 2)
    assert found.predict(model, examples).shape == examples.sample.shape
    assert set(found.block_outputs(model).values()) <= {key for key, _ in model.named_modules()}


def test_enough_architectures_are_tried() -> None:
    assert all(len(names) >= 15 for names in ARCHITECTURES.values())
