"""pipeline_pruning.py: one call prunes the denoiser of any pipeline, and changes nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from torch import Tensor

from diffusers_gfprune import PruneDDPMPipeline, prune_pipeline
from diffusers_gfprune.drawn_images import draw_images
from diffusers_gfprune.families.lookup import FAMILIES, family_of
from diffusers_gfprune.fingerprints import tensors_fingerprint
from diffusers_gfprune.metrics.model_size import count_macs
from diffusers_gfprune.pipeline_parts import PipelineParts
from helpers.architectures import build
from helpers.families import inputs
from helpers.latent_pipelines import CAPTIONS, PIPELINES, sd3

BUDGET = {"target": "macs", "ratio": 0.3, "channel_multiple": 1}


def images(count: int = 8, size: int = 16) -> Tensor:
    """Images in [-1, 1]."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def given(name: str, count: int = 8) -> dict:
    """The conditions that a pipeline needs."""
    prompts = [CAPTIONS[number % len(CAPTIONS)] for number in range(count)]
    return {"dit": {"class_labels": torch.arange(count) % 4}, "ldm": {}}.get(name, {"prompts": prompts})


def component(pipe: DiffusionPipeline) -> str:
    return next(family.component for family in FAMILIES if type(pipe).__name__ in family.pipelines)


# Variants of others, and SD3, which has a test without its third text encoder
SLOW = ("sdxl", "ldm-text", "pixart-sigma", "sd3")


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PIPELINES])
def test_the_denoiser_is_pruned_and_nothing_else_changes(name: str, tmp_path: Path) -> None:
    pipe = PIPELINES[name](tmp_path / name)
    models = {key: value for key, value in pipe.components.items() if isinstance(value, torch.nn.Module)}
    before = {key: tensors_fingerprint(value.state_dict()) for key, value in models.items()}
    dense = getattr(pipe, denoiser := component(pipe))
    small = prune_pipeline(pipe, images(), **given(name), **BUDGET)
    assert type(small) is type(pipe) and getattr(pipe, denoiser) is dense
    assert count_macs(getattr(small, denoiser)) == pytest.approx(0.7 * count_macs(dense), rel=0.03)
    assert {key: tensors_fingerprint(value.state_dict()) for key, value in models.items()} == before
    assert all(getattr(small, key) is value for key, value in models.items() if key != denoiser)
    small.save_pretrained(tmp_path / "small")
    found = getattr(DiffusionPipeline.from_pretrained(tmp_path / "small"), denoiser)
    assert type(found) is type(getattr(small, denoiser))


def test_names_of_local_folders_are_left_out(tmp_path: Path) -> None:
    """They would be published with the pipeline. The dense pipeline keeps its own."""
    PIPELINES["ldm"](tmp_path / "made").save_pretrained(tmp_path / "private")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "private")
    small = prune_pipeline(pipe, images(), **given("ldm"), **BUDGET)
    small.save_pretrained(tmp_path / "small")
    for path in (tmp_path / "small").rglob("*.json"):
        assert "private" not in path.read_text(), path
    assert "private" in str(pipe.vqvae.config["_name_or_path"]) and "private" in str(pipe.config["_name_or_path"])
    assert all(mine is theirs for mine, theirs in zip(small.vqvae.parameters(), pipe.vqvae.parameters(), strict=True))


def test_stable_diffusion_3_is_pruned_without_t5(tmp_path: Path) -> None:
    """Its zeros are as wide as the model's tokens. What is saved loads as the dense pipeline does, without T5 by name."""
    pipe = sd3(tmp_path / "sd3", has_t5=False, num_layers=1)
    small = prune_pipeline(pipe, images(), **given("sd3"), **BUDGET, criterion="magnitude", ranking="group", recovery=False)
    small.save_pretrained(tmp_path / "small")
    none = dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    found = DiffusionPipeline.from_pretrained(tmp_path / "small", **none)
    assert count_macs(found.transformer) == pytest.approx(0.7 * count_macs(pipe.transformer), rel=0.03)


@pytest.mark.slow  # test_latent_pipelines.py loads such a pipeline for training
def test_a_pipeline_with_eulers_method_is_pruned_as_a_ddpm(tmp_path: Path) -> None:
    """As SDXL is saved: the same result as with the scheduler of its training, and its own scheduler stays."""
    pipe = PIPELINES["sdxl"](tmp_path / "sdxl")
    options = given("sdxl") | BUDGET | {"recovery": False}
    expected = prune_pipeline(pipe, images(), **options).unet
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    small = prune_pipeline(pipe, images(), **options)
    assert all(torch.equal(a, b) for a, b in zip(small.unet.parameters(), expected.parameters()))
    assert type(small.scheduler) is EulerDiscreteScheduler
    assert type(PipelineParts.of(small, pruned=True).scheduler) is DDPMScheduler  # that of exports
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="scheduler=EulerDiscreteScheduler is not supported"):
        prune_pipeline(pipe, images(), **options)


