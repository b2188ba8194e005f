"""The pruner in loops that are not those of the training script: mistakes are said, and wrappers are seen through."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from torch.optim.swa_utils import AveragedModel

from diffusers_gfprune import GradientFlowPruner, prune_pipeline
from diffusers_gfprune.one_shot import prune_unet
from diffusers_gfprune.pruning.masking import dense_parameters
from helpers.architectures import build
from helpers.families import build as build_family
from helpers.pruners import SCHEDULER, Script, batches, config, mask_values, one_shot, run
from helpers.scripts import forget_accelerator


def pruner_of(**options) -> GradientFlowPruner:
    return GradientFlowPruner(build("fine-units"), config(**options), SCHEDULER)


# --- steps ----------------------------------------------------------------------------------------------------------------


def test_a_second_call_of_a_step_does_nothing() -> None:
    """As with accumulated gradients, where a step has several batches; the state can be loaded."""
    once, twice = pruner_of(), pruner_of()
    for step in range(7):
        once.step(step, [])
        assert [twice.step(step, []) is None for _ in range(2)] == [not once.schedule.is_update(step), True]
    assert twice.history == once.history
    pruner_of().load_state_dict(twice.state_dict())


def test_steps_do_not_go_back() -> None:
    """A loop that counts from 0 in its second epoch would move masks beyond 1."""
    pruner = pruner_of()
    for step in range(8):
        pruner.step(step, [])
    with pytest.raises(
        ValueError, match="step=1 is before the last ranking, at step 6: number training steps over all epochs"
    ):
        pruner.step(1, [])
    assert mask_values(pruner)[-1] == 1


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(("last", "step", "missed"), [(0, 5, 3), (0, 40, 3), (6, 12, 9), (9, 14, 13)])
def test_missed_rankings_are_said_at_once(last: int, step: int, missed: int, resumed: bool) -> None:
    """Not only where masks end between 0 and 1: with fewer rankings, they would jump."""
    pruner = pruner_of(ranking="group")
    for done in range(last + 1):
        pruner.step(done, [])
    if resumed:
        state, pruner = pruner.state_dict(), pruner_of(ranking="group")
        pruner.load_state_dict(state)
    before = pruner.state_dict()["values"]
    message = rf"^step={step}: the ranking at step {missed} was missed: call step\(\) before every training step$"
    with pytest.raises(ValueError, match=message):
        pruner.step(step, pytest.fail)
    assert pruner.state_dict()["values"] == before and not pruner.finished


def test_a_first_step_after_the_first_ranking_is_refused() -> None:
    with pytest.raises(ValueError, match="^step=1: the ranking at step 0 was missed"):
        pruner_of().step(1, [])


def test_steps_between_rankings_may_be_left_out() -> None:
    pruner = pruner_of(ranking="group")
    for step in [*pruner.schedule.update_steps(), pruner.schedule.end_steps]:
        pruner.step(step, [])
    assert pruner.finished and mask_values(pruner) == [0.0, 1.0]


@pytest.mark.parametrize(("steps", "message"), [(0, "no unit is pruned yet: call"), (5, "only binary masks can be compacted")])
def test_unfinished_masks_are_not_compacted(steps: int, message: str) -> None:
    pruner = pruner_of(ranking="group")
    for step in range(steps):
        pruner.step(step, [])
    with pytest.raises(ValueError, match=message):
        pruner.compact()


def test_a_ranking_that_fails_leaves_the_state_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may run out after units were scored."""
    pruner = GradientFlowPruner(build("fine-units"), config(criterion="gradient-flow", ranking="joint"), SCHEDULER)

    def fails(*arguments) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("diffusers_gfprune.ranking.removal_damage", fails)
        with pytest.raises(torch.OutOfMemoryError):
            pruner.step(0, batches())
    assert pruner.scores is None
    pruner_of(criterion="gradient-flow", ranking="joint").load_state_dict(pruner.state_dict())
    assert pruner.step(0, batches()) is not None


@pytest.mark.parametrize("options", [{"ratio": 0.2}, {"total_steps": 80}, {"attention_unit": "heads"}])
def test_a_state_of_another_plan_is_refused(options: dict) -> None:
    pruner = pruner_of()
    for step in range(7):
        pruner.step(step, [])
    with pytest.raises(ValueError, match="^the pruner's state has .*, and this pruner "):
        pruner_of(**options).load_state_dict(pruner.state_dict())
    older = pruner.state_dict()
    del older["values"]["plan"]
    pruner_of(ratio=0.4).load_state_dict(older)


# --- devices and wrappers -------------------------------------------------------------------------------------------------


