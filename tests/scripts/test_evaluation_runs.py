"""evaluate.py in this process: feature networks, kinds of models, folders of images, and refused arguments."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid
from cleanfid.inception_torchscript import InceptionV3W
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from diffusers_gfprune.hub import push_folder
from diffusers_gfprune.metrics import quality as quality_module
from diffusers_gfprune.metrics.features import INCEPTION_FILE
from diffusers_gfprune.metrics.fidelity import frechet_distance_pixels
from diffusers_gfprune.metrics.quality import SamplingSettings
from helpers.architectures import build
from helpers.evaluations import COUNT, FILES, fail_to_sample, real_images, run, save_dense, write_images
from helpers.hub import make_run
from helpers.hub_server import WRITE, HubServer
from helpers.images import load, model_spec
from helpers.inception import Base

BARE = ("--speed_batch_sizes", "0", "--step_loss_timesteps", "4")

# --- which distances ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small TorchScript file in place of Inception's."""
    file = tmp_path_factory.mktemp("inception") / INCEPTION_FILE
    torch.jit.script(Base()).save(file)
    return file


@pytest.mark.parametrize("root", ["recorded", pytest.param("real", marks=pytest.mark.slow)])
def test_fid_and_kid_are_those_of_clean_fid(root: str, inception: Path, tmp_path: Path, monkeypatch) -> None:
    """On identical images, written to folders that clean-fid reads by itself.

    The root of a 2048x2048 matrix takes 20 s: the fast test looks at what it would be taken of.
    """
    recorded, distance = [], cleanfid.frechet_distance
    if root == "recorded":
        monkeypatch.setattr(cleanfid, "frechet_distance", lambda *moments: recorded.append(moments) or 12.5)
    save_dense(tmp_path / "dense", "rgb")
    write_images(tmp_path / "images", channels=3, train=40)
    options = ("--features", "inception", "--inception_weights", inception, "--num_images", 50)
    results = run(tmp_path, "--model", tmp_path / "dense", "--dataset_name", tmp_path / "images", *options)

    real = load(tmp_path / "images", model_spec(channels=3))[0].head(100) / 2 + 0.5
    samples = SamplingSettings(50, 2).sample(build("rgb"), DDPMScheduler(clip_sample=True))
    model = InceptionV3W(str(inception.parent), download=False)
    features = []
    for name, images in (("samples", samples), ("real", real)):
        (tmp_path / name).mkdir()
        for index, image in enumerate(images):
            pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{index:03}.png")
        options = {"num_workers": 0, "batch_size": 16, "device": torch.device("cpu"), "mode": "clean", "verbose": False}
        features.append(cleanfid.get_folder_features(str(tmp_path / name), model, **options).astype(np.float64))
    moments = [moment for f in features for moment in (f.mean(axis=0), np.cov(f, rowvar=False))]
    found = results["model"]["quality"]
    if root == "recorded":
        assert found["fid"] == 12.5 and len(recorded) == 1
        for mine, theirs in zip(recorded[0], moments):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    else:
        assert found["fid"] == pytest.approx(distance(*moments), rel=1e-3)
    np.random.seed(0)
    assert found["kid"] == pytest.approx(cleanfid.kernel_distance(*features, 100, 1000), rel=1e-3)
    described = results["evaluation"]["distances"]
    assert described["fid"]["title"] == "FID" and described["kid"]["title"] == "KID"
    assert described["fid"]["reference_images"] == 40 and "Inception v3" in described["fid"]["features"]
    assert "FID" in (tmp_path / "out/table.md").read_text()


def test_few_images_for_many_features_are_warned_of(inception: Path, world: Path, tmp_path: Path, capsys) -> None:
    arguments = ("--model", world / "dense", "--dataset_name", world / "images", "--features", "inception", "--dry_run")
    run(tmp_path, *arguments, "--inception_weights", inception, "--num_images", 40)
    assert "40 images are few for FID on 2,048 features" in capsys.readouterr().err


@pytest.mark.slow
def test_several_networks_at_once(inception: Path, world: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cleanfid, "frechet_distance", lambda *moments: 1.0)
    options = ("--features", "pixels", "inception", "--inception_weights", inception, "--num_images", 70)
    results = run(tmp_path, "--model", world / "dense", "--dataset_name", world / "images", *options)
    assert set(results["model"]["quality"]) == {"fd_pixels", "kd_pixels", "fid", "kid"}
    assert set(results["evaluation"]["distances"]) == set(results["model"]["quality"])