def test_pipelines_of_pixels_are_pruned_as_by_prune() -> None:
    pipe = DDPMPipeline(build("base"), DDPMScheduler())
    pixels = images(size=8)[:, :1]
    small = prune_pipeline(pipe, pixels, **BUDGET)
    assert count_macs(small.unet) < 0.75 * count_macs(pipe.unet)
    with pytest.raises(ValueError, match="the unet of the pipeline is already pruned: prune the dense model to the"):
        prune_pipeline(small, pixels, **BUDGET)


def test_recovery_brings_predictions_back(tmp_path: Path) -> None:
    """Latents and labels of the calibration images are used; the widths are the same."""
    pipe = PIPELINES["dit"](tmp_path / "dit")
    dense = pipe.transformer
    options = given("dit") | BUDGET | {"ranking": "sensitivity"}
    plain, mended = (prune_pipeline(pipe, images(), **options, recovery=recovery).transformer for recovery in (False, True))
    assert dict(plain.config) == dict(mended.config)
    batch, family = inputs(dense, 16), family_of(dense)
    batch.conditioning["class_labels"] %= 4
    with torch.no_grad():
        expected, *found = (family.predict(model.eval(), batch) for model in (dense, plain, mended))
    errors = [(prediction - expected).square().mean() for prediction in found]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("recovery", [True, False])
