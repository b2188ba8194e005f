"""prune_ddpm.py on flow matching in pixels and on EDMs in latents: trained, sampled, saved and described as what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDPMPipeline,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
)

from diffusers_gfprune import PruneDDPMPipeline
from diffusers_gfprune.scripts import prune_ddpm
from diffusers_gfprune.trained_pipelines import load_pipeline
from helpers.consistency_models import SIZE, consistency_unet
from helpers.latent_pipelines import ldm, sdxl, write_data
from helpers.scripts import forget_accelerator, plain_runs

SHORT = [
    *("--max_train_steps", "6", "--soft_fraction", "0.2", "--hard_fraction", "0.4", "--update_interval", "1"),
    *("--train_batch_size", "8", "--calibration_batches", "1", "--validation_images", "8", "--validation_steps", "3"),
    *("--eval_images", "6", "--ddim_num_inference_steps", "2", "--speed_batch_sizes", "0", "--recovery", "none"),
]
DRAWN = ("--train_data", "teacher", "--num_teacher_images", "16", "--teacher_num_inference_steps", "2")


def run(pipe: DiffusionPipeline, folder: Path, *data: object) -> tuple[dict, dict, str]:
    """Report, results and card of a run, by default without data; noise has a weight in the loss, too."""
    pipe.save_pretrained(folder / "dense")
    places = ("--pretrained_model_name_or_path", folder / "dense", "--output_dir", folder / "out")
    forget_accelerator()
    with plain_runs():
        data = data or (*DRAWN, "--teacher_images_dir", folder / "images")
        given = (*SHORT, *places, "--distillation_weight", 0.5, *data)
        prune_ddpm.main([str(word) for word in given])
    report, results = (json.loads((folder / "out" / f).read_text()) for f in ("pruning_report.json", "results.json"))
    return report, results, " ".join((folder / "out/README.md").read_text().split())


@pytest.mark.slow
def test_a_flow_matching_unet_in_pixels(tmp_path: Path) -> None:
    pipe = DDPMPipeline(consistency_unet(), FlowMatchEulerDiscreteScheduler(shift=2.0))
    report, results, card = run(pipe, tmp_path)
    assert report["pipeline"]["process"] == "flow matching" and "lipman2023flow" in card
    assert results["evaluation"]["sampler"] == "Euler's method" and results["evaluation"]["num_inference_steps"] == 2
    assert results["dense"]["step_loss"] > 0 and "Step loss: prediction error on 8" in card
    assert "trained on the dense model's prediction, with weight 0.5, and on the target itself" in card
    pruned = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pruned.set_progress_bar_config(disable=True)
    assert type(pruned.scheduler) is FlowMatchEulerDiscreteScheduler and pruned.scheduler.config.shift == 2
    assert pruned(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, SIZE, SIZE, 1)


@pytest.mark.slow
def test_an_edm_in_latents(tmp_path: Path) -> None:
    dense = ldm(tmp_path / "parts")
    pipe = LDMPipeline(dense.vqvae, dense.unet, EDMEulerScheduler())
    report, results, card = run(pipe, tmp_path)
    assert report["pipeline"]["process"] == "edm" and "karras2022elucidating" in card
    assert results["dense"]["step_loss"] > 0 and results["evaluation"]["sampler"] == "Euler's method"
    pruned = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pruned.set_progress_bar_config(disable=True)
    assert type(pruned.scheduler) is EDMEulerScheduler
    assert torch.tensor(pruned(batch_size=1, num_inference_steps=2, output_type="np").images).isfinite().all()


@pytest.mark.slow
def test_an_edm_of_text(tmp_path: Path) -> None:
    pipe = sdxl(tmp_path / "parts")
    pipe.scheduler = EDMEulerScheduler()
    data = write_data(tmp_path / "data")
    report, results, _ = run(pipe, tmp_path, "--dataset_name", data, "--caption_column", "text")
    assert (report["pipeline"]["process"], report["pipeline"]["condition"]) == ("edm", "text")
    assert results["pruned"]["macs"] / results["dense"]["macs"] == pytest.approx(0.5, abs=0.02)
    pruned = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pruned.set_progress_bar_config(disable=True)
    assert type(pruned.scheduler) is EDMEulerScheduler
    assert torch.tensor(pruned("a cat", num_inference_steps=2, output_type="np").images).isfinite().all()


@pytest.mark.slow
def test_one_call_prunes_flow_matching() -> None:
    pipe = PruneDDPMPipeline(unet=consistency_unet(), scheduler=FlowMatchEulerDiscreteScheduler())
    small = pipe.prune(num_teacher_images=8, target="macs", ratio=0.3)
    assert type(small.scheduler) is FlowMatchEulerDiscreteScheduler and small.unet.config.layer_channels


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            EDMEulerScheduler(),
            "EDMEulerScheduler is of an EDM, which a DDPMPipeline does not sample; pipelines for it: LDMPipeline",
        ),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting=True of the FlowMatchEuler"),
    ],
)
def test_what_the_pipeline_would_not_sample_is_refused(scheduler, message: str, tmp_path: Path) -> None:
    DDPMPipeline(consistency_unet(), scheduler).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(tmp_path))


def test_pipelines_that_replace_their_scheduler_are_refused(tmp_path: Path) -> None:
    """`DDIMPipeline` makes a DDIMScheduler of any other."""
    DDPMPipeline(consistency_unet(), FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": DDIMPipeline.__name__}))
    with pytest.raises(
        ValueError, match="a flow-matching model, which a DDIMPipeline does not sample; pipelines for it: DDPM"
    ):
        load_pipeline(str(tmp_path))
