"""Train a small dense DDPM from scratch, as for the two teachers here (`make teacher`, `make cifar10-teacher`).

    accelerate launch --quiet training/train_ddpm.py --model_config training/digits/unet_config.json \
        --dataset_name training/digits --output_dir runs/digits-teacher --max_train_steps 8000

The loss is the simple noise-prediction loss of Ho et al., https://arxiv.org/abs/2006.11239, equation 14. The exponential
moving average of the weights is saved. For larger models, use Diffusers' `train_unconditional.py`; its pipelines can be pruned
here.

Checkpoints are kept in `<output_dir>.training` until the run ends. `--resume_from_checkpoint latest` resumes from the newest
undamaged one and gives the same weights as without the interruption.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DDPMScheduler, ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from diffusers_gfprune.argument_fields import (
    NOT_NEGATIVE,
    POSITIVE,
    ArgumentHelp,
    argument,
    at_least,
    check_fields,
    parse_dataclasses,
)
from diffusers_gfprune.data.batches import BrokenImages, train_dataloader
from diffusers_gfprune.data.images import DataArguments, load_images
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.diffusion.ddpm import check_variance_type
from diffusers_gfprune.diffusion.schedulers import training_process
from diffusers_gfprune.errors import one_line_errors
from diffusers_gfprune.evaluation.processes import make_accelerator
from diffusers_gfprune.evaluation.trials import try_sampling
from diffusers_gfprune.families.lookup import family_named, family_of
from diffusers_gfprune.interruption import Interruption, StoppedBySignal, asked_to_stop
from diffusers_gfprune.metrics.model_size import parameter_bytes
from diffusers_gfprune.metrics.quality import SamplingSettings
from diffusers_gfprune.metrics.step_loss import StepLoss
from diffusers_gfprune.model_spec import ModelSpec
from diffusers_gfprune.reports.plots import save_sample_rows
from diffusers_gfprune.run_folder import RunFolder
from diffusers_gfprune.training.checkpointing import Checkpoint, Checkpoints
from diffusers_gfprune.training.named_state import load_optimizer_state, load_tensors, optimizer_state
from diffusers_gfprune.training.safeguards import share_broken_images
from diffusers_gfprune.training.state import seed_everything

# The newest, and the one before it in case that is damaged
CHECKPOINTS_KEPT = 2
# For weights, batches, noise, timesteps and dropout
SEED = 0
WEIGHT_DECAY, EMA_MAX_DECAY, MAX_GRAD_NORM = 1e-6, 0.9995, 1.0


@dataclass
class TrainArguments:
    """Model, output and optimization."""

    _argument_group_name = "training"

    model_config: str = argument(help="JSON file with the arguments of `UNet2DModel`.")
    output_dir: str = argument(help="Folder for the pipeline.")
    train_batch_size: int = argument(128, "Number of images per step and process (>= 1).")
    max_train_steps: int = argument(8000, "Number of optimizer steps (>= 1).")
    learning_rate: float = argument(5e-4, "Peak learning rate of AdamW, with cosine decay (> 0).")
    lr_warmup_steps: int = argument(500, "Steps of linear warm-up (>= 0).")
    validation_steps: int = argument(500, "Steps between measurements of the held-out loss (>= 1).")
    checkpointing_steps: int = argument(1000, "Steps between checkpoints (>= 1).")
    resume_from_checkpoint: str | None = argument(
        None, "A checkpoint of this run, or `latest` (starts from the beginning if there is none)."
    )

    def __post_init__(self) -> None:
        names = ("train_batch_size", "max_train_steps", "validation_steps", "checkpointing_steps")
        check_fields(self, at_least(1), *names)
        check_fields(self, NOT_NEGATIVE, "lr_warmup_steps")
        check_fields(self, POSITIVE, "learning_rate")


class DenseTraining:
    """A run between two steps: model, optimizer, schedule and average.

    Args:
        args: The command line.
        unet: The model, on the device.
        accelerator: Wraps the model.
    """

    def __init__(self, args: TrainArguments, unet: ModelMixin, accelerator: Accelerator) -> None:
        self.step, self.broken = 0, []
        self.unet, self.parameters = unet, dict(unet.named_parameters())
        self.optimizer = torch.optim.AdamW(
            unet.parameters(), lr=args.learning_rate, betas=(0.95, 0.999), weight_decay=WEIGHT_DECAY
        )
        self.lr_scheduler = get_scheduler(
            "cosine",
            self.optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
        )
        self.ema = EMAModel(unet.parameters(), decay=EMA_MAX_DECAY, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self.ema.to(accelerator.device)
        self.model = accelerator.prepare_model(unet)

    def save(self, checkpoints: Checkpoints, identity: dict, broken: list[str]) -> None:
        """Write a checkpoint.

        Args:
            checkpoints: Checkpoints of the run.
            identity: Values that must not change when the run is resumed.
            broken: Images that could not be read so far.
        """
        tensors = {
            "model": self.parameters,
            "ema": dict(zip(self.parameters, self.ema.shadow_params)),
            "optimizer": optimizer_state(self.optimizer, self.parameters)[0],
        }
        values = {
            "ema_steps": self.ema.optimization_step,
            "lr_scheduler_steps": self.lr_scheduler.last_epoch,
            "broken": broken,
        }
        checkpoints.save(self.step, identity, {}, tensors, values)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore the state of a checkpoint.

        Raises:
            ValueError: It holds tensors of another model.
        """
        shadows = dict(zip(self.parameters, self.ema.shadow_params))
        load_tensors(checkpoint.path, "weights", checkpoint.tensors["model"], self.parameters)
        load_tensors(checkpoint.path, "averaged weights", checkpoint.tensors["ema"], shadows)
        load_optimizer_state(self.optimizer, self.parameters, checkpoint.tensors["optimizer"], {})
        self.ema.optimization_step = checkpoint.values["ema_steps"]
        self.lr_scheduler.last_epoch = checkpoint.values["lr_scheduler_steps"] - 1
        self.lr_scheduler.step()
        self.broken = checkpoint.values["broken"]
        self.step = checkpoint.step


