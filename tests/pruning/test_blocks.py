"""Removable blocks: what they are, what their masks do, and that removing them changes nothing else."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffusers_gfprune import GFPrunedUNet2DModel
from diffusers_gfprune.metrics.model_size import count_macs, count_parameters
from diffusers_gfprune.pruning.blocks import RemovableBlock, inner_groups, removed_blocks, trace_blocks, trace_groups
from diffusers_gfprune.pruning.channel_groups import ChannelGroup, trace_channel_groups
from diffusers_gfprune.pruning.compaction import carry_ema, carry_optimizer, compact, plan_compaction
from diffusers_gfprune.pruning.cost_model import CostModel
from diffusers_gfprune.pruning.masking import attach, check_mask, dense_parameters, detach
from diffusers_gfprune.remote.pruned_layers import RemovedBlock
from helpers import architectures, families
from helpers.architectures import random_masks
from helpers.compaction import relative_error

UNET = "unet"
ALL = [*((UNET, name) for name in architectures.ARCHITECTURES), *families.ALL]
FAMILIES = (UNET, *families.BASES)
DEEP = [(UNET, "resnet-samplers"), *((family, families.removable(family)) for family in families.BASES)]


def build(family: str, name: str = "base") -> ModelMixin:
    return architectures.build(name) if family == UNET else families.build(family, name)


def run(family: str, model: nn.Module) -> Tensor:
    return architectures.run(model) if family == UNET else families.run(model)


@functools.cache
def traced(family: str, name: str = "base") -> tuple[ChannelGroup, ...]:
    """All groups of an architecture, blocks included."""
    return tuple(trace_groups(build(family, name), "allow"))


def blocks_of(family: str, name: str = "base") -> list[RemovableBlock]:
    return [group for group in traced(family, name) if isinstance(group, RemovableBlock)]


def ones(groups: Sequence[ChannelGroup], **changed: float) -> dict[str, Tensor]:
    """Masks of ones, with other values for some blocks; `__` stands for a dot."""
    values = {name.replace("__", "."): value for name, value in changed.items()}
    return {group.name: torch.full((group.num_units,), values.get(group.name, 1.0)) for group in groups}


# --- which blocks ------------------------------------------------------------------------------------------------------


def test_blocks_of_each_family() -> None:
    """The first residual block, the first layer that reads text and the first layer of a transformer always stay."""
    names = {family: [block.name for block in blocks_of(family)] for family in FAMILIES}
    assert names["dit"] == names["pixart"] == ["transformer_blocks.1"]
    assert names["sd3"] == []  # the last block stays, too
    assert [block.name for block in blocks_of("sd3", "four-layers")] == ["transformer_blocks.1", "transformer_blocks.2"]
    assert set(names[UNET]) == {
        *("down_blocks.1.resnets.0", "down_blocks.1.attentions.0", "mid_block.resnets.0", "mid_block.resnets.1"),
        *("mid_block.attentions.0", "up_blocks.0.resnets.0", "up_blocks.0.resnets.1", "up_blocks.0.attentions.0"),
        *("up_blocks.0.attentions.1", "up_blocks.1.resnets.0", "up_blocks.1.resnets.1"),
    }
    assert set(names["condition"]) == {
        *("down_blocks.1.resnets.0", "mid_block.resnets.0", "mid_block.resnets.1", "mid_block.attentions.0"),
        *("up_blocks.0.resnets.0", "up_blocks.0.resnets.1", "up_blocks.0.attentions.0", "up_blocks.0.attentions.1"),
        *("up_blocks.1.resnets.0", "up_blocks.1.resnets.1"),
    }
    layers = [block.name for block in blocks_of("condition", "two-layers")]
    assert "down_blocks.1.attentions.0.transformer_blocks.0" not in layers
    assert "down_blocks.1.attentions.0.transformer_blocks.1" in layers
    assert not [name for name in layers if name.endswith("attentions.0")]  # several layers: the transformer itself stays


def test_a_block_is_a_group_of_one_unit() -> None:
    """All rows of the last layers are in its slices; everything but the shortcut is inside."""
    (block,) = (block for block in blocks_of(UNET) if block.name == "up_blocks.1.resnets.0")
    assert (block.num_channels, block.units, block.num_units) == (1, ((0,),), 1)
    assert [(p.name, p.dim, len(p.positions), p.role) for p in block.slices] == [
        ("up_blocks.1.resnets.0.conv2.weight", 0, 16, "branch"),
        ("up_blocks.1.resnets.0.conv2.bias", 0, 16, "branch"),
    ]
    layers = {name.rpartition(".")[2] for name in block.inside if name != block.name}
    assert {"norm1", "conv1", "time_emb_proj", "norm2", "conv2"} <= layers and "conv_shortcut" not in layers
    (layer,) = blocks_of("dit")
    assert [piece.name.removeprefix("transformer_blocks.1.") for piece in layer.slices] == [
        *("attn1.to_out.0.weight", "attn1.to_out.0.bias", "ff.net.2.weight", "ff.net.2.bias")
    ]
    (layer,) = blocks_of("pixart")
    assert {piece.module for piece in layer.slices} == {
        f"transformer_blocks.1.{name}" for name in ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")
    }
    of_both_streams = ("attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2")
    layers = [{piece.module.split(".", 2)[2] for piece in block.slices} for block in blocks_of("sd3", "four-layers")]
    assert layers == [{*of_both_streams, "attn2.to_out.0"}, {*of_both_streams}]


def test_groups_inside_of_a_block() -> None:
    """Its hidden channels are; the stream that it adds to, and the time embedding that it reads, are not."""
    groups = traced(UNET)
    inner = {groups[block].name: [groups[index].name for index in found] for block, found in inner_groups(groups).items()}
    assert inner["mid_block.resnets.1"] == ["mid_block.resnets.1.conv1"]
    assert inner["mid_block.attentions.0"] == ["mid_block.attentions.0.to_q", "mid_block.attentions.0.to_v"] or set(
        inner["mid_block.attentions.0"]
    ) == {group.name for group in groups if group.attention == "mid_block.attentions.0"}
    assert all(len(found) >= 1 for found in inner.values())


def test_without_depth_there_are_only_channel_groups() -> None:
    model = build(UNET)
    assert trace_groups(model) == trace_channel_groups(model)
    assert trace_groups(model, "only") == [*trace_channel_groups(model), *trace_blocks(model)]
    with pytest.raises(ValueError, match="^depth=only must be none or allow: the model has no block"):
        trace_groups(build("dit", "one-layer"), "only")


# --- masks and compaction ----------------------------------------------------------------------------------------------


@pytest.mark.fast_variants(8)
@pytest.mark.parametrize(("family", "name"), ALL)
def test_removal_is_exact_and_costs_are_those_of_the_small_model(family: str, name: str) -> None:
    """Random blocks and widths together; masks of ones are free, and detached masks leave no trace."""
    model, groups = build(family, name), list(traced(family, name))
    dense, cost = run(family, model), CostModel(model, groups)
    assert cost.parameters(cost.dense) == count_parameters(model)
    attach(model, groups)
    assert relative_error(run(family, model), dense) <= 1e-6
    for seed in (0, 1):
        masks = random_masks(groups, seed)
        model.channel_masks.set(masks)
        masked = run(family, model)
        small = compact(model, plan_compaction(model, groups, masks))
        assert relative_error(run(family, small), masked) <= 1e-4
        widths = np.array([int(group.per_channel(masks[group.name]).sum()) for group in groups])
        assert (cost.parameters(widths), cost.macs(widths)) == (count_parameters(small), count_macs(small))
        assert small.config.removed_blocks == sorted(block.name for block in removed_blocks(groups, masks))
        gone = [name for name, module in small.named_modules() if isinstance(module, RemovedBlock)]
        assert sorted(gone) == small.config.removed_blocks
        tables = (*small.config.layer_channels, *small.config.norm_group_sizes, *small.config.attention_heads)
        modules = dict(small.named_modules())
        assert all(entry in modules for entry in tables)  # entries of what is gone are gone, too
    detach(model)
    assert torch.equal(run(family, model), dense)


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize(("family", "name"), DEEP)
def test_a_mask_scales_the_branch(family: str, name: str) -> None:
    """The stream is (shortcut + m branch) / factor, with any m; with 0 it is that of the block without its branch."""
    model, groups = build(family, name), list(traced(family, name))
    attach(model, groups)
    for block in blocks_of(family, name):
        outputs: dict[float, Tensor] = {}
        for value in (0.0, 0.5, 1.0):
            model.channel_masks.set({block.name: torch.tensor([value])})
            seen: list = []
            hook = model.get_submodule(block.name).register_forward_hook(lambda _, *rest: seen.append(rest), with_kwargs=True)  # noqa: B023
            run(family, model)
            hook.remove()
            (args, kwargs, output) = seen[0]
            outputs[value] = output[-1] if isinstance(output, tuple) else output  # of two streams, that of the image
        if len(block.slices) == 2:  # one layer: linear in m
            torch.testing.assert_close(outputs[0.5], (outputs[0.0] + outputs[1.0]) / 2, rtol=1e-4, atol=1e-5)
        assert relative_error(outputs[0.5], outputs[0.0]) > 1e-4 and relative_error(outputs[0.5], outputs[1.0]) > 1e-4
        with torch.no_grad():
            passed = RemovedBlock(model.get_submodule(block.name))(*args, **{**kwargs, "return_dict": False})
        torch.testing.assert_close(passed[-1] if isinstance(passed, tuple) else passed, outputs[0.0], rtol=1e-5, atol=1e-6)


def test_masks_of_blocks_may_be_empty_those_of_channels_may_not() -> None:
    block = blocks_of(UNET)[0]
    group = next(group for group in traced(UNET) if not group.fixed and group.attention is None)
    check_mask(block, torch.zeros(1))
    with pytest.raises(ValueError, match="leaves none of its"):
        check_mask(group, torch.zeros(group.num_units))
    for value in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
            check_mask(block, torch.tensor([value]))
    model = build(UNET)
    with pytest.raises(ValueError, match="only binary masks can be compacted"):
        plan_compaction(model, traced(UNET), ones(traced(UNET), mid_block__resnets__0=0.5))


def test_every_block_of_a_model_may_go() -> None:
    """What is left still reads the timestep."""
    for family in FAMILIES:
        model, groups = build(family), list(traced(family))
        masks = ones(groups) | {block.name: torch.zeros(1) for block in blocks_of(family)}
        small = compact(model, plan_compaction(model, groups, masks)).eval()
        before = run(family, small)
        assert before.isfinite().all()
        owner = families.family_of(small)
        inputs = owner.example_inputs(small, 8, 8, 2) if family == UNET else families.inputs(small)
        owner.output(small, inputs).square().sum().backward()
        assert [name for name, p in small.named_parameters() if p.grad is None] == []


# --- training ----------------------------------------------------------------------------------------------------------


def test_optimizer_and_averages_lose_the_parameters_of_removed_blocks() -> None:
    """All others keep their state, by name."""
    model, groups = build(UNET), list(traced(UNET))
    attach(model, groups)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ema = EMAModel(model.parameters())
    for _ in range(2):
        model(**architectures.inputs(model)).sample.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
    model.channel_masks.set(ones(groups, mid_block__resnets__0=0.0, up_blocks__1__resnets__0=0.0))
    before = {name: optimizer.state[p]["exp_avg"].clone() for name, p in dense_parameters(model).items()}
    averages = dict(zip(dense_parameters(model), [shadow.clone() for shadow in ema.shadow_params]))
    plan = plan_compaction(model, groups, model.channel_masks.as_dict())
    small = compact(model, plan)
    carry_optimizer(optimizer, model, small, plan)
    carry_ema(ema, model, small, plan)
    names = [name for name, _ in small.named_parameters()]
    assert len(names) < len(before) and "up_blocks.1.resnets.0.conv_shortcut.weight" in names
    assert not [name for name in names if name.startswith(("mid_block.resnets.0.", "up_blocks.1.resnets.0.conv1"))]
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in small.parameters()]
    assert len(optimizer.state) == len(names)
    for (name, parameter), shadow in zip(small.named_parameters(), ema.shadow_params, strict=True):
        assert torch.equal(optimizer.state[parameter]["exp_avg"], before[name])
        assert torch.equal(shadow, averages[name])
    small(**architectures.inputs(small)).sample.square().sum().backward()
    optimizer.step()


@pytest.mark.slow
def test_a_model_without_blocks_is_like_any_other(tmp_path: Path) -> None:
    """Saved, loaded, checkpointed, compiled and exported."""
    for family, name in DEEP:
        model, groups = build(family, name), list(traced(family, name))
        small = compact(model, plan_compaction(model, groups, random_masks(groups, 1)))
        assert small.config.removed_blocks
        known, folder = run(family, small), tmp_path / family
        small.save_pretrained(folder)
        loaded = type(small).from_pretrained(folder)
        assert torch.equal(run(family, loaded), known)
        assert loaded.config.removed_blocks == small.config.removed_blocks
        gradients = []
        for checkpointed in (False, True):
            loaded.zero_grad()
            if checkpointed:
                loaded.train().enable_gradient_checkpointing()
            predict = families.family_of(loaded).predict
            inputs = families.family_of(loaded).example_inputs(loaded, 8, 8, 2) if family == UNET else families.inputs(loaded)
            (predict(loaded, inputs) - 1).square().mean().backward()
            gradients.append([p.grad.clone() for p in loaded.parameters()])
        for first, second in zip(*gradients, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
        torch.compiler.reset()
        compiled = torch.compile(small, backend="eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(predict(compiled, inputs), predict(small, inputs), rtol=1e-4, atol=1e-5)


def test_the_shipped_file_loads_a_model_without_blocks(tmp_path: Path) -> None:
    """Without this package, Diffusers runs the file beside the weights."""
    model, groups = build(UNET, "resnet-samplers"), list(traced(UNET, "resnet-samplers"))
    small = compact(model, plan_compaction(model, groups, random_masks(groups, 1)))
    assert small.config.removed_blocks
    small.save_pretrained(tmp_path)
    spec = importlib.util.spec_from_file_location("shipped_without_blocks", tmp_path / "diffusers_gfprune.py")
    shipped = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shipped)
    loaded = shipped.GFPrunedUNet2DModel.from_pretrained(tmp_path)
    assert type(loaded) is not type(small)
    assert torch.equal(run(UNET, loaded), run(UNET, small))
    with pytest.raises(ValueError, match="removed_blocks names 'conv_in', which is not a block that can be removed"):
        shipped.GFPrunedUNet2DModel(**architectures.BASE, removed_blocks=["conv_in"])


def test_repositories_without_the_table_load_as_before() -> None:
    small = GFPrunedUNet2DModel(**architectures.BASE, layer_channels={}, norm_group_sizes={}, attention_heads={})
    assert not [module for module in small.modules() if isinstance(module, RemovedBlock)]
