"""The teacher's prediction as a target of training."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training"))

from prune_ddpm import training_loss  # noqa: E402


def small_unet(seed: int, **options: object) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        **options,
    ).eval()


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
    student, teacher = small_unet(0), small_unet(1)
    noise, both, distilled = (loss(student, teacher, weight, prediction_type) for weight in (0.0, 0.25, 1.0))
    torch.testing.assert_close(both, 0.75 * noise + 0.25 * distilled)
    assert not torch.isclose(noise, distilled)


def test_student_that_is_the_teacher_has_nothing_to_learn():
    teacher = small_unet(0)
    assert loss(teacher, teacher, 1.0) == 0
    assert loss(teacher, None, 0.0) > 0.1  # noise is another matter, and needs no teacher


def test_teacher_gets_labels_and_no_gradient():
    student, teacher = (small_unet(seed, num_class_embeds=2) for seed in (0, 1))
    loss(student, teacher, 1.0).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.conv_in.weight.grad.abs().sum() > 0
