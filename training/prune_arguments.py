"""Command line of `prune_ddpm.py`: dataclasses whose fields become arguments, grouped by phase.

The pruning group is `GFPruneConfig` itself, so that the library and the script cannot drift apart. `--preset` changes
defaults; what is given by name still wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from diffusers_gfprune.configuration import PRESETS, GFPruneConfig
from diffusers_gfprune.hub import check_repo_id
from diffusers_gfprune.importance import criteria
from image_data import DataArguments

__all__ = ["Arguments", "parse_arguments"]


LR_SCHEDULERS = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


@dataclass
class ModelArguments:
    """The dense model."""

    _argument_group_name = "model"

    pretrained_model_name_or_path: str = field(
        metadata={"help": "Trained DDPM: a Diffusers pipeline with a UNet2DModel, as a Hub id or a local folder."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the Hub repository."})


@dataclass
class OutputArguments:
    """The run."""

    _argument_group_name = "run"

    output_dir: str = field(default="runs/ddpm-gfpruned", metadata={"help": "Folder for the pruned pipeline."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace output_dir if it exists."})
    dry_run: bool = field(default=False, metadata={"help": "Print the plan and stop."})
    preset: str = field(
        default="default",
        metadata={
            "help": "Defaults of the pruning arguments: the best measured here, those of the paper, or one-shot pruning "
            "followed by fine-tuning.",
            "choices": list(PRESETS),
        },
    )
    save_model_steps: int = field(
        default=0,
        metadata={"help": "Steps of fine-tuning between two saves of the pipeline as it is (0: only at the end)."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of batches, noise, timesteps and calibration images."})

    def __post_init__(self) -> None:
        if self.save_model_steps < 0:
            raise ValueError(f"save_model_steps={self.save_model_steps} must not be negative")


@dataclass
class PruningArguments(GFPruneConfig):
    """How channels are chosen and when."""

    total_steps: int = field(default=1, init=False)  # max_train_steps on the command line
    calibration_batches: int = field(default=8, metadata={"help": "Batches that scores are taken on at each ranking (>= 1)."})
    calibration_batch_size: int | None = field(
        default=None, metadata={"help": "Images in a calibration batch (>= 1; default: train_batch_size)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("calibration_batches", "calibration_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.criterion not in criteria():
            raise ValueError(f"criterion={self.criterion} must be one of {', '.join(criteria())}")

    def config(self, total_steps: int) -> GFPruneConfig:
        """The library's configuration for a run of `total_steps`."""
        names = [f.name for f in dataclasses.fields(GFPruneConfig) if f.name != "total_steps"]
        return GFPruneConfig(total_steps=total_steps, **{name: getattr(self, name) for name in names})