def test_widths_are_planned_for_the_device_of_the_first_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model may be made on the CPU and moved later. Layers that were timed have been timed where they were."""
    pruner = GradientFlowPruner(build("fine-units"), config(channel_multiple="auto"), SCHEDULER)
    monkeypatch.setattr(GradientFlowPruner, "_device_type", lambda self: "cuda")
    planned = []
    monkeypatch.setattr("diffusers_gfprune.pruner.UnitChoice", lambda cost, config, device: planned.append(device) or before)
    before = pruner.choice
    pruner.step(0, [])
    assert planned == ["cuda"]
    other = GradientFlowPruner(build("fine-units"), config(), SCHEDULER)
    other._planned_for, other.config = "cpu", SimpleNamespace(**{**vars(other.config), "target": "latency"})
    with pytest.raises(ValueError, match="the model was moved from cpu, where it was timed: make the pruner after that"):
        other.step(0, [])


@pytest.mark.parametrize("ranking", ["group", "sensitivity", "curves"])
def test_a_run_continues_with_the_widths_of_its_device(ranking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths of GPUs have other multiples. A run that continues is made on the CPU, or goes on there."""

    def made() -> GradientFlowPruner:
        return pruner_of(channel_multiple="auto", ranking=ranking)

    whole = made()
    with monkeypatch.context() as patch:
        patch.setattr(GradientFlowPruner, "_device_type", lambda self: "cuda")
        for step in range(7):
            whole.step(step, batches())
    resumed = made()
    assert resumed.ladders != whole.ladders  # those of a CPU
    resumed.load_state_dict(whole.state_dict())
    assert resumed.ladders == whole.ladders and (resumed.planned_widths == whole.planned_widths).all()
    for pruner in (whole, resumed):
        for step in range(7, 21):
            pruner.step(step, batches())
    assert resumed.history == whole.history and resumed.finished
    assert all(torch.equal(mask, whole.masks[name]) for name, mask in resumed.masks.items())


@pytest.mark.parametrize("ranking", ["group", "global", "sensitivity"])
def test_widths_stay_once_masks_are_binary(ranking: str, scripted: list[Script]) -> None:
    """Scores of the moment change from ranking to ranking; blocks and widths that follow them would come and go."""

    def noise(seed: int) -> Script:
        return lambda name, units: torch.rand(units, generator=torch.Generator().manual_seed(seed * 1000 + len(name))) + 0.1

    scripted += [noise(seed) for seed in range(9)]
    pruner = pruner_of(criterion="scripted", ranking=ranking, depth="allow", revival_margin=0.0, score_decay=0.0)
    widths = set()
    for step in range(21):
        update = pruner.step(step, batches())
        if update is not None and update.phase == "hard":
            widths.add(tuple(pruner.kept_channels()))
    assert len(widths) == 1 and pruner.finished


class Times:
    """Times of layers, as a number."""

    shares = 1

    def to_dict(self) -> dict:
        return {"shares": self.shares}

    def load_dict(self, values: dict) -> None:
        self.shares = int(values["shares"])


