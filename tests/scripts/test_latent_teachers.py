"""The latent digits models that ship here: they load with stock Diffusers, sample the right digits, and can be pruned."""

from __future__ import annotations

import functools

import datasets
import pytest
import torch
from check_teachers import accuracy, classifier, distance, reconstruction_psnr, reduced, sampled, use_null_label
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from latent_training import load_digits
from learned_variance import variance_loss
from torch import Tensor
from train_latent_teachers import Batch
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner
from diffusers_gfprune.diffusion.schedulers import training_process
from diffusers_gfprune.metrics.model_size import count_macs, count_parameters
from helpers.scripts import ROOT

DIGITS = ROOT / "training/digits"
KINDS = {"dit": DiTPipeline, "ldm": LDMPipeline, "text": StableDiffusionPipeline}
LABELS = list(range(10))
PSNR = {"dit": 44, "ldm": 41}  # in decibels, of 64 held-out digits
FD = 0.4  # of 100 samples in 20 steps


@functools.cache
def pipeline(kind: str) -> DiffusionPipeline:
    """A shipped pipeline, by its stock class."""
    return KINDS[kind].from_pretrained(DIGITS / kind)


def denoiser(kind: str) -> torch.nn.Module:
    return pipeline(kind).transformer if kind == "dit" else pipeline(kind).unet


def by_label(labels: list[int], **options) -> Tensor:
    """Samples of the transformer in 20 steps."""
    return sampled(pipeline("dit"), len(labels), class_labels=labels, num_inference_steps=20, **options)


def by_prompt(prompts: list[str], **options) -> Tensor:
    """Samples of the text model in 20 steps."""
    return sampled(pipeline("text"), len(prompts), prompt=prompts, num_inference_steps=20, **options)


# --- the repositories --------------------------------------------------------------------------------------------------


def test_all_models_are_small() -> None:
    files = [path for kind in KINDS for path in (DIGITS / kind).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".md", ".safetensors"}  # `load_dataset` would find pictures
    files += (ROOT / "training/captioned_digits").rglob("*.parquet")
    assert sum(path.stat().st_size for path in files) <= 6_000_000


@pytest.mark.parametrize("kind", KINDS)
def test_repositories_are_complete_and_load_in_single_precision(kind: str) -> None:
    """Weights are stored in half precision, and loaded in single precision."""
    found = DiffusionPipeline.from_pretrained(DIGITS / kind)
    assert type(found) is KINDS[kind]
    classes = {
        "dit": {"transformer": DiTTransformer2DModel, "vae": AutoencoderKL},
        "ldm": {"unet": UNet2DModel, "vqvae": VQModel},
        "text": {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel},
    }[kind]
    modules = {name: part for name, part in found.components.items() if isinstance(part, torch.nn.Module)}
    assert {name: type(part) for name, part in modules.items()} == classes
    for part in modules.values():
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    training_process(found.scheduler)  # refuses what cannot be trained
    card = (DIGITS / kind / "README.md").read_text()
    assert "license: apache-2.0" in card and "library_name: diffusers" in card


def test_one_autoencoder_serves_two_models() -> None:
    name = "vae/diffusion_pytorch_model.safetensors"
    assert (DIGITS / "dit" / name).read_bytes() == (DIGITS / "text" / name).read_bytes()


@pytest.mark.parametrize(("kind", "part"), [("dit", "vae"), ("ldm", "vqvae")])
def test_latents_have_unit_variance_and_images_come_back(kind: str, part: str) -> None:
    vae, images = getattr(pipeline(kind), part), load_digits("validation").images[:64]
    with torch.no_grad():
        encoded = vae.encode(images)
    latents = encoded.latents if kind == "ldm" else encoded.latent_dist.mean
    assert (vae.config.scaling_factor * latents).std().item() == pytest.approx(1, abs=0.05)
    assert reconstruction_psnr(vae, images) > PSNR[kind]


# --- samples -----------------------------------------------------------------------------------------------------------


def test_the_classifier_knows_held_out_digits() -> None:
    digits = load_digits("validation")
    assert accuracy(digits.images, digits.labels) > 0.97
    assert accuracy(digits.images, (digits.labels + 1) % 10) < 0.03
    assert reduced(digits.images).shape == (297, 64)


def test_labels_give_their_digits() -> None:
    assert accuracy(by_label(LABELS * 3, guidance_scale=1.0), torch.tensor(LABELS * 3)) >= 0.9


