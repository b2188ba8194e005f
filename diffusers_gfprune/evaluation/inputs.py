"""Inputs of an evaluation: models, data, feature networks, a folder of images. All of them are checked here."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor

from ..data.folders import visible_files
from ..data.images import DataArguments, load_images
from ..data.sources import HeldOut, ImageSource
from ..diffusion.pixel_values import is_greyscale, needs_pixels, pixel_values, with_channels
from ..errors import HUB_ERRORS, one_line
from ..families.lookup import family_of
from ..fingerprints import tensors_fingerprint
from ..metrics.conditions import SampleConditions, label_conditions, row_conditions
from ..metrics.features import FeatureNetwork, feature_network
from ..metrics.quality import SamplingSettings
from ..metrics.sampling import to_uint8
from ..model_spec import ModelSpec
from ..reports.results import read_results
from ..trained_pipelines import TrainedPipeline, load_pipeline
from .arguments import EvaluateArguments

__all__ = ["FolderImages", "Inputs", "load_inputs", "recorded_settings"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})


class FolderImages:
    """Generated images in a folder and its subfolders, without hidden ones, in the order of their paths.

    The first image decides between greyscale and colour; modes are those of `diffusers_gfprune.diffusion.pixel_values`.

    Args:
        folder: The folder.
        num_images: Number of first images to use (None: all).
        resolution: Expected height and width in pixels (None: not checked).

    Raises:
        ValueError: There are too few images, they differ in size, or one cannot be read.
    """

    def __init__(self, folder: str, num_images: int | None = None, resolution: int | None = None) -> None:
        self.folder = Path(folder)
        self.paths = [path for path in visible_files(self.folder) if path.suffix.lower() in SUFFIXES][:num_images]
        if len(self.paths) < (num_images or 2):
            raise ValueError(f"images_dir={folder} holds {len(self.paths)} images, but must hold at least {num_images or 2}")
        self._digests: dict[range, str] = {}
        first = self._open(self.paths[0])
        self.channels, self.size = 1 if is_greyscale(first) else 3, (first.height, first.width)
        if resolution is not None and self.size != (resolution, resolution):
            raise ValueError(
                f"resolution={resolution} but images of images_dir={folder} have {first.height}x{first.width} pixels"
            )
        for path in self.paths:  # headers only, unless pixels decide whether an image fits
            image = self._open(path)
            if (image.height, image.width) != self.size:
                raise ValueError(
                    f"images_dir={folder}: {path.name} has {image.height}x{image.width} pixels, others have "
                    f"{first.height}x{first.width}"
                )
            if needs_pixels(image, self.channels):
                self._pixels(path)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, span: range) -> Tensor:
        """Images by number: uint8 with shape `(n, channels, height, width)`."""
        return torch.stack([self._pixels(self.paths[number]) for number in span])

    def digest(self, span: range) -> str:
        """Hash of the contents of image files."""
        if span in self._digests:
            return self._digests[span]
        digest = hashlib.sha256()
        for number in span:
            content = self.paths[number].read_bytes()
            digest.update(len(content).to_bytes(8, "little") + content)
        return self._digests.setdefault(span, digest.hexdigest())

    def _open(self, path: Path, load: bool = False) -> Image.Image:
        """A picture, of which only the header is read unless `load` is set."""
        try:
            with Image.open(path) as image:
                if load:
                    image.load()
                return image
        except Exception as error:  # Pillow raises many types for broken files
            raise ValueError(f"images_dir={self.folder}: {path.name} cannot be read: {one_line(error)}") from error

    def _pixels(self, path: Path) -> Tensor:
        image = self._open(path, load=True)
        try:
            picture = with_channels(image, self.channels)
        except ValueError as error:
            raise ValueError(f"images_dir={self.folder}: {path.name}: {error}") from error
        return to_uint8(pixel_values(picture, self.channels) / 2 + 0.5)


@dataclass
class Inputs:
    """Inputs of an evaluation.

    Attributes:
        models: Pipelines of `model` and, if given, `reference_model`, with denoisers on the device; empty for a folder of
            images.
        weights: CRC-32 of their weights in float32, if a model card is to be updated, else empty.
        folder_images: Images of the evaluated folder; None if models are evaluated.
        images: Real images.
        held_out: Images in [-1, 1] for the step loss, and their labels, if any, as conditioning.
        networks: Feature networks of the distances.
        num_images: Number of samples of each model, or of images in the folder.
        settings: Settings of the sampler, fitted to the models' timesteps.
        changes: Changes to the requested settings, one line each.
    """

    models: dict[str, TrainedPipeline]
    weights: dict[str, str]
    folder_images: FolderImages | None
    images: ImageSource
    held_out: HeldOut
    networks: list[FeatureNetwork]
    num_images: int
    settings: SamplingSettings
    changes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape `(channels, height, width)` of images."""
        return self.images.decoder.shape

    @property
    def classes(self) -> int | None:
        """Number of class labels of the models; None if they have none."""
        if not self.models:
            return None
        denoiser = self.models["model"].denoiser
        labels = family_of(denoiser).class_labels(denoiser.config)
        return None if labels is None else labels.count

    @property
    def takes_rows(self) -> bool:
        """Whether samples have the captions or vectors of held-out images."""
        pipeline = self.models["model"]
        family = family_of(pipeline.denoiser)
        return pipeline.prompts is not None or family.vector_size(pipeline.denoiser.config) is not None

    @functools.cached_property
    def conditions(self) -> SampleConditions:
        """What samples of the models are conditioned on: captions or vectors of held-out images, or classes, in turn.

        Captions must be encoded before (`images.prepare`).
        """
        pipeline = self.models["model"]
        if self.takes_rows:
            return row_conditions(self.held_out.conditioning, self.images.null_conditioning())
        labels = family_of(pipeline.denoiser).class_labels(pipeline.denoiser.config)
        return label_conditions(labels, self.settings.null_label)


