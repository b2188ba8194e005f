"""diffusion/batch.py: inputs and targets of a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffusers_gfprune.diffusion.batch import DiffusionBatch
from helpers.processes import ddpm

CLEAN, NOISE = torch.full((3, 1, 2, 2), 0.5), torch.full((3, 1, 2, 2), -1.0)
TIMESTEPS, LABELS = torch.tensor([0, 500, 999]), torch.tensor([7, 8, 9])
BATCH = DiffusionBatch(CLEAN, NOISE, TIMESTEPS, {"class_labels": LABELS})


def test_inputs_are_noisy_images_and_targets_what_the_process_predicts() -> None:
    """sqrt(abar) x + sqrt(1 - abar) eps, and eps, x or sqrt(abar) eps - sqrt(1 - abar) x."""
    abar = ddpm().scheduler.alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1)
    inputs = BATCH.inputs(ddpm())
    torch.testing.assert_close(inputs.sample, 0.5 * abar.sqrt().expand(3, 1, 2, 2) - (1 - abar).sqrt())
    assert inputs.timesteps is TIMESTEPS and inputs.conditioning == {"class_labels": LABELS}
    assert BATCH.inputs(ddpm(), torch.bfloat16).sample.dtype == torch.bfloat16
    assert BATCH.target(ddpm()) is NOISE and BATCH.target(ddpm(prediction_type="sample")) is CLEAN
    velocity = BATCH.target(ddpm(prediction_type="v_prediction"))
    torch.testing.assert_close(velocity, (-abar.sqrt() - 0.5 * (1 - abar).sqrt()).expand(3, 1, 2, 2))


def test_tuples_become_batches() -> None:
    assert DiffusionBatch.of(BATCH) is BATCH
    assert DiffusionBatch.of((CLEAN, NOISE, TIMESTEPS)).conditioning == {}
    assert DiffusionBatch.of([CLEAN, NOISE, TIMESTEPS, LABELS]).conditioning == {"class_labels": LABELS}
    for count in (2, 5):
        with pytest.raises(ValueError, match=rf"\(clean_images, noise, timesteps\[, class_labels\]\), not {count} tensors"):
            DiffusionBatch.of([CLEAN] * count)


def test_parts_hold_the_rows_of_everything() -> None:
    first, second = BATCH.split(2)
    assert (len(BATCH), len(first), len(second)) == (3, 2, 1)
    for whole, *parts in zip(BATCH.tensors(), first.tensors(), second.tensors()):
        assert torch.equal(torch.cat(parts), whole)
    moved = BATCH.to(torch.device("meta"))
    assert all(tensor.is_meta for tensor in moved.tensors()) and list(moved.conditioning) == ["class_labels"]


def test_seeds_are_those_of_the_images_in_any_split() -> None:
    noise = torch.randn(5, 1, 2, 2)
    whole = DiffusionBatch(torch.zeros(5, 1, 2, 2), noise, torch.arange(5))
    one, other = whole.split(3)
    assert one.seeds() + other.seeds() == whole.seeds() and len(set(whole.seeds())) == 5
    same_images = DiffusionBatch(torch.ones(5, 1, 2, 2), noise.clone(), torch.zeros(5))
    assert same_images.seeds() == whole.seeds() != DiffusionBatch(noise, noise.flip(0), torch.arange(5)).seeds()


def test_the_memory_format_is_that_of_images_and_noise() -> None:
    images = torch.zeros(2, 3, 4, 4)
    moved = DiffusionBatch(images, images, TIMESTEPS[:2]).to(images.device, memory_format=torch.channels_last)
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (moved.clean, moved.noise))


def test_batches_of_another_model_are_refused() -> None:
    BATCH.check(1, ddpm())
    for change, message in (
        ({"clean": CLEAN[0]}, r"clean images have shape \(1, 2, 2\), but the model has in_channels=1"),
        ({"noise": NOISE[:2]}, r"noise has shape \(2, 1, 2, 2\), but clean images have \(3, 1, 2, 2\)"),
        ({"timesteps": TIMESTEPS + 1}, "timesteps range from 1 to 1000; they must be integers from 0 to 999"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(BATCH, **change).check(1, ddpm())


def test_embeddings_have_the_dtype_of_the_samples_and_labels_stay() -> None:
    """Labels of one floating-point number may be timesteps, which half precision would round."""
    given = {"encoder_hidden_states": torch.zeros(3, 5, 2), "class_labels": torch.tensor([1.0, 501.0, 999.0]), "ids": LABELS}
    found = replace(BATCH, conditioning=given).inputs(ddpm(), torch.bfloat16).conditioning
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "encoder_hidden_states": torch.bfloat16,
        "class_labels": torch.float32,
        "ids": torch.int64,
    }