def test_the_result_follows_from_the_seed(recovery: bool, tmp_path: Path) -> None:
    """Recovery draws other noise; without it, only the choice of units depends on the seed."""
    pipe = PIPELINES["dit"](tmp_path / "dit")
    labels = given("dit")["class_labels"]
    first, same, other = (
        prune_pipeline(pipe, images(), class_labels=given, seed=seed, recovery=recovery, **BUDGET).transformer.state_dict()
        for given, seed in ((labels, 0), (labels.tolist(), 0), (labels, 1))
    )
    assert tensors_fingerprint(first) == tensors_fingerprint(same) != tensors_fingerprint(other)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("dit", {"class_labels": None}, "class_labels=None must be labels of the images"),
        ("dit", {"class_labels": torch.zeros(3, dtype=torch.long)}, "class_labels has 3 labels for 8 images"),
        (
            "dit",
            {"class_labels": torch.zeros(8)},
            r"class_labels has shape \(8,\) and dtype torch.float32: it must be integers",
        ),
        ("dit", {"class_labels": torch.full((8,), 4)}, "class_labels has null_label=4, which no image may have"),
        ("dit", {"class_labels": torch.full((8,), 5)}, "class_labels range from 5 to 5; with num_embeds_ada_norm=4 of the"),
        ("dit", {"prompts": list("abcdefgh")}, "prompts must be None: the model takes no text"),
        ("ldm", {"class_labels": torch.zeros(8, dtype=torch.long)}, "class_labels must be None: the model takes no labels"),
        ("ldm", {"images": images(size=8)}, "images have 8x8 pixels, but the pipeline makes images of 16x16"),
        ("sd", {"prompts": None}, "prompts=None must be a prompt for each image"),
        ("sd", {"prompts": "a cat"}, "prompts must be a list of 8 texts"),
        ("sd", {"caption_dropout": 1.0}, "caption_dropout=1.0 must be in"),
        ("ldm", {"total_steps": 5}, "total_steps=5: one-shot pruning has no schedule"),
        ("ldm", {"images": "nonsense"}, "images"),
        ("ldm", {"images": None, "num_teacher_images": 0}, "num_teacher_images=0 must be at least 1"),
        ("sd", {"images": None, "prompts": []}, "prompts must be a list of texts, at least one"),
        ("sd", {"images": None, "prompts": None}, "prompts=None must be a prompt for each image"),
        ("dit", {"images": None}, "class_labels must be None with images=None"),
    ],
)
def test_what_does_not_fit_is_one_line(
    name: str, arguments: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the pruner is made, which may time layers for minutes."""
    monkeypatch.setattr("diffusers_gfprune.pipeline_pruning.GradientFlowPruner", lambda *_: pytest.fail("a pruner is made"))
    options = {"images": images(), **given(name), **BUDGET, **arguments}
    with pytest.raises(ValueError, match=f"^{message}"):
        prune_pipeline(PIPELINES[name](tmp_path / name), **options)


@pytest.mark.parametrize(
    ("count", "options", "dropped"),
    [
        (1, {}, 0),
        (2, {}, 1),
        (8, {"caption_dropout": 0.25}, 2),
        (2, {"caption_dropout": 0.9}, 1),
        (8, {"caption_dropout": 0.0}, 0),
    ],
)
def test_prompts_lose_their_share_but_one_stays(
    count: int, options: dict, dropped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one image, scores and recovery would see the empty prompt only."""

    class Seen(Exception):
        """Holds the calibration batches."""

    class Stub:
        def __init__(self, *_) -> None: ...

        def step(self, step: int, batches: list) -> None:
            raise Seen(batches)

    monkeypatch.setattr("diffusers_gfprune.pipeline_pruning.GradientFlowPruner", Stub)
    pipe = PIPELINES["sd"](tmp_path / "sd")
    with pytest.raises(Seen) as caught:
        prune_pipeline(pipe, images(count), **given("sd", count), **options, **BUDGET)
    [batch], name = caught.value.args[0], "encoder_hidden_states"
    null = PipelineParts.of(pipe).prompts.null()[name]
    assert sum(torch.equal(row[None], null) for row in batch.conditioning[name]) == dropped


# --- without data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ldm", "sd"))])
def test_without_images_the_model_draws_them(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its classes or the prompts in turn; the result is that of the same images."""
    seen: dict = {}

    def spy(*arguments, **options) -> Tensor:
        seen["images"] = draw_images(*arguments, **{**options, "num_inference_steps": 2})
        return seen["images"]

    monkeypatch.setattr("diffusers_gfprune.pipeline_pruning.draw_images", spy)
    pipe = PIPELINES[name](tmp_path / name)
    prompts = {"prompts": list(CAPTIONS[:2])} if name == "sd" else {}
    small = prune_pipeline(pipe, num_teacher_images=6, recovery=False, **prompts, **BUDGET)
    assert seen["images"].shape == (6, 3, 16, 16) and seen["images"].abs().max() <= 1
    repeated = {"prompts": [CAPTIONS[number % 2] for number in range(6)]} if name == "sd" else {}
    labels = {"class_labels": torch.arange(6) % 4} if name == "dit" else {}
    same = prune_pipeline(pipe, seen["images"], recovery=False, **repeated, **labels, **BUDGET)
    denoiser = component(pipe)
    assert getattr(small, denoiser).config.layer_channels == getattr(same, denoiser).config.layer_channels
    weights, others = (tensors_fingerprint(getattr(each, denoiser).state_dict()) for each in (small, same))
    assert weights == others


@pytest.mark.parametrize("kind", ["pipeline", "unet"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.999}, "ratio=0.999"),
        ({"label_dropout": 1.5}, "label_dropout=1.5 must be in"),
        ({"null_label": 99}, "null_label=99 must be"),
    ],
)
def test_what_cannot_be_is_said_before_images_are_drawn(
    kind: str, options: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take hours to draw them."""
    for module in ("pipeline_pruning", "one_shot"):
        monkeypatch.setattr(f"diffusers_gfprune.{module}.draw_images", lambda *_, **__: pytest.fail("images are drawn"))
    options = {**BUDGET, **options}
    with pytest.raises(ValueError, match=message):
        if kind == "pipeline":
            prune_pipeline(PIPELINES["dit"](tmp_path / "dit"), **options)
        else:
            PruneDDPMPipeline(build("class-embedding"), DDPMScheduler(num_train_timesteps=10)).prune(**options)


@pytest.mark.parametrize("pipe", ["training/digits/teacher", build("base")], ids=["path", "unet"])
def test_what_is_no_pipeline_is_named(pipe: object) -> None:
    name = type(pipe).__name__
    with pytest.raises(
        ValueError, match=f"^pipe is a {name}, not a pipeline: load one with DiffusionPipeline.from_pretrained$"
    ):
        prune_pipeline(pipe, **BUDGET)


def test_a_compiled_model_is_named() -> None:
    pipe = DDPMPipeline(build("base"), DDPMScheduler())
    pipe.unet = torch.compile(pipe.unet)
    with pytest.raises(ValueError, match="^the unet of the pipeline is a OptimizedModule, not a UNet2DModel: pass the model"):
        prune_pipeline(pipe, images(), **BUDGET)


def test_prune_draws_images_with_labels() -> None:
    unet = build("class-embedding")
    pipe = PruneDDPMPipeline(unet, DDPMScheduler(num_train_timesteps=10))
    small = pipe.prune(num_teacher_images=8, recovery=False, **BUDGET)
    assert count_macs(small.unet) < 0.75 * count_macs(unet)
    with pytest.raises(ValueError, match="num_teacher_images=0 must be at least 1"):
        pipe.prune(num_teacher_images=0, **BUDGET)
    with pytest.raises(ValueError, match="class_labels must be None with images=None"):
        pipe.prune(class_labels=torch.zeros(8, dtype=torch.long), **BUDGET)


def test_drawing_needs_prompts_where_the_model_takes_text(tmp_path: Path) -> None:
    pipe = PIPELINES["sd"](tmp_path / "sd")
    with pytest.raises(ValueError, match="prompts=None must be a prompt for each image: the model takes text"):
        prune_pipeline(pipe, num_teacher_images=2, **BUDGET)
    with pytest.raises(ValueError, match="prompts must be a list of texts, at least one"):
        prune_pipeline(pipe, prompts=[], num_teacher_images=2, **BUDGET)
