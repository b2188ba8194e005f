"""Short and full help: `--help` shows the essential arguments, `--help_all` all of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..argument_fields import ArgumentHelp

__all__ = ["ESSENTIAL", "add_help_all"]

HELP_ALL = ("--help_all", "--help-all")

# Arguments in `--help`, by argument group
ESSENTIAL = {
    "model": ("pretrained_model_name_or_path",),
    "run": ("recipe", "output_dir", "overwrite_output_dir", "dry_run", "preset", "seed"),
    "data": ("dataset_name", "train_data_dir", "random_flip"),
    "teacher images": ("train_data",),
    "pruning": ("target", "ratio", "criterion", "ranking", "soft_fraction", "hard_fraction", "calibration_batches"),
    "training": (
        *("max_train_steps", "train_batch_size", "learning_rate", "lr_scheduler", "lr_warmup_steps", "use_ema"),
        "ema_max_decay",
    ),
    "objective": ("distillation_weight",),
    "precision": ("mixed_precision", "gradient_checkpointing", "torch_compile"),
    "checkpoints": ("checkpointing_steps", "resume_from_checkpoint"),
    "tracking": ("report_to",),
    "evaluation": ("eval_images", "eval_features", "ddim_num_inference_steps"),
    "hub": ("push_to_hub", "hub_model_id"),
}


class EssentialHelp(ArgumentHelp):
    """Lists the arguments of `ESSENTIAL` only."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._shown = {"help", *(name for names in ESSENTIAL.values() for name in names)}

    def add_argument(self, action: argparse.Action) -> None:
        if action.dest in self._shown or set(HELP_ALL) & set(action.option_strings):
            super().add_argument(action)


def add_help_all(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Add `--help_all` to a parser and shorten its `--help`.

    Args:
        parser: The parser, which gets the formatter of short help, or that of full help if the command line contains
            `--help_all`.
        words: The command line.
    """
    parser.add_argument(*HELP_ALL, action="help", help="show all arguments and exit")
    parser.formatter_class = ArgumentHelp if set(HELP_ALL) & set(words) else EssentialHelp