def main() -> None:
    interruption = Interruption()  # knows the launcher from here on
    parser = HfArgumentParser(
        (TrainArguments, DataArguments), description=__doc__.splitlines()[0], formatter_class=ArgumentHelp
    )
    args, data_args = parse_dataclasses(parser, sys.argv[1:])
    folder = RunFolder(args.output_dir, False, (data_args.dataset_name, data_args.train_data_dir))
    accelerator = make_accelerator(mixed_precision="no")
    with folder if accelerator.is_main_process else contextlib.nullcontext():
        if accelerator.is_main_process:
            folder.lock()
            folder.check(resuming=args.resume_from_checkpoint is not None)
        accelerator.wait_for_everyone()
        train(args, data_args, accelerator, folder, interruption)
    accelerator.end_training()


def train(
    args: TrainArguments, data_args: DataArguments, accelerator: Accelerator, folder: RunFolder, interruption: Interruption
) -> None:
    """A run, in its folder, which is locked."""
    # 1. model, data, optimizer
    checkpoints, main_process = Checkpoints(folder.training, CHECKPOINTS_KEPT), accelerator.is_main_process
    set_seed(SEED)
    try:
        unet = family_named("UNet2DModel").dense_class.from_config(json.loads(Path(args.model_config).read_text()))
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"model_config={args.model_config} is not a valid UNet2DModel config: {error}") from error
    scheduler, family = DDPMScheduler(), family_of(unet)
    process = training_process(scheduler)
    try:  # that the pipeline can be sampled, and pruned
        family.check_trainable(unet.config)
        family.check_process(unet.config, process)
        check_variance_type(scheduler, family.has_learned_variance(unet.config), pipeline_splits=False)
    except ValueError as error:
        raise ValueError(f"model_config={args.model_config} cannot be trained: {error}") from error
    images, held_out = load_images(data_args, ModelSpec.of(unet))
    if main_process:
        print("\n".join(f"{title:5} {line}" for title, line in zip(("data:", "", ""), images.summary.lines())))
    step_loss = StepLoss(held_out.samples, process, held_out.conditioning)
    state = DenseTraining(args, unet.to(accelerator.device).train(), accelerator)
    identity = run_identity(args, data_args, unet, accelerator.num_processes)
    which = args.resume_from_checkpoint
    if which is not None and (checkpoint := checkpoints.find(which)) is not None:
        # Checkpoints of earlier versions name more
        checkpoint.identity = {name: value for name, value in checkpoint.identity.items() if name in identity}
        checkpoints.check_identity(checkpoint, identity)
        try:
            state.restore(checkpoint)
        except (KeyError, TypeError, RuntimeError) as error:  # complete, but from a run of another kind
            raise ValueError(f"{checkpoint.path} does not fit this run: {error!r}") from error
        accelerator.print(f"resuming from {checkpoint.path.name}")
    elif main_process:
        folder.check()
    dataloader = train_dataloader(
        images,
        args.train_batch_size,
        seed=SEED,
        process=process,
        first_batch=state.step,
        num_workers=data_args.dataloader_num_workers,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    broken = BrokenImages(data_args.max_broken_images, state.broken)
    shown = SamplingSettings(num_images=32, seed=0, null_label=images.decoder.null_label)
    if main_process:
        try_sampling(f"model_config={args.model_config}", unet, scheduler, shown)
        folder.try_writing(parameter_bytes(unet))

    if main_process:
        folder.prepare(parameter_bytes(unet), resuming=state.step > 0)
    accelerator.wait_for_everyone()

    # 2. training loop
    progress = tqdm(total=args.max_train_steps, initial=state.step, desc="train", disable=not main_process)
    with interruption:
        for batch, _, unread in itertools.islice(dataloader, args.max_train_steps - state.step):
            broken.add(unread)
            batch = batch.to(accelerator.device, non_blocking=True)
            seed_everything(SEED, state.step, accelerator.process_index)
            training_step(args, state, batch, process, accelerator)
            progress.update()
            if state.step % args.validation_steps == 0 and main_process:
                state.ema.store(unet.parameters())
                state.ema.copy_to(unet.parameters())
                progress.write(f"step {state.step}: held-out loss (averaged weights) {step_loss(unet):.4f}")
                state.ema.restore(unet.parameters())
            asked = asked_to_stop(accelerator, interruption)
            if asked is not None or state.step % args.checkpointing_steps == 0:
                share_broken_images(accelerator, broken)
                if main_process:
                    state.save(checkpoints, identity, broken.to_list())
            if asked is not None:
                accelerator.wait_for_everyone()
                if main_process:
                    print(f"stopped after step {state.step}, saved; --resume_from_checkpoint latest", file=sys.stderr)
                raise StoppedBySignal(asked)

    # 3. save the averaged weights and a grid of samples
    share_broken_images(accelerator, broken)
    if broken and main_process:
        print(f"{len(broken)} images could not be read and were replaced, first {broken.to_list()[0]}", file=sys.stderr)
    if main_process:
        state.ema.copy_to(unet.parameters())
        save(DDPMPipeline(unet=unet, scheduler=scheduler), folder, shown)


def run_identity(args: TrainArguments, data_args: DataArguments, unet: ModelMixin, num_processes: int) -> dict:
    """Values by name that must not change when the run is resumed."""
    free = ("model_config", "output_dir", "resume_from_checkpoint", "checkpointing_steps", "validation_steps")
    free += ("max_broken_images", "cache_dir", "encoding_cache_dir")
    if not data_args.streaming:  # loading processes divide a stream
        free += ("dataloader_num_workers",)
    given = {name: value for name, value in {**asdict(args), **asdict(data_args)}.items() if name not in free}
    return {**given, **{n: v for n, v in unet.config.items() if not n.startswith("_")}, "num_processes": num_processes}


def training_step(args: TrainArguments, state: DenseTraining, batch: DiffusionBatch, process, accelerator) -> None:
    """Forward, backward and update."""
    prediction = family_of(state.unet).predict(state.model, batch.inputs(process))
    loss = torch.nn.functional.mse_loss(prediction.float(), batch.target(process))
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {loss.item()} in step {state.step}: lower learning_rate={args.learning_rate}")
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(state.model.parameters(), MAX_GRAD_NORM)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.lr_scheduler.step()
    state.ema.step(state.unet.parameters())
    state.step += 1


def save(pipeline: DDPMPipeline, folder: RunFolder, shown: SamplingSettings) -> None:
    """Save the pipeline and a grid of samples that cycles through the classes."""
    pipeline.unet.eval()
    pipeline.save_pretrained(folder.staging)
    samples = shown.sample(pipeline.unet, pipeline.scheduler, progress="sampling")
    save_sample_rows(folder.staging / "samples.png", samples.split(8), columns=8)
    folder.publish()


if __name__ == "__main__":
    with one_line_errors("train_ddpm.py"):
        main()
