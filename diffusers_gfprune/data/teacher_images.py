"""Training images that the dense model draws itself, for pruning without data.

A trained diffusion model is a source of images. The pruned model is to make the same ones, so that it can be scored, trained
and measured on samples of the dense model where the images of its training are not at hand. Image number i is a function of
the model, the sampler and i alone (`metrics.sampling`). Its class is number i mod n of the model's n classes, its prompt
number i mod n of n given prompts.

Images are drawn once, before training, in shards (`shards`). A run that was stopped draws the missing shards, later runs of
the same model use the same images, and several processes divide the work. Samples of latent models are kept as latents, so
that the VAE need not encode what it has decoded, and as pixels for measurements.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers import ModelMixin
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from ..argument_fields import NOT_NEGATIVE, argument, at_least, check_fields, expand_home
from ..diffusion.class_labels import label_dropout_of
from ..diffusion.placement import moved
from ..diffusion.schedulers import training_process
from ..formatting import format_count
from ..metrics.cache import default_cache_dir
from ..metrics.conditions import SampleConditions, conditions_of_vectors, label_conditions
from ..metrics.model_size import spatial_size
from ..metrics.sampling import denoised, to_uint8
from ..model_spec import ModelSpec
from ..reports.model_identity import model_identity
from .captions import CAPTION_DROPOUT
from .decoding import EncodedImage, ImageDecoder
from .images import DataArguments
from .latents import CaptionTexts
from .shards import ShardedRows, Shards, make_shards
from .sources import HeldOut, IndexedSource
from .splits import DataSummary

__all__ = ["TeacherArguments", "TeacherImages", "read_prompts"]

SHARD_IMAGES = 256  # drawing takes long, and a run that is stopped loses a shard at most
SOURCE = "train_data=teacher"


@dataclass
class TeacherArguments:
    """Images that the dense model draws."""

    _argument_group_name = "teacher images"

    train_data: str = argument(
        "images",
        "Train on images of a data set, or on images that the dense model draws (a data set is then for measurements only).",
        choices=["images", "teacher"],
    )
    num_teacher_images: int = argument(5000, "Number of training images, with train_data=teacher (>= 1).")
    teacher_num_inference_steps: int | None = argument(
        None, "Number of sampling steps for each of them (>= 1; default: 50, 1 for consistency models)."
    )
    teacher_guidance_scale: float = argument(
        1.0, "Scale of classifier-free guidance for them (>= 0; 1: none, as in training)."
    )
    teacher_prompts: str | None = argument(
        None, "Text file with a prompt in each line, for text-conditional models: images have them in turn."
    )
    teacher_images_dir: str | None = argument(
        None,
        "Folder for these images. Drawing that was stopped resumes from it, and later runs of the same model reuse it "
        "(default: next to the Hub's cache).",
    )

    def __post_init__(self) -> None:
        check_fields(self, at_least(1), "num_teacher_images", "teacher_num_inference_steps")
        check_fields(self, NOT_NEGATIVE, "teacher_guidance_scale")
        expand_home(self, "teacher_prompts", "teacher_images_dir")
        for given in fields(self) if self.train_data != "teacher" else ():
            if (value := getattr(self, given.name)) != given.default:
                raise ValueError(f"{given.name}={value} needs train_data=teacher")


def read_prompts(path: str) -> list[str]:
    """Prompts of a text file, one in each line; empty lines are left out.

    Raises:
        ValueError: The file cannot be read as UTF-8, or holds no prompt.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"teacher_prompts={path} cannot be read: {reason}") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"teacher_prompts={path} holds no prompt: it must have one in each line")
    return prompts


