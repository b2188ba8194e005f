"""prune_ddpm.py and evaluate.py on latent, class-conditional and text pipelines, from saved pipeline to saved pipeline."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from diffusers_gfprune.hub import files_to_push
from diffusers_gfprune.scripts import prune_ddpm
from helpers.hub import contents
from helpers.latent_models import autoencoder, text_encoder, tokenizer
from helpers.latent_pipelines import CAPTIONS, CLASSES, save, write_data
from helpers.resume import checkpoints_kept, place
from helpers.scripts import assert_one_error, forget_accelerator, plain_runs, run_script

# Soft phase to step 2, hard phase to step 4
SHORT = [
    *("--max_train_steps", "8", "--soft_fraction", "0.25", "--hard_fraction", "0.5", "--update_interval", "1"),
    *("--train_batch_size", "8", "--calibration_batches", "1", "--validation_images", "8", "--validation_steps", "4"),
    *("--eval_images", "6", "--ddim_num_inference_steps", "2", "--speed_batch_sizes", "0", "--recovery", "none"),
]
COMPONENTS = {
    "dit": ("transformer", "vae"),
    "ldm": ("unet", "vqvae"),
    "sd": ("unet", "vae", "text_encoder", "tokenizer"),
    "pixart": ("transformer", "vae", "text_encoder", "tokenizer"),
    "sd3": (
        *("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        *("text_encoder_3", "tokenizer_3"),
    ),
}
EXTRA = {
    "dit": ("--guidance_scale", "2"),
    "ldm": (),
    "sd": ("--guidance_scale", "3", "--snr_gamma", "5"),
    "pixart": ("--guidance_scale", "3", "--depth", "allow"),
    "sd3": ("--guidance_scale", "3", "--depth", "allow"),
}
EXAMPLES = {
    "dit": "pipe(class_labels=[0], guidance_scale=1).images.pop()",
    "ldm": "pipe().images.pop()",
    "sd": 'pipe("a prompt").images.pop()',
    "pixart": 'pipe("a prompt", use_resolution_binning=False).images.pop()',
    "sd3": 'pipe("a prompt").images.pop()',
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines and a data set, which tests only read, and the cache of encoded images."""
    folder = tmp_path_factory.mktemp("world")
    for name in COMPONENTS:
        save(name, folder / name)
    write_data(folder / "data")
    return folder


