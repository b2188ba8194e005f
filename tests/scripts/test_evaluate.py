"""evaluate.py in this process: measurements and output, without repeated work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler
from PIL import Image
from safetensors.torch import load_file

from diffusers_gfprune.metrics.fidelity import (
    frechet_distance_pixels,
    kernel_distance,
    psnr_to_reference,
    ssim_to_reference,
)
from diffusers_gfprune.metrics.model_size import count_macs, count_parameters
from diffusers_gfprune.metrics.quality import SamplingSettings
from diffusers_gfprune.metrics.step_loss import StepLoss
from helpers.architectures import build, pruned
from helpers.evaluations import COUNT, FILES, real_images, run
from helpers.figures import cells


@pytest.fixture(scope="module")
def evaluated(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A pruned model against the dense one, with quadratic spacing and speed; no test changes its folder."""
    folder = tmp_path_factory.mktemp("evaluated")
    arguments = ("--model", world / "pruned", "--reference_model", world / "dense", "--dataset_name", world / "images")
    speed = ("--speed_batch_sizes", 1, 2, "--speed_dtypes", "float32", "bfloat16", "--speed_memory_formats", "channels_last")
    drawn = ("--num_images", COUNT, "--timestep_spacing", "quadratic", "--num_inference_steps", 3, "--eval_batch_size", 100)
    return folder, run(folder, *arguments, *drawn, *speed)


def models() -> dict:
    """Those of the world, as they are in memory."""
    return {"model": pruned("base"), "reference_model": build("base")}


def test_a_model_saved_with_another_sampler_is_measured_in_its_process(world: Path, tmp_path: Path) -> None:
    """DPMSolverMultistepScheduler adds noise only at the timesteps that it was last set to."""
    DDPMPipeline(build("base"), DPMSolverMultistepScheduler()).save_pretrained(tmp_path / "model")
    arguments = ("--dataset_name", world / "images", "--num_images", 0, "--features", "none")
    folders = (tmp_path / "model", world / "dense")
    short = ("--speed_batch_sizes", "0", "--step_loss_timesteps", "4")
    other, known = (
        run(tmp_path, "--model", folder, *arguments, out=f"{folder.name}-evaluation", short=short) for folder in folders
    )
    assert other["model"]["step_loss"] == pytest.approx(known["model"]["step_loss"], rel=1e-6)


# --- what is measured ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_figures_are_those_of_samples_drawn_by_hand(world: Path, evaluated: tuple[Path, dict]) -> None:
    """Fréchet and kernel distance, SSIM and PSNR of the same images, without shards, cache and script."""
    _, results = evaluated
    settings = SamplingSettings(COUNT, 3, "quadratic")
    scheduler = DDPMScheduler(clip_sample=True)
    images = {name: settings.sample(unet, scheduler) for name, unet in models().items()}
    real = real_images(world / "images")
    assert len(real) == 120
    for name, sampled in images.items():
        quality = results[name]["quality"]
        assert quality["fd_pixels"] == pytest.approx(frechet_distance_pixels(sampled.flatten(1), real.flatten(1)), rel=1e-3)
        assert quality["kd_pixels"] == pytest.approx(kernel_distance(sampled.flatten(1), real.flatten(1)), rel=1e-3)
    quality = results["model"]["quality"]
    assert quality["ssim_to_dense"] == pytest.approx(ssim_to_reference(*images.values()), rel=1e-3)
    assert quality["psnr_to_dense"] == pytest.approx(psnr_to_reference(*images.values()), rel=1e-3)
    assert "ssim_to_dense" not in results["reference_model"]["quality"]


