"""demo/drawing.py: images are those of the same call of Diffusers, to the bit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMPipeline,
    PNDMScheduler,
)

from diffusers_gfprune.demo.drawing import MAX_IMAGES, Settings, draw, try_drawing
from diffusers_gfprune.demo.models import Choices, Models, load_models
from diffusers_gfprune.demo.pictures import compare, difference, picture
from helpers import latent_pipelines
from helpers.tiny_pipelines import tiny_pipeline

STEPS, SEED = 4, 5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "dense"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tiny: Path) -> Models:
    return load_models(str(tiny), str(tiny))


def pixels(images) -> torch.Tensor:
    """PIL images as 8-bit values with shape `(n, height, width[, channels])`."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


def as_pixels(drawn: torch.Tensor) -> torch.Tensor:
    values = (drawn * 255).round().to(torch.uint8)
    return values[:, 0] if values.shape[1] == 1 else values.permute(0, 2, 3, 1)


def stock_call(pipe: DiffusionPipeline, scheduler: str, **options) -> torch.Tensor:
    config = dict(pipe.scheduler.config)
    if "unet" not in pipe.components or len(pipe.components) > 2:  # latents, which are not clipped to [-1, 1]
        config.setdefault("clip_sample", False)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(config)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    return pixels(pipe(**options, num_inference_steps=STEPS, generator=generator).images)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_pixels_are_those_of_the_stock_pipeline(tiny: Path, models: Models, scheduler: str) -> None:
    drawn = draw(models.pruned, Settings(3, STEPS, scheduler, SEED), models.choices)
    expected = stock_call(DiffusionPipeline.from_pretrained(tiny), scheduler, batch_size=3)
    assert torch.equal(as_pixels(drawn.images), expected) and drawn.seconds > 0 and drawn.changes == ()


def test_pixels_of_other_pipelines_of_pixels(tmp_path: Path) -> None:
    unet = tiny_pipeline().unet
    for kind, scheduler in ((DDIMPipeline, DDIMScheduler()), (PNDMPipeline, PNDMScheduler())):
        folder, name = tmp_path / kind.__name__, type(scheduler).__name__
        kind(unet=unet, scheduler=scheduler).save_pretrained(folder)
        models = load_models(str(folder))
        drawn = draw(models.pruned, Settings(2, STEPS, name, SEED), models.choices)
        assert torch.equal(as_pixels(drawn.images), stock_call(kind.from_pretrained(folder), name, batch_size=2)), kind
        if kind is PNDMPipeline:
            with pytest.raises(ValueError, match="num_inference_steps=2 is not possible with scheduler=PNDMScheduler"):
                draw(models.pruned, Settings(2, 2, name), models.choices)
        assert ("DDPMScheduler" in models.choices.schedulers) == (kind is DDIMPipeline)


CALLS: dict[str, tuple[dict, Callable[[int], dict]]] = {
    "ldm": ({}, lambda n: {"batch_size": n}),
    "dit": ({"class_labels": [3, 1]}, lambda n: {"class_labels": [3, 1, 3][:n], "guidance_scale": 1}),
    "sd": ({"prompts": ["a cat"], "guidance_scale": 3.0}, lambda n: {"prompt": ["a cat"] * n, "guidance_scale": 3.0}),
    "sdxl": ({"prompts": ["a cat"], "guidance_scale": 1.0}, lambda n: {"prompt": ["a cat"] * n, "guidance_scale": 1.0}),
    "pixart": (
        {"prompts": ["a cat"], "guidance_scale": 3.0},
        lambda n: {"prompt": ["a cat"] * n, "guidance_scale": 3.0, "use_resolution_binning": False},
    ),
    "ldm-text": ({"prompts": ["two", "red"]}, lambda n: {"prompt": ["two", "red", "two"][:n]}),
}


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize("kind", CALLS)
def test_latent_models_take_labels_and_prompts(kind: str, tmp_path: Path) -> None:
    folder = latent_pipelines.save(kind, tmp_path / kind)
    models = load_models(str(folder))
    given, call = CALLS[kind]
    for scheduler in ("DDIMScheduler", "UniPCMultistepScheduler"):
        drawn = draw(models.pruned, Settings(3, STEPS, scheduler, SEED, **given), models.choices)
        expected = stock_call(DiffusionPipeline.from_pretrained(folder, safety_checker=None), scheduler, **call(3))
        assert torch.equal(as_pixels(drawn.images), expected)
    assert models.choices.has_prompts == ("prompts" in given)
    assert models.choices.classes == (tuple(range(latent_pipelines.CLASSES)) if kind == "dit" else ())


