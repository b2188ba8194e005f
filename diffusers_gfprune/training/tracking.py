"""Progress of a run: curves in a tracker, a progress bar per phase in the terminal, grids of samples.

Trackers are those of Accelerate. Trackers group names by the part before the slash:

    train/      loss and its terms, gradient norm, learning rate
    pruning/    s_t, p_t, MACs, parameters, revived units; pruning/sparsity/<group> the pruned share of each group
    quality/    Fréchet distance of samples, and their similarity to the dense model's
    speed/      images per second over all processes, remaining seconds
"""

from __future__ import annotations

import dataclasses
import sys
import time
from functools import partial

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..diffusion.placement import moved
from ..errors import first_line, one_line
from ..evaluation.sample_quality import SampleQuality
from ..pruner import MaskUpdate
from ..reports.plots import save_sample_grid
from ..reports.provenance import portable
from ..run_folder import RunFolder
from .arguments import Arguments
from .state import TrainingState

__all__ = ["PHASE_NAMES", "Tracking"]

PHASE_NAMES = {"soft": "soft pruning", "hard": "hard pruning", "finetune": "fine-tuning"}


class Tracking:
    """Reports progress to the terminal and to the tracker.

    Args:
        args: The command line.
        accelerator: Accelerator whose `log_with` is the tracker.
        folder: Folder of the run; grids of samples are saved in its training folder.
        sample_quality: Settings of the samples, and the dense model, which samples from the same noise.

    Raises:
        ValueError: The tracker cannot be started.
    """

    def __init__(self, args: Arguments, accelerator: Accelerator, folder: RunFolder, sample_quality: SampleQuality) -> None:
        self.args, self.accelerator, self.folder, self.sample_quality = args, accelerator, folder, sample_quality
        self.dense_samples: torch.Tensor | None = None
        self.progress: tqdm | None = None
        self.phase: str | None = None
        self.clock, self.clock_step = time.perf_counter(), 0
        if args.tracking.report_to != "none":
            # Each run of the script is one run of the tracker; a resumed run adds to the same folder.
            given = {name: portable(value) for name, value in args.to_dict().items() if value is not None}
            # TensorBoard does not accept lists
            config = {name: " ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for name, v in given.items()}
            # Weights & Biases would write into the working directory
            logs = folder.training / "logs"
            if args.tracking.report_to == "wandb" and accelerator.is_main_process:
                logs.mkdir(parents=True, exist_ok=True)
            own = {"wandb": {"dir": str(logs)}}
            try:
                accelerator.init_trackers(args.tracking.tracker_project_name, config=config, init_kwargs=own)
            except Exception as error:  # each tracker has its own errors, such as a missing login
                raise ValueError(f"report_to={args.tracking.report_to} cannot be started: {one_line(error)}") from error

    def enter_phase(self, state: TrainingState) -> None:
        """Start a progress bar if the next step begins a new phase."""
        if state.phase == self.phase:
            return
        self.close()
        self.phase = state.phase
        schedule, total = state.pruner.schedule, self.args.training.max_train_steps
        ends = {"soft": (0, schedule.soft_steps), "hard": (schedule.soft_steps, schedule.end_steps)}
        start, end = ends.get(self.phase, (schedule.end_steps, total))
        self.progress = tqdm(
            total=min(end, total) - start,
            initial=state.step - start,
            desc=PHASE_NAMES[self.phase],
            disable=not self.accelerator.is_local_main_process,
        )
        self.clock, self.clock_step = time.perf_counter(), state.step

    def log_training(self, state: TrainingState, loss: float, terms: dict[str, float], gradient_norm: float) -> None:
        """Log a point of the training curves."""
        args, schedule = self.args, state.pruner.schedule
        seconds = (time.perf_counter() - self.clock) / max(1, state.step - self.clock_step)
        self.clock, self.clock_step = time.perf_counter(), state.step
        images = args.training.train_batch_size * args.training.gradient_accumulation_steps * self.accelerator.num_processes
        values = {"train/loss": loss, **{f"train/{name}": value for name, value in terms.items()}}
        values |= {"train/gradient_norm": gradient_norm, "train/learning_rate": state.lr_scheduler.get_last_lr()[0]}
        values |= {
            "speed/images_per_second": images / seconds,
            "speed/eta_seconds": seconds * (args.training.max_train_steps - state.step),
        }
        if not state.pruner.finished:
            values |= {
                "pruning/s_t": schedule.sparsity(state.step) * args.pruning.ratio,
                "pruning/p_t": schedule.mask_value(state.step),
            }
        self._log(values, state.step)
        if self.progress is not None:
            self.progress.set_postfix(loss=f"{loss:.4f}")

    def log_ranking(self, state: TrainingState, update: MaskUpdate) -> None:
        """Log the result of a ranking, with the sparsity of each group."""
        widths = state.pruner.cost.present(state.pruner.kept_channels())
        values = {
            f"pruning/sparsity/{group.name}": 1 - width / group.num_channels
            for group, width in zip(state.pruner.groups, widths)
        }
        values |= {
            "pruning/sparsity": update.sparsity,
            "pruning/kept_units": update.kept_units,
            "pruning/revived_units": update.revived_units,
            "pruning/kept_channels": update.kept_channels,
            "pruning/macs": update.macs,
            "pruning/params": update.params,
        }
        self._log(values, state.step)

    def log_validation(self, step: int, loss: float) -> None:
        """Log a step loss on held-out images."""
        self._log({"validation/step_loss": loss}, step)

    def log_quality(self, step: int, measured: dict[str, float | None]) -> None:
        """Log distances and similarities of samples."""
        self._log({f"quality/{name}": value for name, value in measured.items() if value is not None}, step)

    def _log(self, values: dict[str, float], step: int) -> None:
        if self.args.tracking.report_to != "none":
            self.accelerator.log(values, step=step)

    def log_samples(self, state: TrainingState) -> None:
        """Save and log a grid of samples and the dense model's, always from the same noise, with averaged weights if any."""
        if not self.accelerator.is_main_process:
            return
        count = self.args.tracking.num_samples
        settings = dataclasses.replace(self.sample_quality.settings, num_images=count)
        quality = self.sample_quality
        sample = partial(settings.sample, scheduler=quality.scheduler, codec=quality.codec, conditions=quality.conditions)
        if self.dense_samples is None:
            with moved([quality.dense], self.accelerator.device):
                self.dense_samples = sample(quality.dense)
        with state.averaged() as unet:
            samples = sample(unet)
        path = self.folder.training / "samples" / f"step-{state.step}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_sample_grid(path, self.dense_samples, samples, rows=None)
        except OSError as error:
            path.unlink(missing_ok=True)
            tqdm.write(f"warning: {path} could not be saved: {first_line(error)}; training continues", file=sys.stderr)
            return
        grid = torch.cat([self.dense_samples, samples])  # dense above pruned
        pictures = (255 * grid.permute(0, 2, 3, 1)).round().clamp(0, 255).to(torch.uint8).numpy()
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"samples": pictures}, step=state.step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"samples": list(pictures)}, step=state.step)
            elif tracker.name == "trackio":
                import trackio

                tracker.log({"samples": trackio.Image(str(path))}, step=state.step)

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        if self.progress is not None:
            self.progress.update()

    def close(self) -> None:
        """Close the progress bar."""
        if self.progress is not None:
            self.progress.close()
            self.progress = None
