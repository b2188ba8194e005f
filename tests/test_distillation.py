"""The teacher's prediction as a target of training."""

import sys
from pathlib import Path

import pytest
import torch
from architectures import build
from diffusers import DDPMScheduler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training"))

from prune_ddpm import training_loss  # noqa: E402


def loss(student, teacher, weight: float, prediction_type: str = "epsilon") -> torch.Tensor:
    scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type=prediction_type)
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = {"pixel_values": images}
    if student.config.num_class_embeds is not None:
        batch["class_labels"] = torch.arange(4) % 2
    torch.manual_seed(1)  # noise and timesteps
    return training_loss(student, scheduler, batch, teacher, weight)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_is_between_noise_and_teacher(prediction_type):
    student, teacher = build(seed=0), build(seed=1)
    noise, both, distilled = (loss(student, teacher, weight, prediction_type) for weight in (0.0, 0.25, 1.0))
    torch.testing.assert_close(both, 0.75 * noise + 0.25 * distilled)
    assert not torch.isclose(noise, distilled)


def test_student_that_is_the_teacher_has_nothing_to_learn():
    teacher = build()
    assert loss(teacher, teacher, 1.0) == 0
    assert loss(teacher, None, 0.0) > 0.1  # noise is another matter, and needs no teacher


def test_teacher_gets_labels_and_no_gradient():
    student, teacher = (build("class-embedding", seed) for seed in (0, 1))
    loss(student, teacher, 1.0).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.conv_in.weight.grad.abs().sum() > 0
