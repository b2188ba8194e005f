"""Safeguards of a run: checks of losses and weights, checkpoints, and a clean stop on signals."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from ..criteria import find_criterion
from ..data.batches import BrokenImages
from ..diffusion.placement import moved
from ..errors import one_line
from ..interruption import Interruption, StoppedBySignal, asked_to_stop
from .arguments import Arguments
from .checkpointing import Checkpoint, CheckpointError, Checkpoints, changed_settings
from .diagnostics import check_hessian_gradient_product, compare_with_magnitude, diagnose
from .run_setup import SCHEDULER, Run, run_settings
from .state import TrainingState
from .tracking import PHASE_NAMES, Tracking

__all__ = [
    "check_divergence",
    "check_weights",
    "examine_first_ranking",
    "explained_worker_death",
    "find_checkpoint",
    "look_for_failures",
    "mean_recent_loss",
    "record_loss",
    "report_broken_images",
    "save_checkpoint",
    "share_broken_images",
    "stop_if_asked",
    "warn",
]

# A model whose loss is larger than that of predicting zero for so many consecutive steps has diverged.
DIVERGED_STEPS = 100


def warn(accelerator: Accelerator, text: str) -> None:
    """Write a line to standard error, above any progress bar, on the main process only."""
    if accelerator.is_main_process:
        tqdm.write(text, file=sys.stderr)


def find_checkpoint(
    args: Arguments, accelerator: Accelerator, checkpoints: Checkpoints, identity: Mapping
) -> Checkpoint | None:
    """Load the checkpoint that the command line requests, if it exists, and warn about changed settings.

    Raises:
        ValueError: It is damaged or belongs to another run, or processes found different checkpoints.
    """
    checkpoint = checkpoints.find(args.checkpoints.resume_from_checkpoint, warn=lambda text: warn(accelerator, text))
    step = -1 if checkpoint is None else checkpoint.step
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise ValueError(
            f"resume_from_checkpoint={args.checkpoints.resume_from_checkpoint}: processes found checkpoints of steps {steps} "
            f"(-1: none); {checkpoints.folder} must be on a file system shared by all processes"
        )
    if checkpoint is None:
        accelerator.print(f"no checkpoint in {checkpoints.folder}: starting from the beginning")
        return None
    known = checkpoint.identity  # those of earlier versions do not name the scheduler
    named = any(name.startswith(SCHEDULER) for name in known)
    checkpoints.check_identity(
        checkpoint, {name: value for name, value in identity.items() if named or not name.startswith(SCHEDULER)}
    )
    before, now = checkpoint.settings, run_settings(args, accelerator)
    both = before.keys() & now.keys()  # checkpoints of other versions have others
    for line in changed_settings(*({name: values[name] for name in both} for values in (before, now))):
        warn(accelerator, f"warning: resuming with a changed setting: {line}")
    if later := checkpoints.later_than(step):
        names = ", ".join(path.name for path in later)
        warn(
            accelerator,
            f"warning: {names} will be removed when the next checkpoint is saved: the run goes back to step {step}",
        )
    return checkpoint


def mean_recent_loss(run: Run, state: TrainingState) -> float:
    """Mean loss since the last point of the curve. Losses in `state.recent` are replaced by their means over processes.

    Raises:
        ValueError: A loss is not finite.
    """
    device = run.accelerator.device
    losses = torch.stack([torch.as_tensor(loss, device=device, dtype=torch.float32) for loss in state.recent])
    losses = run.accelerator.reduce(losses, reduction="mean")
    state.recent = losses.tolist()  # now equal on every process, as after a resume
    finite = torch.isfinite(losses)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        args, step = run.args, state.step - len(losses) + first
        phase = PHASE_NAMES[state.pruner.schedule.phase(step)]
        raise ValueError(
            f"the loss is {losses[first].item()} at step {step} ({phase}): lower "
            f"learning_rate={args.training.learning_rate:g}, or check the weights of "
            f"{args.model.pretrained_model_name_or_path}{last_checkpoint(run, step)}"
        )
    return losses.mean().item()


def record_loss(run: Run, state: TrainingState) -> float:
    """Add a point to the curve of training losses: their mean since the last point.

    Raises:
        ValueError: A loss is not finite, the run has diverged, or too many images are broken.
    """
    share_broken_images(run.accelerator, state.broken)
    mean = mean_recent_loss(run, state)
    state.curves.train_steps.append(state.step)
    state.curves.train_loss.append(mean)
    state.recent.clear()
    check_divergence(run, state)
    return mean


def check_weights(run: Run, state: TrainingState) -> None:
    """Check the weights.

    Raises:
        ValueError: A weight is not finite.
    """
    if not all(torch.isfinite(parameter).all() for parameter in state.unet.parameters()):
        raise ValueError(
            f"weights are not finite after step {state.step}: lower learning_rate={run.args.training.learning_rate:g}"
            f"{last_checkpoint(run, state.step)}"
        )


def trivial_loss(run: Run) -> float:
    """The loss of a model whose prediction and block outputs are zero, at most.

    Distances to block outputs are relative, so that theirs is 1. Responses to a change of the input have no such scale.
    """
    objective = run.args.objective
    if objective.needs_directions:
        return math.inf
    return run.pipeline.process.target_square + objective.feature_distillation_weight


def check_divergence(run: Run, state: TrainingState) -> None:
    """Stop a run that has diverged.

    Raises:
        ValueError: The loss was larger than that of a prediction of zero for `DIVERGED_STEPS` steps.
    """
    start, limit = state.step - DIVERGED_STEPS, trivial_loss(run)
    points = [(s, loss) for s, loss in zip(state.curves.train_steps, state.curves.train_loss) if s > start]
    if start >= 0 and all(loss > limit for _, loss in points):
        raise ValueError(
            f"the training loss was over {limit:g}, the loss of predicting zero, from step {start} to step "
            f"{state.step}: lower learning_rate={run.args.training.learning_rate:g}{last_checkpoint(run, start)}"
        )


def last_checkpoint(run: Run, step: int) -> str:
    """Text that names the newest checkpoint before a step, since that of the step itself has the bad weights; may be empty."""
    good = [path for path in run.checkpoints.paths() if int(path.name.partition("-")[2]) < step]
    return f"; the last good checkpoint is {good[0]} (--resume_from_checkpoint {good[0].name})" if good else ""


def examine_first_ranking(run: Run, state: TrainingState, batches: Sequence[Sequence[Tensor]]) -> None:
    """Compare the first ranking with magnitude, and its Hessian-gradient products with finite differences if asked to.

    Args:
        run: The run.
        state: State right after a ranking, with the weights that were ranked.
        batches: Calibration batches of that ranking.
    """
    pruner, diagnostics = state.pruner, state.diagnostics
    if len(pruner.history) == 1 and find_criterion(pruner.config.criterion).needs_batches:
        dense = None if run.args.pruning.recovery == "none" else run.sample_quality.dense
        with moved([] if dense is None else [dense], run.accelerator.device):
            diagnostics["comparison"] = compare_with_magnitude(pruner, batches, dense)
        if run.args.pruning.check_scores:
            arguments = (state.unet, pruner.groups, batches, pruner.process, pruner.config)
            diagnostics["hessian_check"] = check_hessian_gradient_product(*arguments)
            agreement = diagnostics["hessian_check"]["rank_correlation"]
            run.accelerator.print(
                f"Hessian-gradient products: rank correlation with finite differences {agreement:.4f} or more"
            )


def look_for_failures(run: Run, state: TrainingState) -> None:
    """Detect known failures after a ranking, and warn about new ones.

    Args:
        run: The run.
        state: State after a ranking and its validation.
    """
    pruner, diagnostics = state.pruner, state.diagnostics
    validation = zip(state.curves.validation_steps, state.curves.validation_loss)
    if not pruner.process.has_target:  # distances to the dense model start at 0 and always rise
        validation = ()
    known = {warning["kind"] for warning in diagnostics["warnings"]}
    for diagnosis in diagnose(
        pruner.history, validation, pruner.config, diagnostics["comparison"], diagnostics["hessian_check"]
    ):
        if diagnosis.kind not in known:
            diagnostics["warnings"].append({"step": state.step, **diagnosis._asdict()})
            warn(run.accelerator, f"warning: {diagnosis.message}")


@contextmanager
def explained_worker_death(run: Run, state: TrainingState) -> Iterator[None]:
    """Turn the error that follows the death of a data loading process into one line.

    Raises:
        ValueError: A loading process was killed, for example because memory ran out.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        where = last_checkpoint(run, state.step + 1)
        raise ValueError(f"loading images failed because a loading process died: {one_line(error)}{where}") from error


