"""Sources of training images: rows of a data set on disk, or a stream, as pixels; `latents` has those of latent models.

All yield `EncodedImage`s; `batches` selects them. `ImageSource` is their common interface.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice

import datasets
import numpy as np
import torch
from torch import Tensor

from .decoding import BrokenImage, EncodedImage, ImageDecoder
from .splits import DataSummary

__all__ = ["HeldOut", "ImageRows", "ImageSource", "ImageStream", "IndexedSource", "readable_images"]


class HeldOut:
    """Held-out images, in memory.

    Args:
        samples: Samples as the model denoises them, float32 with shape `(n, channels, height, width)`.
        conditioning: Conditioning of each, by name.
    """

    def __init__(self, samples: Tensor, conditioning: Mapping[str, Tensor]) -> None:
        self.samples, self.conditioning = samples, conditioning

    def __len__(self) -> int:
        """Number of images."""
        return len(self.samples)


class ImageSource(ABC):
    """Training images, and the samples and the conditioning that a model is trained on.

    Attributes:
        decoder: Decoder of the images.
        num_images: Number of images; None: unknown.
        summary: Source and number of images, for the plan (set by `load_images`).
        drawn_by: How the dense model drew the images, in words; None: they are those of a data set.
    """

    decoder: ImageDecoder
    num_images: int | None
    summary: DataSummary | None = None
    drawn_by: str | None = None

    @abstractmethod
    def in_order(self) -> Iterator[EncodedImage]:
        """All images, from the first on."""

    @abstractmethod
    def spare(self, generator: np.random.Generator) -> EncodedImage:
        """A random image, to replace a broken one."""

    @property
    def pixels(self) -> ImageSource:
        """The source of the same images as pixels."""
        return self

    def head(self, count: int) -> Tensor:
        """The first `count` readable images (fewer if there are fewer), cropped at the centre, not flipped.

        Returns:
            float32 with shape `(count, channels, height, width)` in [-1, 1].
        """
        return readable_images(self.pixels.in_order(), self.decoder, count)

    def prepare(self, device: torch.device | str = "cpu") -> None:  # noqa: B027
        """Make samples and conditioning available. Pixels are already; latents are encoded.

        Args:
            device: Device to encode on.
        """

    def prepare_held_out(self, device: torch.device | str = "cpu") -> None:  # noqa: B027
        """As `prepare`, for the held-out images only, which is enough for an evaluation."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a sample: `(channels, height, width)`."""
        return self.decoder.shape

    def sample(self, image: EncodedImage, uniforms: Sequence[float], generator: np.random.Generator) -> Tensor:
        """The sample of an image, as the model denoises it.

        Args:
            image: The image.
            uniforms: Three random numbers in [0, 1), see `ImageDecoder`.
            generator: Makes further random numbers that are needed.

        Returns:
            float32 with shape `sample_shape`.

        Raises:
            BrokenImage: The image cannot be read or does not fit the model.
        """
        return self.decoder(image, uniforms)

    def conditioning(self, image: EncodedImage, drop: float, generator: np.random.Generator) -> dict[str, Tensor]:
        """Conditioning of an image by name.

        Args:
            image: The image.
            drop: Random number in [0, 1), which decides whether the label or caption is dropped.
            generator: Makes further random numbers that are needed.
        """
        return {} if image.label is None else {"class_labels": torch.tensor(self.decoder.dropped(image.label, drop))}

    def null_conditioning(self) -> dict[str, Tensor]:
        """Conditioning without a label or caption, with one row; empty if the model has none."""
        null = self.decoder.null_label
        return {} if null is None else {"class_labels": torch.tensor([null])}

    def notes(self) -> tuple[str, ...]:
        """Lines about latents and captions, for the plan."""
        return ()

    def choices(self) -> dict[str, object]:
        """Data arguments by name that were chosen because they were not given."""
        dropout = self.decoder.label_dropout
        return {} if dropout is None else {"null_label": dropout.null_label, "label_dropout": dropout.probability}


class IndexedSource(ImageSource):
    """Images with random access."""

    num_images: int

    @abstractmethod
    def __getitem__(self, index: int) -> EncodedImage:
        """Image number `index`, from 0 to `num_images - 1`."""

    def in_order(self) -> Iterator[EncodedImage]:
        return (self[index] for index in range(self.num_images))

    def spare(self, generator: np.random.Generator) -> EncodedImage:
        return self[int(generator.integers(self.num_images))]


