"""The end of a run: measure the models, save, plot and push."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from tqdm.auto import tqdm

from ..errors import HUB_ERRORS, first_line, hub_error_reason
from ..hub import PushError, prepare_repo, prepare_space, push_checkpoint, update_card
from ..metrics.speedup import compare_speeds
from ..reports.plots import plot_pruning, plot_widths, save_sample_grid
from ..reports.results import Results
from ..run_folder import RunFolder, write_json
from ..runtimes.forwards import ConversionError
from .arguments import Arguments
from .reporting import measure_step_losses, pruning_report, results
from .run_setup import Run
from .state import TrainingState

__all__ = ["finish", "prepared_repository", "prepared_space", "save_model"]


def prepared_repository(args: Arguments) -> str:
    """Create the repository to push to if needed, and check write access before training.

    Raises:
        ValueError: The repository cannot be created or written.
    """
    name = args.hub.hub_model_id or Path(args.run.output_dir).name
    try:
        return prepare_repo(name, token=args.hub.hub_token, private=args.hub.hub_private_repo or None)
    except HUB_ERRORS as error:
        raise ValueError(f"push_to_hub to {name} would fail: {hub_error_reason(error)}") from error


def prepared_space(args: Arguments) -> str | None:
    """Create the Space to push to if needed, and check write access before training; None if there is none to push.

    Raises:
        ValueError: The Space cannot be created or written.
    """
    name = args.hub.push_space
    try:
        return name and prepare_space(name, token=args.hub.hub_token, private=args.hub.hub_private_repo or None)
    except HUB_ERRORS as error:
        raise ValueError(f"push_space to {name} would fail: {hub_error_reason(error)}") from error


def save_model(run: Run, state: TrainingState) -> None:
    """Save the current pipeline, and push it with `hub_strategy=every_save`. If either fails, the run goes on."""
    args = run.args
    try:
        with state.averaged() as unet:
            run.folder.save(partial(run.pipeline.save, unet))
    except (OSError, SafetensorError) as error:
        tqdm.write(
            f"warning: the model of step {state.step} could not be saved in {run.folder.staging}: {first_line(error)}; "
            f"training continues",
            file=sys.stderr,
        )
        return
    if run.repo_id is not None and args.hub.hub_strategy == "every_save":
        message = f"Step {state.step} of {args.training.max_train_steps}"
        try:
            push_checkpoint(run.folder.staging, run.repo_id, token=args.hub.hub_token, commit_message=message)
        except (PushError, ValueError) as error:
            tqdm.write(f"warning: {error}; training continues", file=sys.stderr)


def finish(run: Run, state: TrainingState) -> None:
    """Write pipeline, results, report, card and pictures, and publish the run folder."""
    args, folder = run.args, run.folder
    if state.ema is not None:
        state.ema.copy_to(state.unet.parameters())
    unet = state.unet.requires_grad_(False).eval()
    dense = run.sample_quality.dense.to(run.accelerator.device)
    losses = (run.dense_step_losses, measure_step_losses(run.step_loss, unet, run.images.null_conditioning()))
    folder.save(partial(run.pipeline.save, unet))
    measured, dense_samples, samples = results(args, dense, unet, run.sample_quality, len(run.step_loss.images), losses)
    if state.pruner.latency is not None:
        try:
            measured.latency_budget = state.pruner.check_latency(dense, unet).to_dict()
        except (RuntimeError, ConversionError, OSError) as error:  # memory, a compiler or a runtime; the model is done
            tqdm.write(f"warning: the latency budget cannot be checked: {first_line(error)}", file=sys.stderr)
    write_json(folder.staging / "results.json", measured.to_dict())
    density = state.timestep_density
    report = pruning_report(
        *(args, state.pruner, state.curves, run.dense_step_losses["step_loss"], run.origin),
        diagnostics=state.diagnostics,
        broken=state.broken.to_list(),
        timestep_density=None if density is None else density.describe(run.pipeline.process.timesteps_at),
    )
    write_json(folder.staging / "pruning_report.json", report)
    plot_pruning(folder.staging / "pruning.png", report)
    plot_widths(folder.staging / "widths.png", report)
    if samples is not None:
        save_sample_grid(folder.staging / "samples.png", dense_samples, samples)
    update_card(folder.staging, run.repo_id or args.hub.hub_model_id or folder.name)
    folder.publish()
    print_results(measured, folder)


def print_results(measured: Results, folder: RunFolder) -> None:
    """Print the main figures, dense beside pruned."""
    dense, pruned = measured.reference_model, measured.model
    costs = [("parameters", "parameters", "{:,}"), ("MACs", "macs", "{:,}"), ("step loss (held out)", "step_loss", "{:.4f}")]
    null = "empty prompt" if "prompts" in measured.evaluation else "null label"
    costs.append((f"step loss, {null}", "step_loss_null_label", "{:.4f}"))
    rows = [(title, [getattr(model, name) for model in (dense, pruned)], form) for title, name, form in costs]
    metrics = [(described["title"], name) for name, described in measured.evaluation["distances"].items()]
    for title, name in (*metrics, ("SSIM to dense", "ssim_to_dense")):
        rows.append((title, [model.quality.get(name) for model in (dense, pruned)], "{:.3f}"))
    print(f"\n{'':24}{'dense':>14}{'pruned':>14}")

    def print_row(title: str, values: list, form: str, words: str = "") -> None:
        cells = "".join(f"{form.format(value) if value is not None else '-':>14}" for value in values)
        print(f"{title:24}{cells}  {words}".rstrip())

    for title, values, form in rows:
        if any(value is not None for value in values):
            print_row(title, values, form)
    for line in compare_speeds(dense.speed, pruned.speed):
        print_row(f"ms, {line['title']}", [line["first_ms"], line["other_ms"]], "{:.2f}", line["words"])
    if measured.latency_budget is not None:
        print(f"\n{measured.latency_budget['words']}")
    print(f"\nsaved: {folder.path}  (DiffusionPipeline.from_pretrained after `import diffusers_gfprune`)")
