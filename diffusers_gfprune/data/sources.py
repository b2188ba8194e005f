"""Sources of training images: rows of a data set on disk, or a stream.

Both yield `EncodedImage`s; `batches` selects them. Their common interface:

- `num_images`: number of images, None for a stream;
- `in_order()`: all images, from the first on;
- `spare(generator)`: a random image, to replace a broken one;
- `head(count)`: the first images as a tensor;
- `decoder`: the `ImageDecoder` of the images;
- `summary`: source and number of images, for the plan (set by `load_images`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice

import datasets
import numpy as np
import torch
from torch import Tensor

from .decoding import BrokenImage, EncodedImage, ImageDecoder
from .splits import DataSummary

__all__ = ["ImageRows", "ImageStream", "readable_images"]


class ImageRows:
    """Images of a data set on disk, with random access.

    Args:
        rows: The data set, with encoded images.
        decoder: Decoder of the images.
        order: Row numbers of the images, in order, with shape `(num_images,)`.
    """

    summary: DataSummary | None = None

    def __init__(self, rows: datasets.Dataset, decoder: ImageDecoder, order: np.ndarray) -> None:
        self.rows, self.decoder, self.order = rows, decoder, order

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.order)

    def __getitem__(self, index: int) -> EncodedImage:
        row = int(self.order[index])
        values = self.rows[row]
        label = values[self.decoder.label_column] if self.decoder.label_column else None
        return EncodedImage(values[self.decoder.column], label, (row,))

    def in_order(self) -> Iterator[EncodedImage]:
        """All images, from the first on."""
        return (self[index] for index in range(self.num_images))

    def spare(self, generator: np.random.Generator) -> EncodedImage:
        """A random image, to replace a broken one."""
        return self[int(generator.integers(self.num_images))]

    def head(self, count: int) -> Tensor:
        """The first `count` readable images (fewer if there are fewer), cropped at the centre, not flipped.

        Returns:
            float32 with shape `(count, channels, height, width)` in [-1, 1].
        """
        return readable_images(self.in_order(), self.decoder, count)


class ImageStream:
    """Images of a data set that is read on demand, shard by shard.

    Shards and images are shuffled here, not by `datasets`, whose shuffling differs between versions: a resumed run must see
    the same images.

    Args:
        rows: The data set, with encoded images.
        decoder: Decoder of the images.
        shuffle_buffer_size: Number of images in the shuffle buffer.
        num_held_out: Number of first images that are moved to `held_out`.
    """

    summary: DataSummary | None = None
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
        """All images, from the first on."""
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
        """A random one of the first images, to replace a broken one."""
        return self.spares[int(generator.integers(len(self.spares)))]

    def head(self, count: int) -> Tensor:
        """As `ImageRows.head`."""
        return readable_images(self.in_order(), self.decoder, count)

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