def test_without_samples_and_without_networks(world: Path, tmp_path: Path) -> None:
    """Cost and step loss alone; similarity alone."""
    arguments = ("--model", world / "pruned", "--reference_model", world / "dense", "--dataset_name", world / "images")
    bare = run(tmp_path, *arguments, "--num_images", 0, out="bare", short=BARE)
    assert bare["model"]["quality"] == {} and bare["model"]["step_loss"] > 0
    assert bare["evaluation"]["num_images"] == 0 and bare["evaluation"]["distances"] == {}
    assert {path.name for path in (tmp_path / "bare").iterdir()} == {"results.json", "step_loss.png", "table.md"}
    alike = run(tmp_path, *arguments, "--num_images", 3, "--features", "none", out="alike")
    assert set(alike["model"]["quality"]) == {"ssim_to_dense", "psnr_to_dense"} and alike["evaluation"]["distances"] == {}


@pytest.mark.fast_variants(1)
@pytest.mark.parametrize("samples", [("--num_images", 0), ("--num_images", 3, "--features", "none")])
def test_stream_without_distances(world: Path, tmp_path: Path, samples: tuple) -> None:
    """It need not be counted where only held-out images are read."""
    arguments = ("--model", world / "pruned", "--reference_model", world / "dense", "--dataset_name", world / "images")
    found = run(tmp_path, *arguments, "--streaming", *samples, short=BARE)
    assert found["model"]["step_loss"] > 0 and found["evaluation"]["distances"] == {}


@pytest.mark.parametrize("broken", [True, False], ids=["broken images", "more than there are"])
def test_what_is_wrong_with_real_images_is_said_before_sampling(
    world: Path, tmp_path: Path, monkeypatch, broken: bool
) -> None:
    from helpers.images import encode, write_parquet

    images = [encode(np.full((8, 8), number, dtype=np.uint8)) for number in range(120)]
    if broken:
        images[60:] = [b"cut"] * 60
    data = write_parquet(tmp_path / "images", [images])
    monkeypatch.setattr(SamplingSettings, "sample", fail_to_sample)
    arguments = ("--model", world / "dense", "--dataset_name", data, "--validation_images", 8, "--num_images", 70)
    more, message = ("--max_broken_images", 10), "max_broken_images=10 is exceeded"
    if not broken:
        more, message = ("--num_reference_images", 500), "num_reference_images=500 must be at most the 112 training images"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *arguments, *more)


def test_model_against_itself(world: Path, tmp_path: Path) -> None:
    """The PSNR of equal images is undefined; the images are kept, since the model is also the reference."""
    arguments = ("--model", world / "dense", "--reference_model", world / "dense", "--dataset_name", world / "images")
    results = run(tmp_path, *arguments, "--num_images", 3, "--features", "none")
    assert results["model"]["quality"] == {"psnr_to_dense": None, "ssim_to_dense": 1.0}
    assert "| - |" in (tmp_path / "out/table.md").read_text().splitlines()[3]
    assert len(list((tmp_path / "cache").glob("samples-*"))) == 1


# --- which models -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_conditional_colour_model_with_noise_in_every_step(tmp_path: Path) -> None:
    """Four classes in turn; eta > 0 draws the same noise for the dense and the pruned model."""
    folder = tmp_path / "conditional"
    unet = build("class-embedding")
    DDPMPipeline(unet, DDPMScheduler(clip_sample=True)).save_pretrained(folder)
    write_images(tmp_path / "images")
    options = ("--reference_model", folder, "--eta", 1, "--num_images", 70)
    results = run(tmp_path, "--model", folder, "--dataset_name", tmp_path / "images", *options)
    assert (results["evaluation"]["eta"], results["evaluation"]["classes"]) == (1, 10)
    assert results["model"]["quality"]["ssim_to_dense"] == 1
    samples = SamplingSettings(70, 2, eta=1.0).sample(unet, DDPMScheduler(clip_sample=True))
    real = real_images(tmp_path / "images").flatten(1)
    assert results["model"]["quality"]["fd_pixels"] == pytest.approx(
        frechet_distance_pixels(samples.flatten(1), real), rel=1e-3
    )


@pytest.mark.slow
def test_half_precision(world: Path, tmp_path: Path) -> None:
    """Near full precision, not equal to it, and written down."""
    arguments = ("--model", world / "dense", "--dataset_name", world / "images", "--num_images", 70)
    full = run(tmp_path, *arguments, out="full")
    half = run(tmp_path, *arguments, "--dtype", "bfloat16", out="half")
    assert half["evaluation"]["dtype"] == "bfloat16"
    assert half["model"]["weight_file_bytes"] < 0.6 * full["model"]["weight_file_bytes"]
    for name in ("step_loss",):
        assert half["model"][name] != full["model"][name]
        assert half["model"][name] == pytest.approx(full["model"][name], rel=0.05)


