"""training/state.py: optimizer state and average match weights by name, before and after compaction."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D

from diffusers_gfprune import GradientFlowPruner
from diffusers_gfprune.pruning.masking import dense_parameters
from diffusers_gfprune.training.arguments import parse_arguments
from diffusers_gfprune.training.checkpointing import Checkpoints
from diffusers_gfprune.training.state import TrainingState, seed_everything
from helpers.scripts import forget_accelerator

SMALL = {
    **{"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32), "norm_num_groups": 8},
    **{"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
    **{"attention_head_dim": 8, "layers_per_block": 1},
}
WORDS = ["--pretrained_model_name_or_path", "model", "--dataset_name", "images", "--max_train_steps", "10", "--use_ema"]


def make_state(*words: str, checkpoint=None, scaler=None) -> TrainingState:
    forget_accelerator()
    torch.manual_seed(0)
    args = parse_arguments([*WORDS, "--preset", "one-shot", "--criterion", "magnitude", *words])
    unet = UNet2DModel(**SMALL)
    pruner = GradientFlowPruner(unet, args.pruning.config(args.training.max_train_steps))
    accelerator = Accelerator()
    accelerator.scaler = scaler
    return TrainingState(args, accelerator, unet, pruner, checkpoint)


def step(state: TrainingState, seed: int) -> None:
    """An optimizer step on noise."""
    generator = torch.Generator().manual_seed(seed)
    images, timesteps = torch.randn(4, 1, 8, 8, generator=generator), torch.randint(0, 1000, (4,), generator=generator)
    state.accelerator.backward(state.model(images, timesteps).square().mean())
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.lr_scheduler.step()
    state.ema.step(state.unet.parameters())
    state.step += 1


def compacted_state(*words: str) -> TrainingState:
    state = make_state(*words)
    step(state, 0)
    state.pruner.step(0, [])
    state.compact()
    return state


def test_the_optimizer_is_that_of_the_command_line_before_and_after_compaction() -> None:
    words = ("--adam_beta1", "0.5", "--adam_beta2", "0.75", "--adam_weight_decay", "0.125", "--adam_epsilon", "0.25")
    state = make_state(*words, "--learning_rate", "0.0625")
    for _ in range(2):
        (group,) = state.optimizer.param_groups
        found = [group[name] for name in ("betas", "weight_decay", "eps", "lr")]
        assert type(state.optimizer.optimizer) is torch.optim.AdamW and found == [(0.5, 0.75), 0.125, 0.25, 0.0625]
        if not state.compacted:
            state.pruner.step(0, [])
            state.compact()


def test_dropout_is_that_of_the_command_line_before_and_after_compaction() -> None:
    state = make_state("--dropout", "0.25")
    for _ in range(2):
        blocks = [module for module in state.unet.modules() if isinstance(module, ResnetBlock2D)]
        assert len(blocks) == 8 and {block.dropout.p for block in blocks} == {0.25}
        if not state.compacted:
            state.pruner.step(0, [])
            state.compact()
    assert state.unet.config.dropout == 0.0  # the saved state has the same values


def test_compaction_takes_everything_along_by_name() -> None:
    state = make_state()
    step(state, 0)
    parameters = dense_parameters(state.unet)
    moments = {name: state.optimizer.optimizer.state[p]["exp_avg_sq"].clone() for name, p in parameters.items()}
    shadows = dict(zip(parameters, [shadow.clone() for shadow in state.ema.shadow_params]))
    state.pruner.step(0, [])
    plan = state.pruner.compaction_plan()
    state.compact()
    assert state.compacted and state.phase == "finetune"
    for (name, parameter), shadow in zip(state.unet.named_parameters(), state.ema.shadow_params):
        assert torch.equal(shadow, plan.take(name, shadows[name])), name
        moment = state.optimizer.optimizer.state[parameter]["exp_avg_sq"]
        assert torch.equal(moment, plan.take(name, moments[name], -2)), name
    before = copy.deepcopy(state.unet.state_dict())
    step(state, 1)  # wrapper, optimizer and average use the small model
    assert any(not torch.equal(value, before[name]) for name, value in state.unet.state_dict().items())


@pytest.mark.fast_variants(1)
@pytest.mark.parametrize("words", [(), ("--channels_last",)], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("compacted", [False, True], ids=["masked", "compacted"])
def test_saved_and_restored_states_go_on_alike(tmp_path: Path, compacted: bool, words: tuple[str, ...]) -> None:
    state = compacted_state(*words) if compacted else make_state(*words)
    step(state, 2)
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(state.step, {}, {}, state.tensors(), state.values())
    other = make_state(*words, checkpoint=checkpoints.load(path))
    assert (other.step, other.compacted, other.phase) == (state.step, compacted, state.phase)
    for one, two in zip(state.unet.parameters(), other.unet.parameters()):
        assert one.stride() == two.stride()
        for key, value in state.optimizer.optimizer.state[one].items():
            assert other.optimizer.optimizer.state[two][key].stride() == value.stride()
    for seed in (3, 4):
        step(state, seed)
        step(other, seed)
    restored = other.tensors()
    for part, content in state.tensors().items():
        for name, tensor in content.items():
            assert torch.equal(tensor, restored[part][name]), (part, name)
    assert state.lr_scheduler.get_last_lr() == other.lr_scheduler.get_last_lr()


@pytest.mark.parametrize("part", ["values", "tensors"])
def test_a_whole_checkpoint_that_lacks_something_is_refused(tmp_path: Path, part: str) -> None:
    state = make_state()
    step(state, 0)
    tensors, values = state.tensors(), state.values()
    del (values if part == "values" else tensors)[{"values": "recent", "tensors": "optimizer"}[part]]
    path = Checkpoints(tmp_path).save(1, {}, {}, tensors, values)
    with pytest.raises(ValueError, match="checkpoint-1 does not fit this run: KeyError"):
        make_state(checkpoint=Checkpoints(tmp_path).load(path))


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize(("part", "what"), [("model", "weights"), ("ema", "averaged weights")])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.update({"conv_in.bias": torch.ones(1)}),
            r"conv_in.bias has shape \(1,\), and the model's \(16,\)",
        ),
        (lambda tensors: tensors.pop("conv_in.bias"), "1 names, first conv_in.bias"),
    ],
    ids=["broadcastable", "missing"],
)
def test_tensors_of_another_model_are_refused(tmp_path: Path, part: str, what: str, change, message: str) -> None:
    """Copying would broadcast one value to all channels."""
    state = make_state()
    tensors = {name: dict(content) for name, content in state.tensors().items()}
    change(tensors[part])
    path = Checkpoints(tmp_path).save(1, {}, {}, tensors, state.values())
    with pytest.raises(ValueError, match=f"checkpoint-1 holds {what} of another configuration: {message}"):
        make_state(checkpoint=Checkpoints(tmp_path).load(path))


def test_loss_scale_is_saved(tmp_path: Path) -> None:
    """fp16 training needs a GPU, but the scaler is the same on a CPU."""
    state = make_state(scaler=torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1))
    step(state, 0)
    assert state.accelerator.scaler.get_scale() == 16.0
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, {}, {}, state.tensors(), state.values())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    make_state(checkpoint=checkpoints.load(path), scaler=scaler)
    assert scaler.get_scale() == 16.0


def test_averaged_weights_are_there_inside_only() -> None:
    state = compacted_state()
    step(state, 5)
    trained = [parameter.clone() for parameter in state.unet.parameters()]
    with state.averaged() as unet:
        for parameter, shadow in zip(unet.parameters(), state.ema.shadow_params):
            assert torch.equal(parameter, shadow)
    for parameter, before in zip(state.unet.parameters(), trained):
        assert torch.equal(parameter, before)


def test_learning_rate_goes_on_along_its_schedule(tmp_path: Path) -> None:
    words = ("--lr_scheduler", "cosine", "--lr_warmup_steps", "2")
    state, rates = make_state(*words), []
    for seed in range(6):
        if seed == 3:
            path = Checkpoints(tmp_path).save(state.step, {}, {}, state.tensors(), state.values())
        step(state, seed)
        rates.append(state.lr_scheduler.get_last_lr()[0])
    other = make_state(*words, checkpoint=Checkpoints(tmp_path).load(path))
    for seed in range(3, 6):
        step(other, seed)
        assert other.lr_scheduler.get_last_lr()[0] == rates[seed]
    raised = make_state(*words, "--learning_rate", "4e-4", checkpoint=Checkpoints(tmp_path).load(path))
    step(raised, 3)
    assert raised.lr_scheduler.get_last_lr()[0] == pytest.approx(2 * rates[3])


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_every_schedule_warms_up(name: str) -> None:
    """That of Diffusers' `constant` does not."""
    state = make_state("--lr_scheduler", name, "--lr_warmup_steps", "4", "--learning_rate", "1e-3")
    rates = [state.lr_scheduler.get_last_lr()[0]]
    for seed in range(2):
        step(state, seed)
        rates.append(state.lr_scheduler.get_last_lr()[0])
    assert rates == pytest.approx([0, 2.5e-4, 5e-4])


