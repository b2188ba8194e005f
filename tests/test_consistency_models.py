"""Consistency models from scoring to saving: pruned without data, and trained by the teacher alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    UNet2DModel,
)
from torch import Tensor

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner, PruneDDPMPipeline, prune_pipeline
from diffusers_gfprune.metrics.sampling import denoised
from diffusers_gfprune.metrics.step_loss import StepLoss
from diffusers_gfprune.objectives.objective import NoisePrediction, Objective, ObjectiveArguments
from diffusers_gfprune.one_shot import calibration_batches, prune_unet
from diffusers_gfprune.scoring.context import ScoringContext
from diffusers_gfprune.trained_pipelines import load_pipeline
from helpers.consistency_models import SIZE, consistency_pipeline, consistency_unet, trained_pipeline, wanted_images
from helpers.processes import consistency
from helpers.pruners import one_shot

OPTIONS = {"target": "macs", "ratio": 0.3}


def images_of(unet: UNet2DModel, count: int = 32, steps: int = 1) -> Tensor:
    """Samples of a consistency model, before rounding."""
    (found,) = denoised(unet, CMStochasticIterativeScheduler(), range(count), (SIZE, SIZE), steps, seed=5)
    return found


def batches(count: int = 32) -> list:
    noise = torch.randn(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return calibration_batches(wanted_images(noise), consistency(), batch_size=16)


# --- without training ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pipeline_is_pruned_without_data() -> None:
    """The dense model draws images in one step; what is left is nearer to it than what magnitude leaves."""
    pipe = trained_pipeline()
    before = copy.deepcopy(pipe.unet.state_dict())
    dense = images_of(pipe.unet)
    errors = {}
    for name, options in {
        "default": {},
        "without recovery": {"recovery": False},
        "one step": {"num_inference_steps": 1},
        "magnitude": {"criterion": "magnitude", "recovery": False},
    }.items():
        small = prune_pipeline(pipe, num_teacher_images=64, **OPTIONS, **options)
        assert type(small) is ConsistencyModelPipeline and small.unet.config.layer_channels
        errors[name] = (images_of(small.unet) - dense).square().mean().item()
    assert max(errors["default"], errors["one step"]) < errors["without recovery"] < errors["magnitude"], errors
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())


@pytest.mark.slow
def test_one_call_repeats_exactly_and_takes_images() -> None:
    pipe = consistency_pipeline()
    images = torch.rand(8, 1, SIZE, SIZE) * 1.8 - 0.9
    first, second = (prune_unet(pipe.unet, pipe.scheduler, images, **OPTIONS) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


@pytest.mark.slow
def test_vectors_come_from_a_tensor_or_a_function() -> None:
    """Models with class_embed_type=identity; a network that makes the vectors stays as it is."""
    pipe = consistency_pipeline(class_embed_type="identity")
    label_network = torch.nn.Linear(1, 64)

    @torch.no_grad()
    def vectors(numbers: range) -> Tensor:
        return label_network(torch.tensor(list(numbers)).float()[:, None] / 10)

    options = {"num_teacher_images": 8, "batch_size": 4, **OPTIONS}
    small = prune_pipeline(pipe, class_labels=vectors, **options)
    also = prune_pipeline(pipe, class_labels=vectors(range(8)), **options)
    assert all(torch.equal(a, b) for a, b in zip(small.unet.parameters(), also.unet.parameters()))
    other = prune_unet(pipe.unet, pipe.scheduler, class_labels=vectors(range(8)) * 2, **options)
    assert not all(torch.equal(a, b) for a, b in zip(small.unet.parameters(), other.parameters()))
    for given, message in (
        (None, "class_labels=None must be vectors of 64 values, or a function that makes them"),
        (torch.zeros(8, 3), r"class_labels have shape \(8, 3\), torch.float32; the model takes vectors"),
        (torch.zeros(8), r"class_labels have shape \(8,\)"),
        (torch.full((8, 64), torch.nan), "class_labels must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_pipeline(pipe, class_labels=given, **options)
    with pytest.raises(ValueError, match="class_labels has 4 vectors for 8 images"):
        prune_unet(pipe.unet, pipe.scheduler, torch.zeros(8, 1, SIZE, SIZE), class_labels=vectors(range(4)), **OPTIONS)
    with pytest.raises(ValueError, match="class_labels must be labels of the images: functions are for models"):
        prune_unet(consistency_unet(), pipe.scheduler, torch.zeros(8, 1, SIZE, SIZE), class_labels=vectors, **OPTIONS)


class Wrapper(torch.nn.Module):
    """A user's: it computes the vectors, and the image from the output."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet, self.labels = unet, torch.nn.Linear(1, 64)

    def forward(self, noisy: Tensor, timesteps: Tensor, difficulty: Tensor) -> Tensor:
        return 0.5 * self.unet(noisy, timesteps, class_labels=self.labels(difficulty[:, None])).sample


