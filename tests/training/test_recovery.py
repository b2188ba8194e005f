"""training/recovery.py: changes of weights follow the masks, with their averages, and survive a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel

from diffusers_gfprune import GradientFlowPruner
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.pruning.masking import dense_parameters
from diffusers_gfprune.training.arguments import parse_arguments
from diffusers_gfprune.training.checkpointing import Checkpoints
from diffusers_gfprune.training.recovery import WeightPath, follow_changes, model_before, plan_changes
from diffusers_gfprune.training.state import TrainingState
from helpers.scripts import forget_accelerator

SMALL = {
    **{"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32), "norm_num_groups": 8},
    **{"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
    **{"attention_head_dim": 8, "layers_per_block": 1},
}
WORDS = [
    *("--pretrained_model_name_or_path", "model", "--dataset_name", "images", "--max_train_steps", "10", "--use_ema"),
    *("--soft_fraction", "0.4", "--hard_fraction", "0.6", "--update_interval", "2", "--criterion", "magnitude"),
]


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of 256."""
    monkeypatch.setattr("diffusers_gfprune.training.recovery.SAMPLES", 32)


def make_state(checkpoint=None) -> TrainingState:
    """Ranked at 0 and 2, with binary masks from step 4 on."""
    forget_accelerator()
    torch.manual_seed(0)
    args = parse_arguments(WORDS)
    unet = UNet2DModel(**SMALL)
    pruner = GradientFlowPruner(unet, args.pruning.config(10), DDPMScheduler())
    return TrainingState(args, Accelerator(), unet, pruner, checkpoint)


def batches() -> list[DiffusionBatch]:
    generator = torch.Generator().manual_seed(1)
    clean, noise = (torch.randn(16, 1, 8, 8, generator=generator) for _ in range(2))
    return [DiffusionBatch(clean, noise, torch.arange(0, 1000, 63))]


def weights(state: TrainingState) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in dense_parameters(state.unet).items()}


def output(unet: UNet2DModel) -> torch.Tensor:
    batch = batches()[0]
    with torch.no_grad():
        return copy.deepcopy(unet).eval()(batch.noise, batch.timesteps).sample


def test_changes_follow_the_masks_and_survive_a_checkpoint(tmp_path: Path) -> None:
    state = make_state()
    dense = copy.deepcopy(UNet2DModel.from_config(state.unet.config))
    dense.load_state_dict(weights(state))
    wanted, before = output(dense), weights(state)
    state.pruner.step(0, batches())
    plan_changes(state, dense, batches(), seed=0)
    follow_changes(state)
    assert all(torch.equal(now, before[name]) for name, now in weights(state).items())  # nothing has moved yet
    path = state.weight_path
    assert (path.start_step, path.goal_step, path.done) == (0, 2, 0.0) and len(path.changes) > 5

    state.step = 1
    state.pruner.step(1, [])
    follow_changes(state)
    for name, now in weights(state).items():
        expected = before[name] + 0.5 * path.changes[name] if name in path.changes else before[name]
        torch.testing.assert_close(now, expected)
    checkpoints = Checkpoints(tmp_path)
    saved = checkpoints.save(1, {}, {}, state.tensors(), state.values())
    resumed = make_state(checkpoints.load(saved))
    for each in (state, resumed):
        each.step = 2
        each.pruner._follow_path(2)
        follow_changes(each)
        assert each.weight_path is None
    shadows = dict(zip(before, state.ema.shadow_params))
    for name, now in weights(state).items():
        assert torch.equal(now, weights(resumed)[name])
        torch.testing.assert_close(now, before[name] + path.changes.get(name, 0.0))
        torch.testing.assert_close(shadows[name], now)

    mended = (output(state.unet) - wanted).square().mean()
    for name, parameter in dense_parameters(state.unet).items():
        parameter.data.copy_(before[name])
    assert mended < 0.9 * (output(state.unet) - wanted).square().mean()


def test_changes_are_complete_when_the_next_ones_are_planned() -> None:
    """At a ranking, masks are where the one before led them, and so are weights."""
    state = make_state()
    dense = UNet2DModel.from_config(state.unet.config)
    dense.load_state_dict(weights(state))
    before = weights(state)
    state.pruner.step(0, batches())
    plan_changes(state, dense, batches(), seed=0)
    path = state.weight_path
    for state.step in (1, 2):
        assert (state.pruner.step(state.step, batches()) is None) == (state.step == 1)
        if state.step == 1:
            follow_changes(state)
    plan_changes(state, dense, batches(), seed=0)
    assert state.weight_path is not path and state.weight_path.start_step == 2
    for name, now in weights(state).items():
        torch.testing.assert_close(now, before[name] + path.changes.get(name, 0.0))


def test_targets_are_those_of_the_model_before_the_ranking() -> None:
    """Where no mask changes, no weight does, however far training has come from the dense model."""
    state = make_state()
    dense = UNet2DModel.from_config(state.unet.config)
    dense.load_state_dict(weights(state))
    state.pruner.step(0, batches())
    for state.step in (1, 2, 3, 4):
        state.pruner.step(state.step, batches())
    with torch.no_grad():
        for parameter in state.unet.parameters():
            parameter.mul_(1.1)
    masks = state.pruner.unit_masks
    assert all(set(mask.unique().tolist()) <= {0.0, 1.0} for mask in masks.values())
    torch.testing.assert_close(output(model_before(state.unet, masks, dense)), output(state.unet))
    plan_changes(state, dense, batches(), seed=0, masks_before=masks)
    assert not state.weight_path.changes
    plan_changes(state, dense, batches(), seed=0)
    assert len(state.weight_path.changes) > 5
    everything = {name: torch.ones_like(mask) for name, mask in masks.items()}
    plan_changes(state, dense, batches(), seed=0, masks_before=everything)
    assert len(state.weight_path.changes) > 5


def test_shares_of_a_path() -> None:
    assert [WeightPath(4, 8, {}).share(step) for step in (4, 5, 8, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert WeightPath(4, 4, {}).share(4) == 1.0  # at once
