"""What the scripts of the latent digits models share: images, the training loop, and saving.

Every step draws its batch, noise and timesteps from a generator that is seeded with the step. A run that was stopped therefore
continues from its newest checkpoint to the same weights.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as F
from tqdm.auto import tqdm

from diffusers_gfprune.argument_fields import POSITIVE, argument, at_least, check_fields
from diffusers_gfprune.diffusion.pixel_values import pixel_values, with_channels
from diffusers_gfprune.interruption import Interruption, StoppedBySignal
from diffusers_gfprune.run_folder import RunFolder
from diffusers_gfprune.training.checkpointing import Checkpoints
from diffusers_gfprune.training.named_state import load_optimizer_state, load_tensors, optimizer_state

__all__ = ["DATA", "FOLDER", "IMAGE_SIZE", "Digits", "LatentTrainArguments", "Training", "enlarged", "load_digits", "run"]

FOLDER = Path(__file__).parent
DATA = FOLDER / "data"
IMAGE_SIZE = 32  # pixels; the digits have 8
SEED = 0
LR_WARMUP_STEPS, WEIGHT_DECAY, EMA_MAX_DECAY, MAX_GRAD_NORM = 100, 1e-4, 0.999, 1.0
CHECKPOINTS_KEPT = 2
PRINTED_STEPS = 250  # steps between lines of the mean loss


@dataclass
class LatentTrainArguments:
    """Length, speed and output of a training."""

    _argument_group_name = "training"

    output_dir: str = argument(help="Folder for the result.")
    max_train_steps: int = argument(1, "Number of optimizer steps (>= 1).")
    train_batch_size: int = argument(128, "Number of images per step (>= 1).")
    learning_rate: float = argument(1e-3, "Peak learning rate of AdamW, with cosine decay (> 0).")
    checkpointing_steps: int = argument(500, "Steps between checkpoints (>= 1).")
    num_threads: int = argument(1, "Threads of the CPU (>= 1).")
    resume_from_checkpoint: str | None = argument(
        None, "A checkpoint of this run, or `latest` (starts from the beginning if there is none)."
    )

    def __post_init__(self) -> None:
        check_fields(self, at_least(1), "max_train_steps", "train_batch_size", "checkpointing_steps", "num_threads")
        check_fields(self, POSITIVE, "learning_rate")

    def identity(self) -> dict:
        """Values that must not change when a run is resumed."""
        free = ("output_dir", "checkpointing_steps", "num_threads", "resume_from_checkpoint")
        return {name: value for name, value in asdict(self).items() if name not in free}


@dataclass(frozen=True)
class Digits:
    """A split of the digits.

    Attributes:
        images: float32 with shape `(N, 3, 32, 32)` in [-1, 1].
        labels: int64 with shape `(N,)`, 0 to 9.
    """

    images: Tensor
    labels: Tensor


def enlarged(picture: Image.Image) -> Tensor:
    """A digit at the size of the latent models, enlarged as in `diffusers_gfprune.data.decoding`.

    Returns:
        float32 with shape `(3, 32, 32)` in [-1, 1].
    """
    return pixel_values(F.resize(with_channels(picture, 3), [IMAGE_SIZE, IMAGE_SIZE]), 3)


@functools.cache
def load_digits(split: str) -> Digits:
    """The digits of a split, `train` or `validation`."""
    rows = datasets.Dataset.from_parquet(str(DATA / f"{split}.parquet"))
    return Digits(torch.stack([enlarged(picture) for picture in rows["image"]]), torch.tensor(rows["label"]))


class Training:
    """Modules that are trained together, their optimizer, schedule and moving average.

    Args:
        args: Length and learning rate.
        modules: Modules by name; parameters that require no gradient are left as they are.
    """

    def __init__(self, args: LatentTrainArguments, modules: Mapping[str, nn.Module]) -> None:
        self.args, self.modules, self.step = args, modules, 0
        named = nn.ModuleDict(modules).named_parameters()
        self.parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        values = list(self.parameters.values())
        self.optimizer = torch.optim.AdamW(values, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY)
        self.lr_scheduler = get_scheduler(
            "cosine", self.optimizer, num_warmup_steps=LR_WARMUP_STEPS, num_training_steps=args.max_train_steps
        )
        self.ema = EMAModel(values, decay=EMA_MAX_DECAY, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def update(self, loss: Tensor) -> None:
        """One optimizer step.

        Raises:
            ValueError: The loss is not finite.
        """
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} in step {self.step}: lower learning_rate={self.args.learning_rate}")
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        self.ema.step(self.parameters.values())
        self.step += 1

    def save(self, checkpoints: Checkpoints, identity: Mapping) -> None:
        """Write a checkpoint."""
        tensors = {
            "model": self.parameters,
            "ema": dict(zip(self.parameters, self.ema.shadow_params)),
            "optimizer": optimizer_state(self.optimizer, self.parameters)[0],
        }
        checkpoints.save(self.step, identity, {}, tensors, {"ema_steps": self.ema.optimization_step})

    def restore(self, checkpoints: Checkpoints, which: str, identity: Mapping) -> None:
        """Continue from a checkpoint, if there is one.

        Raises:
            ValueError: It is damaged, or of another run.
        """
        checkpoint = checkpoints.find(which)
        if checkpoint is None:
            return
        checkpoints.check_identity(checkpoint, identity)
        shadows = dict(zip(self.parameters, self.ema.shadow_params))
        load_tensors(checkpoint.path, "weights", checkpoint.tensors["model"], self.parameters)
        load_tensors(checkpoint.path, "averaged weights", checkpoint.tensors["ema"], shadows)
        load_optimizer_state(self.optimizer, self.parameters, checkpoint.tensors["optimizer"], {})
        self.ema.optimization_step = checkpoint.values["ema_steps"]
        self.step = checkpoint.step
        self.lr_scheduler.last_epoch = self.step - 1
        self.lr_scheduler.step()
        print(f"resuming from {checkpoint.path.name}")

    def steps(self, checkpoints: Checkpoints, identity: Mapping) -> Iterator[torch.Generator]:
        """The generator of every step that is left; checkpoints are written in between.

        Raises:
            StoppedBySignal: After SIGTERM or SIGINT, and a checkpoint.
        """
        progress = tqdm(total=self.args.max_train_steps, initial=self.step, desc="train", mininterval=10)
        with Interruption() as interruption:
            while self.step < self.args.max_train_steps:
                torch.manual_seed(self.step)  # dropout
                yield torch.Generator().manual_seed(SEED + self.step)
                progress.update()
                if interruption.signal is not None or self.step % self.args.checkpointing_steps == 0:
                    self.save(checkpoints, identity)
                if interruption.signal is not None:
                    print(f"stopped after step {self.step}, saved; --resume_from_checkpoint latest", file=sys.stderr)
                    raise StoppedBySignal(interruption.signal)


def run(
    args: LatentTrainArguments,
    modules: Mapping[str, nn.Module],
    loss_of: Callable[[int, torch.Generator], Tensor],
    save: Callable[[Path], None],
    identity: Mapping,
) -> None:
    """Train modules, and save the result with the averaged weights.

    Args:
        args: Length, speed and output.
        modules: Modules by name.
        loss_of: The loss of a step, from its number and its generator.
        save: Writes the result into a folder.
        identity: JSON values besides those of `args` that must not change when the run is resumed.

    Raises:
        ValueError: The output folder exists, or the checkpoint does not fit.
    """
    identity = {**args.identity(), **identity}
    folder = RunFolder(args.output_dir, overwrite=False)
    with folder:
        folder.lock()
        folder.check(resuming=args.resume_from_checkpoint is not None)
        checkpoints = Checkpoints(folder.training, CHECKPOINTS_KEPT)
        training = Training(args, modules)
        if args.resume_from_checkpoint is not None:
            training.restore(checkpoints, args.resume_from_checkpoint, identity)
        folder.prepare(resuming=training.step > 0)
        losses: list[float] = []
        for generator in training.steps(checkpoints, identity):
            loss = loss_of(training.step, generator)
            training.update(loss)
            losses.append(loss.item())
            if training.step % PRINTED_STEPS == 0:
                print(f"step {training.step}: mean loss {sum(losses) / len(losses):.4f}", flush=True)
                losses.clear()
        training.ema.copy_to(training.parameters.values())
        for module in modules.values():
            module.eval()
        save(folder.staging)
        folder.publish()