def test_a_wrapper_around_the_unet_stays_as_it_is() -> None:
    """The pruner takes the UNet inside; the wrapper computes the same with masks and after compaction."""
    wrapper = Wrapper(consistency_unet(class_embed_type="identity")).eval()
    labels = copy.deepcopy(wrapper.labels.state_dict())
    inputs = (torch.randn(4, 1, SIZE, SIZE), torch.full((4,), 100.0), torch.rand(4))
    pruner = GradientFlowPruner(wrapper.unet, one_shot(criterion="gradient-flow", ratio=0.3), CMStochasticIterativeScheduler())
    with torch.no_grad():
        vectors = wrapper.labels(torch.rand(8, 1))
    pruner.step(0, calibration_batches(torch.zeros(8, 1, SIZE, SIZE), consistency(), 8, vectors))
    with torch.no_grad():
        masked = wrapper(*inputs)
        wrapper.unet = pruner.compact()
        torch.testing.assert_close(wrapper(*inputs), masked, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, labels[name]) for name, value in wrapper.labels.state_dict().items())


# --- losses -------------------------------------------------------------------------------------------------------------


def test_scores_are_of_images() -> None:
    """Outputs count with the factor by which sampling multiplies them."""
    unet, process = consistency_unet(), consistency()
    (batch, *_), groups = (
        batches(),
        GradientFlowPruner(consistency_unet(), one_shot(), CMStochasticIterativeScheduler()).groups,
    )
    context = ScoringContext(unet, groups, [batch], process, GFPruneConfig(total_steps=1))
    inputs = batch.inputs(process)
    expected = unet(inputs.sample, inputs.timesteps).sample * process.output_scale(batch.timesteps)[:, None, None, None]
    torch.testing.assert_close(context.predictions(batch), expected)


def test_the_loss_is_the_distance_to_the_teacher_alone() -> None:
    process, (batch, *_) = consistency(), batches()
    student, teacher = consistency_unet(1), consistency_unet(2)
    loss, terms, _ = Objective(ObjectiveArguments(), process, teacher)(NoisePrediction(student), batch)
    assert set(terms) == {"distillation"}
    inputs = batch.inputs(process)
    gap = (student(inputs.sample, inputs.timesteps).sample - teacher(inputs.sample, inputs.timesteps).sample).detach()
    expected = (gap * process.output_scale(batch.timesteps)[:, None, None, None]).square().mean()
    torch.testing.assert_close(loss.detach(), expected)
    zero, *_ = Objective(ObjectiveArguments(), process, copy.deepcopy(student))(NoisePrediction(student), batch)
    assert zero == 0
    loss.backward()
    assert student.conv_in.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_training_brings_a_pruned_model_back() -> None:
    """A few steps on the teacher's images halve the distance of samples at least."""
    pipe = trained_pipeline()
    options = {"target": "macs", "ratio": 0.6, "criterion": "magnitude", "recovery": False}
    small = prune_unet(pipe.unet, pipe.scheduler, **options).requires_grad_(True)
    dense = images_of(pipe.unet)
    before = (images_of(small) - dense).square().mean()
    objective, model = Objective(ObjectiveArguments(), pipe.scheduler, pipe.unet), NoisePrediction(small)
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-3)
    for _ in range(15):
        for batch in batches(64):
            loss, *_ = objective(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert (images_of(small) - dense).square().mean() < before / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"distillation_weight": 0.5},
            "distillation_weight=0.5 must be 1: the model is a consistency model, which has no target",
        ),
        ({"distillation_weight": 0.0, "feature_distillation_weight": 1.0}, "distillation_weight=0 must be 1"),
        ({"snr_gamma": 5.0}, "snr_gamma=5 must be left out: it is for DDPMs, and the model is a consistency model"),
    ],
)
def test_losses_of_noise_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(ObjectiveArguments(**options), consistency(), consistency_unet())


