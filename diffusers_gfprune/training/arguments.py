"""Command line of `prune_ddpm.py`: dataclasses whose fields become arguments, grouped by phase.

The pruning group is `GFPruneConfig` itself, so that library and script stay consistent. `--preset` changes defaults;
arguments given explicitly take precedence.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from ..argument_fields import NOT_NEGATIVE, argument, at_least, check_fields, expand_home, parse_dataclasses
from ..configuration import DEVICES, PRESETS, GFPruneConfig
from ..data.images import DataArguments
from ..data.teacher_images import TeacherArguments
from ..evaluation.run_arguments import EvaluationArguments
from ..hub import check_repo_id
from ..objectives.objective import ObjectiveArguments
from .essential_help import add_help_all
from .optimization_arguments import CheckpointArguments, PrecisionArguments, TrackingArguments, TrainingArguments
from .recipes import expand_recipe
from .recovery import RECOVERIES

__all__ = ["Arguments", "parse_arguments"]

# The published method has no teacher. With one, samples of the pruned model are closer to the dense model's (README).
SCRIPT_PRESETS = {
    **PRESETS,
    "paper": {**PRESETS["paper"], "distillation_weight": 0.0, "recovery": "none", "timestep_sampling": "independent"},
}


@dataclass
class ModelArguments:
    """The dense pipeline."""

    _argument_group_name = "model"

    pretrained_model_name_or_path: str = argument(help="Trained pipeline: a Hub id or a local folder (docs/supported.md).")
    revision: str | None = argument(None, "Branch, tag or commit of the Hub repository.")


@dataclass
class OutputArguments:
    """Output, preset and seed of the run."""

    _argument_group_name = "run"

    recipe: str | None = argument(None, "YAML file with arguments, or one of training/recipes by name. The command line wins.")
    output_dir: str = argument("runs/ddpm-gfpruned", "Folder for the pruned pipeline.")
    overwrite_output_dir: bool = argument(False, "Replace output_dir if it exists.")
    dry_run: bool = argument(False, "Print the plan and stop.")
    preset: str = argument("default", "Defaults: ours, those of the paper, or one-shot pruning.", choices=SCRIPT_PRESETS)
    save_model_steps: int = argument(0, "Save the pipeline every so many fine-tuning steps (0: only at the end).")
    seed: int = argument(0, "Seed for images, noise and timesteps (>= 0).")

    def __post_init__(self) -> None:
        check_fields(self, NOT_NEGATIVE, "save_model_steps")
        expand_home(self, "output_dir")


@dataclass
class PruningArguments(GFPruneConfig):
    """Which channels are pruned, and when."""

    total_steps: int = field(default=1, init=False)  # max_train_steps on the command line
    calibration_batches: int = argument(8, "Number of calibration batches for each ranking (>= 1).")
    calibration_batch_size: int | None = argument(
        None, "Images in a calibration batch, per process (>= 1; default: train_batch_size)."
    )

    recovery: str = argument(
        "rankings",
        "Least squares for the layers that read pruned channels: at all rankings, towards layer outputs of the dense model in "
        "the soft phase and of the model before the ranking in the hard phase; once, at compaction; or none.",
        choices=RECOVERIES,
    )
    check_scores: bool = argument(False, "Compare the Hessian-gradient product with finite differences at the first ranking.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, at_least(1), "calibration_batches", "calibration_batch_size")
        if self.recovery not in RECOVERIES:
            raise ValueError(f"recovery={self.recovery} must be one of {', '.join(RECOVERIES)}")
        if self.check_scores and not self.takes_hessian:
            raise ValueError(
                f"check_scores=True needs criterion=gradient-flow-weights, not {self.criterion}, which takes no Hessian"
            )

    def on_device(self, device: str) -> PruningArguments:
        """A copy with `target_device=auto` set to the training device; models are loaded on the CPU and moved later.

        With a budget for a runtime, the target is the CPU, on which runtimes execute.
        """
        device = device if self.latency_runtime is None else "cpu"
        known = self.target_device == "auto" and device in DEVICES
        return dataclasses.replace(self, target_device=device) if known else self

    def config(self, total_steps: int) -> GFPruneConfig:
        """The `GFPruneConfig` of a run of `total_steps`."""
        names = [f.name for f in dataclasses.fields(GFPruneConfig) if f.name != "total_steps"]
        return GFPruneConfig(total_steps=total_steps, **{name: getattr(self, name) for name in names})


@dataclass
class HubArguments:
    """Upload to the Hub."""

    _argument_group_name = "hub"

    push_to_hub: bool = argument(False, "Push the pruned pipeline and its card to the Hub.")
    hub_model_id: str | None = argument(None, "Repository, as namespace/name or name (default: the name of output_dir).")
    hub_private_repo: bool = argument(False, "Make the repository and the Space private.")
    hub_token: str | None = argument(None, "Access token (default: HF_TOKEN, or the token saved by `hf auth login`).")
    hub_strategy: str = argument(
        "end", "When to push: at the end only, or also after every saved model.", choices=["end", "every_save"]
    )
    push_space: str | None = argument(
        None, "Space to push, too: a page that shows the pruned model beside the dense one, as namespace/name or name."
    )

    def __post_init__(self) -> None:
        self.hub_token = self.hub_token.strip() if self.hub_token else None
        if self.hub_model_id is not None:
            check_repo_id(self.hub_model_id, "hub_model_id")
        if self.push_space is not None:
            check_repo_id(self.push_space, "push_space")
        given = [name for name in ("hub_model_id", "hub_private_repo", "push_space") if getattr(self, name)]
        if given and not self.push_to_hub:
            raise ValueError(f"{given[0]}={getattr(self, given[0])} needs --push_to_hub")


@dataclass
class Arguments:
    """All arguments, by group."""

    model: ModelArguments
    run: OutputArguments
    data: DataArguments
    teacher: TeacherArguments
    pruning: PruningArguments
    training: TrainingArguments
    objective: ObjectiveArguments
    precision: PrecisionArguments
    checkpoints: CheckpointArguments
    tracking: TrackingArguments
    evaluation: EvaluationArguments
    hub: HubArguments
    words: list[str]  # the command line

    def __post_init__(self) -> None:
        self.pruning.check_installed()
        if self.hub.hub_strategy == "every_save" and not (self.hub.push_to_hub and self.run.save_model_steps):
            raise ValueError("hub_strategy=every_save needs --push_to_hub and --save_model_steps")
        if self.hub.hub_token is not None and self.tracking.report_to == "wandb":
            raise ValueError(
                "hub_token cannot be used with report_to=wandb, which stores the command line: log in with `hf auth login`, "
                "or set HF_TOKEN"
            )
        if self.training.use_8bit_adam and self.precision.channels_last:
            raise ValueError("use_8bit_adam=True cannot be used with channels_last=True: its moments follow the memory order")

    def to_dict(self) -> dict:
        """All values by argument name, for the report, without the access token."""
        groups = [getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "words"]
        values = {name: value for group in groups for name, value in dataclasses.asdict(group).items()}
        del values["hub_token"]
        return values


GROUPS = (
    *(ModelArguments, OutputArguments, DataArguments, TeacherArguments, PruningArguments, TrainingArguments),
    *(ObjectiveArguments, PrecisionArguments, CheckpointArguments, TrackingArguments, EvaluationArguments, HubArguments),
)


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """Parse the command line and the recipe that it names.

    Raises:
        ValueError: A value is out of range, or the recipe cannot be read.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser(
        GROUPS,
        usage="%(prog)s --pretrained_model_name_or_path MODEL "
        "(--dataset_name NAME | --train_data_dir FOLDER | --train_data teacher) [arguments]",
        description="Prune a trained diffusion pipeline by gradient flow in two phases, fine-tune it, and save it.",
        allow_abbrev=False,
    )
    add_help_all(parser, words)
    known = {f.name: f.type for group in GROUPS for f in dataclasses.fields(group) if f.init}
    lists = {name for name, kind in known.items() if str(kind).startswith("list[")}  # text, or types once parsed
    expanded = expand_recipe(words, known, SCRIPT_PRESETS, lists)
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--preset", choices=list(SCRIPT_PRESETS), default="default")
    parser.set_defaults(**SCRIPT_PRESETS[first_look.parse_known_args(expanded)[0].preset])
    return Arguments(*parse_dataclasses(parser, expanded), words)
