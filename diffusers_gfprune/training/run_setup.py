"""Setup of a run: Accelerate, pruner, data, and the values that a checkpoint must share with the run."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, TorchDynamoPlugin
from diffusers import ModelMixin
from torch import nn

from .. import GradientFlowPruner
from ..data.batches import BrokenImages, calibration_batches, train_dataloader
from ..data.images import check_drawn, load_images
from ..data.sources import HeldOut, ImageSource
from ..data.teacher_images import TeacherImages
from ..diffusion.batch import DiffusionBatch
from ..diffusion.latents import LatentCodec
from ..diffusion.placement import moved
from ..diffusion.process import DiffusionProcess
from ..diffusion.prompts import PromptEncoder
from ..evaluation.processes import make_accelerator
from ..evaluation.sample_quality import SampleQuality
from ..families.lookup import family_of
from ..fingerprints import tensors_fingerprint
from ..metrics.cache import default_cache_dir
from ..metrics.step_loss import StepLoss
from ..model_spec import ModelSpec
from ..objectives.objective import Objective
from ..run_folder import RunFolder
from ..trained_pipelines import TrainedPipeline
from .arguments import Arguments
from .checkpointing import Checkpoint, Checkpoints
from .estimate import StepEstimate, estimate_step

__all__ = [
    "SCHEDULER",
    "Run",
    "RunImages",
    "check_training",
    "estimate_run",
    "load_run_images",
    "make_batches",
    "make_calibration",
    "make_pruner",
    "run_accelerator",
    "run_identity",
    "run_settings",
]

# Distributed types in which every process holds complete weights
REPLICATED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_XPU", "MULTI_MLU", "MULTI_MUSA", "MULTI_HPU")

# Arguments of evaluation that make curves of sample quality differ
MEASURED_BY = ("eval_images", "eval_features", "eval_reference_images", "eval_seed", "guidance_scale")
MEASURED_BY += ("ddim_num_inference_steps", "timestep_spacing")

# Beginning of the names of the process's entries in the identity of a run
SCHEDULER = "scheduler."


@dataclass(kw_only=True)
class Run:
    """The parts of a run that do not change during training.

    Attributes:
        args: The command line.
        accelerator: Accelerator of this process.
        folder: Files of the run.
        checkpoints: Checkpoints of the run.
        identity: Values that a checkpoint must share to be resumed (see `run_identity`).
        pipeline: The dense pipeline; its denoiser is pruned in place.
        images: Training images.
        step_loss: Step loss on the held-out images.
        dense_step_losses: Step losses of the dense model (see `measure_step_losses`); empty except on the main process.
        sample_quality: Measures samples; it has the dense model, frozen.
        objective: Training loss.
        origin: Base model, data set and command, for the report.
        repo_id: Repository to push to, if any.
    """

    args: Arguments
    accelerator: Accelerator
    folder: RunFolder
    checkpoints: Checkpoints
    identity: dict
    pipeline: TrainedPipeline
    images: object
    step_loss: StepLoss
    dense_step_losses: dict[str, float]
    sample_quality: SampleQuality
    objective: Objective
    origin: dict
    repo_id: str | None


def check_distributed_type(distributed_type: DistributedType) -> None:
    """Check that training is not sharded.

    Raises:
        ValueError: Weights are sharded over processes; masks and compaction need complete weights.
    """
    if distributed_type.name not in REPLICATED:
        raise ValueError(
            f"distributed_type={distributed_type.value} is not supported: double backward, masks and compaction need complete "
            f"weights on every process; use data parallelism (accelerate launch --multi_gpu)"
        )


def run_accelerator(args: Arguments, folder: RunFolder) -> Accelerator:
    """Create the Accelerator of a run.

    Raises:
        ValueError: The launcher requests sharded training, or the device does not support the precision.
    """
    if args.precision.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    accelerator = make_accelerator(
        timeout=timedelta(hours=6),  # other ranks wait while the main process measures or samples
        gradient_accumulation_steps=args.training.gradient_accumulation_steps,
        mixed_precision=args.precision.mixed_precision,
        log_with=None if args.tracking.report_to == "none" else args.tracking.report_to,
        project_config=ProjectConfiguration(project_dir=str(folder.training), logging_dir=str(folder.training / "logs")),
        dynamo_plugin=TorchDynamoPlugin(
            backend="no" if args.precision.torch_compile == "no" else "inductor",
            mode=None if args.precision.torch_compile == "no" else args.precision.torch_compile,
            dynamic=False,  # all batches of a run have the same size
        ),
    )
    check_distributed_type(accelerator.distributed_type)
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ValueError("mixed_precision=fp16 needs a GPU for loss scaling; use bf16 on this machine")
    return accelerator


def make_pruner(
    args: Arguments, accelerator: Accelerator, unet: ModelMixin, process: DiffusionProcess, checkpoint: Checkpoint | None
) -> GradientFlowPruner:
    """Create the pruner of a run and attach its masks.

    Widths are planned for the training device. For a latency budget, models are timed there, unless a checkpoint has their
    times. Layer times are cached beside the Hub's cache, or in `evaluation_cache_dir`. The model returns to where it was.

    Raises:
        ValueError: The model cannot be pruned, or the budget cannot be met.
    """
    config = args.pruning.config(args.training.max_train_steps)
    known = None if checkpoint is None else checkpoint.values["pruner"].get("latency")
    folder = args.evaluation.evaluation_cache_dir
    cache_dir = default_cache_dir() if folder is None else Path(folder)
    with moved([unet], accelerator.device):
        return GradientFlowPruner(unet, config, process, latency=known, latency_cache_dir=cache_dir)


def check_training(args: Arguments, dense: nn.Module, process: DiffusionProcess) -> None:
    """Check that arguments have an effect on a model and its process.

    Raises:
        ValueError: An argument does not fit the model.
    """
    args.objective.check_model(dense)
    args.objective.check_process(process)
    if args.training.dropout is not None and not family_of(dense).residual_blocks(dense):
        kind = type(dense).__name__
        raise ValueError(f"dropout={args.training.dropout} is that of residual blocks, of which a {kind} has none")


def run_identity(
    args: Arguments,
    dense: nn.Module,
    process: DiffusionProcess,
    codec: LatentCodec | None = None,
    prompts: PromptEncoder | None = None,
) -> dict:
    """Values by name that must not change when a run is resumed from a checkpoint.

    Args:
        args: The command line.
        dense: The dense model.
        process: Its process.
        codec: VAE of a latent model.
        prompts: Text encoders of a model of text.
    """
    component = family_of(dense).component
    architecture = {f"{component}.{name}": value for name, value in dense.config.items() if not name.startswith("_")}
    noise = {f"{SCHEDULER}{name}": value for name, value in process.scheduler.config.items() if not name.startswith("_")}
    frozen = {"autoencoder": codec, "text encoders": prompts}
    names = (
        *("target", "ratio", "channel_multiple", "target_device", "min_keep_ratio", "attention_unit"),
        *("latency_batch_size", "latency_dtype", "latency_backend", "soft_fraction", "hard_fraction"),
        *("update_interval", "sparsity_schedule", "mask_schedule", "interpolate_masks"),
    )
    return {
        **architecture,
        **noise,
        "weights of the dense model": tensors_fingerprint(dict(dense.named_parameters())),
        **{name: encoder.identity() for name, encoder in frozen.items() if encoder is not None},
        **{name: getattr(args.pruning, name) for name in names},
        "max_train_steps": args.training.max_train_steps,
        "use_ema": args.training.use_ema,
        "use_8bit_adam": args.training.use_8bit_adam,
        "seed": args.run.seed,
    }


def run_settings(args: Arguments, accelerator: Accelerator) -> dict:
    """Settings that affect the result and may change on resuming, with a warning."""
    groups = (args.data, args.teacher, args.pruning, args.training, args.objective, args.precision)
    settings = {name: value for group in groups for name, value in vars(group).items()}
    settings |= {name: value for name, value in vars(args.evaluation).items() if name in MEASURED_BY}
    settings["mixed_precision"] = accelerator.mixed_precision
    settings["num_processes"] = accelerator.num_processes
    return json.loads(json.dumps(settings))  # the types that a checkpoint restores


class RunImages(NamedTuple):
    """Images of a run.

    Attributes:
        training: Images to score and train on.
        held_out: Held-out images for the step loss.
        measured: Images that samples are compared with: those of training, unless the dense model draws these and there is a
            data set besides.
    """

    training: ImageSource
    held_out: HeldOut
    measured: ImageSource

    def prepare(self, device: torch.device) -> None:
        """Draw or encode all images and captions that are needed. All processes must call this method."""
        self.training.prepare(device)
        if self.measured is not self.training:
            self.measured.prepare_held_out(device)


def load_run_images(args: Arguments, pipeline: TrainedPipeline, dense: ModelMixin) -> RunImages:
    """Find the images of a run. None is drawn or encoded here.

    Args:
        args: The command line.
        pipeline: The pipeline.
        dense: Its denoiser, which draws images if asked for.

    Raises:
        ValueError: There is no data set, or images do not fit the model.
    """
    spec = ModelSpec.of(dense, pipeline.codec, pipeline.prompts)
    given = args.data.dataset_name is not None or args.data.train_data_dir is not None
    if args.teacher.train_data == "images":
        images, held_out = load_images(args.data, spec)
        return RunImages(images, held_out, images)
    if args.evaluation.eval_seed == TeacherImages.SEED:
        raise ValueError(
            f"eval_seed={TeacherImages.SEED} is the seed of the training images with train_data=teacher: give another"
        )
    batch_size = args.evaluation.eval_batch_size
    if not given and spec.vector_size is not None:
        raise ValueError(
            f"train_data=teacher needs dataset_name or train_data_dir with vectors of {spec.vector_size} values, which the "
            f"model takes as class_labels"
        )
    if not given:
        check_drawn(args.data, spec)
        drawn = TeacherImages(args.teacher, args.data, dense, pipeline.scheduler, spec, batch_size=batch_size)
        return RunImages(drawn, drawn.held_out, drawn)
    images, held_out = load_images(args.data, spec)
    vectors = held_out.conditioning["class_labels"] if spec.vector_size is not None else None
    data = replace(args.data, null_label=images.decoder.null_label)  # as found in the data
    drawn = TeacherImages(args.teacher, data, dense, pipeline.scheduler, spec, vectors, batch_size)
    return RunImages(drawn, held_out, images)


def make_batches(args: Arguments, accelerator: Accelerator, images, process: DiffusionProcess, first_batch: int):
    """Endless training batches of this process."""
    return train_dataloader(
        images,
        args.training.train_batch_size,
        seed=args.run.seed,
        process=process,
        first_batch=first_batch,
        num_workers=args.data.dataloader_num_workers,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        stratified=args.training.timestep_sampling != "independent",
    )


def make_calibration(run: Run, step: int, broken: BrokenImages) -> list[DiffusionBatch]:
    """This process's rows of the calibration batches for a ranking at `step`."""
    args, accelerator = run.args, run.accelerator
    return calibration_batches(
        run.images,
        args.pruning.calibration_batches,
        args.pruning.calibration_batch_size or args.training.train_batch_size,
        process=run.pipeline.process,
        seed=args.run.seed,
        step=step,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        broken=broken,
    )


def estimate_run(args: Arguments, accelerator: Accelerator, dense: nn.Module, process: DiffusionProcess) -> StepEstimate:
    """Time and memory of a dense step of this run."""
    return estimate_step(
        dense,
        process,
        args.training.train_batch_size,
        device=accelerator.device,
        mixed_precision=accelerator.mixed_precision,
        gradient_checkpointing=args.precision.gradient_checkpointing,
        scoring_batch_size=args.pruning.calibration_batch_size,
    )
