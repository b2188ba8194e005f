"""objectives/objective.py with latent models: learned variances, conditions, and min-SNR weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.diffusion.ddpm import DDPMProcess
from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.objectives.objective import NoisePrediction, Objective, ObjectiveArguments
from diffusers_gfprune.objectives.snr_weights import min_snr_weights
from diffusers_gfprune.pruning.channel_groups import trace_channel_groups
from diffusers_gfprune.pruning.masking import ChannelMasks
from helpers.families import build
from helpers.processes import ddpm

LEARNED = "learned-variances"
EVERYTHING = {"distillation_weight": 0.5, "feature_distillation_weight": 0.1, "sensitivity_matching_weight": 0.01}


def batch(model: nn.Module, size: int = 4) -> DiffusionBatch:
    """Latents with random conditioning."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(size, 4, 8, 8, generator=generator) for _ in range(2))
    timesteps = torch.tensor([20, 300, 600, 900])[:size]
    example = family_of(model).example_inputs(model, 8, 8, size).conditioning

    def values(like: Tensor) -> Tensor:
        if like.is_floating_point():
            return torch.randn(like.shape, generator=generator)
        return torch.arange(size) if like.ndim == 1 else like  # labels, or the mask of text

    conditioning = {name: values(like) for name, like in example.items()}
    return DiffusionBatch(clean, noise, timesteps, conditioning)


def objective(teacher: nn.Module, process: DDPMProcess | None = None, **weights: float) -> Objective:
    masks = ChannelMasks(trace_channel_groups(teacher))
    return Objective(ObjectiveArguments(**weights), process or ddpm(), teacher, masks)


@pytest.mark.parametrize("family", ["dit", "condition"])
def test_the_variance_half_is_kept_at_the_teachers(family: str) -> None:
    """It has a term of its own, and no part in the others."""
    student, teacher = build(family, LEARNED), build(family, LEARNED, seed=1)
    data = batch(student)
    loss, terms, _ = objective(teacher, distillation_weight=0.75)(NoisePrediction(student), data)
    inputs = data.inputs(ddpm())
    with torch.no_grad():
        own, theirs = (family_of(model).output(model, inputs) for model in (student, teacher))
    assert own.shape == (4, 8, 8, 8)
    torch.testing.assert_close(terms["noise"], mse_loss(own[:, :4], data.noise))
    torch.testing.assert_close(terms["distillation"], mse_loss(own[:, :4], theirs[:, :4]))
    torch.testing.assert_close(terms["variance"], mse_loss(own[:, 4:], theirs[:, 4:]))
    torch.testing.assert_close(loss.detach(), 0.25 * terms["noise"] + 0.75 * terms["distillation"] + terms["variance"])


@pytest.mark.parametrize(
    ("family", "name"),
    [("dit", LEARNED), *((family, "base") for family in ("dit", "condition", "pixart", "sd3")), ("condition", "text-time")],
)
def test_every_term_works_and_the_teacher_itself_has_only_noise_to_learn(family: str, name: str) -> None:
    student, teacher = build(family, name, seed=1), build(family, name, seed=1)
    data = batch(student)
    directions = torch.randn(data.noise.shape, generator=torch.Generator().manual_seed(1))
    loss, terms, _ = objective(teacher, **EVERYTHING)(NoisePrediction(student, features=True), data, directions)
    learned = {"variance"} if family_of(student).has_learned_variance(student.config) else set()
    assert set(terms) == {"noise", "distillation", "features", "sensitivity"} | learned
    assert all(value.isfinite() for value in terms.values())
    assert all(value == 0 for key, value in terms.items() if key != "noise")
    torch.testing.assert_close(loss.detach(), 0.5 * terms["noise"])
    other = NoisePrediction(build(family, name), features=True)
    assert all(value > 0 for value in objective(teacher, **EVERYTHING)(other, data, directions)[1].values())


def test_learned_variances_need_a_teacher() -> None:
    model = build("dit", LEARNED)
    with pytest.raises(ValueError, match=r"^distillation_weight=0 must be greater than 0: the model has learned variances"):
        ObjectiveArguments(distillation_weight=0.0).check_model(model)
    ObjectiveArguments(distillation_weight=0.1).check_model(model)
    ObjectiveArguments(distillation_weight=0.0).check_model(build("dit"))


def test_a_transformer_in_training_does_not_drop_labels_by_itself() -> None:
    """Each block would drop others, with a probability of 0.1, and the teacher none."""
    model = build("dit")
    data = batch(model)
    inputs = data.inputs(ddpm())
    wanted = family_of(model).output(model, inputs)
    torch.manual_seed(0)
    dropping = [family_of(model).output(model.train(), inputs) for _ in range(4)]
    assert not all(torch.equal(found, wanted) for found in dropping)
    family_of(model).prepare_training(model)
    assert all(torch.equal(family_of(model).output(model.train(), inputs), wanted) for _ in range(4))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_noise_and_distillation(prediction_type: str) -> None:
    """Each image's error by its timestep; the variance is not weighed."""
    student, teacher = build("dit", LEARNED), build("dit", LEARNED, seed=1)
    process, data = ddpm(prediction_type=prediction_type), batch(student)
    _, plain, _ = objective(teacher, process)(NoisePrediction(student), data)
    _, terms, _ = objective(teacher, process, snr_gamma=5.0)(NoisePrediction(student), data)
    weights = min_snr_weights(process, data.timesteps, 5.0)
    inputs, target = data.inputs(process), data.target(process)
    with torch.no_grad():
        own, theirs = (family_of(model).predict(model, inputs) for model in (student, teacher))
    for name, wanted in (("noise", target), ("distillation", theirs)):
        errors = ((own - wanted) ** 2).mean(dim=(1, 2, 3))
        torch.testing.assert_close(terms[name], (weights * errors).mean())
        assert abs(terms[name] - plain[name]) > 1e-3
    assert terms["variance"] == plain["variance"]


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("inf")])
def test_a_gamma_without_meaning_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match="^snr_gamma=.* must be greater than 0 and finite"):
        ObjectiveArguments(snr_gamma=gamma)