def test_resuming_says_nothing_of_schedules(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """torch would warn of a scheduler that steps before its optimizer."""
    state = make_state("--lr_scheduler", "cosine")
    step(state, 0)
    path = Checkpoints(tmp_path).save(state.step, {}, {}, state.tensors(), state.values())
    recwarn.clear()
    make_state("--lr_scheduler", "cosine", checkpoint=Checkpoints(tmp_path).load(path))
    assert not [str(found.message) for found in recwarn if "lr_scheduler" in str(found.message)]


@pytest.mark.parametrize("before", ["stratified", None])
def test_timesteps_by_importance_start_anew_where_a_checkpoint_has_no_density(tmp_path: Path, before: str | None) -> None:
    """That of a run with other timesteps, and that of an earlier build."""
    state = make_state("--timestep_sampling", before or "importance")
    step(state, 0)
    values = state.values()
    if before is None:
        del values["timestep_density"]
    path = Checkpoints(tmp_path).save(state.step, {}, {}, state.tensors(), values)
    other = make_state("--timestep_sampling", "importance", checkpoint=Checkpoints(tmp_path).load(path))
    assert other.step == 1 and other.timestep_density.step == 0


def test_a_step_draws_the_same_wherever_it_is_reached_from() -> None:
    drawn = []
    for _ in range(2):
        torch.rand(3)
        seed_everything(7, 100, 0)
        drawn.append(torch.rand(4))
    seed_everything(7, 100, 1)
    assert torch.equal(*drawn) and not torch.equal(drawn[0], torch.rand(4))