def test_cost_and_step_loss_are_those_of_the_models(world: Path, evaluated: tuple[Path, dict]) -> None:
    """As the library counts them, and the file as it lies there."""
    from helpers.images import load

    _, results = evaluated
    held_out = load(world / "images", validation_images=256)[1][0]
    step_loss = StepLoss(held_out, DDPMScheduler(), grid=4)
    for name, unet in models().items():
        figures = results[name]
        assert (figures["parameters"], figures["macs"]) == (count_parameters(unet), count_macs(unet))
        folder = world / ("pruned" if name == "model" else "dense")
        assert figures["weight_file_bytes"] == (folder / "unet/diffusion_pytorch_model.safetensors").stat().st_size
        assert figures["step_loss"] == pytest.approx(step_loss(unet), rel=1e-6)
        by_timestep = {int(timestep): loss for timestep, loss in figures["step_loss_by_timestep"].items()}
        assert by_timestep == pytest.approx(step_loss.by_timestep(unet), rel=1e-6)
        assert list(by_timestep) == [125, 375, 625, 875]


def test_speed_is_there_for_every_setting(evaluated: tuple[Path, dict]) -> None:
    for name in ("model", "reference_model"):
        entries = evaluated[1][name]["speed"]
        settings = [(e["batch_size"], e["dtype"], e["mode"], e["memory_format"]) for e in entries]
        assert settings == [(n, dtype, "eager", "channels_last") for n in (1, 2) for dtype in ("float32", "bfloat16")]
        assert all(e["latency_ms"] > 0 and e["samples_per_second"] > 0 and e["peak_memory_bytes"] > 0 for e in entries)
        assert {e["speedup"] == 1 for e in entries} == {name == "reference_model"}


def test_results_say_all_that_figures_depend_on(world: Path, evaluated: tuple[Path, dict]) -> None:
    folder, results = evaluated
    assert (results["format_version"], results["kind"]) == (4, "evaluation")
    e = results["evaluation"]
    drawn = ("sampler", "num_images", "num_inference_steps", "timestep_spacing", "eta", "seed", "dtype", "device")
    assert [e[name] for name in drawn] == ["DDIM", COUNT, 3, "quadratic", 0.0, 1234, "float32", "cpu"]
    assert e["sample_size"] == [8, 8] and e["channels"] == 1 and (e["step_loss_images"], e["step_loss_timesteps"]) == (8, 4)
    fingerprint = e["dataset"].pop("fingerprint")
    assert len(fingerprint) == 16 and e["dataset"] == {"name": "images", "hub_id": None, "config_name": None}
    assert e["classes"] is None and results["model"]["weights"] != results["reference_model"]["weights"]
    assert set(e["distances"]) == {"fd_pixels", "kd_pixels"}
    assert e["distances"]["fd_pixels"] == {
        "title": "FD-pixels",
        "features": "raw pixels in [0, 1]",
        "reference_images": 120,
    }
    assert e["distances"]["kd_pixels"]["title"] == "KD-pixels" and e["distances"]["kd_pixels"]["num_subsets"] == 100
    assert {"torch", "diffusers", "clean-fid", "scikit-image", "pillow", "python"} <= set(e["versions"])
    assert results["model"]["ema"] is None and results["model"]["name"] == "pruned"
    for path in folder.glob("out/*.*"):
        if path.suffix in (".json", ".md"):
            assert str(world.parent) not in path.read_text() and str(folder) not in path.read_text()


