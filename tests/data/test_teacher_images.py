"""data/teacher_images.py: images are those that the model samples, drawn once, and serve like those of a data set."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel

from diffusers_gfprune.data import teacher_images
from diffusers_gfprune.data.batches import calibration_batches, train_dataloader
from diffusers_gfprune.data.images import DataArguments, check_drawn
from diffusers_gfprune.data.teacher_images import TeacherArguments, TeacherImages, read_prompts
from diffusers_gfprune.diffusion.latents import LatentCodec
from diffusers_gfprune.diffusion.prompts import PromptEncoder
from diffusers_gfprune.evaluation.sample_quality import RealFeatures
from diffusers_gfprune.metrics.cache import TensorCache
from diffusers_gfprune.metrics.conditions import SampleConditions, label_conditions
from diffusers_gfprune.metrics.features import feature_network
from diffusers_gfprune.metrics.sampling import denoised, sample_images
from diffusers_gfprune.model_spec import ModelSpec
from helpers.architectures import build
from helpers.latent_models import autoencoder, text_encoder
from helpers.latent_pipelines import DIT, LATENT_SIZE, sd
from helpers.processes import ddpm

SCHEDULER = DDPMScheduler()
STEPS = 2


def teacher(folder: Path, model, codec: LatentCodec | None = None, count: int = 6, data: dict | None = None, **options):
    """Images of a model; `validation_images` is 3."""
    given = {"num_teacher_images": count, "teacher_num_inference_steps": STEPS, "teacher_images_dir": str(folder), **options}
    arguments = TeacherArguments(train_data="teacher", **given)
    data = DataArguments(**{"validation_images": 3, **(data or {})})
    return TeacherImages(arguments, data, model, SCHEDULER, ModelSpec.of(model, codec))


def dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(**DIT).eval()


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    return build("base").eval()


@pytest.fixture
def drawn(unet: UNet2DModel, tmp_path: Path) -> TeacherImages:
    images = teacher(tmp_path, unet)
    images.prepare()
    return images


# --- what is drawn ------------------------------------------------------------------------------------------------------


def test_images_are_samples_of_the_model(drawn: TeacherImages, unet: UNet2DModel) -> None:
    """Training images first, then held-out ones, in 8 bits."""
    expected = sample_images(unet, SCHEDULER, 9, (8, 8), STEPS, seed=TeacherImages.SEED) * 2 - 1
    torch.testing.assert_close(drawn.head(6), expected[:6], rtol=0, atol=1e-6)
    torch.testing.assert_close(drawn.held_out.samples, expected[6:], rtol=0, atol=1e-6)
    assert drawn.num_images == 6 and len(drawn.held_out) == 3 and drawn.held_out.conditioning == {}
    assert torch.equal(torch.stack([drawn.clean(row) for row in range(6)]), drawn.head(6))


def test_images_are_drawn_in_batches_of_the_given_size(unet: UNet2DModel, tmp_path: Path) -> None:
    """And the same ones whatever the size."""
    seen, model = [], build("base").eval()
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    arguments = TeacherArguments("teacher", 6, STEPS, teacher_images_dir=str(tmp_path))
    data = DataArguments(validation_images=3)
    images = TeacherImages(arguments, data, model, SCHEDULER, ModelSpec.of(model), batch_size=4)
    images.prepare()
    assert seen == [4] * STEPS + [4] * STEPS + [1] * STEPS
    expected = sample_images(unet, SCHEDULER, 9, (8, 8), STEPS, seed=TeacherImages.SEED) * 2 - 1
    torch.testing.assert_close(images.head(6), expected[:6], rtol=0, atol=1e-2)


def test_latents_are_kept_as_they_are_and_have_labels_in_turn(tmp_path: Path) -> None:
    codec, model = LatentCodec(autoencoder()), dit()
    images = teacher(tmp_path, model, codec)
    images.prepare()
    conditions = label_conditions(images.decoder.labels, images.decoder.null_label)
    size = (LATENT_SIZE, LATENT_SIZE)
    (expected,) = denoised(model, SCHEDULER, range(9), size, STEPS, TeacherImages.SEED, conditions=conditions, latents=True)
    torch.testing.assert_close(torch.stack([images.clean(row) for row in range(9)]), expected, rtol=1e-4, atol=1e-5)
    pixels = (codec.decode(expected[:6]).clamp(-1, 1) + 1) * 127.5
    assert (images.head(6) * 127.5 + 127.5 - pixels).abs().max() <= 1
    assert [images[index].label for index in range(6)] == [0, 1, 2, 3, 0, 1]
    assert images.held_out.conditioning["class_labels"].tolist() == [2, 3, 0]


def test_batches_have_dropped_labels_and_flips(tmp_path: Path, unet: UNet2DModel) -> None:
    images = teacher(tmp_path, dit(), LatentCodec(autoencoder()), data={"label_dropout": 0.5})
    images.prepare()
    (batch,) = calibration_batches(images, 1, 6, process=ddpm(1000), seed=0, step=0)
    assert batch.clean.shape == (6, 4, LATENT_SIZE, LATENT_SIZE) and (batch.conditioning["class_labels"] == 4).sum() == 3
    flipped = teacher(tmp_path, unet, data={"random_flip": True})
    flipped.prepare()
    known = torch.stack([flipped.clean(row) for row in range(6)])
    loader = train_dataloader(flipped, 6, seed=0, process=ddpm(1000))
    clean = torch.cat([batch.clean for batch, *_ in itertools.islice(loader, 4)])
    same, mirrored = ((clean[:, None] == other).flatten(2).all(dim=2).any(dim=1) for other in (known, known.flip(-1)))
    assert (same | mirrored).all() and same.any() and mirrored.any()


# --- once ---------------------------------------------------------------------------------------------------------------


def test_images_are_drawn_once(
    drawn: TeacherImages, unet: UNet2DModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the same model and sampler; a stopped run keeps its shards."""
    calls = []

    def spy(*arguments, **options):
        calls.append(arguments[2])
        return denoised(*arguments, **options)

    monkeypatch.setattr(teacher_images, "denoised", spy)
    again = teacher(tmp_path, unet)
    again.prepare()
    assert calls == [] and torch.equal(again.head(6), drawn.head(6))
    other = teacher(tmp_path, unet, teacher_num_inference_steps=STEPS + 1)
    other.prepare()
    assert calls == [range(9)] and not torch.equal(other.head(6), drawn.head(6))
    calls.clear()
    monkeypatch.setattr(teacher_images, "SHARD_IMAGES", 4)
    stopped = teacher(tmp_path / "parts", unet)

    def stops(*arguments, **options):
        return spy(*arguments, **options) if len(calls) < 2 else 1 / 0

    monkeypatch.setattr(teacher_images, "denoised", stops)
    with pytest.raises(ZeroDivisionError):
        stopped.prepare()
    monkeypatch.setattr(teacher_images, "denoised", spy)
    resumed = teacher(tmp_path / "parts", unet)
    resumed.prepare()
    assert calls == [range(4), range(4, 8), range(8, 9)] and torch.equal(resumed.head(6), drawn.head(6))


