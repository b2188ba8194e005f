"""Order of the images, and their crops, noise and timesteps, as a function of the seed and the batch number.

Nothing here has a state that a checkpoint must save. With W processes of B images each, a global batch has G = W·B images.
Training batch k consists of the draws

    d = k·G, ..., k·G + G - 1          of which rank r makes the r-th block of B

and crop, flip, noise and timestep of draw d come from a random generator seeded by (seed, d). With n images on disk, an epoch
has b = ⌊n / G⌋ batches (the remainder is left out), and batch k is number k mod b in the permutation of epoch ⌊k / b⌋, which
is seeded by (seed, epoch). A batch therefore does not depend on the number of processes or workers, or on where a run resumes.

Streams are different: the images of a rank also depend on the numbers of processes and workers, which divide the shards. If
these are unchanged, a resumed stream also gives exactly the same batches.

Stratified timesteps spread a batch over all noise levels: row i of global batch k gets the timestep at

    (p_k(i) + u_d) / G          u_d uniform in [0, 1), from the generator of its draw d

in the distribution of the training, with p_k a permutation of 0, ..., G - 1 seeded by (seed, k). Each timestep has the same
distribution as an independent one, and the loss of a batch the same mean, but less variance, since it differs more between
noise levels than between images (Kingma et al., "Variational Diffusion Models", https://arxiv.org/abs/2107.00630, appendix I).

Calibration batches are a function of (seed, step). Their timesteps are spread evenly: image j of g gets that at
(j + u) / g in the distribution of the training, with u uniform in [0, 1), which lowers the variance of the scores. If labels
are dropped (`class_labels`), image j of all batches drops its label if {u + j (√5 - 1) / 2} < p, with one u per ranking. This
sequence is evenly spread, so every ranking has the right share of null labels, at all noise levels.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ..argument_fields import at_least, check_range
from ..diffusion.batch import DiffusionBatch
from ..diffusion.process import DiffusionProcess
from ..errors import one_line
from ..interruption import notice_dead_workers_at_next_batch, obey_only_parent
from .decoding import NETWORK_ERRORS, BrokenImages, EncodedImage
from .draws import (
    CALIBRATION,
    CALIBRATION_LABELS,
    DRAW,
    ORDER,
    STRATA,
    Example,
    random_generator,
    read_example,
    stack_examples,
)
from .sources import ImageSource, ImageStream, IndexedSource

__all__ = ["BrokenImages", "TrainingBatch", "calibration_batches", "train_dataloader"]

GOLDEN_RATIO = (5**0.5 - 1) / 2
READ_ERRORS = (ValueError, OSError, *NETWORK_ERRORS)


class TrainingBatch(NamedTuple):
    """A batch of a process.

    Attributes:
        batch: The images with their noise and timesteps.
        times: Where the timesteps are in their distribution, in [0, 1), float64 with shape `(batch,)`.
        unread: Names of unreadable images, each of which was replaced by another image.
    """

    batch: DiffusionBatch
    times: Tensor
    unread: list[str]


@dataclass(frozen=True)
class _Failure:
    """An error in a worker. (An exception would arrive with the worker's traceback as its message.)"""

    message: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        """The error in one line."""
        text = one_line(error)
        return cls(text if isinstance(error, ValueError) else f"images cannot be read: {text}")


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must be in [0, {world_size})")


@dataclass(frozen=True)
class _Plan:
    """Common settings of all training batches of a process."""

    batch_size: int
    seed: int
    process: DiffusionProcess
    first_batch: int
    rank: int
    world_size: int
    stratified: bool

    def make(self, images: ImageSource, number: int, encoded: Sequence[EncodedImage]) -> TrainingBatch:
        """Rows of this process in global batch `number`."""
        first = (number * self.world_size + self.rank) * self.batch_size
        examples = [read_example(images, image, self.seed, DRAW, first + row) for row, image in enumerate(encoded)]
        times = self.times(number, examples)
        batch, unread = stack_examples(examples, times, self.process)
        return TrainingBatch(batch, torch.tensor(times, dtype=torch.float64), unread)

    def times(self, number: int, examples: Sequence[Example]) -> list[float]:
        """Where timesteps of these rows of global batch `number` are in their distribution, in [0, 1)."""
        if not self.stratified:
            return [example.time for example in examples]
        size, first = self.batch_size * self.world_size, self.batch_size * self.rank
        strata = random_generator(self.seed, STRATA, number).permutation(size)[first : first + self.batch_size]
        return [float(stratum + example.time) / size for stratum, example in zip(strata, examples, strict=True)]


class _RowBatches(Dataset):
    """Batches of images on disk, by number."""

    def __init__(self, images: IndexedSource, plan: _Plan) -> None:
        self.images, self.plan = images, plan
        self.batches_per_epoch = images.num_images // (plan.batch_size * plan.world_size)
        if self.batches_per_epoch == 0:
            processes = f" on each of {plan.world_size} processes" if plan.world_size > 1 else ""
            raise ValueError(
                f"train_batch_size={plan.batch_size}{processes} is larger than the {images.num_images} training images"
            )
        self.order: tuple[int, np.ndarray] | None = None

    def _order(self, epoch: int) -> np.ndarray:
        if self.order is None or self.order[0] != epoch:
            self.order = (epoch, random_generator(self.plan.seed, ORDER, epoch).permutation(self.images.num_images))
        return self.order[1]

    def __getitem__(self, number: int) -> TrainingBatch | _Failure:
        plan = self.plan
        epoch, position = divmod(number, self.batches_per_epoch)
        first = (position * plan.world_size + plan.rank) * plan.batch_size
        try:
            encoded = [self.images[index] for index in self._order(epoch)[first : first + plan.batch_size]]
            return plan.make(self.images, number, encoded)
        except READ_ERRORS as error:
            return _Failure.of(error)


class _StreamBatches(IterableDataset):
    """Batches of a stream, in the order of their numbers if workers take turns.

    Shards are divided into as many groups as there are readers (ranks times workers), and each reader reads one group per
    epoch. It is always the same group if all groups have equally many shards. Otherwise readers rotate through the groups, so
    that all shards are read equally often in the long run. If a stream has fewer shards than ranks, every rank reads the whole
    stream and skips the images of the other ranks. If images are separate files, whose paths are cheap to read, workers do
    the same.
    """

    def __init__(self, images: ImageStream, plan: _Plan, num_workers: int) -> None:
        self.images, self.plan = images, plan
        workers, shards = max(1, num_workers), images.num_shards
        readers = plan.world_size * workers
        if readers <= shards:
            self.num_groups = readers
        elif images.are_paths:
            self.num_groups = 1
        elif plan.world_size > shards >= workers:
            self.num_groups = workers
        else:
            raise ValueError(
                f"dataloader_num_workers={num_workers} must be at most "
                f"{shards if plan.world_size > shards else shards // plan.world_size}: workers divide the shards, and the "
                f"stream has {shards} for {plan.world_size} process{'es' if plan.world_size > 1 else ''}"
            )
        self.stride = readers // self.num_groups
        self.turn = 0 if shards % self.num_groups == 0 else 1
        self.cycle = self.num_groups if self.turn else 1  # epochs until a reader returns to its first group

    def __iter__(self) -> Iterator[TrainingBatch | _Failure | None]:
        plan, info = self.plan, get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        given = len(range(worker, plan.first_batch, num_workers))
        if worker < plan.first_batch % num_workers:
            yield None  # workers take turns from worker 0 on, but this worker's next batch belongs to the second round
        try:
            images = self._images(worker, num_workers, given * plan.batch_size)
            for number in itertools.count(worker + given * num_workers, num_workers):
                yield plan.make(self.images, number, list(itertools.islice(images, plan.batch_size)))
        except READ_ERRORS as error:
            yield _Failure.of(error)

    def _images(self, worker: int, num_workers: int, skip: int) -> Iterator[EncodedImage]:
        """All images of a reader, epoch after epoch, except the first `skip`.

        All cycles are equally long, so at most two are read (not decoded) to skip images.
        """
        offset, first_group = divmod(self.plan.rank * num_workers + worker, self.num_groups)

        def epochs(numbers: Iterable[int]) -> Iterator[EncodedImage]:
            idle = 0
            for number in numbers:
                group, idle = (first_group + number * self.turn) % self.num_groups, idle + 1
                generator = random_generator(self.plan.seed, ORDER, number, group)
                images = self.images.shuffled(generator, group, self.num_groups)
                for image in itertools.islice(images, offset, None, self.stride):
                    idle = 0
                    yield image
                if idle == self.cycle:
                    raise ValueError(
                        f"dataloader_num_workers={num_workers} is too large: worker {worker} of process {self.plan.rank} has "
                        f"no images in its share of the stream"
                    )

        images = epochs(range(self.cycle))
        passed = sum(1 for _ in itertools.islice(images, skip))
        if passed == skip:
            return itertools.chain(images, epochs(itertools.count(self.cycle)))
        cycles, skip = divmod(skip, passed)
        images = epochs(itertools.count(cycles * self.cycle))
        return itertools.islice(images, skip, None)


class _BatchLoader(DataLoader):
    """A `DataLoader` of data sets that yield whole batches, None if it is not their turn, or a failure."""

    def __iter__(self) -> Iterator[TrainingBatch]:
        batches = super().__iter__()
        if self.num_workers > 0:
            notice_dead_workers_at_next_batch()
        while True:
            batch = next(batches)
            if isinstance(batch, _Failure):
                del batches  # end the workers now, not when the exception is garbage collected
                raise ValueError(batch.message)
            if batch is not None:
                yield batch


def _as_it_is(batch):
    return batch


def train_dataloader(
    images: ImageSource,
    batch_size: int,
    *,
    seed: int,
    process: DiffusionProcess,
    first_batch: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    stratified: bool = False,
) -> DataLoader:
    """An infinite loader of training batches for one process. It uses no global random generator.

    Each item is a `TrainingBatch`. Images and noise are float32 with shape `(batch_size, channels, height, width)`. Timesteps
    of the process have shape `(batch_size,)`, and so do `class_labels`, int64, if the model is class conditional. More than
    ten unreadable images in a row raise a `ValueError`, as does a label that the model does not have.

    Args:
        images: The training images.
        batch_size: Number of images per batch of this process.
        seed: Seed; it determines a batch together with the batch number.
        process: Process of the model's training.
        first_batch: Number of the first batch. Skipping batches does not change the later ones. A stream reads the skipped
            images without decoding them.
        num_workers: Number of processes that load images (0: load in this process). Batches of a stream depend on it.
        rank: Number of this process.
        world_size: Number of processes that share a global batch.
        stratified: Whether timesteps of a global batch are spread evenly over their distribution, not drawn independently.

    Raises:
        ValueError: There are too few images for one global batch, too few shards for the workers, or a number is out of range.
    """
    check_range(at_least(1), train_batch_size=batch_size)
    check_range(at_least(0), seed=seed, first_batch=first_batch, dataloader_num_workers=num_workers)
    _check_rank(rank, world_size)
    plan = _Plan(batch_size, seed, process, first_batch, rank, world_size, stratified)
    common = {
        "batch_size": None,
        "collate_fn": _as_it_is,
        "num_workers": num_workers,
        "worker_init_fn": obey_only_parent,
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),  # for the workers' seeds, which are not used here
    }
    if isinstance(images, ImageStream):
        return _BatchLoader(_StreamBatches(images, plan, num_workers), **common)
    return _BatchLoader(_RowBatches(images, plan), sampler=range(first_batch, sys.maxsize), **common)