def test_models_from_the_hub(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pruned and a dense one, with their commits, and whether weights are averaged according to the pruned one's results."""
    run_folder = make_run(tmp_path / "digits")
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "home", WRITE)
        push_folder(run_folder, "alice/digits")
        dense = build("one-level")
        DDPMPipeline(dense, DDPMScheduler(num_train_timesteps=100)).push_to_hub("alice/dense")
        arguments = ("--model", "alice/digits", "--reference_model", "alice/dense", "--dataset_name", world / "images")
        results = run(tmp_path, *arguments, "--num_images", 2, "--features", "none")
    assert results["model"]["name"] == "alice/digits" and results["reference_model"]["name"] == "alice/dense"
    assert all(len(results[name]["revision"]) == 40 for name in ("model", "reference_model"))
    assert (results["model"]["ema"], results["reference_model"]["ema"]) == (True, None)


@pytest.mark.slow
def test_stream_of_real_images(world: Path, tmp_path: Path) -> None:
    """The first ones, as from the disk."""
    arguments = ("--model", world / "dense", "--dataset_name", world / "images", "--num_images", 70)
    options = ("--num_reference_images", 100)
    rows = run(tmp_path, *arguments, *options, out="rows")
    stream = run(tmp_path, *arguments, *options, "--streaming", out="stream")
    assert rows["evaluation"]["distances"]["fd_pixels"]["reference_images"] == 100
    assert stream["model"]["quality"] == rows["model"]["quality"]
    assert stream["evaluation"]["dataset"] == rows["evaluation"]["dataset"]


# --- images of a folder -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_folder_of_images_has_the_figures_of_the_model_that_made_them(world: Path, tmp_path: Path) -> None:
    samples = SamplingSettings(COUNT, 2).sample(build("base"), DDPMScheduler(clip_sample=True))
    for index, image in enumerate((samples * 255).round().to(torch.uint8)):
        path = tmp_path / "generated" / f"test-{index % 3}" / f"{index:05}.png"  # names that mean something to `datasets`
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    made = run(tmp_path, "--model", world / "dense", "--dataset_name", world / "images", "--num_images", COUNT, out="made")
    short = ("--features", "pixels")
    arguments = ("--images_dir", tmp_path / "generated", "--dataset_name", world / "images")
    found = run(tmp_path, *arguments, out="found", short=short)
    assert found["model"]["quality"]["fd_pixels"] == pytest.approx(made["model"]["quality"]["fd_pixels"], rel=1e-3)
    assert found["evaluation"]["sampler"] == "images of a folder" and found["evaluation"]["num_images"] == COUNT
    assert found["evaluation"]["distances"] == made["evaluation"]["distances"]
    assert found["model"]["name"] == "generated" and found["model"]["parameters"] is None
    assert {path.name for path in (tmp_path / "found").iterdir()} == FILES - {"step_loss.png"}
    assert len(list((tmp_path / "cache").glob("samples-*"))) == 2  # those of the model: files of the folder are not kept again
    # an image that has changed is seen
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(next((tmp_path / "generated").rglob("00000.png")))
    changed = run(tmp_path, *arguments, out="changed", short=short)
    assert changed["model"]["quality"]["fd_pixels"] != found["model"]["quality"]["fd_pixels"]


# --- what is wrong ------------------------------------------------------------------------------------------------------


def test_plan_alone(world: Path, tmp_path: Path, capsys) -> None:
    run(tmp_path, "--model", world / "dense", "--dataset_name", world / "images", "--dry_run")
    printed = capsys.readouterr().out
    assert "50,000 of each model: DDIM, 2 steps (leading), eta 0, seed 1234" in printed and "FD-pixels" in printed
    assert "120 training images of train, 8 held-out images of validation" in printed
    assert not list(tmp_path.iterdir())


def test_more_steps_than_timesteps_are_made_to_fit_and_said(world: Path, tmp_path: Path, capsys) -> None:
    arguments = ("--model", world / "dense", "--dataset_name", world / "images", "--dry_run")
    for steps, drawn in ((1001, "1,000 steps (leading)"), (501, "501 steps (trailing)")):
        run(tmp_path, *arguments, "--num_inference_steps", steps)
        printed = capsys.readouterr()
        assert drawn in printed.out and f"num_inference_steps={steps}" in printed.err


