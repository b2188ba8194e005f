"""Arguments of `prune_ddpm.py` for optimization, precision, checkpoints and trackers."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from ..argument_fields import FRACTION, NOT_NEGATIVE, POSITIVE, argument, at_least, check_fields, expand_home

__all__ = ["CheckpointArguments", "PrecisionArguments", "TrackingArguments", "TrainingArguments"]

LR_SCHEDULERS = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
# The last learning rate of Diffusers' polynomial schedule
POLYNOMIAL_END = 1e-7
TIMESTEP_SAMPLINGS = ["importance", "stratified", "independent"]
TRACKERS = ["none", "tensorboard", "wandb", "trackio"]


def _check_installed(argument: str, value: object, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{argument}={value} needs the package {package}: pip install {package}")


@dataclass
class TrainingArguments:
    """Optimization, during pruning and after it."""

    _argument_group_name = "training"

    max_train_steps: int = argument(100_000, "Number of optimizer steps of the whole run (>= 1).")
    train_batch_size: int = argument(64, "Number of images per forward and process (>= 1).")
    gradient_accumulation_steps: int = argument(1, "Number of batches per optimizer step (>= 1).")
    timestep_sampling: str = argument(
        "importance",
        "Timesteps of a batch: more where errors are larger, weighted to the same loss (importance); one from each of as many "
        "equal parts of their distribution (stratified); or independent ones.",
        choices=TIMESTEP_SAMPLINGS,
    )
    learning_rate: float = argument(2e-4, "Peak learning rate of AdamW (> 0).")
    lr_scheduler: str = argument("constant", "Learning rate schedule, by its name in Diffusers.", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = argument(0, "Steps of linear warm-up, of every schedule (>= 0).")
    adam_beta1: float = argument(0.9, "Decay of AdamW's first moment, in [0, 1).")
    adam_beta2: float = argument(0.999, "Decay of AdamW's second moment, in [0, 1).")
    adam_weight_decay: float = argument(0.0, "Weight decay of AdamW (>= 0).")
    adam_epsilon: float = argument(1e-8, "Epsilon of AdamW (> 0).")
    use_8bit_adam: bool = argument(False, "Use the 8-bit AdamW of bitsandbytes.")
    max_grad_norm: float = argument(1.0, "Maximum gradient norm; larger gradients are clipped (>= 0; 0: never).")
    dropout: float | None = argument(
        None, "Dropout of the residual blocks of a UNet in training, in [0, 1) (default: from the model's config)."
    )
    use_ema: bool = argument(False, "Average the weights; samples and saved models use the average.")
    ema_max_decay: float = argument(0.9999, "Maximum decay of the averaged weights, in [0, 1).")

    def __post_init__(self) -> None:
        check_fields(self, at_least(1), "max_train_steps", "train_batch_size", "gradient_accumulation_steps")
        check_fields(self, NOT_NEGATIVE, "lr_warmup_steps", "adam_weight_decay", "max_grad_norm")
        check_fields(self, POSITIVE, "learning_rate", "adam_epsilon")
        check_fields(self, FRACTION, "adam_beta1", "adam_beta2", "ema_max_decay", "dropout")
        if self.lr_scheduler == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise ValueError(
                f"learning_rate={self.learning_rate:g} must be greater than {POLYNOMIAL_END:g}, the last one of "
                f"lr_scheduler=polynomial"
            )
        if self.use_8bit_adam:
            _check_installed("use_8bit_adam", True, "bitsandbytes")

    def doubts(self) -> list[str]:
        """A line for each combination of arguments that works, and is hardly meant."""
        warmup, steps = self.lr_warmup_steps, self.max_train_steps
        if warmup < steps:
            return []
        return [f"lr_warmup_steps={warmup} is not less than max_train_steps={steps}: the learning rate never reaches its peak"]


@dataclass
class PrecisionArguments:
    """Speed and memory of training. Scores, recovery and step losses always use float32 without TF32, samples float32."""

    _argument_group_name = "precision"

    mixed_precision: str | None = argument(
        None, "Precision of training (default: Accelerate's).", choices=["no", "fp16", "bf16"]
    )
    gradient_checkpointing: bool = argument(False, "Recompute activations in the backward instead of keeping them.")
    allow_tf32: bool = argument(
        False, "Allow TensorFloat-32 in matrix products on GPUs that support it, as PyTorch does in convolutions."
    )
    torch_compile: str = argument(
        "no",
        "Compile the training forward and backward, and the teacher's forward; reduce-overhead uses CUDA graphs on a GPU.",
        choices=["no", "default", "reduce-overhead"],
    )
    channels_last: bool = argument(False, "Use channels-last memory format for images and weights.")


@dataclass
class CheckpointArguments:
    """Saving and resuming the state of a run."""

    _argument_group_name = "checkpoints"

    checkpointing_steps: int = argument(
        1000, "Steps between checkpoints, kept in <output_dir>.training until the run ends (0: none)."
    )
    checkpoints_total_limit: int = argument(
        2, "Number of checkpoints to keep (0: all). With 2, a run survives a damaged checkpoint."
    )
    resume_from_checkpoint: str | None = argument(
        None, '"latest" (starts from the beginning if there is none), a checkpoint name, or a path.'
    )

    def __post_init__(self) -> None:
        check_fields(self, NOT_NEGATIVE, "checkpointing_steps", "checkpoints_total_limit")
        expand_home(self, "resume_from_checkpoint")


@dataclass
class TrackingArguments:
    """Curves and samples during training."""

    _argument_group_name = "tracking"

    report_to: str = argument("none", "Tracker for the curves.", choices=TRACKERS)
    tracker_project_name: str = argument("diffusers-gfprune", "Project name in the tracker.")
    logging_steps: int = argument(10, "Steps averaged for a point of the loss curve (>= 1).")
    sample_steps: int = argument(0, "Steps between grids of samples of the pruned and the dense model (0: none).")
    num_samples: int = argument(16, "Number of samples in a grid (>= 1).")

    def __post_init__(self) -> None:
        check_fields(self, at_least(1), "logging_steps", "num_samples")
        check_fields(self, NOT_NEGATIVE, "sample_steps")
        if self.report_to != "none":
            _check_installed("report_to", self.report_to, self.report_to)