def test_files(evaluated: tuple[Path, dict]) -> None:
    """Pictures are pictures, samples are the first ones of either model, and nothing else is left behind."""
    folder, results = evaluated
    assert {path.name for path in (folder / "out").iterdir()} == FILES
    assert {path.name for path in folder.iterdir()} == {"out", "cache"}
    with Image.open(folder / "out/step_loss.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # a line of either model
    kept = load_file(folder / "out/samples.safetensors")
    drawn = cells(folder / "out/samples.png", columns=16)[..., 0]
    for row, name in enumerate(("reference_model", "model") * 2):
        assert (drawn[row] == kept[name][row // 2 * 16 :][:16, 0].numpy()).all()
    sampled = SamplingSettings(64, 3, "quadratic").sample(pruned("base"), DDPMScheduler(clip_sample=True))
    assert {name: (images.dtype, images.shape) for name, images in kept.items()} == dict.fromkeys(
        ("model", "reference_model"), (torch.uint8, (64, 1, 8, 8))
    )
    torch.testing.assert_close(kept["model"].float() / 255, sampled, rtol=0, atol=1.001 / 255)
    table = (folder / "out/table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table] == ["model", "---", "dense (reference)", "pruned"]
    assert f"{results['model']['quality']['fd_pixels']:.4g}" in table[3] and "KD-pixels" in table[0]
    assert "latency (ms), batch 2 bfloat16" in table[0]


# --- what is kept -------------------------------------------------------------------------------------------------------


def test_second_evaluation_makes_nothing_again(world: Path, evaluated: tuple[Path, dict], tmp_path: Path, no_sampling) -> None:
    """Though the images of the pruned model are gone: all figures of them are known."""
    shutil.copytree(evaluated[0] / "cache", tmp_path / "cache")
    arguments = ("--model", world / "pruned", "--reference_model", world / "dense", "--dataset_name", world / "images")
    drawn = ("--num_images", COUNT, "--timestep_spacing", "quadratic", "--num_inference_steps", 3, "--eval_batch_size", 100)
    results = run(tmp_path, *arguments, *drawn)
    for name in ("model", "reference_model"):
        assert results[name]["quality"] == evaluated[1][name]["quality"]
        assert results[name]["step_loss"] == evaluated[1][name]["step_loss"]
    shown = [load_file(folder / "out/samples.safetensors") for folder in (tmp_path, evaluated[0])]
    assert all(torch.equal(shown[0][name], shown[1][name]) for name in shown[0])


def test_images_of_the_reference_model_are_kept_and_those_of_the_model_are_not(evaluated: tuple[Path, dict]) -> None:
    kinds = [path.name.partition("-")[0] for path in (evaluated[0] / "cache").iterdir()]
    # two shards each of the reference model's samples, of both models' features, of similarities, and one of 120 real images
    assert {kind: kinds.count(kind) for kind in kinds} == {"samples": 2, "features": 5, "similarities": 2, "shown": 2}


@pytest.mark.slow
def test_damaged_cache_is_made_again(world: Path, evaluated: tuple[Path, dict], tmp_path: Path, capsys) -> None:
    shutil.copytree(evaluated[0] / "cache", tmp_path / "cache")
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    arguments = ("--model", world / "pruned", "--reference_model", world / "dense", "--dataset_name", world / "images")
    drawn = ("--num_images", COUNT, "--timestep_spacing", "quadratic", "--num_inference_steps", 3, "--eval_batch_size", 100)
    results = run(tmp_path, *arguments, *drawn)
    assert "is made again" in capsys.readouterr().err
    for name in ("model", "reference_model"):
        assert results[name]["quality"] == evaluated[1][name]["quality"]


@pytest.mark.slow
def test_more_images_later_add_to_those_there(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 images are a shard; with 300, only the other 44 are sampled, and the figures are those of 300 at once."""
    arguments = ("--model", world / "dense", "--dataset_name", world / "images", "--num_images")
    run(tmp_path, *arguments, 256)
    sampled = []
    sample = SamplingSettings.sample
    monkeypatch.setattr(SamplingSettings, "sample", lambda *a, **k: sampled.append(k["count"]) or sample(*a, **k))
    grown = run(tmp_path, *arguments, 300, out="grown")
    assert sum(sampled) == 44
    whole = run(tmp_path, *arguments, 300, "--evaluation_cache_dir", tmp_path / "other", out="whole")
    assert grown["model"]["quality"] == whole["model"]["quality"]


def test_where_nothing_can_be_kept_everything_is_made_once(world: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """On a full disk, the run cannot be resumed, but gives its figures."""
    sampled = []
    sample = SamplingSettings.sample
    monkeypatch.setattr(SamplingSettings, "sample", lambda *a, **k: sampled.append(k["count"]) or sample(*a, **k))

    def full(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr("diffusers_gfprune.metrics.cache.save_file", full)
    arguments = ("--model", world / "pruned", "--reference_model", world / "dense", "--dataset_name", world / "images")
    results = run(tmp_path, *arguments, "--num_images", COUNT)
    assert "cannot be written" in capsys.readouterr().err
    assert results["model"]["quality"]["fd_pixels"] > 0 and sum(sampled) == 2 * COUNT
