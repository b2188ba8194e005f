"""What is shown while a run goes on: curves in a tracker, a line a phase in the terminal, grids of samples.

Trackers are those of Accelerate. Names are grouped by the part before the slash, as trackers show them:

    train/      loss and its terms, gradient norm, learning rate
    pruning/    s_t, p_t, MACs, parameters, revived channels; pruning/sparsity/<group> the share of each group that is pruned
    quality/    Fréchet distance and similarity to the dense model of samples
    speed/      images per second over all processes, seconds to the end
"""

from __future__ import annotations

import dataclasses
import time
from functools import partial

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

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
    """Sends what happens to the terminal and to the tracker.

    Args:
        args: The command line.
        accelerator: With the tracker chosen in its `log_with`.
        folder: Of the run; grids of samples go to its training folder.
        sample_quality: How samples are drawn, and the dense model, which samples from the same noise.
    """

    def __init__(self, args: Arguments, accelerator: Accelerator, folder: RunFolder, sample_quality: SampleQuality) -> None:
        self.args, self.accelerator, self.folder, self.sample_quality = args, accelerator, folder, sample_quality
        self.dense_samples: torch.Tensor | None = None
        self.progress: tqdm | None = None
        self.phase: str | None = None
        self.clock, self.clock_step = time.perf_counter(), 0
        if args.tracking.report_to != "none":
            # One run of the script is one run of the tracker; a resumed one adds to the same folder.
            given = {name: portable(value) for name, value in args.to_dict().items() if value is not None}
            # TensorBoard takes no lists
            config = {name: " ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for name, v in given.items()}
            # Weights & Biases would write into the working directory
            logs = folder.training / "logs"
            if args.tracking.report_to == "wandb" and accelerator.is_main_process:
                logs.mkdir(parents=True, exist_ok=True)
            own = {"wandb": {"dir": str(logs)}}
            accelerator.init_trackers(args.tracking.tracker_project_name, config=config, init_kwargs=own)

    def enter_phase(self, state: TrainingState) -> None:
        """A progress bar for the phase of the next step, if it is a new one."""
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

    def say(self, text: str) -> None:
        """A line above the progress bar, once for all processes."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def log_training(self, state: TrainingState, loss: float, terms: dict[str, float], gradient_norm: float) -> None:
        """A point of the training curves."""
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
        """What a ranking did, group by group."""
        widths = state.pruner.kept_channels()
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
        """A step loss on held-out images."""
        self._log({"validation/step_loss": loss}, step)

    def log_quality(self, step: int, measured: dict[str, float | None]) -> None:
        """Distances and similarities of samples."""
        self._log({f"quality/{name}": value for name, value in measured.items() if value is not None}, step)

    def _log(self, values: dict[str, float], step: int) -> None:
        if self.args.tracking.report_to != "none":
            self.accelerator.log(values, step=step)

    def log_samples(self, state: TrainingState) -> None:
        """A grid of samples beside the dense model's, always from the same noise, with averaged weights if there are any."""
        if not self.accelerator.is_main_process:
            return
        count = self.args.tracking.num_samples
        settings = dataclasses.replace(self.sample_quality.settings, num_images=count)
        sample = partial(settings.sample, scheduler=self.sample_quality.scheduler)
        if self.dense_samples is None:
            dense = self.sample_quality.dense
            home = next(dense.parameters()).device
            self.dense_samples = sample(dense.to(self.accelerator.device))
            dense.to(home)
        with state.averaged() as unet:
            samples = sample(unet)
        path = self.folder.training / "samples" / f"step-{state.step}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_sample_grid(path, self.dense_samples, samples, rows=max(1, -(-count // 16)))
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
        """One step of the phase is done."""
        if self.progress is not None:
            self.progress.update()

    def close(self) -> None:
        """End the progress bar."""
        if self.progress is not None:
            self.progress.close()
            self.progress = None