class ImageRows(IndexedSource):
    """Images of a data set on disk, with random access.

    Args:
        rows: The data set, with encoded images.
        decoder: Decoder of the images.
        order: Row numbers of the images, in order, with shape `(num_images,)`.
    """

    def __init__(self, rows: datasets.Dataset, decoder: ImageDecoder, order: np.ndarray) -> None:
        self.rows, self.decoder, self.order = rows, decoder, order

        self.num_images = len(order)

    def __getitem__(self, index: int) -> EncodedImage:
        row = int(self.order[index])
        values = self.rows[row]
        label = values[self.decoder.label_column] if self.decoder.label_column else None
        return EncodedImage(values[self.decoder.column], label, (row,))


class ImageStream(ImageSource):
    """Images of a data set that is read on demand, shard by shard.

    Shards and images are shuffled here, not by `datasets`, whose shuffling differs between versions: a resumed run must see
    the same images.

    Args:
        rows: The data set, with encoded images.
        decoder: Decoder of the images.
        shuffle_buffer_size: Number of images in the shuffle buffer.
        num_held_out: Number of first images that are moved to `held_out`.
    """

    num_images = None  # not known before the end
    num_spares = 32

    def __init__(
        self, rows: datasets.IterableDataset, decoder: ImageDecoder, shuffle_buffer_size: int, num_held_out: int = 0
    ) -> None:
        self.rows, self.decoder, self.shuffle_buffer_size = rows, decoder, shuffle_buffer_size
        self.start = (0, 0)  # shard and row of the first image
        first = list(islice(self.in_order(), num_held_out + self.num_spares))
        self.held_out, self.spares = first[:num_held_out], first[num_held_out:]
        if self.spares:
            self.start = self.spares[0].position

    @property
    def num_shards(self) -> int:
        """Shards with training images."""
        return self.rows.num_shards - self.start[0]

    @property
    def are_paths(self) -> bool:
        """Whether rows are only paths of image files, which are cheap to skip."""
        return all(image.is_path for image in self.spares)

    def in_order(self) -> Iterator[EncodedImage]:
        return self._read(range(self.start[0], self.rows.num_shards))

    def shuffled(self, generator: np.random.Generator, group: int = 0, num_groups: int = 1) -> Iterator[EncodedImage]:
        """One pass over a group of shards in random order, with their images drawn from a shuffle buffer.

        Args:
            generator: Random generator, which alone determines the order.
            group: Number of the group: every `num_groups`-th shard from this one on.
            num_groups: Number of groups, at most `num_shards`.
        """
        shards = np.arange(self.start[0], self.rows.num_shards)[group::num_groups]
        buffer: list[EncodedImage] = []
        for image in self._read(generator.permutation(shards).tolist()):
            if len(buffer) < self.shuffle_buffer_size:
                buffer.append(image)
                continue
            chosen = int(generator.integers(len(buffer)))
            image, buffer[chosen] = buffer[chosen], image
            yield image
        yield from (buffer[chosen] for chosen in generator.permutation(len(buffer)))

    def spare(self, generator: np.random.Generator) -> EncodedImage:
        return self.spares[int(generator.integers(len(self.spares)))]

    def _read(self, shards: Iterable[int]) -> Iterator[EncodedImage]:
        return chain.from_iterable(map(self._read_shard, shards))

    def _read_shard(self, shard: int) -> Iterator[EncodedImage]:
        # Plain iteration would divide even a single shard among the workers of a DataLoader; `iter` does not.
        row = 0
        for columns in self.rows.shard(self.rows.num_shards, shard).iter(batch_size=64):
            images = columns[self.decoder.column]
            labels = columns[self.decoder.label_column] if self.decoder.label_column else [None] * len(images)
            for image, label in zip(images, labels):
                if (shard, row) >= self.start:
                    yield EncodedImage(image, label, (shard, row))
                row += 1


def readable_images(images: Iterable[EncodedImage], decoder: ImageDecoder, count: int | None = None) -> Tensor:
    """The first `count` images that can be read and fit the model (default: all), cropped at the centre, not flipped.

    Returns:
        float32 with shape `(n, channels, height, width)` in [-1, 1].
    """

    def decoded() -> Iterator[Tensor]:
        for image in images:
            with contextlib.suppress(BrokenImage):
                yield decoder(image)

    pixels = list(islice(decoded(), count))
    return torch.stack(pixels) if pixels else torch.empty(0, *decoder.shape)