@pytest.mark.parametrize("criterion", ["taylor", "diff-pruning", "gradient-flow-weights"])
def test_criteria_of_the_loss_are_refused(criterion: str) -> None:
    unet = consistency_unet()
    with pytest.raises(
        ValueError, match=f"criterion={criterion} must be one of gradient-flow, magnitude, random.*: the model is"
    ):
        GradientFlowPruner(unet, one_shot(criterion=criterion), CMStochasticIterativeScheduler())
    assert not hasattr(unet, "channel_masks")


def test_the_step_loss_is_the_distance_to_the_dense_model() -> None:
    dense, other, process = consistency_unet(1), consistency_unet(2), consistency()
    images = torch.rand(6, 1, SIZE, SIZE) * 2 - 1
    loss = StepLoss(images, process, grid=8, reference=dense)
    assert loss(dense) == 0 and loss(other) > 0
    by_timestep = loss.by_timestep(other)
    assert len(by_timestep) == 8 and list(by_timestep) == sorted(by_timestep)
    with pytest.raises(ValueError, match="reference=None must be the dense model: a consistency model has no other target"):
        StepLoss(images, process)


# --- pipelines ----------------------------------------------------------------------------------------------------------


def test_a_pruned_pipeline_is_saved_and_loads_everywhere(tmp_path: Path) -> None:
    pipe = consistency_pipeline()
    pipe.save_pretrained(tmp_path / "dense")
    found = load_pipeline(str(tmp_path / "dense"))
    assert found.kind is ConsistencyModelPipeline and found.process.name == "consistency"
    small = prune_unet(found.denoiser, found.scheduler, num_teacher_images=8, **OPTIONS)
    found.save(small, tmp_path / "pruned")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pruned")
    assert type(loaded) is ConsistencyModelPipeline
    assert torch.equal(images_of(loaded.unet, 4, 2), images_of(small, 4, 2))
    again = load_pipeline(str(tmp_path / "pruned"), pruned=True)
    assert dict(again.scheduler.config) == dict(found.scheduler.config)


@pytest.mark.parametrize(
    ("kind", "scheduler", "message"),
    [
        (
            DDPMPipeline,
            CMStochasticIterativeScheduler(),
            "which a DDPMPipeline does not sample; pipelines for it: Consistency",
        ),
        (
            ConsistencyModelPipeline,
            DDIMScheduler(),
            "a DDPM, which a ConsistencyModelPipeline does not sample; pipelines for it",
        ),
    ],
)
def test_schedulers_of_another_pipeline_are_refused(kind, scheduler, message: str, tmp_path: Path) -> None:
    """They would load, and sample something else."""
    pipe = kind(consistency_unet(), scheduler)
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(tmp_path / "model"))
    with pytest.raises(ValueError, match=message):
        prune_pipeline(pipe, num_teacher_images=8, **OPTIONS)


def test_a_ddpm_pipeline_does_not_prune_another_process() -> None:
    pipe = PruneDDPMPipeline(unet=consistency_unet(), scheduler=CMStochasticIterativeScheduler())
    with pytest.raises(ValueError, match="which a PruneDDPMPipeline does not sample"):
        pipe.prune(num_teacher_images=8, **OPTIONS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"time_embedding_type": "fourier"}, "time_embedding_type=fourier must be positional: outputs would be divided"),
        (
            {"time_embedding_type": "learned", "num_train_timesteps": 1000},
            "time_embedding_type=learned must be positional: timesteps of a consistency model are no integers",
        ),
    ],
)
def test_embeddings_of_other_timesteps_are_refused(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientFlowPruner(consistency_unet(**config), one_shot(), CMStochasticIterativeScheduler())
