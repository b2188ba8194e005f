"""benchmarks/study_trajectory.py: rows follow the student along the sampler's steps, and errors there are measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import study_trajectory
import torch
from diffusers import DDPMScheduler
from study_trajectory import TrajectoryLoss, errors_along
from torch import Tensor

from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.diffusion.ddpm import DDPMProcess
from diffusers_gfprune.objectives.objective import NoisePrediction, Objective, ObjectiveArguments
from helpers.architectures import build
from helpers.scripts import SHORT, forget_accelerator, plain_runs

STEPS = 4
PROCESS = DDPMProcess(DDPMScheduler())


def models() -> tuple[NoisePrediction, torch.nn.Module]:
    """A student and a teacher that differ a little."""
    student, teacher = build("one-level"), build("one-level").eval()
    with torch.no_grad():
        student.conv_out.weight.mul_(1.1)
    return NoisePrediction(student.eval()), teacher


def batch_of(seed: int, size: int = 4) -> DiffusionBatch:
    config = build("one-level").config
    shape = (size, config.in_channels, config.sample_size, config.sample_size)
    clean, noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    return DiffusionBatch(clean.clamp(-1, 1), noise, torch.arange(size) * 100 + seed, {})


def observed(student: NoisePrediction, seen: list) -> torch.nn.Module:
    def forward(sample: Tensor, timesteps: Tensor, *rest, **options) -> Tensor:
        seen.append((sample, timesteps))
        return student(sample, timesteps, *rest, **options)

    return forward


def test_rows_are_the_states_of_the_sampler() -> None:
    """Of a whole trajectory and the beginning of the next, against DDIM step by step."""
    student, teacher = models()
    sampler = PROCESS.sampler(STEPS)
    loss = TrajectoryLoss(Objective(ObjectiveArguments(), PROCESS, teacher), sampler, first_call=0, share=0.5)
    seen: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for seed in range(STEPS + 1):
            loss(observed(student, seen), batch_of(seed))
    # The second of two trajectories begins in the middle, and two calls later with the noise of the third batch
    state, begins = batch_of(2).noise[1], 2
    for place, (sample, timesteps) in enumerate(seen[begins:]):
        assert timesteps[3] == sampler.timesteps[place]
        torch.testing.assert_close(sample[3], state)
        output = student(state[None], sampler.timesteps[place][None]).detach()
        state = sampler.step(output, sampler.timesteps[place], state[None], [])[0]
    # The first begins at the first step, with a noisy training image
    first = PROCESS.add_noise(batch_of(0).clean[:1], batch_of(0).noise[:1], sampler.timesteps[:1])
    torch.testing.assert_close(seen[0][0][2], first[0])


def test_what_is_not_replaced_and_earlier_calls_stay_as_they_were() -> None:
    student, teacher = models()
    objective = Objective(ObjectiveArguments(), PROCESS, teacher)
    loss = TrajectoryLoss(objective, PROCESS.sampler(STEPS), first_call=1, share=0.25)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    plain = objective(student, batch_of(0), image_weights=weights)
    early, late = (loss(student, batch_of(0), image_weights=weights) for _ in range(2))
    assert torch.equal(early.loss, plain.loss) and torch.equal(early.squares, plain.squares)
    assert late.squares.isnan().tolist() == [True, False, False, False]
    torch.testing.assert_close(late.squares[1:], plain.squares[1:])
    # The loss is the weighted mean of squares; the replaced image has weight 1
    replaced = 4 * late.loss - (weights[1:] * plain.squares[1:]).sum()
    with torch.no_grad():
        state = PROCESS.add_noise(batch_of(0).clean[:1], batch_of(0).noise[:1], PROCESS.sampler(STEPS).timesteps[:1])
        ours, theirs = (unet(state, PROCESS.sampler(STEPS).timesteps[:1]) for unet in (student, NoisePrediction(teacher)))
    torch.testing.assert_close(replaced.detach(), (ours - theirs).square().mean(), rtol=1e-3, atol=1e-6)


def test_conditional_models_are_refused() -> None:
    student, teacher = models()
    loss = TrajectoryLoss(Objective(ObjectiveArguments(), PROCESS, teacher), PROCESS.sampler(STEPS), 0, 1.0)
    batch = batch_of(0)
    batch.conditioning["class_labels"] = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="^the batch has class_labels, but trajectories are of unconditional models$"):
        loss(student, batch)


def test_errors_of_equal_models_are_zero_and_those_at_the_first_step_are_alike() -> None:
    student, teacher = models()
    images = batch_of(0).clean
    assert not any(errors_along(teacher, teacher, PROCESS, PROCESS.sampler(STEPS), images)["own"])
    found = errors_along(student.unet, teacher, PROCESS, PROCESS.sampler(STEPS), images)
    assert found["timesteps"] == PROCESS.sampler(STEPS).timesteps.tolist()
    assert found["own"][0] == found["dense"][0] and found["own"][1] != found["dense"][1]  # both begin with the same noise
    assert all(error > 0 for name in ("own", "dense", "held_out") for error in found[name])


def test_a_run_ends_with_its_errors(tmp_path: Path) -> None:
    words = [*SHORT, "--recipe", "digits", "--output_dir", str(tmp_path / "run"), "--max_train_steps", "4"]
    words += ["--preset", "one-shot", "--criterion", "magnitude", "--eval_images", "0", "--speed_batch_sizes", "0"]
    forget_accelerator()
    with plain_runs():
        study_trajectory.main(["--fraction", "0.5", "--share", "0.5", *words])
    found = json.loads((tmp_path / "run/pruning_report.json").read_text())["trajectory"]
    assert (found["fraction"], found["share"]) == (0.5, 0.5)
    assert len(found["own"]) == len(found["timesteps"]) and min(found["own"]) > 0


def test_losses_with_noise_as_a_target_are_refused() -> None:
    with pytest.raises(ValueError, match="^distillation_weight and gradient_accumulation_steps must be 1: a call"):
        study_trajectory.main(["--fraction", "0.5", "--recipe", "digits", "--distillation_weight", "0.5"])
    with pytest.raises(ValueError, match="^fraction=2.0 must be in \\[0, 1\\]"):
        study_trajectory.main(["--fraction", "2", "--recipe", "digits"])