def words(world: Path, name: str, output: Path, *more: object) -> list[str]:
    """The command line of a short run."""
    places = {
        "--pretrained_model_name_or_path": world / name,
        "--dataset_name": world / "data",
        "--cache_dir": world / "datasets",
        "--encoding_cache_dir": world / "encoded",
        "--output_dir": output,
    }
    return [*(str(word) for pair in places.items() for word in pair), *SHORT, *map(str, more)]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script as users start it, without a new process."""
    return run_script("training/prune_ddpm.py", *arguments, environment={"HF_HUB_OFFLINE": "1"})


def run_here(*arguments: str) -> None:
    forget_accelerator()
    with plain_runs():
        prune_ddpm.main(list(arguments))


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("ldm", "pixart", "sd", "sd3")), "dit"]
)
def test_a_pipeline_is_pruned_whole(name: str, world: Path, tmp_path: Path) -> None:
    """Everything that a run leaves, and that it is a pipeline for everybody."""
    done = run(*words(world, name, tmp_path / "run", *EXTRA[name], "--recovery", "rankings"))
    assert done.returncode == 0, done.stderr
    assert "encoded once in" in done.stdout
    denoiser, *others = COMPONENTS[name]
    before, after = contents(world / name), contents(tmp_path / "run")
    for component in (*others, "scheduler"):
        own = {path: data for path, data in before.items() if path.startswith(f"{component}/")}
        assert own and own.items() <= after.items(), component
    assert f"{denoiser}/diffusers_gfprune.py" in after and "pipeline.py" not in after
    results, report = (json.loads(after[f"{part}.json"]) for part in ("results", "pruning_report"))
    assert results["pruned"]["macs"] == pytest.approx(0.5 * results["dense"]["macs"], rel=0.02)
    assert results["evaluation"]["sample_size"] == [16, 16] and results["evaluation"]["latent_size"][1:] == [8, 8]
    assert results["pruned"]["quality"]["ssim_to_dense"] > 0.1
    assert (results["pruned"]["step_loss_null_label"] is not None) == (name != "ldm")
    assert report["pipeline"]["component"] == denoiser
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert type(getattr(pipe, denoiser)).__name__.startswith("GFPruned")
    card = ModelCard.load(tmp_path / "run/README.md")
    assert f"image = {EXAMPLES[name]}" in card.text and f"`{denoiser}/diffusers_gfprune.py`" in card.text
    assert card.data.pipeline_tag == ("text-to-image" if name in ("sd", "pixart", "sd3") else "unconditional-image-generation")
    assert (tmp_path / "run/samples.png").stat().st_size > 100
    going, left_out = files_to_push(tmp_path / "run")
    assert set(going) == set(after) and not left_out


@pytest.mark.slow
def test_a_text_model_has_its_prompts_and_guidance_on_record(world: Path, tmp_path: Path) -> None:
    run_here(*words(world, "sd", tmp_path / "run", *EXTRA["sd"]))
    evaluation = json.loads((tmp_path / "run/results.json").read_text())["evaluation"]
    assert evaluation["guidance_scale"] == 3 and evaluation["num_prompts"] == 8
    header = yaml.safe_load((tmp_path / "run/README.md").read_text().split("---\n")[1])
    assert "stable-diffusion" in header["tags"]
    card = (tmp_path / "run/README.md").read_text()
    assert "guidance scale 3" in card and not any(caption in card for caption in CAPTIONS[:2])  # they may be private


@pytest.mark.parametrize(
    ("name", "step"), [("dit", 5), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("dit", 1), ("sd", 5)))]
)
def test_a_run_that_was_killed_goes_on_to_the_same_weights(name: str, step: int, world: Path, tmp_path: Path) -> None:
    """Before and after compaction; draws of latents, labels and captions included."""
    quick = ("--eval_images", 0, "--checkpointing_steps", 1, "--checkpoints_total_limit", 0, "--use_ema")
    with checkpoints_kept(tmp_path / "kept"):
        run_here(*words(world, name, tmp_path / "run", *quick))
    place(tmp_path / "kept", tmp_path / "again", step)
    run_here(*words(world, name, tmp_path / "again", *quick, "--resume_from_checkpoint", "latest"))
    file = f"{COMPONENTS[name][0]}/diffusion_pytorch_model.safetensors"
    first, second = (load_file(tmp_path / run / file) for run in ("run", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_a_checkpoint_with_another_autoencoder_is_refused(world: Path, tmp_path: Path) -> None:
    quick = ("--eval_images", 0, "--checkpointing_steps", 1)
    with checkpoints_kept(tmp_path / "kept"):
        run_here(*words(world, "dit", tmp_path / "run", *quick))
    place(tmp_path / "kept", tmp_path / "again", 8)
    shutil.copytree(world / "dit", tmp_path / "model")
    autoencoder(seed=7).save_pretrained(tmp_path / "model/vae")
    model = ("--pretrained_model_name_or_path", tmp_path / "model")
    with pytest.raises(ValueError, match="is a checkpoint of another run: autoencoder was"):
        run_here(*words(world, "dit", tmp_path / "again", *quick, *model, "--resume_from_checkpoint", "latest"))


@pytest.mark.slow
def test_evaluation_samples_as_the_run_did(world: Path, tmp_path: Path) -> None:
    """The same noise, labels and guidance; the pruned pipeline is compared with the dense one, image by image."""
    run_here(*words(world, "dit", tmp_path / "run", *EXTRA["dit"]))
    measured = json.loads((tmp_path / "run/results.json").read_text())
    done = run_script(
        *("training/evaluate.py", "--model", tmp_path / "run", "--reference_model", world / "dit"),
        *("--dataset_name", world / "data", "--cache_dir", world / "datasets", "--encoding_cache_dir", world / "encoded"),
        *("--validation_images", 8, "--num_images", 6, "--num_inference_steps", 2, *EXTRA["dit"], "--features", "none"),
        *("--speed_batch_sizes", 0, "--output_dir", tmp_path / "found", "--evaluation_cache_dir", tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found/results.json").read_text())
    similarity = found["model"]["quality"]["ssim_to_dense"]
    assert similarity == pytest.approx(measured["pruned"]["quality"]["ssim_to_dense"], abs=1e-4)
    assert found["model"]["step_loss"] == pytest.approx(measured["pruned"]["step_loss"], rel=1e-4)
    assert (found["evaluation"]["classes"], found["evaluation"]["channels"]) == (CLASSES, 3)
    assert found["evaluation"]["guidance_scale"] == 2


def test_an_evaluation_of_text_is_planned_without_encoding(world: Path, tmp_path: Path) -> None:
    done = run_script(
        *(
            "training/evaluate.py",
            "--model",
            world / "sd",
            "--dataset_name",
            world / "data",
            "--cache_dir",
            world / "datasets",
        ),
        *("--encoding_cache_dir", tmp_path / "encoded", "--validation_images", 8, "--num_images", 6, "--features", "none"),
        *("--reference_model", world / "sd", "--speed_batch_sizes", 0, "--output_dir", tmp_path / "found", "--dry_run"),
        *("--evaluation_cache_dir", tmp_path / "cache", "--guidance_scale", 3),
    )
    assert done.returncode == 0, done.stderr
    assert "12 of 12 remain to be drawn" in done.stdout and "guidance 3" in done.stdout
    assert not (tmp_path / "encoded").exists()


def wrong_vae(model: Path, data: Path) -> None:
    shutil.rmtree(model / "vae")
    autoencoder(latent_channels=3).save_pretrained(model / "vae")


def wrong_text_encoder(model: Path, data: Path) -> None:
    text_encoder(tokenizer(model / "tokenizer"), width=24).save_pretrained(model / "text_encoder")


def without_captions(model: Path, data: Path) -> None:
    shutil.rmtree(data)
    write_data(data, captions=None)


BAD: dict[str, tuple[str, Callable[[Path, Path], None] | None, tuple[str, ...], str]] = {
    "wrong vae": ("dit", wrong_vae, (), "the VAE makes latents of 3 channels, but the model has in_channels=4"),
    "wrong size": ("dit", None, ("--resolution", "32"), "resolution=32 but"),
    "no captions": ("sd", without_captions, (), "caption"),
    "no such caption column": ("sd", None, ("--caption_column", "words"), "caption_column=words is not a column"),
    "labels": ("dit-of-5", None, (), "the data set has 4 classes, but the model has num_embeds_ada_norm=5"),
    "text encoder": ("sd", wrong_text_encoder, (), "width 24, but the model needs 16"),
    "no teacher": ("dit", None, ("--distillation_weight", "0"), "distillation_weight=0 must be greater than 0"),
    "no dropout": ("dit", None, ("--dropout", "0.1"), "dropout=0.1 is that of residual blocks, of which a DiTTransformer2D"),
    "no guidance": ("ldm", None, ("--guidance_scale", "2"), "guidance_scale=2 must be 1: the model is unconditional"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_anything_is_encoded(case: str, world: Path, tmp_path: Path) -> None:
    name, change, more, message = BAD[case]
    if name == "dit-of-5":
        save("dit", tmp_path / "model", num_embeds_ada_norm=5)
    else:
        shutil.copytree(world / name, tmp_path / "model")
    shutil.copytree(world / "data", tmp_path / "data")
    if change is not None:
        change(tmp_path / "model", tmp_path / "data")
    arguments = ("--encoding_cache_dir", tmp_path / "encoded", *more)
    done = run_script("training/prune_ddpm.py", *words(tmp_path, "model", tmp_path / "run", *arguments))
    assert_one_error(done, message)
    assert not (tmp_path / "encoded").exists() and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_long_prompts_are_cut_with_a_warning(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As Diffusers' pipelines cut them."""
    write_data(tmp_path / "data", captions=("a cat with a very long tail", "two"))
    arguments = ("--dataset_name", tmp_path / "data", "--encoding_cache_dir", tmp_path / "encoded", "--dry_run")
    done = run_script("training/prune_ddpm.py", *words(world, "sd", tmp_path / "run", *arguments))
    assert done.returncode == 0, done.stderr
    assert "1 of 2 different captions are longer than the limit of 8 tokens: they are cut" in caplog.text
