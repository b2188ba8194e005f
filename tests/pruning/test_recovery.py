"""Recovery: known answers, every family, and what must not change."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import ModelMixin, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor

from diffusers_gfprune import GradientFlowPruner
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.pruning import least_squares, recovery
from diffusers_gfprune.pruning.blocks import trace_groups
from diffusers_gfprune.pruning.channel_groups import ChannelGroup
from diffusers_gfprune.pruning.compaction import CompactionPlan, compact, plan_compaction
from diffusers_gfprune.pruning.masking import attach, dense_parameters
from diffusers_gfprune.pruning.recovery import recover, recovery_bytes, recovery_macs
from helpers import families
from helpers.architectures import build, random_masks
from helpers.processes import ddpm
from helpers.pruners import SCHEDULER, batches, one_shot

PROCESS = ddpm(100)
TEACHER = Path(__file__).resolve().parents[2] / "training/digits/teacher/unet"


def batch_for(model: ModelMixin, size: int = 16, seed: int = 0) -> DiffusionBatch:
    """A batch of noise, with random conditioning."""
    sample, _, conditioning = families.inputs(model, size, seed)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(sample.shape, generator=generator)
    return DiffusionBatch(sample, noise, torch.randint(0, 100, (size,), generator=generator), conditioning)


def masked(dense: ModelMixin, masks: dict[str, Tensor], depth: str = "none") -> tuple[ModelMixin, CompactionPlan]:
    """A masked copy of a model, and its plan."""
    model = copy.deepcopy(dense)
    groups = trace_groups(model, depth)
    attach(model, groups).set(masks)
    return model, plan_compaction(model, groups, model.channel_masks.as_dict())


@torch.no_grad()
def damage(dense: ModelMixin, model: ModelMixin, batch: DiffusionBatch) -> float:
    """Mean squared change of all outputs, learned variances included."""
    inputs, family = batch.inputs(PROCESS), family_of(dense)
    return (family.output(model, inputs) - family.output(dense, inputs)).square().mean().item()


def one_unit(groups: list[ChannelGroup], producer: str) -> dict[str, Tensor]:
    """Masks that remove the second unit of the group whose channels a layer writes."""
    group = next(g for g in groups if any(p.module == producer and p.role == "output" for p in g.slices))
    mask = torch.ones(group.num_units)
    mask[1] = 0
    return {group.name: mask}


def test_a_copy_of_a_kept_unit_is_replaced_exactly() -> None:
    """Two units of a residual block compute the same: when one goes, the next layer reads the other one instead."""
    dense = build("base")
    block = dense.down_blocks[0].resnets[0]
    with torch.no_grad():  # units are norm groups of 4 channels
        for parameter in (*block.conv1.parameters(), *block.time_emb_proj.parameters(), *block.norm2.parameters()):
            parameter[4:8] = parameter[:4]
    model, plan = masked(dense, one_unit(trace_groups(dense), "down_blocks.0.resnets.0.conv1"))
    held_out = batch_for(dense, seed=1)
    before = damage(dense, model, held_out)
    mended = recover(dense, model, plan, [batch_for(dense)], PROCESS, ridge=1e-9)
    assert list(mended)[0] == "down_blocks.0.resnets.0.conv2"
    assert damage(dense, model, held_out) < 1e-6 * before


def test_a_constant_unit_is_folded_into_the_bias() -> None:
    dense = families.build("dit", "base")
    with torch.no_grad():  # hidden channels of a feed-forward layer are units of one
        dense.transformer_blocks[0].ff.net[0].proj.weight[1] = 0
    model, plan = masked(dense, one_unit(trace_groups(dense), "transformer_blocks.0.ff.net.0.proj"))
    assert damage(dense, model, batch_for(dense, seed=1)) > 1e-6
    weight = model.transformer_blocks[0].ff.net[2].weight.clone()
    mended = recover(dense, model, plan, [batch_for(dense)], PROCESS)
    assert list(mended) == ["transformer_blocks.0.ff.net.2"]
    torch.testing.assert_close(model.transformer_blocks[0].ff.net[2].weight, weight, rtol=0, atol=1e-5)
    assert damage(dense, model, batch_for(dense, seed=1)) < 1e-9


def test_layers_before_the_first_removed_unit_do_not_change() -> None:
    dense = build("base")
    model, plan = masked(dense, one_unit(trace_groups(dense), "up_blocks.0.resnets.0.conv1"))
    before = {name: parameter.clone() for name, parameter in dense_parameters(model).items()}
    mended = recover(dense, model, plan, [batch_for(dense)], PROCESS)
    changed = {name.rpartition(".")[0] for name, p in dense_parameters(model).items() if not torch.equal(p, before[name])}
    assert changed == set(mended)
    assert "up_blocks.0.resnets.0.conv2" in changed and "conv_out" in changed
    assert not any(name.startswith(("conv_in", "time_embedding", "down_blocks", "mid_block")) for name in changed)


def test_compiled_parts_are_mended_too() -> None:
    """Compiled code does not call the hooks that see what a layer reads."""
    found = []
    for compiled in (False, True):
        dense = build("base").eval()
        pruner = GradientFlowPruner(copy.deepcopy(dense), one_shot(ratio=0.3), SCHEDULER)
        pruner.step(0, batches())
        if compiled:
            dense.mid_block.compile(backend="eager")
            for size in (16, 2):  # now it is, for any number of images
                with torch.no_grad():
                    dense(torch.zeros(size, 1, 8, 8), 3)
        found.append((pruner.recover(dense, batches()), pruner.compact().state_dict()))
    (gaps, weights), (others, other_weights) = found
    assert gaps == others and any(name.startswith("mid_block") for name in gaps)
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())


def test_nothing_changes_without_removed_units() -> None:
    dense = build("base")
    model, plan = masked(dense, {})
    assert recover(dense, model, plan, [batch_for(dense)], PROCESS) == {}


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize(
    ("family", "name", "depth"),
    [
        ("dit", "base", "none"),
        ("dit", "learned-variances", "allow"),
        ("condition", "base", "allow"),
        ("pixart", "sizes", "allow"),
        pytest.param("condition", "text-time", "none", marks=pytest.mark.slow),
        pytest.param("condition", "two-layers", "only", marks=pytest.mark.slow),
    ],
)
def test_families(family: str, name: str, depth: str) -> None:
    dense = families.build(family, name)
    check_damage_falls(dense, depth)


@pytest.mark.fast_variants(1)
@pytest.mark.parametrize("name", ["scale-shift", "class-embedding", "resnet-sampler-blocks"])
def test_unets(name: str) -> None:
    check_damage_falls(build(name), "allow")


def check_damage_falls(dense: ModelMixin, depth: str) -> None:
    """Half of everything is removed at random: what is left is nearer to the dense model, in its small form, too."""
    groups = trace_groups(dense, depth)
    model, plan = masked(dense, random_masks(groups, seed=3), depth)
    held_out = batch_for(dense, 32, seed=1)
    before = damage(dense, model, held_out)
    recover(dense, model, plan, [batch_for(dense, 64)], PROCESS)
    after = damage(dense, model, held_out)
    assert after < 0.7 * before
    assert damage(dense, compact(model, plan), held_out) == pytest.approx(after, rel=1e-2)


@pytest.mark.slow
def test_several_passes_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """With little memory, batches are split, and layers are mended one after another. Rows are drawn alike."""
    dense = build("one-level")
    masks = one_unit(trace_groups(dense), "mid_block.resnets.1.conv1")
    once, plan = masked(dense, masks)
    again, batches = masked(dense, masks)[0], [batch_for(dense, 3), batch_for(dense, 4, seed=1)]
    sizes, run = [], recovery._Recovery._run
    found = recover(dense, once, plan, batches, PROCESS, rows=100)
    with monkeypatch.context() as patched:
        patched.setattr(recovery._Recovery, "_run", lambda self, batch, *a: (sizes.append(len(batch)), run(self, batch, *a)))
        also = recover(dense, again, plan, batches, PROCESS, rows=100, pass_bytes=2**19)
    assert list(found) == list(also) and len(found) > 5
    assert max(sizes) <= 3 and len(sizes) > 10
    before = dense_parameters(dense)
    for (name, one), two in zip(dense_parameters(once).items(), dense_parameters(again).values()):
        change = float((one - before[name]).abs().max())
        torch.testing.assert_close(one, two, rtol=0, atol=1e-3 * change)


def test_models_are_left_in_their_mode_and_without_hooks() -> None:
    dense = build("base").train()
    model, plan = masked(dense, one_unit(trace_groups(dense), "up_blocks.0.resnets.0.conv1"))
    weights = copy.deepcopy(dense.state_dict())
    recover(dense, model, plan, [batch_for(dense)], PROCESS)
    assert dense.training and model.training and dense.mid_block.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dense.modules())
    assert all(torch.equal(value, weights[name]) for name, value in dense.state_dict().items())


def test_damage_of_the_trained_digits_model_falls() -> None:
    """A tenth of every group of the digits model goes."""
    dense = UNet2DModel.from_pretrained(TEACHER).eval()
    groups = trace_groups(dense)
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for group in (group for group in groups if group.attention is None and group.num_units > 1):
        masks[group.name] = torch.ones(group.num_units)
        masks[group.name][torch.randperm(group.num_units, generator=generator)[: max(1, group.num_units // 10)]] = 0
    model, plan = masked(dense, masks)
    held_out = batch_for(dense, 32, seed=1)
    before = damage(dense, model, held_out)
    recover(dense, model, plan, [batch_for(dense, 64)], PROCESS)
    assert damage(dense, model, held_out) < before / 3


def test_a_pruner_mends_what_it_pruned() -> None:
    dense = build("base")
    pruner = GradientFlowPruner(copy.deepcopy(dense), one_shot(ratio=0.3), SCHEDULER)
    held_out = batch_for(dense, 32, seed=1)
    with pytest.raises(ValueError, match="timesteps range from"):
        pruner.recover(dense, [DiffusionBatch(held_out.clean, held_out.noise, held_out.timesteps + 100)])
    pruner.step(0, batches())
    before = damage(dense, pruner.unet, held_out)
    assert len(pruner.recover(dense, [batch_for(dense, 64)])) > 10
    assert damage(dense, pruner.compact(), held_out) < 0.7 * before
    group = next(group for group in pruner.groups if group.num_units > 1)
    pruner.unet.channel_masks.set({group.name: torch.full((group.num_units,), 0.5)})
    with pytest.raises(ValueError, match="only binary masks can be compacted"):
        pruner.recover(dense, batches())
    pruner.detach()
    with pytest.raises(ValueError, match="the masks of the model were removed"):
        pruner.recover(dense, batches())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_said(value: float) -> None:
    """Before any weight is not finite: nothing else would notice."""
    dense = build("base")
    model, plan = masked(dense, random_masks(trace_groups(dense), seed=3))
    batch = batch_for(dense)
    batch.clean[3, 0, 2, 2] = value
    with pytest.raises(
        ValueError, match=r"^recovery of .* has values that are not finite \(NaN or infinity\): check the images"
    ):
        recover(dense, model, plan, [batch], PROCESS)


@pytest.mark.fast_variants(1)
@pytest.mark.parametrize(("limit", "left"), [(48, 0.8), (40, 0.85)], ids=["at the centre", "not all"])
def test_layers_with_large_gram_matrices(
    limit: int, left: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Kernels change at their centre; a layer for which even this is too large stays as it is, which is said."""
    for module in (least_squares, recovery):
        monkeypatch.setattr(module, "MAX_FEATURES", limit)
    dense = build("base")
    model, plan = masked(dense, random_masks(trace_groups(dense), seed=3))
    weights = {name: weight.clone() for name, weight in dense_parameters(model).items()}
    held_out = batch_for(dense, 32, seed=1)
    before = damage(dense, model, held_out)
    mended = recover(dense, model, plan, [batch_for(dense, 64)], PROCESS)
    assert damage(dense, model, held_out) < left * before
    wide = "up_blocks.0.resnets.1.conv1"  # reads 48 channels
    assert (f"{wide} reads 48 channels, more than {limit}, and is left as it is" in caplog.text) == (wide not in mended)
    assert (wide in mended) == (limit == 48)
    change = dense_parameters(model)["mid_block.resnets.0.conv1.weight"] - weights["mid_block.resnets.0.conv1.weight"]
    assert change[:, :, 1, 1].abs().max() > 0
    change[:, :, 1, 1] = 0
    assert (change == 0).all()