def test_images_of_other_conditions_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance, the null label, which no image has, prompts and their encoder: each is drawn, and once."""
    calls: list[range] = []

    def zeros(model, scheduler, span: range, size: tuple[int, int], **_):
        calls.append(span)
        yield torch.zeros(len(span), model.config.in_channels, *size)

    monkeypatch.setattr(teacher_images, "denoised", zeros)

    def is_drawn(images: TeacherImages) -> bool:
        before = len(calls)
        images.prepare()
        return len(calls) == before + 1

    def drawn_twice(make: Callable[[], TeacherImages]) -> tuple[bool, bool]:
        return is_drawn(make()), is_drawn(make())

    codec, labelled, transformer = LatentCodec(autoencoder()), build("class-embedding"), dit()
    pipe = sd(tmp_path / "sd")
    texts = {name: write_prompts(tmp_path / f"{name}.txt", name) for name in ("cat", "dog")}

    def text(name: str, seed: int = 0) -> TeacherImages:
        encoder = PromptEncoder([pipe.tokenizer], [text_encoder(pipe.tokenizer, seed=seed)])
        given = TeacherArguments("teacher", 6, STEPS, teacher_prompts=texts[name], teacher_images_dir=str(tmp_path / "text"))
        spec = ModelSpec.of(pipe.unet, codec, encoder)
        return TeacherImages(given, DataArguments(validation_images=3), pipe.unet, SCHEDULER, spec)

    for make in (
        lambda: teacher(tmp_path, transformer, codec),
        lambda: teacher(tmp_path, transformer, codec, teacher_guidance_scale=3.0),
        lambda: teacher(tmp_path, labelled),
        lambda: teacher(tmp_path, labelled, data={"null_label": 9}),
        lambda: teacher(tmp_path, labelled, data={"null_label": 8}),
        lambda: text("cat"),
        lambda: text("dog"),
        lambda: text("cat", seed=1),
    ):
        assert drawn_twice(make) == (True, False)


def write_prompts(path: Path, text: str) -> str:
    path.write_text(f"a {text}\n")
    return str(path)


def test_images_go_to_loading_processes_and_features(drawn: TeacherImages) -> None:
    """The model does not go with them. Features are those of the images as files."""
    copied = pickle.loads(pickle.dumps(drawn))  # noqa: S301 - made here
    assert torch.equal(copied.clean(5), drawn.clean(5)) and copied._teacher is None
    network = feature_network("pixels")
    features = RealFeatures(drawn, [network], TensorCache(None)).features()["pixels"]
    torch.testing.assert_close(features, network(((drawn.head(6) + 1) * 127.5).round().to(torch.uint8)))


def test_the_plan_says_what_is_drawn(unet: UNet2DModel, tmp_path: Path) -> None:
    lines = " ".join(teacher(tmp_path, unet).summary.lines())
    assert "6 training images" in lines and str(tmp_path) in lines
    assert f"drawn by the dense model in {STEPS} steps of DDIM" in lines


# --- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["num_teacher_images", "teacher_num_inference_steps"])
def test_numbers_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        TeacherArguments(**{name: 0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("teacher_images_dir", "x"), ("teacher_prompts", "x"), ("num_teacher_images", 7)),
        *(("teacher_num_inference_steps", 7), ("teacher_guidance_scale", 7.0)),
    ],
)
def test_arguments_without_effect_are_refused(name: str, value: object) -> None:
    TeacherArguments(train_data="teacher", **{name: value})
    with pytest.raises(ValueError, match=f"{name}={value} needs train_data=teacher"):
        TeacherArguments(**{name: value})


def test_images_of_another_device_are_others(unet: UNet2DModel, tmp_path: Path) -> None:
    """The model is moved to draw them; their key names the device that they are drawn on."""
    images = teacher(tmp_path, unet)
    given = (unet, SCHEDULER, ModelSpec.of(unet), SampleConditions())
    keys = [images._shards(*given, device).describe(range(3)) for device in ("cpu", "meta")]
    assert [key["device"] for key in keys] == ["cpu", "meta"] and keys[0] == {**keys[1], "device": "cpu"}


def test_arguments_of_data_sets_are_refused_without_one(unet: UNet2DModel) -> None:
    """And so are those that are about text, and another resolution."""
    spec = ModelSpec.of(unet)
    check_drawn(DataArguments(resolution=8, random_flip=True), spec)
    for arguments, message in (
        ({"image_column": "img"}, "image_column=img needs a data set: give dataset_name or train_data_dir"),
        ({"streaming": True}, "streaming=True needs a data set"),
        ({"resolution": 64}, "resolution=64 but the model was built for sample_size=8x8"),
        ({"caption_dropout": 0.5}, "caption_dropout=0.5 needs a text-conditional model"),
    ):
        with pytest.raises(ValueError, match=message):
            check_drawn(DataArguments(**arguments), spec)


def test_what_does_not_fit_the_model_is_refused(unet: UNet2DModel, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\n two \n", "utf-8-sig")  # as some editors save it
    assert read_prompts(str(tmp_path / "prompts.txt")) == ["one", "two"]
    with pytest.raises(ValueError, match="does not fit the model, which takes no text"):
        teacher(tmp_path, unet, teacher_prompts=str(tmp_path / "prompts.txt"))
    with pytest.raises(ValueError, match="guidance_scale=2 must be 1: the model is unconditional"):
        teacher(tmp_path, unet, teacher_guidance_scale=2.0)
    with pytest.raises(ValueError, match="random_flip=True must be False for latents"):
        teacher(tmp_path, dit(), LatentCodec(autoencoder()), data={"random_flip": True})
    for content, message in ((b"\n \n", "holds no prompt"), (b"\xff\xfe", "it is not UTF-8")):
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_prompts(str(tmp_path / "bad.txt"))
    with pytest.raises(ValueError, match="teacher_prompts=.*missing.txt cannot be read: No such file"):
        read_prompts(str(tmp_path / "missing.txt"))
    assert SampleConditions().of([1]) == {}