def calibration_batches(
    images: ImageSource,
    num_batches: int,
    batch_size: int,
    *,
    process: DiffusionProcess,
    seed: int,
    step: int,
    rank: int = 0,
    world_size: int = 1,
    broken: BrokenImages | None = None,
) -> list[DiffusionBatch]:
    """Batches for computing scores. They are a function of `seed` and `step`, with evenly spread timesteps.

    Args:
        images: The training images.
        num_batches: Number of batches (>= 1).
        batch_size: Number of images in a batch on each process (fewer if there are not enough images).
        process: Process of the model's training.
        seed: Seed of the run.
        step: Step of the ranking.
        rank: Number of this process, which decodes only its own block of every global batch.
        world_size: Number of processes that share a global batch, in blocks of equal size.
        broken: Counts unreadable images that were replaced.

    Returns:
        Batches: images and noise, float32 with shape `(n, channels, height, width)`, timesteps of the process with
        shape `(n,)`, and `class_labels`, int64 with this shape, if the model is class conditional.

    Raises:
        ValueError: There are fewer images than processes, or a number is out of range.
    """
    check_range(
        at_least(1),
        calibration_batches=num_batches,
        calibration_batch_size=batch_size,
    )
    check_range(at_least(0), seed=seed, step=step)
    _check_rank(rank, world_size)
    blocks = _stream_blocks if isinstance(images, ImageStream) else _row_blocks
    batches, earlier = [], 0
    offset = random_generator(seed, CALIBRATION_LABELS, step).random()
    for number, encoded in enumerate(blocks(images, num_batches, batch_size, seed, step, rank, world_size)):
        if not encoded:
            raise ValueError(f"there are fewer training images than the {world_size} processes")
        size, first = len(encoded) * world_size, len(encoded) * rank
        examples = [
            read_example(
                *(images, image, seed, CALIBRATION, step, number, first + row),
                drop=(offset + (earlier + first + row) * GOLDEN_RATIO) % 1,
            )
            for row, image in enumerate(encoded)
        ]
        earlier += size
        times = [(first + row + example.time) / size for row, example in enumerate(examples)]
        batch, unread = stack_examples(examples, times, process)
        if broken is not None:
            broken.add(unread)
        batches.append(batch)
    return batches