def test_averages_change_with_the_weights() -> None:
    """By as much: an average of other weights keeps its distance to them."""
    dense = build("base")
    pruner = GradientFlowPruner(copy.deepcopy(dense), one_shot(ratio=0.3), SCHEDULER)
    ema = EMAModel(pruner.unet.parameters())
    with torch.no_grad():
        for shadow in ema.shadow_params:
            shadow += 0.25
    pruner.step(0, batches())
    pruner.recover(dense, [batch_for(dense, 64)], ema=ema)
    assert any(not torch.equal(*pair) for pair in zip(dense.parameters(), dense_parameters(pruner.unet).values()))
    for shadow, parameter in zip(ema.shadow_params, pruner.unet.parameters()):
        torch.testing.assert_close(shadow, parameter + 0.25, rtol=0, atol=1e-5)
    ema.shadow_params.pop()
    with pytest.raises(ValueError, match="ema has .* parameters, but the model has"):
        pruner.recover(dense, [batch_for(dense, 64)], ema=ema)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": 0.0}, "ridge=0.0 must be a number greater than 0"),
        ({"ridge": float("nan")}, "ridge=nan must be"),
        ({"rows": 0}, "rows=0 must be at least 1"),
        ({"batches": []}, "recovery needs at least one calibration batch"),
        ({"dense": "two-layers"}, "must have the layers of the masked one: .* differs"),
    ],
)
def test_bad_input(options: dict, message: str) -> None:
    dense = build("base")
    model, plan = masked(dense, {})
    options = {"dense": dense, "batches": [batch_for(dense)], **options}
    if isinstance(options["dense"], str):
        options["dense"] = build(options["dense"])
    with pytest.raises(ValueError, match=message):
        recover(masked=model, plan=plan, process=PROCESS, **options)