@dataclass
class TrainingArguments:
    """Optimization, during pruning and after it."""

    _argument_group_name = "training"

    max_train_steps: int = field(default=100_000, metadata={"help": "Optimizer steps of the whole run (>= 1)."})
    train_batch_size: int = field(default=64, metadata={"help": "Images per step (>= 1)."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of AdamW (> 0)."})
    lr_scheduler: str = field(
        default="constant", metadata={"help": "Schedule, by its name in Diffusers.", "choices": LR_SCHEDULERS}
    )
    lr_warmup_steps: int = field(default=0, metadata={"help": "Steps of linear warm-up (>= 0)."})
    adam_beta1: float = field(default=0.9, metadata={"help": "Decay of AdamW's first moment, in [0, 1)."})
    adam_beta2: float = field(default=0.999, metadata={"help": "Decay of AdamW's second moment, in [0, 1)."})
    adam_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of AdamW (>= 0)."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Epsilon of AdamW (> 0)."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are scaled down to this norm (> 0)."})
    distillation_weight: float = field(
        default=0.0,
        metadata={"help": "Weight w of the dense model's noise prediction as the target, in [0, 1]; the noise has 1 - w."},
    )
    use_ema: bool = field(default=False, metadata={"help": "Average the weights; the average is what is saved."})
    ema_max_decay: float = field(default=0.9999, metadata={"help": "Largest decay of the average, in [0, 1)."})
    mixed_precision: str | None = field(
        default=None,
        metadata={"help": "Precision of training (default: Accelerate's).", "choices": ["no", "fp16", "bf16"]},
    )

    def __post_init__(self) -> None:
        for name in ("max_train_steps", "train_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0")
        for name in ("lr_warmup_steps", "adam_weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(f"distillation_weight={self.distillation_weight} must be in [0, 1]")
        for name in ("adam_beta1", "adam_beta2", "ema_max_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")


@dataclass
class EvaluationArguments:
    """What is measured, during the run and at its end."""

    _argument_group_name = "evaluation"

    validation_steps: int = field(default=500, metadata={"help": "Steps between two step losses on held-out images (>= 1)."})
    eval_images: int = field(
        default=1000, metadata={"help": "Samples of either model for the Fréchet distance and SSIM (0: no sampling)."}
    )
    eval_batch_size: int = field(default=128, metadata={"help": "Samples in one forward (>= 1)."})
    ddim_num_inference_steps: int = field(default=100, metadata={"help": "DDIM steps of these samples (>= 1)."})
    eval_seed: int = field(default=1234, metadata={"help": "Seed of the samples' initial noise."})

    def __post_init__(self) -> None:
        for name in ("validation_steps", "eval_batch_size", "ddim_num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.eval_images < 0:
            raise ValueError(f"eval_images={self.eval_images} must not be negative")


@dataclass
class HubArguments:
    """Sharing the result."""

    _argument_group_name = "hub"

    push_to_hub: bool = field(default=False, metadata={"help": "Push the pruned pipeline and its card to the Hub."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository, as namespace/name or name (default: the name of output_dir)."}
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Make the repository private."})
    hub_token: str | None = field(
        default=None, metadata={"help": "Access token (default: that of `hf auth login`, or HF_TOKEN)."}
    )
    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "When to push: at the end, or after every saved model as well.",
            "choices": ["end", "every_save"],
        },
    )

    def __post_init__(self) -> None:
        self.hub_token = self.hub_token.strip() if self.hub_token else None
        if self.hub_model_id is not None:
            check_repo_id(self.hub_model_id, "hub_model_id")
        given = [name for name in ("hub_model_id", "hub_private_repo") if getattr(self, name)]
        if given and not self.push_to_hub:
            raise ValueError(f"{given[0]}={getattr(self, given[0])} needs --push_to_hub")


@dataclass
class Arguments:
    """All arguments, by group."""

    model: ModelArguments
    run: OutputArguments
    data: DataArguments
    pruning: PruningArguments
    training: TrainingArguments
    evaluation: EvaluationArguments
    hub: HubArguments
    words: list[str]  # of the command line

    def __post_init__(self) -> None:
        if self.hub.hub_strategy == "every_save" and not (self.hub.push_to_hub and self.run.save_model_steps):
            raise ValueError("hub_strategy=every_save needs --push_to_hub and --save_model_steps")

    def to_dict(self) -> dict:
        """Every value by argument name, for the report; no access token."""
        groups = (self.model, self.run, self.data, self.pruning, self.training, self.evaluation, self.hub)
        values = {name: value for group in groups for name, value in dataclasses.asdict(group).items()}
        del values["hub_token"]
        return values


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """Read the command line.

    Raises:
        ValueError: A value is out of its range.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    groups = (
        ModelArguments,
        OutputArguments,
        DataArguments,
        PruningArguments,
        TrainingArguments,
        EvaluationArguments,
        HubArguments,
    )
    parser = HfArgumentParser(
        groups,
        description="Prune a trained DDPM by gradient flow in two phases, fine-tune it, and save a Diffusers pipeline.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--preset", choices=list(PRESETS), default="default")
    parser.set_defaults(**PRESETS[first_look.parse_known_args(words)[0].preset])
    return Arguments(*parser.parse_args_into_dataclasses(words), words)