def _row_blocks(
    images: IndexedSource, num_batches: int, batch_size: int, seed: int, step: int, rank: int, world_size: int
) -> Iterator[list[EncodedImage]]:
    """Block of this process in every calibration batch."""
    size = min(batch_size, images.num_images // world_size)
    for number in range(num_batches):
        generator = random_generator(seed, CALIBRATION, step, number)
        chosen = generator.choice(images.num_images, size * world_size, replace=False)
        yield [images[index] for index in chosen[rank * size : (rank + 1) * size]]


def _stream_blocks(
    images: ImageStream, num_batches: int, batch_size: int, seed: int, step: int, rank: int, world_size: int
) -> Iterator[list[EncodedImage]]:
    """As `_row_blocks`, in the order of shuffled passes over the stream for this step."""
    passes = (images.shuffled(random_generator(seed, CALIBRATION, step, number)) for number in itertools.count())
    stream, global_size = next(passes), batch_size * world_size
    for _ in range(num_batches):
        batch = list(itertools.islice(stream, global_size))
        if len(batch) < global_size:  # end of the stream: start a new pass, which may itself be shorter than a batch
            stream = next(passes)
            batch = list(itertools.islice(stream, global_size))
        size = len(batch) // world_size
        yield batch[rank * size : (rank + 1) * size]