def test_nothing_is_overwritten(world: Path, tmp_path: Path, no_sampling) -> None:
    arguments = ("--model", world / "dense", "--dataset_name", world / "images", "--num_images", 70)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="out already exists: choose another folder"):
        run(tmp_path, *arguments)
    with pytest.raises(ValueError, match="is not an evaluation, it holds thesis.txt: choose another folder"):
        run(tmp_path, *arguments, "--overwrite_output_dir")
    assert (tmp_path / "out/thesis.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="contains .*dense, which this run reads"):
        run(tmp_path, *arguments, "--output_dir", world, "--overwrite_output_dir")
    (tmp_path / "new.training/checkpoint-5").mkdir(parents=True)
    with pytest.raises(ValueError, match="new belongs to a training run"):
        run(tmp_path, *arguments, "--output_dir", tmp_path / "new", "--overwrite_output_dir")
    assert (tmp_path / "new.training/checkpoint-5").is_dir()
    with pytest.raises(ValueError, match="evaluation_cache_dir=.*inside must not be in output_dir"):
        run(tmp_path, *arguments, "--evaluation_cache_dir", tmp_path / "fresh/inside", out="fresh")
    with pytest.raises(ValueError, match="evaluation_cache_dir=.*thesis.txt cannot be written"):
        run(tmp_path, *arguments, "--evaluation_cache_dir", tmp_path / "out/thesis.txt", out="fresh")


def test_earlier_evaluation_can_be_replaced(world: Path, tmp_path: Path) -> None:
    arguments = ("--model", world / "dense", "--dataset_name", world / "images", "--num_images", 0)
    run(tmp_path, *arguments, short=BARE)
    again = run(tmp_path, *arguments, "--step_loss_timesteps", 2, "--overwrite_output_dir", short=BARE)
    assert again["evaluation"]["step_loss_timesteps"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--reference_model", "{rgb}"],
            "reference_model=.*rgb generates 8x8 images of 3 channels in 1000 timesteps, but the model 8x8",
        ),
        (["--num_images", "64"], "features=pixels needs more than 64 images, both generated and real, not 64"),
        (["--num_images", "70", "--num_reference_images", "60"], "features=pixels needs more than 64 .* not 60"),
        (["--features", "inception", "--inception_weights", "nowhere"], "inception_weights=nowhere must be the path"),
        (["--features", "dinov2", "--dinov2_model", "{rgb}"], "dinov2_model=.*rgb cannot be loaded as DINOv2"),
        (["--model", "{broken}"], "model=.*broken cannot be loaded: the weight conv_out.bias of its unet holds values"),
        (["--model", "{missing}"], "model=.*missing is not a folder"),
        (["--revision", "v1"], "model=.* is a folder: revision=v1 applies"),
        (
            ["--reference_model", "{rgb}", "--reference_revision", "v1"],
            "reference_model=.*rgb is a folder: revision=v1 applies",
        ),
        (["--step_loss_timesteps", "1001"], "step_loss_timesteps=1001 must be at most the 1000 timesteps"),
        (["--dataset_name", "{missing}"], "dataset_name=.*missing is not a folder"),
    ],
)
def test_what_cannot_work_is_said_before_sampling(world: Path, tmp_path: Path, no_sampling, arguments, message) -> None:
    names = {name: str(world / name) for name in ("rgb", "broken", "missing")}
    if not (world / "rgb").exists():
        save_dense(world / "rgb", "rgb")
        unet = build("base")
        torch.nn.init.constant_(unet.conv_out.bias, float("nan"))
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(world / "broken")
    given = ["--model", world / "dense", "--dataset_name", world / "images"]
    with pytest.raises(ValueError, match=message) as caught:
        run(tmp_path, *given, *(word.format(**names) for word in arguments))
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


def test_failure_on_the_way_leaves_no_folder_and_what_was_made(world: Path, tmp_path: Path, monkeypatch) -> None:
    """The next attempt begins where this one failed."""
    arguments = ("--model", world / "dense", "--dataset_name", world / "images", "--num_images", 300)
    kernel = quality_module.kernel_distance

    def fail(*arguments, **options):
        raise ValueError("no such luck")

    monkeypatch.setattr(quality_module, "kernel_distance", fail)
    with pytest.raises(ValueError, match="no such luck"):
        run(tmp_path, *arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}
    monkeypatch.setattr(quality_module, "kernel_distance", kernel)
    monkeypatch.setattr(SamplingSettings, "sample", fail)
    assert run(tmp_path, *arguments)["model"]["quality"]["kd_pixels"] > 0


def test_ends_with_its_launcher(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which ends first. An evaluation that went on would keep the next one from the folder."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as of `accelerate launch`
    parents = itertools.chain([os.getppid()], itertools.repeat(1))
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    arguments = ("--model", world / "pruned", "--dataset_name", world / "images", "--num_images", 70)
    with pytest.raises(SystemExit) as error:
        run(tmp_path, *arguments)
    assert error.value.code == 128 + signal.SIGTERM and not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert run(tmp_path, *arguments)["model"]["quality"]["fd_pixels"] > 0