@dataclass(frozen=True)
class _PromptsInTurn(SampleConditions):
    """Prompts of images in turn, read from the encoded ones."""

    texts: CaptionTexts | None = None
    sizes: Tensor | None = None

    def of(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        rows = [self.texts.conditioning(number % len(self.texts.texts), self.sizes) for number in numbers]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class TeacherImages(IndexedSource):
    """Images that a dense model draws, with random access. `prepare` draws them before the first one is used.

    Args:
        args: What to draw.
        data: Data arguments about flips, labels, captions and held-out images.
        denoiser: The dense model. It is not kept longer than needed.
        scheduler: Scheduler of its pipeline.
        spec: VAE, text encoders and labels of the model.
        vectors: Conditioning vectors of images in turn, for models that take them, with shape `(n, size)`.
        batch_size: Number of images that are drawn in one forward pass (>= 1).

    Attributes:
        held_out: The held-out images, which are drawn after the training images.

    Raises:
        ValueError: Prompts are missing, not wanted or cannot be read, labels do not fit the model, or guidance has no null
            condition.
    """

    SEED = 0  # of the noise; evaluations have another one

    def __init__(
        self,
        args: TeacherArguments,
        data: DataArguments,
        denoiser: ModelMixin,
        scheduler,
        spec: ModelSpec,
        vectors: Tensor | None = None,
        batch_size: int = 64,
    ) -> None:
        self.args, self.num_images, self.batch_size = args, args.num_teacher_images, batch_size
        self.decoder = ImageDecoder(
            *("image", datasets.Image(), spec),
            label_column=None if spec.labels is None else "label",
            center_crop=True,
            random_flip=data.random_flip and spec.codec is None,
            label_dropout=label_dropout_of(spec.labels, data.null_label, data.label_dropout),
        )
        if data.random_flip and spec.codec is not None:
            raise ValueError("random_flip=True must be False for latents that the model draws: they cannot be flipped")
        if spec.vector_size is not None:
            self._conditions = conditions_of_vectors(vectors, args.num_teacher_images, spec.vector_size)
        else:
            self._conditions = label_conditions(spec.labels, self.decoder.null_label)
        self.texts = self._captions(data, spec)
        if self.texts is None:
            self._conditions.check_guidance(args.teacher_guidance_scale)
        process = training_process(scheduler)
        wanted = args.teacher_num_inference_steps or process.default_drawing_steps
        steps, spacing, self._changes = process.fit_sampling(wanted)
        self._sampler = {"num_inference_steps": steps, "timestep_spacing": spacing}
        self.drawn_by = f"{format_count(steps, 'step')} of {process.sampler_title}"
        folder = args.teacher_images_dir
        self.folder = default_cache_dir() / "teacher_images" if folder is None else Path(folder)
        self._shape = (denoiser.config.in_channels, *spatial_size(denoiser))
        self._teacher: tuple | None = (denoiser, scheduler, spec)
        self._rows: ShardedRows | None = None
        self._is_latent = spec.codec is not None
        self.held_out = TeacherHeldOut(self, range(self.num_images, self.num_images + data.validation_images))
        self.summary = DataSummary(
            source=SOURCE,
            splits={"train": self.num_images, "held out": len(self.held_out)},
            train="train",
            held_out="held out",
            num_train=self.num_images,
            num_held_out=len(self.held_out),
            label_dropout=self.decoder.label_dropout,
            notes=self.notes(),
        )

    def _captions(self, data: DataArguments, spec: ModelSpec) -> CaptionTexts | None:
        path = self.args.teacher_prompts
        if (path is None) != (spec.prompts is None):
            takes = "takes text: pass a file of prompts" if path is None else "takes no text"
            raise ValueError(f"teacher_prompts={path} does not fit the model, which {takes}")
        if path is None:
            return None
        prompts = read_prompts(path)
        spec.prompts.warn_of_long(prompts)
        dropout = CAPTION_DROPOUT if data.caption_dropout is None else data.caption_dropout
        return CaptionTexts(prompts, "teacher_prompts", dropout)

    # --- drawing ---

    def prepare(self, device: torch.device | str = "cpu") -> None:
        """Draw all images that are not in the folder. All processes must call this method.

        Args:
            device: Device to draw on. The model returns to where it was.

        Raises:
            ValueError: The folder cannot be written, or samples are not finite.
        """
        if self._teacher is None:
            return
        denoiser, scheduler, spec = self._teacher
        conditions = self._conditions
        if self.texts is not None:
            self.texts.encode(spec.prompts, device, self.folder)
            conditions = _PromptsInTurn(null=self.texts.null, texts=self.texts, sizes=self._time_ids())
        self._rows = make_shards(self._shards(denoiser, scheduler, spec, conditions, device), self.folder)
        self._teacher = None

    def prepare_held_out(self, device: torch.device | str = "cpu") -> None:
        self.prepare(device)

    def _shards(
        self, denoiser: ModelMixin, scheduler, spec: ModelSpec, conditions: SampleConditions, device: torch.device | str
    ) -> Shards:
        options = {**self._sampler, "guidance_scale": self.args.teacher_guidance_scale}
        identity = model_identity(denoiser, scheduler, spec.codec, device=device)
        prompts = {}
        if self.texts is not None:
            digest = hashlib.sha256(json.dumps(self.texts.texts).encode()).hexdigest()
            prompts = {"prompts": digest, "text_encoders": spec.prompts.identity()}
        vectors = dict(self._conditions.description)
        null = {} if self.decoder.null_label is None else {"null_label": self.decoder.null_label}

        def describe(span: range) -> dict:
            return {**identity, **options, **prompts, **vectors, **null, "seed": self.SEED, "first": span.start}

        def make(span: range) -> dict[str, Tensor]:
            parts = list(
                denoised(
                    *(denoiser, scheduler, span, self._shape[1:]),
                    seed=self.SEED,
                    batch_size=self.batch_size,
                    conditions=conditions,
                    latents=spec.codec is not None,
                    **options,
                )
            )
            pixels = torch.cat([to_uint8((x if spec.codec is None else spec.codec.decode(x)) / 2 + 0.5).cpu() for x in parts])
            return {"pixels": pixels} if spec.codec is None else {"pixels": pixels, "latents": torch.cat(parts).cpu()}

        def ready() -> AbstractContextManager:
            return moved([denoiser, *([] if spec.codec is None else [spec.codec.vae])], device)

        row_bytes = math.prod(self.decoder.shape) + (4 * math.prod(self._shape) if self._is_latent else 0)
        return Shards(
            *("teacher-images", self.num_images + len(self.held_out), row_bytes),
            *(describe, make, ready, "drawing images (dense)", "image"),
            argument="teacher_images_dir",
            most_rows=SHARD_IMAGES,
        )

    # --- images ---

    def __getitem__(self, index: int) -> EncodedImage:
        return EncodedImage(None, self._label(index), (index,))

    def _label(self, index: int) -> int | list[float] | None:
        labels = self._conditions.of([index]).get("class_labels")
        return None if labels is None else labels[0].tolist()

    @property
    def pixels(self) -> PixelRows:
        return PixelRows(self)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self._shape

    def read(self, name: str, row: int) -> Tensor:
        """A row of the tensors `pixels`, uint8, or `latents`, float32."""
        return self._rows.read(name, row)

    def clean(self, row: int) -> Tensor:
        """The sample of a row as the model denoises it, float32 with shape `sample_shape`."""
        return self.read("latents", row) if self._is_latent else self.read("pixels", row).float() / 127.5 - 1

    def sample(self, image: EncodedImage, uniforms: Sequence[float], generator: np.random.Generator) -> Tensor:
        sample = self.clean(image.position[-1])
        return sample.flip(-1) if self.decoder.flips(uniforms) else sample

    def conditioning(self, image: EncodedImage, drop: float, generator: np.random.Generator) -> dict[str, Tensor]:
        labels = super().conditioning(image, drop, generator)
        return labels if self.texts is None else {**labels, **self._caption(image.position[-1], drop)}

    def _caption(self, row: int, drop: float = 1.0) -> dict[str, Tensor]:
        number = None if drop < self.texts.dropout else row % len(self.texts.texts)
        return self.texts.conditioning(number, self._time_ids())

    def _time_ids(self) -> Tensor:
        """SDXL's sizes: images that are neither resized nor cropped."""
        height, width = self.decoder.size
        return torch.tensor([height, width, 0, 0, height, width]).float()

    def null_conditioning(self) -> dict[str, Tensor]:
        return super().null_conditioning() if self.texts is None else self.texts.no_prompt()

    def notes(self) -> tuple[str, ...]:
        notes = [f"drawn by the dense model in {self.drawn_by}, and kept in {self.folder}", *self._changes]
        if self.decoder.labels is not None and self.decoder.null_label is None:
            notes.append("no label is taken for the null label: if the model was trained with one, name it by --null_label")
        if self.texts is not None:
            notes.append(f"{len(self.texts.texts):,} prompts in turn; {self.texts.dropout:.0%} are replaced by the empty one")
        return tuple(notes)

    def choices(self) -> dict[str, object]:
        return super().choices() | ({} if self.texts is None else {"caption_dropout": self.texts.dropout})


class PixelRows(IndexedSource):
    """The images of a `TeacherImages` as files, for measurements."""

    def __init__(self, images: TeacherImages) -> None:
        self.images, self.decoder, self.num_images = images, images.decoder, images.num_images

    def __getitem__(self, index: int) -> EncodedImage:
        buffer = io.BytesIO()
        to_pil_image(self.images.read("pixels", index)).save(buffer, format="PNG")
        return EncodedImage({"bytes": buffer.getvalue(), "path": None}, self.images[index].label, (index,))


class TeacherHeldOut(HeldOut):
    """Held-out images that the dense model draws.

    Args:
        images: The training images.
        rows: Numbers of the held-out images.
    """

    def __init__(self, images: TeacherImages, rows: range) -> None:
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def samples(self) -> Tensor:
        return torch.stack([self.images.clean(row) for row in self.rows])

    @functools.cached_property
    def conditioning(self) -> Mapping[str, Tensor]:
        labels = self.images._conditions.of(self.rows)
        if self.images.texts is None:
            return labels
        rows = [self.images._caption(row) for row in self.rows]
        return labels | {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