@pytest.mark.parametrize("latency", [{}, {"model": {"shares": "damaged"}}, {"model": {"shares": 2}}])
def test_a_state_that_cannot_be_planned_changes_nothing(latency: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layer times are incomplete or damaged, or leave no widths for the budget."""
    pruner = pruner_of()
    pruner.latency, pruner._latency_model, before = {"model": {"shares": 1}}, Times(), pruner.choice
    state = pruner.state_dict()
    state["values"]["latency"] = latency

    def fails(*arguments) -> None:
        raise ValueError("ratio cannot be met")

    monkeypatch.setattr("diffusers_gfprune.pruner.UnitChoice", fails)
    with pytest.raises(ValueError, match="latency of the pruner's state cannot be used: "):
        pruner.load_state_dict(state)
    assert pruner.latency == {"model": pruner._latency_model.to_dict()} == {"model": {"shares": 1}}
    assert pruner.choice is before


def test_wrapped_optimizers_are_carried() -> None:
    forget_accelerator()
    unet = build("fine-units").train()
    inner = torch.optim.AdamW(unet.parameters())
    optimizer = Accelerator(cpu=True).prepare_optimizer(inner)
    pruner = GradientFlowPruner(unet, one_shot(ratio=0.3), SCHEDULER)
    pruner.step(0, batches())
    small = pruner.compact(optimizer=optimizer)
    assert {id(p) for group in inner.param_groups for p in group["params"]} == {id(p) for p in small.parameters()}
    with pytest.raises(ValueError, match="optimizer is a list: it must be one optimizer of PyTorch"):
        pruner.compact(optimizer=[inner])
    with pytest.raises(ValueError, match="ema is a AveragedModel: it must be an EMAModel of Diffusers"):
        pruner.compact(ema=AveragedModel(build("base")))


def test_masks_that_are_copied_in_place_are_noticed() -> None:
    """`AveragedModel` copies buffers without a call of the masks."""
    unet = build("fine-units").eval()
    pruner = GradientFlowPruner(unet, one_shot(ratio=0.5), SCHEDULER)
    averaged = AveragedModel(unet)
    with torch.no_grad():
        dense = run(averaged.module)
        pruner.step(0, batches())
        averaged.update_parameters(unet)
        torch.testing.assert_close(run(averaged.module), run(unet))
    assert not torch.allclose(run(unet), dense, rtol=1e-2)


def test_recovery_is_not_run_under_autocast() -> None:
    """Neither in its context nor by a model whose forward Accelerate has wrapped."""
    found = []
    for wrapped in (False, True):
        forget_accelerator()
        dense = build("fine-units").eval()
        pruner = GradientFlowPruner(copy.deepcopy(dense), one_shot(ratio=0.3), SCHEDULER)
        pruner.step(0, batches())
        if wrapped:
            dense = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(dense, evaluation_mode=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=wrapped):
            pruner.recover(dense, batches())
        found.append({name: weight.detach().clone() for name, weight in dense_parameters(pruner.unet).items()})
    forget_accelerator()
    plain, autocast = found
    for name, weight in plain.items():
        torch.testing.assert_close(autocast[name], weight, rtol=1e-5, atol=1e-6)


def test_adapters_are_named() -> None:
    """What the message says is enough, and half of it is not."""
    message = r"^the model has adapters \(style\): call unload_lora\(\), after fuse_lora\(\) to keep their effect"
    unet = build_family("condition", "base")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    for change in (lambda: None, unet.fuse_lora):
        change()
        with pytest.raises(ValueError, match=message):
            GradientFlowPruner(unet, config(), SCHEDULER)
    unet.unload_lora()
    GradientFlowPruner(unet, config(), SCHEDULER)
    unet = build_family("condition", "base")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    unet.delete_adapters("style")  # leaves the layers around the original ones
    with pytest.raises(ValueError, match=message.replace("style", "without a name")):
        GradientFlowPruner(unet, config(), SCHEDULER)


def test_fused_projections_and_eight_bits_are_named() -> None:
    """Diffusers unfuses projections by other processors; the fused weights stay."""
    unet = build_family("condition", "base")
    unet.fuse_qkv_projections()
    unet.unfuse_qkv_projections()
    with pytest.raises(ValueError, match=r"additional parameter .*\.to_qkv\.weight: load it again without fuse_qkv_proj"):
        GradientFlowPruner(unet, config(), SCHEDULER)
    unet = build("fine-units")
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match=r" is torch.float8_e4m3fn: load the model without layerwise casting to prune it$"):
        GradientFlowPruner(unet, config(), SCHEDULER)


def offload(model: torch.nn.Module) -> None:
    apply_group_offloading(model, onload_device=torch.device("cpu"), offload_type="leaf_level")


def cast(model: torch.nn.Module) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


@pytest.mark.parametrize("criterion", ["magnitude", "gradient-flow"])
@pytest.mark.parametrize(("change", "hook"), [(offload, "group_offloading"), (cast, "layerwise_casting")])
def test_hooks_of_diffusers_are_named(change, hook: str, criterion: str) -> None:
    """Before the model is copied, which most of them do not survive; weights in bfloat16 would stay so."""
    unet, images = build("fine-units"), torch.zeros(4, 1, 8, 8)
    change(unet)
    message = rf"^the model has hooks of Diffusers \(.*{hook}.* of .*\): load it again without them$"
    with pytest.raises(ValueError, match=message):
        GradientFlowPruner(unet, config(criterion=criterion), SCHEDULER)
    with pytest.raises(ValueError, match=message):
        prune_unet(unet, SCHEDULER, images, criterion=criterion)
    with pytest.raises(ValueError, match=message.replace("the model", "the unet of the pipeline")):
        prune_pipeline(DDPMPipeline(unet, SCHEDULER), images, criterion=criterion)


# --- PyTorch's modes ---------------------------------------------------------------------------------------------------


def test_a_model_that_is_pruned_in_inference_mode_can_be_trained() -> None:
    pipe, pruner = DDPMPipeline(build("fine-units"), SCHEDULER), pruner_of(ranking="group")
    for step in [*pruner.schedule.update_steps(), pruner.schedule.end_steps]:
        pruner.step(step, [])
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    with torch.inference_mode():
        small = prune_pipeline(pipe, images, ratio=0.3, recovery=False).unet
        compacted = pruner.compact()
    for model in (small, compacted):
        model.requires_grad_(True)(images, 3).sample.sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_default_device_changes_nothing() -> None:
    """As of notebooks that begin with `torch.set_default_device("cuda")`."""
    pipe = DDPMPipeline(build("fine-units"), SCHEDULER)
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    plain = prune_pipeline(pipe, images, ratio=0.3).unet
    with torch.device("meta"):
        found = prune_pipeline(pipe, images, ratio=0.3).unet
    for name, weight in plain.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    states = []
    for device in ("cpu", "meta"):
        dense = build("fine-units")
        with torch.device(device):
            pruner = GradientFlowPruner(copy.deepcopy(dense), one_shot(criterion="gradient-flow"), SCHEDULER)
            pruner.step(0, batches())
            pruner.recover(dense, batches())
            pruner.load_state_dict(pruner.state_dict())
        states.append(pruner.compact().state_dict())
    assert all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())