def test_a_masked_model_is_not_the_dense_one() -> None:
    pruner = GradientFlowPruner(build("base"), one_shot(ratio=0.3), SCHEDULER)
    pruner.step(0, batches())
    for model in (pruner.unet, copy.deepcopy(pruner.unet)):
        with pytest.raises(ValueError, match="^dense has channel masks: it must be a copy of the model from before"):
            pruner.recover(model, [batch_for(build("base"))])


def test_a_container_has_less_memory_than_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of a quarter of the machine's memory would end a process in a container."""
    monkeypatch.setattr(recovery, "CONTAINER_LIMITS", (tmp_path / "none", tmp_path / "limit"))
    monkeypatch.setattr(recovery, "PASS_BYTES", 2**20)
    (tmp_path / "limit").write_text("max\n")
    whole = recovery._memory(torch.device("cpu"))
    (tmp_path / "limit").write_text(f"{2**30}\n")
    assert recovery._memory(torch.device("cpu")) == 2**28 < whole


def test_memory_of_the_sums() -> None:
    """Those of the largest layer, and a copy that is solved; biases are one more feature."""
    layers = [m for m in build("resnet-sampler-blocks").modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    held = []
    for layer in layers:
        outputs, inputs = (torch.arange(size) for size in layer.weight.shape[:2])
        sums = least_squares.LeastSquares(layer, inputs, outputs)
        held.append(2 * (sums.gram.nbytes + sums.cross.nbytes))
    assert recovery_bytes(torch.nn.ModuleList(layers)) == pytest.approx(max(held), rel=0.02)


@pytest.mark.parametrize("kept", [1280, 910])
def test_cost_of_the_sums_holds_for_any_number_of_kept_inputs(kept: int) -> None:
    """Of 1,280 inputs only the centre of the kernel is mended, of 910 all of it, with 8,190 features."""
    layer = torch.nn.Conv2d(1280, 20, 3, device="meta")
    sums = least_squares.LeastSquares(layer, torch.arange(kept), torch.arange(20))
    assert sums.centre == (kept == 1280)
    size = len(sums.gram)
    assert recovery_bytes(layer) >= 0.999 * 2 * 8 * size * (size + 20)
    assert recovery_macs(layer) >= 0.999 * (recovery.ROWS * size * (size + 20) + size**3 // 3)
    assert recovery_bytes(layer) <= 2 * 8 * 8192 * (8192 + 20)
