"""Rehearsal of the end of a run before training: errors after the last step are found before the first, in seconds.

Sampling, features, timing, the card and the files of a run are needed only at its end. Each is tried once, at minimal size:
one sampler step from pure noise, features of two images, one timed forward, a compiled function, a card with made-up figures,
the files of a Space, and a file of the size of the weights, which is deleted. `--dry_run` does the same.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .. import GradientFlowPruner
from ..diffusion.placement import moved
from ..evaluation.sample_quality import SampleQuality
from ..evaluation.trials import describe_speed, try_features, try_sampling, try_speed
from ..formatting import format_size
from ..hub import check_nothing_private, write_space
from ..metrics.model_size import parameter_bytes
from ..metrics.sampling import image_shape
from ..reports.model_card import render_card
from ..reports.results import PRUNING_RUN, Results
from ..run_folder import RunFolder, write_json
from ..trained_pipelines import TrainedPipeline
from .arguments import Arguments
from .reporting import describe_evaluation, model_figures, pruning_report
from .state import Curves

__all__ = ["rehearse_run"]


def rehearse_run(
    args: Arguments,
    pruner: GradientFlowPruner,
    sample_quality: SampleQuality,
    num_held_out: int,
    origin: dict,
    folder: RunFolder,
    pipeline: TrainedPipeline,
) -> list[str]:
    """Try everything that a pruning run does at its end.

    Args:
        args: The command line.
        pruner: The pruner before its first step.
        sample_quality: Sample quality, with the dense model.
        num_held_out: Number of held-out images.
        origin: `base_model`, `dataset` and `command` (see `provenance`).
        folder: Folder of the run.
        pipeline: The pipeline, whose other components go into the result.

    Returns:
        Lines to print: the settings of the speed measurement, if any, and what was tried.

    Raises:
        ValueError: A part would fail.
    """
    start, tried = time.perf_counter(), []
    dense, e = sample_quality.dense, args.evaluation
    speed, lines, settings = [], [], e.speed_settings()
    with moved([dense], sample_quality.device):
        if e.eval_images or args.tracking.sample_steps:
            argument = f"pretrained_model_name_or_path={args.model.pretrained_model_name_or_path}"
            try_sampling(argument, dense, sample_quality.scheduler, sample_quality.settings, sample_quality.codec)
            tried.append("a sampling step")
        if sample_quality.network is not None:
            try_features([sample_quality.network], image_shape(dense, sample_quality.codec))
            tried.append("features")
        if settings:
            speed, words = try_speed(dense, settings)
            tried += words
            lines.append(describe_speed(settings))
        rehearse_card(args, pruner, sample_quality, num_held_out, origin, speed, pipeline)
    size = parameter_bytes(dense)
    folder.try_writing(size)
    tried.append(f"a card and a file of {format_size(size)}")
    return [*lines, f"{'tried':10} {', '.join(tried)}, in {time.perf_counter() - start:.1f} s"]


def rehearse_card(
    args: Arguments,
    pruner: GradientFlowPruner,
    sample_quality: SampleQuality,
    num_held_out: int,
    origin: dict,
    speed: Sequence[dict],
    pipeline: TrainedPipeline,
) -> None:
    """Render the card of a run from made-up figures, and check it and the settings of components as a push does.

    `speed` has rows of the dense model, which are used for the pruned model, too.

    Raises:
        ValueError: The card is not valid, or a push would refuse it.
    """
    dense, network = sample_quality.dense, sample_quality.network
    losses = {"step_loss": 1.0}
    if sample_quality.has_null:
        losses["step_loss_null_label"] = 1.0
    figures = model_figures("dense", dense, losses)
    figures.speed = [{key: value for key, value in row.items() if key != "model"} for row in speed]
    evaluation = describe_evaluation(args, dense, sample_quality, num_held_out)
    if args.evaluation.eval_images:
        figures.quality |= {"ssim_to_dense": 1.0, "psnr_to_dense": 1.0}
    if network is not None:
        figures.quality[network.metric] = 1.0
        description = {"title": network.title, "features": network.description, "reference_images": 2}
        evaluation["distances"] = {network.metric: description}
    results = Results(PRUNING_RUN, replace(figures, name="pruned"), figures, evaluation)
    report = pruning_report(args, pruner, Curves(), 1.0, origin)
    card = render_card(results, report, args.hub.hub_model_id or Path(args.run.output_dir).name)
    with tempfile.TemporaryDirectory() as place:
        Path(place, "README.md").write_text(card, "utf-8")
        for name, content in (("results.json", results.to_dict()), ("pruning_report.json", report)):
            write_json(Path(place, name), content)
        if args.hub.push_to_hub:
            write_json(Path(place, "model_index.json"), pipeline.index)
            pipeline.copy_others(Path(place), weights=False)
            names = [path.relative_to(place).as_posix() for path in Path(place).rglob("*") if path.is_file()]
            check_nothing_private(place, sorted(names), args.hub.hub_token)
            if args.hub.push_space is not None:
                write_space(Path(place, "space"), args.hub.hub_model_id or "model", args.hub.push_space, report)
