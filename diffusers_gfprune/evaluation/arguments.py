"""Command line of `evaluate.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path

from transformers import HfArgumentParser

from ..argument_fields import ArgumentHelp, argument, at_least, check_fields, expand_home, parse_dataclasses
from ..data.images import DataArguments, check_source
from ..diffusion.process import TIMESTEP_SPACINGS
from ..metrics.quality import SamplingSettings
from ..metrics.speed import DTYPES
from .run_arguments import SpeedArguments

__all__ = ["EvaluateArguments", "parse_evaluate_arguments"]

FEATURES = ("auto", "none", "inception", "efflite0", "dinov2", "pixels")
DINOV2 = "facebook/dinov2-large"
# Default number of samples of each model, as for published figures
NUM_IMAGES = 50_000
# Data arguments without an effect on the images and captions of an evaluation
TRAINING_ONLY = (
    *("random_flip", "center_crop", "shuffle_buffer_size", "dataloader_num_workers"),
    *("label_dropout", "caption_dropout"),
)


@dataclass
class ModelArguments:
    """The model or the images to evaluate."""

    _argument_group_name = "model"

    model: str | None = argument(None, "Pipeline to evaluate, dense or pruned: a Hub id or a local folder.")
    revision: str | None = argument(None, "Branch, tag or commit of model on the Hub.")
    reference_model: str | None = argument(
        None, "Dense pipeline to compare the model with, sample by sample from the same noise."
    )
    reference_revision: str | None = argument(None, "Branch, tag or commit of reference_model on the Hub.")
    images_dir: str | None = argument(None, "Folder of generated images of one size, to evaluate instead of a model.")
    compare: list[str] = argument(
        [], "Result folders of earlier evaluations: print a table of them, draw their samples, and stop."
    )
    dtype: str = argument("float32", "Dtype of the models.", choices=DTYPES)

    def __post_init__(self) -> None:
        given = [name for name in ("model", "images_dir", "compare") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give one of --model, --images_dir and --compare, not {' and '.join(given) or 'none of them'}")
        for name, needs in (("revision", "model"), ("reference_revision", "reference_model"), ("reference_model", "model")):
            if getattr(self, name) is not None and getattr(self, needs) is None:
                raise ValueError(f"{name}={getattr(self, name)} needs --{needs}")
        expand_home(self, "images_dir")
        if self.images_dir is not None and not Path(self.images_dir).is_dir():
            raise ValueError(f"images_dir={self.images_dir} is not a folder")


@dataclass
class OutputArguments:
    """Where results are written."""

    _argument_group_name = "output"

    output_dir: str | None = argument(None, "Folder for results.json and pictures (default: runs/<model>-evaluation).")
    overwrite_output_dir: bool = argument(False, "Replace output_dir if it exists and holds an earlier evaluation.")
    dry_run: bool = argument(False, "Print the plan and stop.")
    update_model_card: bool = argument(
        False, "Also write the figures into results.json and the model card of the pruning run in --model."
    )
    evaluation_cache_dir: str | None = argument(
        None,
        "Folder that keeps samples and features. An interrupted evaluation resumes from it, and later evaluations with the "
        "same dense model or data reuse it (default: next to the Hub's cache).",
    )

    def __post_init__(self) -> None:
        expand_home(self, "output_dir", "evaluation_cache_dir")


@dataclass
class SampleArguments:
    """How samples are drawn and compared."""

    _argument_group_name = "samples"

    num_images: int | None = argument(
        None,
        "Number of samples of each model (>= 2; 0: no sampling; default: 50,000). With images_dir: use this number of its "
        "first images, or all of them if it is not given.",
    )
    num_inference_steps: int | None = argument(
        None, "Number of sampling steps (>= 1; default: 100 DDIM steps, 1 for consistency models, else 50)."
    )
    timestep_spacing: str = argument(
        "leading",
        "How DDIM spaces its timesteps: evenly as in Diffusers, or quadratic, as in papers on CIFAR-10.",
        choices=TIMESTEP_SPACINGS,
    )
    eta: float = argument(0.0, "Share of DDPM's noise in each step, in [0, 1]; 0: deterministic.")
    seed: int = argument(1234, "Seed for the samples' noise (>= 0).")
    guidance_scale: float = argument(
        1.0, "Scale of classifier-free guidance, for models with a null label or of text (>= 0; 1: none)."
    )
    eval_batch_size: int = argument(128, "Number of samples in one forward pass (>= 1).")
    features: list[str] = argument(
        ["auto"],
        "One or more feature networks for the distances: inception (FID, KID), efflite0, dinov2, pixels, none; auto: "
        "inception if its weights are available, else efflite0.",
    )
    inception_weights: str | None = argument(
        None, "Inception's TorchScript file inception-2015-12-05.pt (default: downloaded)."
    )
    dinov2_model: str = argument(DINOV2, "DINOv2 model: a Hub id or a local folder.")
    num_reference_images: int | None = argument(None, "Number of real images: the first training images (>= 2; default: all).")

    def __post_init__(self) -> None:
        if self.num_images is not None and (self.num_images < 0 or self.num_images == 1):
            raise ValueError(f"num_images={self.num_images} must be at least 2, or 0")
        check_fields(self, at_least(2), "num_reference_images")
        check_fields(self, at_least(1), "eval_batch_size")
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
        """Settings of the sampler."""
        return SamplingSettings(
            num_images=NUM_IMAGES if self.num_images is None else max(1, self.num_images),
            num_inference_steps=self.num_inference_steps,
            timestep_spacing=self.timestep_spacing,
            eta=self.eta,
            seed=self.seed,
            batch_size=self.eval_batch_size,
            guidance_scale=self.guidance_scale,
        )


@dataclass
class CostArguments(SpeedArguments):
    """Step loss and speed."""

    _argument_group_name = "cost"

    step_loss_timesteps: int = argument(16, "Number of timesteps of the step loss (>= 1).")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, at_least(1), "step_loss_timesteps")


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
            allowed = ("num_images", "eval_batch_size", *(["features"] if s.features == ["none"] else []))
            self._refuse("num_images 0", [s], allowed)
        if not self.cost.speed_settings():
            self._refuse("speed_batch_sizes 0", [self.cost], ("speed_batch_sizes", "step_loss_timesteps"))
        self._refuse_training()
        if s.num_images != 0 and s.features == ["none"] and m.reference_model is None:
            raise ValueError(
                "features=none without --reference_model leaves nothing to measure on samples: add --num_images 0"
            )
        if self.data.streaming and s.num_reference_images is None and s.num_images != 0 and s.features != ["none"]:
            raise ValueError("streaming=True needs --num_reference_images: the number of images in a stream is unknown")
        if self.output.update_model_card:
            self._check_update()
        check_source(self.data)  # before models are downloaded

    def _refuse(self, argument: str, groups: list, allowed: tuple[str, ...]) -> None:
        """Raise an error for arguments that would be ignored."""
        for group in groups:
            for value in fields(group):
                default = value.default_factory() if callable(value.default_factory) else value.default
                if value.name not in (argument, *allowed) and getattr(group, value.name) != default:
                    raise ValueError(f"{value.name}={getattr(group, value.name)} cannot be combined with --{argument}")

    def _refuse_training(self) -> None:
        for name in TRAINING_ONLY:
            value = getattr(self.data, name)
            if value != DataArguments.__dataclass_fields__[name].default:
                raise ValueError(
                    f"{name}={value} is for training only: an evaluation reads real images in order, cropped at the centre"
                )

    def _check_update(self) -> None:
        m = self.model
        if m.model is None or m.reference_model is None:
            raise ValueError("update_model_card=True needs --model and --reference_model: a card compares dense and pruned")
        if self.samples.num_images == 0 or self.samples.features == ["none"]:
            raise ValueError("update_model_card=True needs samples and --features: their figures replace those on the card")
        for name in ("results.json", "pruning_report.json"):
            if not (Path(m.model) / name).is_file():
                raise ValueError(f"update_model_card=True needs --model to be the folder of a pruning run: no {name} there")

    @property
    def inputs(self) -> tuple[str | None, ...]:
        """Paths and names that are read."""
        m, data, s = self.model, self.data, self.samples
        named = (data.dataset_name, data.train_data_dir, data.cache_dir, s.inception_weights, s.dinov2_model)
        return (m.model, m.reference_model, m.images_dir, *m.compare, *named, self.output.evaluation_cache_dir)

    @property
    def output_dir(self) -> str:
        """Folder for results."""
        if self.output.output_dir is not None:
            return self.output.output_dir
        name = "comparison" if self.model.compare else Path(self.model.model or self.model.images_dir).resolve().name
        return f"runs/{name}" if self.model.compare else f"runs/{name}-evaluation"


def parse_evaluate_arguments(argv: list[str] | None = None) -> EvaluateArguments:
    """Read the command line.

    Raises:
        ValueError: A value is out of its range, or values contradict each other.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser(
        (ModelArguments, OutputArguments, DataArguments, SampleArguments, CostArguments),
        description="Measure a diffusion model, dense or pruned: distances to real images, similarity to the dense one, cost.",
        formatter_class=ArgumentHelp,
        allow_abbrev=False,
    )
    return EvaluateArguments(*parse_dataclasses(parser, words), words)
