"""Arguments of `prune_ddpm.py` for optimization, precision, checkpoints and trackers."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

__all__ = ["CheckpointArguments", "PrecisionArguments", "TrackingArguments", "TrainingArguments"]

LR_SCHEDULERS = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
TRACKERS = ["none", "tensorboard", "wandb", "trackio"]


def _check(arguments: object, at_least: dict[int, tuple[str, ...]]) -> None:
    """Check lower bounds.

    Raises:
        ValueError: A value is below its bound.
    """
    for bound, names in at_least.items():
        for name in names:
            if getattr(arguments, name) < bound:
                wanted = f"at least {bound}" if bound else "0 or more"
                raise ValueError(f"{name}={getattr(arguments, name)} must be {wanted}")


def _check_installed(argument: str, value: object, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{argument}={value} needs the package {package}: pip install {package}")


@dataclass
class TrainingArguments:
    """Optimization, during pruning and after it."""

    _argument_group_name = "training"

    max_train_steps: int = field(default=100_000, metadata={"help": "Number of optimizer steps of the whole run (>= 1)."})
    train_batch_size: int = field(default=64, metadata={"help": "Number of images per forward and process (>= 1)."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Number of batches per optimizer step (>= 1)."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of AdamW (> 0)."})
    lr_scheduler: str = field(
        default="constant", metadata={"help": "Learning rate schedule, by its name in Diffusers.", "choices": LR_SCHEDULERS}
    )
    lr_warmup_steps: int = field(default=0, metadata={"help": "Steps of linear warm-up (>= 0)."})
    adam_beta1: float = field(default=0.9, metadata={"help": "Decay of AdamW's first moment, in [0, 1)."})
    adam_beta2: float = field(default=0.999, metadata={"help": "Decay of AdamW's second moment, in [0, 1)."})
    adam_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of AdamW (>= 0)."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Epsilon of AdamW (> 0)."})
    use_8bit_adam: bool = field(default=False, metadata={"help": "Use the 8-bit AdamW of bitsandbytes."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Maximum gradient norm; larger gradients are clipped (> 0)."})
    dropout: float | None = field(
        default=None,
        metadata={"help": "Dropout of the residual blocks in training, in [0, 1) (default: from the model's config)."},
    )
    use_ema: bool = field(default=False, metadata={"help": "Average the weights; samples and saved models use the average."})
    ema_max_decay: float = field(default=0.9999, metadata={"help": "Maximum decay of the averaged weights, in [0, 1)."})

    def __post_init__(self) -> None:
        _check(
            self,
            {
                1: ("max_train_steps", "train_batch_size", "gradient_accumulation_steps"),
                0: ("lr_warmup_steps", "adam_weight_decay"),
            },
        )
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0")
        for name in ("adam_beta1", "adam_beta2", "ema_max_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if self.use_8bit_adam:
            _check_installed("use_8bit_adam", True, "bitsandbytes")


@dataclass
class PrecisionArguments:
    """Speed and memory of training. Scores, step losses and samples always use full precision."""

    _argument_group_name = "precision"

    mixed_precision: str | None = field(
        default=None,
        metadata={"help": "Precision of training (default: Accelerate's).", "choices": ["no", "fp16", "bf16"]},
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward instead of keeping them."}
    )
    allow_tf32: bool = field(default=False, metadata={"help": "Allow TensorFloat-32 in training on GPUs that support it."})
    torch_compile: str = field(
        default="no",
        metadata={
            "help": "Compile the training forward and backward, and the teacher's forward; reduce-overhead uses CUDA "
            "graphs on a GPU.",
            "choices": ["no", "default", "reduce-overhead"],
        },
    )
    channels_last: bool = field(default=False, metadata={"help": "Use channels-last memory format for images and weights."})


@dataclass
class CheckpointArguments:
    """Saving and resuming the state of a run."""

    _argument_group_name = "checkpoints"

    checkpointing_steps: int = field(
        default=1000,
        metadata={"help": "Steps between checkpoints, kept in <output_dir>.training until the run ends (0: none)."},
    )
    checkpoints_total_limit: int = field(
        default=2, metadata={"help": "Number of checkpoints to keep (0: all). With 2, a run survives a damaged checkpoint."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": '"latest" (starts from the beginning if there is none), a checkpoint name, or a path.'},
    )

    def __post_init__(self) -> None:
        _check(self, {0: ("checkpointing_steps", "checkpoints_total_limit")})


@dataclass
class TrackingArguments:
    """Curves and samples during training."""

    _argument_group_name = "tracking"

    report_to: str = field(default="none", metadata={"help": "Tracker for the curves.", "choices": TRACKERS})
    tracker_project_name: str = field(default="diffusers-gfprune", metadata={"help": "Project name in the tracker."})
    logging_steps: int = field(default=10, metadata={"help": "Steps averaged for a point of the loss curve (>= 1)."})
    sample_steps: int = field(
        default=0, metadata={"help": "Steps between grids of samples of the pruned and the dense model (0: none)."}
    )
    num_samples: int = field(default=16, metadata={"help": "Number of samples in a grid (>= 1)."})

    def __post_init__(self) -> None:
        _check(self, {1: ("logging_steps", "num_samples"), 0: ("sample_steps",)})
        if self.report_to != "none":
            _check_installed("report_to", self.report_to, self.report_to)
