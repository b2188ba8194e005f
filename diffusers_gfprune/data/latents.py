"""Training images of latent models, which are encoded once by the frozen VAE, and their captions by the frozen text encoders.

Every draw makes a new latent from the moments of an image, and may flip it or drop its label or caption. As for pixels, all
random numbers of draw d come from a generator seeded by (seed, d), see `batches`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..diffusion.latents import LatentCodec, LatentDraw
from ..diffusion.prompts import SIZES, PromptEncoder
from ..model_spec import ModelSpec
from .captions import RowCaptions, read_captions
from .decoding import BrokenImage, BrokenImages, EncodedImage
from .encoding import caption_shards, image_shards
from .shards import ShardedRows, make_shards
from .sources import HeldOut, ImageRows, IndexedSource

__all__ = ["CaptionTexts", "LatentHeldOut", "LatentRows", "LatentSplit", "make_latents"]

logger = logging.getLogger(__name__)


class LatentSplit:
    """Rows of a split with their latents and captions, once these are encoded.

    Args:
        images: The images of all rows, in the order of the rows.
        labels: Class labels of all rows; None: the model takes none.
        captions: Captions of all rows; None: the model takes none.

    Attributes:
        moments: Moments of all rows; None: they are not encoded yet.
        readable: Whether each image can be read and fits the model.
    """

    def __init__(self, images: ImageRows, labels: Sequence[int] | None = None, captions: RowCaptions | None = None) -> None:
        self.images, self.captions = images, captions
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.moments: ShardedRows | None = None
        self.readable = np.ones(images.num_images, dtype=bool)

    def encode(self, codec: LatentCodec, device: torch.device | str, folder: Path, num_threads: int) -> None:
        """Encode all images that are not in the cache."""
        self.moments = make_shards(image_shards(self.images, codec, device, num_threads), folder)
        self.readable = self.moments.column("readable").numpy()

    def names(self, rows: Sequence[int]) -> list[str]:
        """Names of images in messages."""
        return [self.images[int(row)].name for row in rows]

    def __getitem__(self, row: int) -> EncodedImage:
        if not self.readable[row]:
            return self.images[row]
        return EncodedImage(None, None if self.labels is None else int(self.labels[row]), (row,))


@dataclass
class CaptionTexts:
    """Different captions of all splits, and their conditioning, once it is encoded.

    Attributes:
        texts: The captions.
        column: Name of their column.
        dropout: Share of captions that are replaced by the empty prompt, in [0, 1).
        encoded: Conditioning of each text; None: it is not encoded yet.
        null: Conditioning without a caption, with one row.
    """

    texts: list[str]
    column: str
    dropout: float
    encoded: ShardedRows | None = None
    null: dict[str, Tensor] | None = None

    def encode(self, prompts: PromptEncoder, device: torch.device | str, folder: Path) -> None:
        """Encode all captions that are not in the cache."""
        self.encoded = make_shards(caption_shards(self.texts, prompts, device), folder)
        with prompts.on(device):
            self.null = prompts.null()

    def no_prompt(self) -> dict[str, Tensor]:
        """Conditioning without a caption, with one row. Sizes are not in it: an image has the same ones with its caption."""
        return {name: values for name, values in self.null.items() if name not in SIZES}

    def conditioning(self, number: int | None, sizes: Tensor) -> dict[str, Tensor]:
        """Conditioning of a caption by its number, or without a caption, for an image with these `time_ids`."""

        def row_of(name: str, null: Tensor) -> Tensor:
            if name == "time_ids":
                return sizes
            return null[0] if number is None or name in SIZES else self.encoded.read(name, number)  # other sizes are equal

        return {name: row_of(name, null) for name, null in self.null.items()}


class LatentRows(IndexedSource):
    """Latents of a data set on disk, with random access. `prepare` encodes the images before the first one is used.

    Args:
        split: The training split.
        order: Row numbers of the training images, in order.
        held_out: The held-out images.
        codec: The VAE; it is not kept longer than needed.
        prompts: The text encoders, likewise; None: the model takes no captions.
        texts: Captions; None: the model takes none.
        folder: Folder of the encoded images and captions.
        max_broken_images: Maximum number of training images, and of held-out ones, that cannot be read.
        num_threads: Number of threads that decode image files.
    """

    def __init__(
        self,
        split: LatentSplit,
        order: np.ndarray,
        held_out: LatentHeldOut,
        codec: LatentCodec,
        prompts: PromptEncoder | None = None,
        texts: CaptionTexts | None = None,
        *,
        folder: Path,
        max_broken_images: int,
        num_threads: int = 1,
    ) -> None:
        self.split, self.order, self.held_out, self.texts = split, order, held_out, texts
        self.decoder, self.num_images = split.images.decoder, len(order)
        self.draw, self._shape = codec.draw, codec.latent_shape(*self.decoder.size)
        self.folder, self.max_broken_images, self.num_threads = folder, max_broken_images, num_threads
        self._encoders: tuple[LatentCodec, PromptEncoder | None] | None = codec, prompts

    @property
    def pixels(self) -> ImageRows:
        return ImageRows(self.split.images.rows, self.decoder, self.order)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self._shape

    def prepare(self, device: torch.device | str = "cpu") -> None:
        """Encode all images and captions that are not in the cache. All processes must call this method.

        VAE and text encoders are on the device only while they encode.

        Args:
            device: Device to encode on.

        Raises:
            ValueError: Too many images cannot be read, or the cache cannot be written.
        """
        if self._encoders is None:
            return
        codec, prompts = self._encoders
        if self.texts is not None:
            self.texts.encode(prompts, device, self.folder)
        for split in dict.fromkeys([self.split, self.held_out.split]):
            split.encode(codec, device, self.folder, self.num_threads)
        broken = self.order[~self.split.readable[self.order]]
        BrokenImages(self.max_broken_images).add(self.split.names(broken[: self.max_broken_images + 1]))
        self.held_out.ready(self.draw, self.texts, self.max_broken_images)
        self._encoders = None

    def prepare_held_out(self, device: torch.device | str = "cpu") -> None:
        """Encode the held-out images and their captions only. Training images cannot be used then."""
        if self._encoders is None:
            return
        codec, prompts = self._encoders
        self.texts = self.held_out.separate(self.texts)
        if self.texts is not None:
            self.texts.encode(prompts, device, self.folder)
        self.held_out.split.encode(codec, device, self.folder, self.num_threads)
        self.held_out.ready(self.draw, self.texts, self.max_broken_images)
        self._encoders = None

    def __getitem__(self, index: int) -> EncodedImage:
        return self.split[int(self.order[index])]

    def sample(self, image: EncodedImage, uniforms: Sequence[float], generator: np.random.Generator) -> Tensor:
        row = image.position[-1]
        if not self.split.readable[row]:
            raise BrokenImage(f"{image.name} of column {self.decoder.column} could not be read when it was encoded")
        moments = self.split.moments.read("moments", row)[int(self.decoder.flips(uniforms))]
        noise = None
        if self.draw.is_random:
            noise = torch.from_numpy(generator.standard_normal(self._shape, dtype=np.float32))
        return self.draw(moments, noise)

    def conditioning(self, image: EncodedImage, drop: float, generator: np.random.Generator) -> dict[str, Tensor]:
        labels = super().conditioning(image, drop, generator)
        if self.texts is None:
            return labels
        row, chosen = image.position[-1], generator.random()
        number = None if drop < self.texts.dropout else self.split.captions.of(row, chosen)
        return {**labels, **self.texts.conditioning(number, self.split.moments.read("time_ids", row))}

    def null_conditioning(self) -> dict[str, Tensor]:
        return super().null_conditioning() if self.texts is None else self.texts.no_prompt()

    def notes(self) -> tuple[str, ...]:
        (channels, height, width), size = self._shape, self.decoder.size
        flipped = ", as they are and flipped" if self.decoder.random_flip else ""
        notes = [
            f"latents of {channels}x{height}x{width} from images of {size[0]}x{size[1]} pixels, cropped at the "
            f"centre{flipped}, encoded once in {self.folder}"
        ]
        if self.texts is not None:
            notes.append(
                f"{len(self.texts.texts):,} different captions of column {self.texts.column}; {self.texts.dropout:.0%} are "
                f"replaced by the empty prompt in training and scoring"
            )
        return tuple(notes)

    def choices(self) -> dict[str, object]:
        captions = {} if self.texts is None else {"caption_column": self.texts.column, "caption_dropout": self.texts.dropout}
        return super().choices() | captions


class LatentHeldOut(HeldOut):
    """Held-out images of a latent model: one fixed draw of each, and its first caption.

    Args:
        split: Their split.
        rows: Their row numbers.
    """

    SEED = 0

    def __init__(self, split: LatentSplit, rows: np.ndarray) -> None:
        self.split, self.rows = split, rows

    def __len__(self) -> int:
        """Number of images; before they are encoded, with those that turn out to be broken."""
        return len(self.rows)

    def separate(self, texts: CaptionTexts | None) -> CaptionTexts | None:
        """Make these images a split of their own, to be encoded without the others of their split.

        Args:
            texts: Captions of all splits.

        Returns:
            The captions of these images only.
        """
        split, rows = self.split, self.rows
        images = ImageRows(split.images.rows, split.images.decoder, rows)
        labels = None if split.labels is None else split.labels[rows]
        if texts is None:
            self.split = LatentSplit(images, labels)
        else:
            numbers = [split.captions.of(int(row)) for row in rows]
            different = list(dict.fromkeys(numbers))
            captions = RowCaptions([different.index(number) for number in numbers], [1] * len(numbers))
            texts = CaptionTexts([texts.texts[number] for number in different], texts.column, texts.dropout)
            self.split = LatentSplit(images, labels, captions)
        self.rows = np.arange(len(rows))
        return texts

    def ready(self, draw: LatentDraw, texts: CaptionTexts | None, max_broken_images: int) -> None:
        """Leave out broken images, after the split has been encoded.

        Raises:
            ValueError: Too many are broken, or all.
        """
        broken = self.rows[~self.split.readable[self.rows]]
        BrokenImages(max_broken_images).add(self.split.names(broken[: max_broken_images + 1]))
        self.rows = self.rows[self.split.readable[self.rows]]
        if len(self.rows) == 0:
            raise ValueError("there are no held-out images: none can be read and fits the model")
        if len(broken):
            logger.warning("%d held-out images do not fit the model and are left out", len(broken))
        self.draw, self.texts = draw, texts

    @functools.cached_property
    def samples(self) -> Tensor:
        moments = torch.stack([self.split.moments.read("moments", int(row))[0] for row in self.rows])
        shape = self.draw(moments).shape
        return self.draw(moments, torch.randn(shape, generator=torch.Generator().manual_seed(self.SEED)))

    @functools.cached_property
    def conditioning(self) -> dict[str, Tensor]:
        labels = {} if self.split.labels is None else {"class_labels": torch.from_numpy(self.split.labels[self.rows])}
        if self.texts is None:
            return labels
        rows = [
            self.texts.conditioning(self.split.captions.of(row), self.split.moments.read("time_ids", row))
            for row in map(int, self.rows)
        ]
        return labels | {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def make_latents(
    train: ImageRows,
    held_out: ImageRows,
    spec: ModelSpec,
    caption_column: str | None = None,
    *,
    caption_dropout: float,
    folder: Path,
    max_broken_images: int,
    num_threads: int,
) -> tuple[LatentRows, LatentHeldOut]:
    """Latents of training and held-out images, which `LatentRows.prepare` encodes.

    Splits are encoded from their first row on, whichever rows are held out, so shards are the same for other choices.

    Args:
        train: Training images.
        held_out: Held-out images, of the same split or the first ones of another one.
        spec: VAE, text encoders and labels of the model.
        caption_column: Column of captions, if the model takes them.
        caption_dropout: Share of captions that are replaced by the empty prompt.
        folder: Folder of the encoded images and captions.
        max_broken_images: Maximum number of training images, and of held-out ones, that cannot be read.
        num_threads: Number of threads that decode image files.

    Raises:
        ValueError: A label is not one of the model's.
    """
    sources = [train] if held_out.rows is train.rows else [train, held_out]
    counts = [len(train.rows), held_out.num_images]
    texts, captions = None, [None] * len(sources)
    if caption_column is not None:
        parts = [source.rows.select(range(count)) for source, count in zip(sources, counts)]
        different, captions, missing = read_captions(parts, caption_column)
        if missing:
            logger.warning("%d rows have no caption in column %s: their prompt is empty", missing, caption_column)
        spec.prompts.warn_of_long(different, "different captions")
        texts = CaptionTexts(different, caption_column, caption_dropout)
    splits = [
        LatentSplit(ImageRows(source.rows, source.decoder, np.arange(count)), _labels(source, count), of_rows)
        for source, count, of_rows in zip(sources, counts, captions)
    ]
    kept = LatentHeldOut(splits[-1], held_out.order)
    options = {"folder": folder, "max_broken_images": max_broken_images, "num_threads": num_threads}
    return LatentRows(splits[0], train.order, kept, spec.codec, spec.prompts, texts, **options), kept


def _labels(images: ImageRows, count: int) -> list[int] | None:
    """Class labels of the first rows; None if the model takes none."""
    decoder = images.decoder
    if decoder.label_column is None:
        return None
    labels = images.rows.select_columns([decoder.label_column])[:count][decoder.label_column]
    for row, label in enumerate(labels):
        decoder.check_label(EncodedImage(None, label, (row,)))
    return list(labels)
