"""diffusion/schedulers.py, ddpm.py: every scheduler of Diffusers is known by name, and accepted ones add the right noise."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    UNet2DModel,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffusers_gfprune import GradientFlowPruner, PruneDDPMPipeline
from diffusers_gfprune.diffusion.ddpm import DDPMProcess, check_variance_type
from diffusers_gfprune.diffusion.schedulers import REFUSED_SCHEDULERS, TRAINABLE_SCHEDULERS, training_process
from helpers.architectures import build, inputs
from helpers.pruners import one_shot

DDPM = [name for name, process in TRAINABLE_SCHEDULERS.items() if process is DDPMProcess]
BETAS = {"num_train_timesteps": 50, "beta_start": 0.001, "beta_end": 0.1}


def all_schedulers() -> set[str]:
    """Names of all scheduler classes of the installed Diffusers, and of those that need a package which is not there."""
    names = {name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")}
    assert {"DDPMScheduler", "FlowMatchEulerDiscreteScheduler"} <= names
    found = {name for name in names if inspect.isclass(getattr(diffusers.schedulers, name))}
    return {name for name in found if getattr(diffusers.schedulers, name) is not SchedulerMixin}


def test_every_scheduler_of_diffusers_is_in_one_of_the_two_lists() -> None:
    """A new one has to be looked at before it is accepted."""
    assert not set(TRAINABLE_SCHEDULERS) & set(REFUSED_SCHEDULERS)
    assert all_schedulers() == {*TRAINABLE_SCHEDULERS, *REFUSED_SCHEDULERS}


@pytest.mark.parametrize("name", DDPM)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "trained"])
def test_accepted_schedulers_add_the_noise_of_their_process(name: str, betas: str) -> None:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, by the scheduler's `add_noise` and by this formula."""
    options = {"beta_schedule": betas} if betas != "trained" else {"trained_betas": torch.linspace(0.01, 0.2, 50).tolist()}
    scheduler = getattr(diffusers, name)(**BETAS, **options)
    process = training_process(scheduler)
    clean, noise = torch.randn(5, 1, 2, 2), torch.randn(5, 1, 2, 2)
    timesteps = torch.tensor([1, 10, 25, 40, 48])
    noisy = process.add_noise(clean, noise, timesteps)
    abar = (1 - scheduler.betas).cumprod(0)[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, abar.sqrt() * clean + (1 - abar).sqrt() * noise)
    scheduler.set_timesteps(50)  # many samplers add noise only at timesteps that they are set to
    torch.testing.assert_close(scheduler.add_noise(clean, noise, timesteps), noisy, rtol=1e-4, atol=1e-5)
    assert process.prediction_type == "epsilon" and process.num_train_timesteps == 50
    assert training_process(process) is process and process.model_scheduler is scheduler


def instance(name: str):
    """One of a class that is refused, without the arguments that its constructor may want."""
    kind = getattr(diffusers, name, None) or getattr(diffusers.schedulers, name)
    return kind.__new__(kind)


@pytest.mark.parametrize("name", sorted(REFUSED_SCHEDULERS))
def test_refused_schedulers_are_named_with_the_reason(name: str) -> None:
    """By their class, independently of their configuration."""
    with pytest.raises(ValueError, match=f"scheduler={name} is not supported, {REFUSED_SCHEDULERS[name]}; supported.*DDPM, "):
        training_process(instance(name))


def test_subclasses_are_what_they_inherit_from() -> None:
    class Mine(DDIMScheduler):
        pass

    class Other(EulerDiscreteScheduler):
        pass

    assert training_process(Mine(**BETAS)).scheduler.config.beta_end == 0.1
    with pytest.raises(ValueError, match="scheduler=Other is not supported, it has other continuous noise levels"):
        training_process(Other(**BETAS))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "use_flow_sigmas=True"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "prediction_type=flow_prediction"),
        (DDPMScheduler(beta_end=1.5), "beta_end=1.5.* must be greater than 0 and at most 1"),
        (DDPMScheduler(beta_start=-0.1), "beta_start=-0.1.* must be greater than 0"),
        (DDPMScheduler(trained_betas=[0.1, 0.2]), "trained_betas of the scheduler has 2 values, not num_train_timesteps=1000"),
    ],
)
def test_processes_that_are_none_are_refused(scheduler, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_process(scheduler)


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_learned_variances_belong_to_the_model_and_to_the_scheduler(kind: str) -> None:
    """`DiTPipeline` removes them from the output itself, so that any scheduler will do."""
    learned, fixed = DDPMScheduler(variance_type=kind, **BETAS), DDPMScheduler(**BETAS)
    assert torch.equal(training_process(learned).scheduler.betas, fixed.betas)
    check_variance_type(learned, learned_variance=True, pipeline_splits=False)
    check_variance_type(fixed, learned_variance=False, pipeline_splits=False)
    check_variance_type(DDIMScheduler(**BETAS), learned_variance=True, pipeline_splits=True)
    with pytest.raises(ValueError, match=f"^variance_type={kind} of the scheduler needs a model with learned variances"):
        check_variance_type(learned, learned_variance=False, pipeline_splits=True)
    with pytest.raises(ValueError, match="^the model has learned variances, which variance_type=fixed_small of the scheduler"):
        check_variance_type(fixed, learned_variance=True, pipeline_splits=False)


def test_noise_levels_that_do_not_follow_from_the_betas_are_refused() -> None:
    scheduler = DDIMScheduler(**BETAS)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    with pytest.raises(ValueError, match="DDIMScheduler has other noise levels than those of a DDPM with its betas"):
        training_process(scheduler)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler(), LMSDiscreteScheduler()])