def test_guidance_needs_the_models_own_null_label() -> None:
    """`DiTPipeline` asks for label 1000, which a model of ten classes does not have."""
    with pytest.raises(IndexError):
        by_label(LABELS, guidance_scale=2.0)
    handle = use_null_label(pipeline("dit"))
    try:
        assert classifier().predict(reduced(by_label(LABELS, guidance_scale=2.0))).tolist() == LABELS
    finally:
        handle.remove()


@pytest.mark.parametrize("template", ["a handwritten {}", "the digit {}"])
def test_prompts_give_their_digits(template: str) -> None:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    images = by_prompt([template.format(word) for word in words], guidance_scale=2.0)
    assert classifier().predict(reduced(images)).tolist() == LABELS


def test_unconditional_samples_are_closer_to_digits_than_noise() -> None:
    samples = sampled(pipeline("ldm"), 100, num_inference_steps=20)
    noise = torch.rand(100, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert distance(samples) < FD < 0.2 * distance(noise)
    assert len(set(classifier().predict(reduced(samples)))) == 10  # all digits appear


def test_prompts_are_cut_into_whole_words() -> None:
    tokenizer: CLIPTokenizer = pipeline("text").tokenizer
    assert tokenizer.tokenize("A handwritten three") == ["a</w>", "handwritten</w>", "three</w>"]
    assert tokenizer.model_max_length == pipeline("text").text_encoder.config.max_position_embeddings == 16
    unseen = tokenizer("a cat, zzz").input_ids  # bytes, and no unknown token
    assert unseen.count(tokenizer.eos_token_id) == 1 and max(unseen) < pipeline("text").text_encoder.config.vocab_size


def test_learned_variances_fit_better_than_either_bound() -> None:
    """Divergence of the reverse step on held-out digits, at all noise levels."""
    pipe, digits = pipeline("dit"), load_digits("validation")
    generator, steps = torch.Generator().manual_seed(0), torch.arange(0, 1000, 5)
    with torch.no_grad():
        clean = pipe.vae.encode(digits.images[:200]).latent_dist.mean * pipe.vae.config.scaling_factor
        noise = torch.randn(clean.shape, generator=generator)
        noisy = pipe.scheduler.add_noise(clean, noise, steps)
        predicted, variance = pipe.transformer(noisy, steps, digits.labels[:200]).sample.chunk(2, dim=1)
    batch = Batch(clean, noise, noisy, steps, rows=steps, dropped=steps < 0)
    learned, smallest, largest = (
        variance_loss(values, predicted, batch, pipe.scheduler.alphas_cumprod)
        for values in (variance, torch.full_like(variance, -1), torch.full_like(variance, 1))
    )
    assert learned < 0.98 * min(smallest, largest)  # 0.0042, 0.0059 and 0.0044 bits


# --- data --------------------------------------------------------------------------------------------------------------


def test_captions_belong_to_the_digits() -> None:
    plain, captioned = (
        datasets.load_dataset(str(folder)) for folder in (DIGITS, ROOT / "training/captioned_digits")
    )  # the first must not find the files of the second
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for split, count in (("train", 1500), ("validation", 297)):
        assert captioned[split].column_names == ["image", "caption", "label"]
        assert list(captioned[split]["label"]) == list(plain[split]["label"]) and len(plain[split]) == count
        rows = list(zip(captioned[split]["caption"], captioned[split]["label"]))
        assert all((words[label] in caption) != (str(label) in caption) for caption, label in rows)
        assert len(set(rows)) > 70  # eight templates for each digit
    assert [image.tobytes() for image in captioned["train"]["image"][:9]] == [
        image.tobytes() for image in plain["train"]["image"][:9]
    ]


# --- pruning -----------------------------------------------------------------------------------------------------------


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize("ratio", [0.3, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_budgets_are_met(kind: str, ratio: float) -> None:
    model = type(denoiser(kind)).from_config(denoiser(kind).config)
    macs = count_macs(model)
    options = {"total_steps": 1, "criterion": "magnitude", "target": "macs", "ratio": ratio}
    pruner = GradientFlowPruner(model, GFPruneConfig.from_preset("one-shot", **options), pipeline(kind).scheduler)
    pruner.step(0, [])
    assert count_macs(pruner.compact()) == pytest.approx((1 - ratio) * macs, rel=0.01)


def test_costs_are_those_of_the_cards() -> None:
    costs = {kind: (count_parameters(denoiser(kind)), count_macs(denoiser(kind))) for kind in KINDS}
    assert costs == {"dit": (587_488, 5_263_360), "ldm": (638_931, 17_968_128), "text": (808_564, 22_275_072)}