def load_inputs(args: EvaluateArguments, device: torch.device) -> Inputs:
    """Load and check all inputs.

    Raises:
        ValueError: An input is missing, damaged, or does not match the others.
    """
    s, folder_images = args.samples, None
    models, weights = _load_models(args, device)
    if args.model.images_dir is not None:
        folder_images = FolderImages(args.model.images_dir, s.num_images, args.data.resolution)
    if models and args.cost.speed_settings() and device.type not in ("cpu", "cuda"):
        sizes = " ".join(map(str, args.cost.speed_batch_sizes))
        raise ValueError(f"speed_batch_sizes={sizes} must be 0 on {device.type}: speed is measured on a CPU or a CUDA device")
    if models:
        spec = ModelSpec.of(models["model"].denoiser, models["model"].codec, models["model"].prompts)
    else:
        spec = ModelSpec(folder_images.size, folder_images.channels)
    images, held_out = load_images(_with_null_label(args, spec), spec)
    if None not in (s.num_reference_images, images.num_images) and s.num_reference_images > images.num_images:
        raise ValueError(
            f"num_reference_images={s.num_reference_images} must be at most the {images.num_images} training images"
        )
    if folder_images is not None:
        count = len(folder_images)
    else:
        count = 0 if s.num_images == 0 else s.settings().num_images
    available = [number for number in (s.num_reference_images, images.num_images) if number is not None]
    networks = _load_networks(args, device, images.decoder.shape, [count, *available]) if count else []
    settings, changes = replace(s.settings(), null_label=images.decoder.null_label), ()
    if models:
        settings, changes = settings.fitted(models["model"].process)  # both models have the same number of timesteps
    inputs = Inputs(models, weights, folder_images, images, held_out, networks, count, settings, changes if count else ())
    if models and models["model"].prompts is None:
        inputs.conditions.check_guidance(settings.guidance_scale)
    return inputs


def recorded_settings(name: str, revision: str | None = None) -> dict:
    """Settings in the `results.json` of the run that trained a model; empty if there is none.

    Args:
        name: Hub id or local folder of the model.
        revision: Branch, tag or commit on the Hub.
    """
    with suppress(ValueError, *HUB_ERRORS):
        is_folder = Path(name).is_dir()
        return read_results(name if is_folder else hf_hub_download(name, "results.json", revision=revision)).evaluation
    return {}


def _with_null_label(args: EvaluateArguments, spec: ModelSpec) -> DataArguments:
    """The data arguments, with the null label recorded by the model's run if none is given."""
    m = args.model
    if m.model is None or spec.labels is None or args.data.null_label is not None:
        return args.data
    recorded = recorded_settings(m.model, m.revision).get("null_label")
    return replace(args.data, null_label=recorded) if isinstance(recorded, int) else args.data


def _load_models(args: EvaluateArguments, device: torch.device) -> tuple[dict[str, TrainedPipeline], dict[str, str]]:
    """The attributes `models` and `weights` of `Inputs`."""
    m = args.model
    names = {"model": (m.model, m.revision), "reference_model": (m.reference_model, m.reference_revision)}
    models, weights = {}, {}
    for argument, (name, revision) in names.items():
        if name is None:
            continue
        pipeline = load_pipeline(name, revision, argument, pruned=True)
        steps = pipeline.process.num_train_timesteps
        if pipeline.process.has_integer_timesteps and args.cost.step_loss_timesteps > steps:
            raise ValueError(
                f"step_loss_timesteps={args.cost.step_loss_timesteps} must be at most the {steps} timesteps that "
                f"{argument}={name} was trained with"
            )
        if args.output.update_model_card:
            weights[argument] = tensors_fingerprint(pipeline.denoiser.state_dict())
        pipeline.denoiser.requires_grad_(False).eval().to(device)
        if m.dtype != "float32":
            pipeline.denoiser.to(getattr(torch, m.dtype))
        models[argument] = pipeline
    if len(models) == 2:
        makes = [pipeline.makes() for pipeline in models.values()]
        if makes[0] != makes[1]:
            raise ValueError(f"reference_model={m.reference_model} generates {makes[1]}, but the model {makes[0]}")
    return models, weights


def _load_networks(
    args: EvaluateArguments, device: torch.device, shape: tuple[int, int, int], counts: Sequence[int]
) -> list[FeatureNetwork]:
    """Feature networks for images of a shape; `counts` are the numbers of generated and real images."""
    s = args.samples
    if s.features == ["none"]:
        return []
    values = math.prod(shape)
    if "pixels" in s.features and min(counts) <= values:
        raise ValueError(f"features=pixels needs more than {values} images, both generated and real, not {min(counts)}")
    options = {"inception_weights": s.inception_weights, "dinov2_model": s.dinov2_model, "device": device}
    return [feature_network(name, **options) for name in s.features]
