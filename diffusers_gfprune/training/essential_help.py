"""Short and full help: `--help` shows the essential arguments, `--help_all` all of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

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


class EssentialHelp(argparse.HelpFormatter):
    """Lists the arguments of `ESSENTIAL`, each with one spelling and its default, if any."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)
        self._shown = {"help", *(name for names in ESSENTIAL.values() for name in names)}

    def add_argument(self, action: argparse.Action) -> None:
        if action.dest in self._shown or set(HELP_ALL) & set(action.option_strings):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return next(name for name in action.option_strings if name.startswith("--"))

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.choices and "Choices:" not in text:
            text += f" Choices: {', '.join(map(str, action.choices))}."
        has_default = action.default not in (None, argparse.SUPPRESS) and action.default is not False
        return f"{text} (default: %(default)s)" if has_default else text


def add_help_all(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Add `--help_all` to a parser and shorten its `--help`.

    Args:
        parser: The parser; its formatter is replaced unless the command line contains `--help_all`.
        words: The command line.
    """
    parser.add_argument(*HELP_ALL, action="help", help="show all arguments and exit")
    if not set(HELP_ALL) & set(words):
        parser.formatter_class = EssentialHelp