def test_the_library_refuses_other_processes(scheduler) -> None:
    """Both ways in; nothing is changed."""
    unet, known = build("base"), build("base")
    with pytest.raises(ValueError, match="scheduler=.* is not supported"):
        GradientFlowPruner(unet, one_shot(), scheduler)
    with pytest.raises(ValueError, match="scheduler=.* is not supported"):
        PruneDDPMPipeline(unet=unet, scheduler=scheduler).prune(torch.zeros(2, 1, 8, 8))
    assert unet.state_dict().keys() == known.state_dict().keys()


@pytest.mark.slow
def test_one_call_keeps_a_scheduler_that_cannot_add_noise_by_itself() -> None:
    """Scores are those of the process; the pipeline keeps its scheduler."""
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    options = {"target": "params", "ratio": 0.3}
    small = [
        PruneDDPMPipeline(unet=build("base"), scheduler=scheduler).prune(images, **options)
        for scheduler in (DDPMScheduler(**BETAS), DPMSolverMultistepScheduler(**BETAS))
    ]
    assert type(small[1].scheduler) is DPMSolverMultistepScheduler and small[1].scheduler.config.beta_end == 0.1
    for mine, other in zip(small[0].unet.parameters(), small[1].unet.parameters()):
        assert torch.equal(mine, other)


def labels_for(unet: UNet2DModel, kind: str) -> torch.Tensor | None:
    """Labels that do not fit."""
    return {
        "none": None,
        "integers": torch.zeros(2, dtype=torch.long),
        "floats": torch.zeros(2),
        "range": torch.tensor([0, 10]),
        "matrix": torch.zeros(2, 3),
    }[kind]


@pytest.mark.parametrize(
    ("architecture", "labels", "message"),
    [
        (
            "class-identity",
            "integers",
            r"class_labels have shape \(2,\), torch.int64; .*identity.*floating point with shape \(2, 64\)",
        ),
        ("class-identity", "matrix", r"class_labels have shape \(2, 3\)"),
        ("class-identity", "none", "the model needs class_labels"),
        ("class-embedding", "floats", "class_labels have dtype torch.float32; .*num_class_embeds=10.* integers from 0 to 9"),
        ("class-embedding", "range", "class_labels range from 0 to 10; .* integers from 0 to 9"),
        ("class-embedding", "none", "the model needs class_labels"),
        ("class-timestep", "matrix", r"class_labels have shape \(2, 3\)"),
        ("base", "integers", "the model is unconditional, but the batch has class_labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused(architecture: str, labels: str, message: str) -> None:
    """In one line, before any forward."""
    unet = build(architecture)
    pruner = GradientFlowPruner(unet, one_shot(criterion="gradient-flow"), DDPMScheduler())
    clean, given = torch.zeros(2, 1, 8, 8), labels_for(unet, labels)
    batch = (clean, torch.randn_like(clean), torch.tensor([1, 2]), *([] if given is None else [given]))
    with pytest.raises(ValueError, match=message):
        pruner.step(0, [batch])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": torch.tensor([1.5, 2.5])}, "timesteps have dtype torch.float32; they must be integers from 0 to 49"),
        ({"timesteps": torch.tensor([1, 50])}, "timesteps range from 1 to 50; they must be integers from 0 to 49"),
        ({"timesteps": torch.tensor([1])}, r"timesteps have shape \(1,\), not \(2,\)"),
        ({"noise": torch.zeros(2, 1, 4, 4)}, r"noise has shape \(2, 1, 4, 4\), but clean images have \(2, 1, 8, 8\)"),
        ({"clean": torch.zeros(0, 1, 8, 8)}, r"shape \(0, 1, 8, 8\): a calibration batch needs at least one image"),
        ({"clean": torch.zeros(2, 3, 8, 8), "noise": torch.zeros(2, 3, 8, 8)}, "3 channels, but the model has in_channels=1"),
    ],
)
def test_batches_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    clean = change.get("clean", torch.zeros(2, 1, 8, 8))
    batch = (clean, change.get("noise", torch.zeros(2, 1, 8, 8)), change.get("timesteps", torch.tensor([1, 2])))
    pruner = GradientFlowPruner(build("base"), one_shot(criterion="taylor"), DDPMScheduler(num_train_timesteps=50))
    with pytest.raises(ValueError, match=message):
        pruner.step(0, [batch])


def test_a_table_of_fewer_timesteps_is_refused() -> None:
    """A learned time embedding has a row for each timestep."""
    GradientFlowPruner(build("learned-time"), one_shot(), DDPMScheduler(num_train_timesteps=1000))
    with pytest.raises(ValueError, match="num_train_timesteps=1001 of the scheduler must be at most num_train_timesteps=1000"):
        GradientFlowPruner(build("learned-time"), one_shot(), DDPMScheduler(num_train_timesteps=1001))


def test_right_labels_are_scored() -> None:
    """Labels of every kind that a model may take."""
    for architecture in ("class-identity", "class-embedding", "class-timestep"):
        unet = build(architecture)
        labels = inputs(unet)["class_labels"]
        pruner = GradientFlowPruner(unet, one_shot(criterion="gradient-flow"), DDPMScheduler())
        clean = torch.zeros(2, 1, 8, 8)
        assert pruner.step(0, [(clean, torch.randn_like(clean), torch.tensor([1, 2]), labels)]) is not None
