"""Command line of `evaluate.py`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from transformers import HfArgumentParser

from ..data.images import DataArguments
from ..metrics.quality import SamplingSettings
from ..metrics.sampling import TIMESTEP_SPACINGS
from ..metrics.speed import DTYPES
from .run_arguments import SpeedArguments

__all__ = ["EvaluateArguments", "parse_evaluate_arguments"]

FEATURES = ("auto", "none", "inception", "efflite0", "dinov2", "pixels")
DINOV2 = "facebook/dinov2-large"
# Samples of a model where no number is given: what published figures take
NUM_IMAGES = 50_000


@dataclass
class ModelArguments:
    """What is evaluated."""

    _argument_group_name = "model"

    model: str | None = field(
        default=None, metadata={"help": "Pipeline to evaluate, dense or pruned: a Hub id or a local folder."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of it on the Hub."})
    reference_model: str | None = field(
        default=None, metadata={"help": "Dense pipeline that it is compared with, sample by sample from the same noise."}
    )
    reference_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of it on the Hub."})
    images_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of generated images, all of one size, to evaluate in place of a model."},
    )
    compare: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders that earlier evaluations left: print their table, draw their samples, and stop."},
    )
    dtype: str = field(default="float32", metadata={"help": "Number type of the models.", "choices": list(DTYPES)})

    def __post_init__(self) -> None:
        given = [name for name in ("model", "images_dir", "compare") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give one of --model, --images_dir and --compare, not {' and '.join(given) or 'none of them'}")
        for name, needs in (("revision", "model"), ("reference_revision", "reference_model"), ("reference_model", "model")):
            if getattr(self, name) is not None and getattr(self, needs) is None:
                raise ValueError(f"{name}={getattr(self, name)} needs --{needs}")
        if self.images_dir is not None and not Path(self.images_dir).is_dir():
            raise ValueError(f"images_dir={self.images_dir} is not a folder")


@dataclass
class OutputArguments:
    """Where results go."""

    _argument_group_name = "output"

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for results.json and pictures (default: runs/<model>-evaluation)."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace output_dir if it exists and holds an earlier evaluation."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the plan and stop."})
    update_model_card: bool = field(
        default=False,
        metadata={"help": "Write the figures into the results.json and the card of the pruning run in --model, too."},
    )
    evaluation_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps samples and features, so that an interrupted evaluation goes on and the next one of "
            "the same dense model or data is short (default: beside the Hub's cache)."
        },
    )


@dataclass
class SampleArguments:
    """How samples are drawn and judged."""

    _argument_group_name = "samples"

    num_images: int | None = field(
        default=None,
        metadata={
            "help": "Samples of each model (>= 2; 0: none are drawn; default: 50,000), or so many of the first images of "
            "images_dir (default: all)."
        },
    )
    num_inference_steps: int = field(default=100, metadata={"help": "DDIM steps (>= 1)."})
    timestep_spacing: str = field(
        default="leading",
        metadata={
            "help": "How DDIM spaces its timesteps: evenly as Diffusers does, or quadratic, as papers do on CIFAR-10.",
            "choices": list(TIMESTEP_SPACINGS),
        },
    )
    eta: float = field(default=0.0, metadata={"help": "Share of DDPM's noise in each step, in [0, 1]; 0 is deterministic."})
    seed: int = field(default=1234, metadata={"help": "Seed of the samples' noise (>= 0)."})
    eval_batch_size: int = field(default=128, metadata={"help": "Samples in one forward (>= 1)."})
    features: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={
            "help": "Feature networks of the distances, several if you like: inception (FID, KID), efflite0, dinov2, pixels, "
            "none; auto: inception if its weights can be had, else efflite0."
        },
    )
    inception_weights: str | None = field(
        default=None, metadata={"help": "Inception's TorchScript file inception-2015-12-05.pt (default: downloaded)."}
    )
    dinov2_model: str = field(default=DINOV2, metadata={"help": "DINOv2: a Hub id or a local folder."})
    num_reference_images: int | None = field(
        default=None, metadata={"help": "Real images, from the first training image on (>= 2; default: all)."}
    )

    def __post_init__(self) -> None:
        if self.num_images is not None and (self.num_images < 0 or self.num_images == 1):
            raise ValueError(f"num_images={self.num_images} must be at least 2, or 0")
        if self.num_reference_images is not None and self.num_reference_images < 2:
            raise ValueError(f"num_reference_images={self.num_reference_images} must be at least 2")
        if self.eval_batch_size < 1:
            raise ValueError(f"eval_batch_size={self.eval_batch_size} must be at least 1")
        for name in self.features:
            if name not in FEATURES:
                raise ValueError(f"features={name} must be one of {', '.join(FEATURES)}")
        if len(self.features) != len(set(self.features)) or (len(self.features) > 1 and {"auto", "none"} & {*self.features}):
            raise ValueError(f"features={' '.join(self.features)} must name each network once, or be auto or none alone")
        if self.inception_weights is not None and not {"auto", "inception"} & {*self.features}:
            raise ValueError(f"inception_weights={self.inception_weights} needs --features inception")
        if self.dinov2_model != DINOV2 and "dinov2" not in self.features:
            raise ValueError(f"dinov2_model={self.dinov2_model} needs --features dinov2")
        self.settings()

    def settings(self) -> SamplingSettings:
        """How samples are drawn."""
        return SamplingSettings(
            num_images=NUM_IMAGES if self.num_images is None else max(1, self.num_images),
            num_inference_steps=self.num_inference_steps,
            timestep_spacing=self.timestep_spacing,
            eta=self.eta,
            seed=self.seed,
            batch_size=self.eval_batch_size,
        )


@dataclass
class CostArguments(SpeedArguments):
    """Step loss and speed."""

    _argument_group_name = "cost"

    step_loss_timesteps: int = field(default=16, metadata={"help": "Timesteps of the grid of the step loss (>= 1)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_loss_timesteps < 1:
            raise ValueError(f"step_loss_timesteps={self.step_loss_timesteps} must be at least 1")


@dataclass
class EvaluateArguments:
    """All arguments, by group."""

    model: ModelArguments
    output: OutputArguments
    data: DataArguments
    samples: SampleArguments
    cost: CostArguments
    words: list[str]

    def __post_init__(self) -> None:
        m, s = self.model, self.samples
        if m.compare:
            self._refuse("compare", [m, self.output, self.data, s, self.cost], ("output_dir", "overwrite_output_dir"))
            return
        if m.images_dir is not None:
            allowed = ("num_images", "features", "inception_weights", "dinov2_model", "num_reference_images")
            self._refuse("images_dir", [m, s, self.cost], allowed)
            if s.num_images == 0 or s.features == ["none"]:
                raise ValueError(f"images_dir={m.images_dir} needs images and --features to measure anything")
        if s.num_images == 0:
            self._refuse("num_images 0", [s], ("num_images", *(["features"] if s.features == ["none"] else [])))
        if not self.cost.speed_settings():
            self._refuse("speed_batch_sizes 0", [self.cost], ("speed_batch_sizes", "step_loss_timesteps"))
        self._refuse_training()
        if s.num_images != 0 and s.features == ["none"] and m.reference_model is None:
            raise ValueError(
                "features=none without --reference_model leaves nothing to measure on samples: add --num_images 0"
            )
        if self.data.streaming and s.num_reference_images is None and s.num_images != 0 and s.features != ["none"]:
            raise ValueError("streaming=True needs --num_reference_images: a stream does not say how many images it has")
        if self.output.update_model_card:
            self._check_update()

    def _refuse(self, argument: str, groups: list, allowed: tuple[str, ...]) -> None:
        """Arguments that would go unheard are an error."""
        for group in groups:
            for value in fields(group):
                default = value.default_factory() if callable(value.default_factory) else value.default
                if value.name not in (argument, *allowed) and getattr(group, value.name) != default:
                    raise ValueError(f"{value.name}={getattr(group, value.name)} does not go with --{argument}")

    def _refuse_training(self) -> None:
        for name in ("random_flip", "shuffle_buffer_size", "dataloader_num_workers", "label_dropout"):
            value = getattr(self.data, name)
            if value != DataArguments.__dataclass_fields__[name].default:
                raise ValueError(f"{name}={value} is for training: an evaluation reads real images in order, as they are")

    def _check_update(self) -> None:
        m = self.model
        if m.model is None or m.reference_model is None:
            raise ValueError("update_model_card=True needs --model and --reference_model: a card shows dense beside pruned")
        if self.samples.num_images == 0 or self.samples.features == ["none"]:
            raise ValueError("update_model_card=True needs samples and --features: their figures replace those on the card")
        for name in ("results.json", "pruning_report.json"):
            if not (Path(m.model) / name).is_file():
                raise ValueError(f"update_model_card=True needs --model to be the folder of a pruning run: no {name} there")

    @property
    def inputs(self) -> tuple[str | None, ...]:
        """Paths, among other names, that are read."""
        m, data, s = self.model, self.data, self.samples
        named = (data.dataset_name, data.train_data_dir, data.cache_dir, s.inception_weights, s.dinov2_model)
        return (m.model, m.reference_model, m.images_dir, *m.compare, *named, self.output.evaluation_cache_dir)

    @property
    def output_dir(self) -> str:
        """Where results go."""
        if self.output.output_dir is not None:
            return self.output.output_dir
        name = "comparison" if self.model.compare else Path(self.model.model or self.model.images_dir).resolve().name
        return f"runs/{name}" if self.model.compare else f"runs/{name}-evaluation"


def parse_evaluate_arguments(argv: list[str] | None = None) -> EvaluateArguments:
    """Read the command line.

    Raises:
        ValueError: A value is out of its range, or values do not go together.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser(
        (ModelArguments, OutputArguments, DataArguments, SampleArguments, CostArguments),
        description="Measure a trained or pruned DDPM: distances to real images, similarity to the dense model, loss, cost.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    return EvaluateArguments(*parser.parse_args_into_dataclasses(words), words)