def test_a_model_that_is_saved_with_eulers_method(tmp_path: Path) -> None:
    """As SDXL is. Its own scheduler is one of those to choose from."""
    pipe = latent_pipelines.sdxl(tmp_path / "parts")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    pipe.save_pretrained(tmp_path / "model")
    models = load_models(str(tmp_path / "model"))
    try_drawing(models)
    given, call = CALLS["sdxl"]
    for scheduler in ("DDIMScheduler", "EulerDiscreteScheduler"):
        drawn = draw(models.pruned, Settings(2, STEPS, scheduler, SEED, **given), models.choices)
        expected = stock_call(DiffusionPipeline.from_pretrained(tmp_path / "model"), scheduler, **call(2))
        assert torch.equal(as_pixels(drawn.images), expected)


def test_schedulers_that_do_not_clip_are_not_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers would warn of an argument that they do not have."""
    said: list[str] = []
    pipe = latent_pipelines.sd(tmp_path / "parts")
    pipe.scheduler = EDMEulerScheduler()
    pipe.save_pretrained(tmp_path / "model")
    models = load_models(str(tmp_path / "model"))
    monkeypatch.setattr(diffusers.configuration_utils.logger, "warning", lambda text, *more: said.append(text))
    try_drawing(models)
    assert not [text for text in said if "clip_sample" in text]
    draw(models.pruned, Settings(1, 4, "EDMEulerScheduler", SEED, **CALLS["sd"][0]), models.choices)
    assert models.pruned.pipeline.scheduler.timesteps.min() < 0  # logarithms of noise levels


def test_labels_of_a_model_of_pixels(tmp_path: Path) -> None:
    """Stock pipelines have no argument for them."""
    pipe = tiny_pipeline(num_class_embeds=4)
    pipe.save_pretrained(tmp_path)
    models = load_models(str(tmp_path))
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    for given, labels in (((2,), [2, 2, 2]), ((), [0, 1, 2])):
        x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(SEED))
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                noise = pipe.unet(x, timestep, class_labels=torch.tensor(labels)).sample
                x = scheduler.step(noise, timestep, x).prev_sample
        expected = (((x / 2 + 0.5).clamp(0, 1)[:, 0]) * 255).round().to(torch.uint8)
        settings = Settings(3, STEPS, seed=SEED, class_labels=given)
        assert torch.equal(as_pixels(draw(models.pruned, settings, models.choices).images), expected)
    assert not models.pruned.pipeline.unet._forward_pre_hooks


def test_settings_of_one_drawing_leave_no_trace_in_the_next(models: Models) -> None:
    """Schedulers are made from the configuration of the pipeline's own."""
    before = draw(models.pruned, Settings(1, STEPS), models.choices)
    many = draw(models.pruned, Settings(1, 143, "DDIMScheduler"), models.choices)
    assert len(many.changes) == 1 and "trailing spacing is used" in many.changes[0]
    draw(models.pruned, Settings(1, STEPS, "DPMSolverMultistepScheduler"), models.choices)
    assert torch.equal(draw(models.pruned, Settings(1, STEPS), models.choices).images, before.images)


@pytest.mark.fast_variants(1)
@pytest.mark.parametrize("kind", ["pixels", "sd"])
def test_most_steps_give_finite_images_or_one_line(kind: str, tmp_path: Path) -> None:
    """Some multistep methods take a timestep twice then, and divide by zero."""
    pipe = latent_pipelines.sd(tmp_path / "parts") if kind == "sd" else tiny_pipeline()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, num_train_timesteps=50)
    pipe.save_pretrained(tmp_path / "model")
    models = load_models(str(tmp_path / "model"))
    refused = set()
    for scheduler in models.choices.schedulers:
        try:
            assert draw(models.pruned, Settings(1, 50, scheduler), models.choices).images.isfinite().all()
        except ValueError as error:
            assert re.fullmatch(
                f"num_inference_steps=50 is not possible with scheduler={scheduler}: Diffusers takes timestep [0-9]+ twice",
                str(error),
            )
            refused.add(scheduler)
    assert refused == ({"DPMSolverMultistepScheduler"} if kind == "pixels" else set())  # the other has steps_offset=1


def test_timesteps_that_are_rounded_below_zero_are_refused(models: Models) -> None:
    with pytest.raises(ValueError, match="^num_inference_steps=201 is not possible with scheduler=DDIMScheduler: .* to -1$"):
        draw(models.pruned, Settings(1, 201), models.choices)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler"])
