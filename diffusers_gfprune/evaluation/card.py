"""Writes the figures of an evaluation into the results and the model card of a pruning run.

In the run's `results.json`, cost and speed stay as the run measured them. Sample quality and step loss, with all settings that
they depend on, are replaced by those of the evaluation. The new files are written to a temporary folder and then moved into
the run, so a failure leaves the run unchanged. The evaluation's own folder is published last, so the same command can be
repeated after an interruption.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..hub import PICTURES, check_edited_card, update_card
from ..metrics.model_size import count_macs, count_parameters
from ..remote.pipeline_prune_ddpm import EVAL_RESULTS, is_as_rendered
from ..reports.model_card import render_card
from ..reports.results import PRUNING_RUN, ModelFigures, Results, read_results
from ..run_folder import write_json
from .inputs import Inputs

__all__ = ["check_run", "merged_run_results", "updated_run"]

# Metrics that an evaluation replaces
SIMILARITIES = ("ssim_to_dense", "psnr_to_dense")
# Settings that not all evaluations have
OPTIONAL = ("null_label", "guidance_scale", "num_prompts", "prompts", "num_vectors", "vectors")
# In this order: the card refers to the others
REPLACED = (PICTURES["samples"], "results.json", EVAL_RESULTS, "README.md")


def is_frechet(metric: str) -> bool:
    """Whether a metric is a Fréchet distance, the only kind of distance that a card shows."""
    return metric == "fid" or metric.startswith("fd_")


def check_run(run: Path, inputs: Inputs) -> None:
    """Check, before long work, that a run can take the figures of these models.

    Raises:
        ValueError: The run cannot be read or written, its card cannot be rendered or was edited into one that the Hub cannot
            show, or its models are others.
    """
    try:
        measured, report = read_results(run), json.loads((run / "pruning_report.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"update_model_card=True: {run} is not a pruning run with complete results: {error}") from error
    if measured.kind != PRUNING_RUN:
        raise ValueError(f"update_model_card=True: {run} holds results of an {measured.kind}, not of a {PRUNING_RUN}")
    render_card(measured, report, run.resolve().name)
    check_edited_card(run)
    for argument in ("model", "reference_model"):
        unet = inputs.models[argument].denoiser
        _check_same(getattr(measured, argument), argument, count_parameters(unet), count_macs(unet))
    # The pruned model may have been trained further. Runs of earlier versions did not record the weights of the dense one.
    if measured.reference_model.weights not in (None, inputs.weights["reference_model"]):
        raise ValueError("reference_model has other weights than the dense model of the run, of the same architecture")
    if not os.access(run, os.W_OK):
        raise ValueError(f"update_model_card=True: {run} cannot be written")


def _check_same(measured: ModelFigures, argument: str, parameters: int | None, macs: int | None) -> None:
    if (measured.parameters, measured.macs) != (parameters, macs):
        raise ValueError(
            f"{argument} has {parameters:,} parameters and {macs:,} MACs, but the {measured.name} model of the run has "
            f"{measured.parameters:,} and {measured.macs:,}"
        )


def merged_run_results(measured: Results, results: Results) -> Results:
    """Results of a pruning run, with step loss and sample quality replaced by those of an evaluation.

    Args:
        measured: Results of the run.
        results: Results of an evaluation of the pruned model, with the dense model as reference.

    Raises:
        ValueError: There is no reference model, or the models are not those of the run.
    """
    if results.reference_model is None:
        raise ValueError("reference_model=None: results of a run can only be updated by an evaluation with a reference model")
    figures = {}
    for argument in ("model", "reference_model"):
        of_run, measured_now = getattr(measured, argument), getattr(results, argument)
        _check_same(of_run, argument, measured_now.parameters, measured_now.macs)
        figures[argument] = replace(
            of_run,
            step_loss=measured_now.step_loss,
            step_loss_null_label=measured_now.step_loss_null_label,
            quality={k: v for k, v in measured_now.quality.items() if is_frechet(k) or k in SIMILARITIES},
        )
    figures["model"].weights = results.model.weights
    e = results.evaluation
    names = ("num_images", "sampler", "num_inference_steps", "timestep_spacing", "eta", "seed")
    names += ("step_loss_images", "step_loss_timesteps", "sample_size", "device", "dtype", "versions")
    depends = {name: value for name, value in measured.evaluation.items() if name not in OPTIONAL}
    depends |= {name: e[name] for name in names}
    depends |= {name: e[name] for name in OPTIONAL if name in e}
    depends["distances"] = {name: described for name, described in e["distances"].items() if is_frechet(name)}
    if "dataset" in e:  # not always that of training
        depends["dataset"] = {name: e["dataset"][name] for name in ("name", "hub_id")}
    depends["command"] = results.command
    return replace(measured, **figures, evaluation=depends)


def card_repository(run: Path) -> str:
    """The repository in the examples of a run's card, or the name of the run."""
    readme = run / "README.md"
    text = readme.read_text("utf-8") if readme.is_file() else ""
    named = re.search(r'from_pretrained\("([^"]+)", trust_remote_code=True\)', text)
    return named[1] if named else run.resolve().name


@contextmanager
def updated_run(run: Path, results: Results, picture: Path) -> Iterator[None]:
    """Context in which a run has new results, samples and card. An error in the context restores the earlier files.

    The new files are written to a hidden folder of the run first, and then moved into place, each one atomically.

    Args:
        run: The run's folder.
        results: Results of the evaluation.
        picture: PNG file with samples of the dense model above those of the pruned one.

    Raises:
        ValueError: The card cannot be rendered; the run is unchanged.
    """
    fresh, replaced = run / ".evaluation.incomplete", []
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir()
        write_json(fresh / "results.json", merged_run_results(read_results(run), results).to_dict())
        for name in ("pruning_report.json", "README.md", *PICTURES.values()):
            if (run / name).is_file():
                shutil.copyfile(run / name, fresh / name)
        shutil.copyfile(picture, fresh / PICTURES["samples"])
        if (run / "README.md").is_file() and not is_as_rendered((run / "README.md").read_text("utf-8")):
            print(f"warning: {run / 'README.md'} was edited, so its text and figures are kept", file=sys.stderr)
        update_card(fresh, card_repository(run))
        for name in REPLACED:
            if (run / name).is_file():
                (fresh / "earlier" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(run / name, fresh / "earlier" / name)
        for name in REPLACED:
            replaced.append(name)
            if (fresh / name).is_file():
                (run / name).parent.mkdir(exist_ok=True)
                os.replace(fresh / name, run / name)
            else:  # this evaluation has no results for the Hub's collection
                (run / name).unlink(missing_ok=True)
        yield
    except BaseException:
        _restore(run, fresh, replaced)
        raise
    shutil.rmtree(fresh, ignore_errors=True)


def _restore(run: Path, fresh: Path, replaced: Sequence[str]) -> None:
    """Restore the files that were replaced, and remove the hidden folder."""
    for name in replaced:
        if (fresh / "earlier" / name).is_file():
            os.replace(fresh / "earlier" / name, run / name)
        else:
            (run / name).unlink(missing_ok=True)
    shutil.rmtree(fresh, ignore_errors=True)