def save_checkpoint(run: Run, state: TrainingState) -> bool:
    """Save a checkpoint. A failed write causes a warning; weights that are not finite are not saved and stop the run.

    Returns:
        Whether a checkpoint of this step exists; only the main process writes it and detects failures.

    Raises:
        ValueError: A loss or a weight is not finite, or too many images are broken.
    """
    share_broken_images(run.accelerator, state.broken)
    if state.recent:
        mean_recent_loss(run, state)
    if not run.accelerator.is_main_process or state.saved_step == state.step:
        return True
    check_weights(run, state)
    settings = run_settings(run.args, run.accelerator)
    try:
        run.checkpoints.save(state.step, run.identity, settings, state.tensors(), state.values())
    except CheckpointError as error:
        warn(run.accelerator, f"warning: {error}; training continues{last_checkpoint(run, state.step)}")
        return False
    state.saved_step = state.step
    return True


def stop_if_asked(run: Run, state: TrainingState, interruption: Interruption, tracking: Tracking) -> None:
    """Save a checkpoint and stop if any process received SIGTERM or SIGINT.

    Raises:
        StoppedBySignal: A process received one.
    """
    accelerator = run.accelerator
    asked = asked_to_stop(accelerator, interruption)
    if asked is None:
        return
    tracking.close()
    saved = save_checkpoint(run, state)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    done = "saved" if saved else "not saved"
    warn(
        accelerator,
        f"stopped by {signal.Signals(asked).name} after step {state.step}, {done}; --resume_from_checkpoint latest",
    )
    raise StoppedBySignal(asked)


def share_broken_images(accelerator: Accelerator, broken: BrokenImages) -> None:
    """Count the broken images that other processes met. All processes must call this function.

    Raises:
        ValueError: Together they have met too many.
    """
    if accelerator.num_processes > 1:
        broken.add(gather_object(broken.to_list()))


def report_broken_images(run: Run, state: TrainingState) -> None:
    """Warn about images that could not be read."""
    share_broken_images(run.accelerator, state.broken)
    if names := state.broken.to_list():
        warn(run.accelerator, f"warning: {len(names)} images could not be read and were left out, first {names[0]}")
