"""metrics/conditions.py: conditions in turn, and classifier-free guidance against its equation."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffusers_gfprune.diffusion.batch import ModelInputs
from diffusers_gfprune.diffusion.class_labels import ClassLabels
from diffusers_gfprune.metrics.conditions import SampleConditions, guided, label_conditions, text_conditions
from diffusers_gfprune.metrics.sampling import sample_images
from helpers.families import build

SIZE = (8, 8)


def test_classes_come_in_turn_without_the_null_label() -> None:
    conditions = label_conditions(ClassLabels(4), null_label=1)
    assert conditions.of(range(5, 10))["class_labels"].tolist() == [3, 0, 2, 3, 0]
    assert conditions.without(2)["class_labels"].tolist() == [1, 1]
    of_architecture = label_conditions(ClassLabels(2, null_label=2))
    assert of_architecture.of(range(3))["class_labels"].tolist() == [0, 1, 0]
    assert of_architecture.without(1)["class_labels"].tolist() == [2]


def test_a_model_without_labels_has_no_conditions() -> None:
    conditions = label_conditions(None)
    assert conditions.of(range(3)) == conditions.without(3) == {}
    with pytest.raises(ValueError, match="^guidance_scale=2 must be 1: the model is unconditional"):
        conditions.check_guidance(2)
    with pytest.raises(ValueError, match="^guidance_scale=2 must be 1: the model has no null label"):
        label_conditions(ClassLabels(3)).check_guidance(2)
    label_conditions(ClassLabels(3), null_label=2).check_guidance(2)


def test_prompts_come_in_turn() -> None:
    rows, null = {"states": torch.arange(6.0).view(3, 2)}, {"states": torch.tensor([[7.0, 8.0]])}
    conditions = text_conditions(rows, null)
    assert torch.equal(conditions.of(range(2, 5))["states"], rows["states"][[2, 0, 1]])
    assert conditions.without(2)["states"].tolist() == [[7, 8], [7, 8]]
    assert conditions.description["num_prompts"] == 3
    for others in ((rows, {"states": null["states"] + 1}), ({"states": rows["states"] + 1}, null)):
        assert text_conditions(*others).description["prompts"] != conditions.description["prompts"]


def test_guidance_is_its_equation() -> None:
    """With e(x, c) = x + c, e = x + s c + (1 - s) null; both passes are one batch."""
    calls = []

    def predict(inputs: ModelInputs) -> Tensor:
        calls.append(inputs)
        return inputs.sample + inputs.conditioning["c"]

    inputs = ModelInputs(torch.tensor([[1.0], [2.0]]), torch.zeros(2), {"c": torch.tensor([[10.0], [20.0]])})
    null = {"c": torch.tensor([[0.5], [0.5]])}
    assert guided(predict, inputs, null, 3.0).flatten().tolist() == [1 + 30 - 1, 2 + 60 - 1]
    assert guided(predict, inputs, null, 0.0).flatten().tolist() == [1.5, 2.5]
    assert [len(call.sample) for call in calls] == [4, 4]
    assert guided(predict, inputs, null, 1.0).flatten().tolist() == [11, 22]
    assert len(calls[-1].sample) == 2
    sizes = torch.tensor([[20.0], [40.0]])  # an image has the same ones with and without its caption
    guided(predict, ModelInputs(inputs.sample, inputs.timesteps, {**inputs.conditioning, "time_ids": sizes}), null, 3.0)
    assert calls[-1].conditioning["time_ids"].flatten().tolist() == [20, 40, 20, 40]


def test_samples_are_guided() -> None:
    """Between the samples of the classes and those of the null label; image i has class i, wherever sampling starts."""
    model, conditions = build("dit", "learned-variances"), label_conditions(ClassLabels(4), null_label=3)

    def draw(given: SampleConditions, scale: float, first: int = 0, count: int = 4) -> Tensor:
        options = {"guidance_scale": scale, "conditions": given, "first": first}
        return sample_images(model, DDPMScheduler(), count, SIZE, num_inference_steps=2, **options)

    plain, unconditional, guided_samples = draw(conditions, 1.0), draw(conditions, 0.0), draw(conditions, 4.0)
    nulls = SampleConditions({"class_labels": torch.tensor([3])})
    torch.testing.assert_close(unconditional, draw(nulls, 1.0), rtol=0, atol=1.001 / 255)
    assert (plain - unconditional).abs().max() > 0.01 and (guided_samples - plain).abs().max() > 0.01
    torch.testing.assert_close(draw(conditions, 4.0, first=2, count=2), guided_samples[2:], rtol=0, atol=1.001 / 255)