def test_samples_that_are_not_finite_are_no_black_pictures(tmp_path: Path, scheduler: str) -> None:
    """Even where a scheduler clips what the model predicts."""
    tiny_pipeline().save_pretrained(tmp_path / "broken")
    models = load_models(str(tmp_path / "broken"))
    models.pruned.pipeline.unet.conv_out.bias.fill_(math.inf)  # such weights are not loaded
    with pytest.raises(ValueError, match="^samples of broken in float32 are not finite: check the model's weights and dtype$"):
        draw(models.pruned, Settings(1, STEPS, scheduler), models.choices)
    assert not models.pruned.pipeline.unet._forward_hooks


def test_decoded_samples_that_are_not_finite(tmp_path: Path) -> None:
    """Of an autoencoder that does not fit the dtype."""
    models = load_models(str(latent_pipelines.save("sd", tmp_path / "broken")))
    with torch.no_grad():
        models.pruned.pipeline.vae.decoder.conv_out.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="^samples of broken in float32 are not finite"):
        draw(models.pruned, Settings(1, STEPS), models.choices)


def test_equal_models_have_an_empty_difference(models: Models) -> None:
    settings = Settings(2, STEPS, "DDPMScheduler")  # its noise is drawn from the seed, too
    dense, pruned = (draw(model, settings, models.choices) for model in (models.reference, models.pruned))
    assert not difference(pruned.images, dense.images).any()
    assert compare(pruned, dense).endswith("equal images")
    other = draw(models.pruned, Settings(2, STEPS, "DDPMScheduler", seed=1), models.choices)
    assert difference(other.images, dense.images).any() and "PSNR" in compare(other, dense)


def test_difference_of_known_images() -> None:
    zero, half = torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.125)
    assert (difference(half, zero) == 0.5).all() and (difference(zero, half + 0.5) == 1).all()


def test_pictures_are_enlarged_by_a_whole_factor() -> None:
    images = torch.rand(5, 1, 8, 8)
    array = np.asarray(picture(images))  # three columns, two rows
    assert array.shape == (2 * 130 + 2, 3 * 130 + 2, 3)
    blocks = array[2:130, 2:130].reshape(8, 16, 8, 16, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    assert np.array_equal(blocks[:, 0, :, 0, 0], (images[0, 0] * 255).round().to(torch.uint8).numpy())


WRONG = {
    "num_images": (0, f"num_images=0 must be a whole number from 1 to {MAX_IMAGES}"),
    "num_inference_steps": (1001, "num_inference_steps=1001 must be a whole number from 1 to 1000"),
    "scheduler": ("EulerDiscreteScheduler", "scheduler=EulerDiscreteScheduler must be one of DDIMScheduler, "),
    "seed": (None, "seed=None must be a whole number from 0 to "),
    "guidance_scale": (-1.0, "guidance_scale=-1.0 must be at least 0"),
    "class_labels": ((1,), "class_labels=1 must be empty: the model takes none"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_named(models: Models, name: str) -> None:
    value, message = WRONG[name]
    with pytest.raises(ValueError) as error:
        draw(models.pruned, Settings(**{name: value}), models.choices)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="seed=0.5 must be"):
        Settings(seed=0.5).check(models.choices)
    with pytest.raises(ValueError, match="class_labels=9 must be from 0 to 3"):
        Settings(class_labels=(9,)).check(Choices((8, 8), 1000, ("DDIMScheduler",), classes=(0, 1, 2, 3)))


def test_what_cannot_be_sampled_is_found_before_the_page_opens(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments, **options):
        raise RuntimeError("no such\nluck")

    monkeypatch.setattr(models.pruned.pipeline.unet, "forward", fail)
    with pytest.raises(ValueError, match="cannot be sampled: no such luck"):
        try_drawing(models)


def test_a_reference_that_was_not_requested_may_fail(
    models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The page then shows the pruned model alone, and says why."""
    assert models.requested and try_drawing(models) == models

    def fail(*arguments, **options):
        raise RuntimeError("no such\nluck")

    monkeypatch.setattr(models.reference.pipeline.unet, "forward", fail)
    with pytest.raises(ValueError, match="cannot be sampled: no such luck"):
        try_drawing(models)
    left = try_drawing(replace(models, requested=False))
    notice = f"The dense model is not shown: {models.reference.name} cannot be sampled: no such luck"
    assert (left.pruned, left.reference, left.notice) == (models.pruned, None, notice)
    assert capsys.readouterr().err.splitlines()[-1] == f"{notice}. Pass --reference to show one"
