"""Which images a run sees when, and with which crop, noise and timestep: all of it a function of the seed and of numbers.

Nothing here has a state that a checkpoint would have to save. With W processes of B images each, a global batch has
G = W·B images. Training batch k is made of the draws

    d = k·G, ..., k·G + G - 1          of which rank r makes the r-th block of B

and crop, flip, noise and timestep of draw d come from a random generator seeded by (seed, d). With n images on the disk,
b = ⌊n / G⌋ batches make an epoch (the remainder is left out), and batch k is number k mod b in the permutation of epoch
⌊k / b⌋, which is seeded by (seed, epoch). So a batch is the same however many processes share it, however many workers load
it, and wherever a run resumes.

Streams have no such order: which images a rank meets also depends on the number of processes and workers, which share out
the shards. With these unchanged, a stream resumes with exactly the same batches too.

Calibration batches are a function of (seed, step), with timesteps spread evenly over the noise levels: of g images, number
j gets t = ⌊(j + u) T / g⌋ with u uniform in [0, 1), which lowers the variance of the scores. Where labels are dropped
(`class_labels`), number j of all batches drops its label if {u + j (√5 - 1) / 2} < p, with one u for a ranking: numbers that
are evenly spread, so that every ranking sees the null label in its share, and at noise levels of all kinds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ..diffusion.batch import DiffusionBatch
from ..errors import one_line
from ..interruption import notice_dead_workers_at_next_batch, obey_only_parent
from .decoding import NETWORK_ERRORS, BrokenImages, EncodedImage
from .draws import CALIBRATION, CALIBRATION_LABELS, DRAW, ORDER, random_generator, read_example, stack_examples
from .sources import ImageRows, ImageStream

__all__ = ["BrokenImages", "calibration_batches", "train_dataloader"]

GOLDEN_RATIO = (5**0.5 - 1) / 2
# With the names of images that could not be read
TrainingBatch = tuple[DiffusionBatch, list[str]]
READ_ERRORS = (ValueError, OSError, *NETWORK_ERRORS)


@dataclass(frozen=True)
class _Failure:
    """What went wrong in a worker. (An exception would arrive with the traceback of the worker as its message.)"""

    message: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        """The error in one line."""
        text = one_line(error)
        return cls(text if isinstance(error, ValueError) else f"images cannot be read: {text}")


def _check(least: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must be in [0, {world_size})")


@dataclass(frozen=True)
class _Plan:
    """What all training batches of a process have in common."""

    batch_size: int
    seed: int
    num_train_timesteps: int
    first_batch: int
    rank: int
    world_size: int

    def make(self, images: ImageRows | ImageStream, number: int, encoded: Sequence[EncodedImage]) -> TrainingBatch:
        """This process's rows of global batch `number`."""
        first = (number * self.world_size + self.rank) * self.batch_size
        examples = [read_example(images, image, self.seed, DRAW, first + row) for row, image in enumerate(encoded)]
        return stack_examples(examples, [example.time for example in examples], self.num_train_timesteps)


class _RowBatches(Dataset):
    """Batches by their number, of images on the disk."""

    def __init__(self, images: ImageRows, plan: _Plan) -> None:
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


class _From:
    """The numbers from `first` on, from there again at every iteration."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first)


class _StreamBatches(IterableDataset):
    """Batches of a stream, in the order of their numbers if workers take turns.

    Shards are dealt into as many groups as there are readers (ranks times workers), and a reader takes a group per epoch:
    always its own if all groups have equally many shards, else the next one each time, so that no shard is read more often
    than another in the long run. A stream with fewer shards than ranks is read whole by every rank, which takes every
    so many-th image; where images are files of their own, whose paths cost nothing, so does every worker.
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
                f"{shards if plan.world_size > shards else shards // plan.world_size}: workers share out shards, and the "
                f"stream has {shards} for {plan.world_size} process{'es' if plan.world_size > 1 else ''}"
            )
        self.stride = readers // self.num_groups
        self.turn = 0 if shards % self.num_groups == 0 else 1
        self.cycle = self.num_groups if self.turn else 1  # epochs until a reader is back at its first group

    def __iter__(self) -> Iterator[TrainingBatch | _Failure | None]:
        plan, info = self.plan, get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        given = len(range(worker, plan.first_batch, num_workers))
        if worker < plan.first_batch % num_workers:
            yield None  # workers take turns from the first one on, but this one's next batch belongs to the second round
        try:
            images = self._images(worker, num_workers, given * plan.batch_size)
            for number in itertools.count(worker + given * num_workers, num_workers):
                yield plan.make(self.images, number, list(itertools.islice(images, plan.batch_size)))
        except READ_ERRORS as error:
            yield _Failure.of(error)

    def _images(self, worker: int, num_workers: int, skip: int) -> Iterator[EncodedImage]:
        """All images of a reader, epoch after epoch, but for the first `skip`.

        All cycles are equally long, so that no more than two are read (not decoded) for what is skipped.
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
                        f"dataloader_num_workers={num_workers}: there are no images for worker {worker} of process "
                        f"{self.plan.rank} in its share of the stream"
                    )

        images = epochs(range(self.cycle))
        passed = sum(1 for _ in itertools.islice(images, skip))
        if passed == skip:
            return itertools.chain(images, epochs(itertools.count(self.cycle)))
        cycles, skip = divmod(skip, passed)
        images = epochs(itertools.count(cycles * self.cycle))
        return itertools.islice(images, skip, None)


class _BatchLoader(DataLoader):
    """A `DataLoader` whose data sets give whole batches, nothing where it is not their turn, or a failure."""

    def __iter__(self) -> Iterator[TrainingBatch]:
        batches = super().__iter__()
        if self.num_workers > 0:
            notice_dead_workers_at_next_batch()
        while True:
            batch = next(batches)
            if isinstance(batch, _Failure):
                del batches  # ends the workers now, and not whenever the error is forgotten
                raise ValueError(batch.message)
            if batch is not None:
                yield batch


def _as_it_is(batch):
    return batch


def train_dataloader(
    images: ImageRows | ImageStream,
    batch_size: int,
    *,
    seed: int,
    num_train_timesteps: int,
    first_batch: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Training batches of one process, without end. Iterating draws nothing from any global generator.

    Each comes as a pair:

    - a `DiffusionBatch`: images and noise, float32 with shape `(batch_size, channels, height, width)`; timesteps, int64 with
      shape `(batch_size,)`, uniform in [0, num_train_timesteps); `class_labels` alike, if the model is class conditional;
    - names of images that could not be read, each replaced by another one. More than ten such in a row end the iteration with
      a `ValueError`, as does a label that the model does not have.

    Args:
        images: The training images.
        batch_size: Images per batch of this process.
        seed: Decides, together with the number of a batch, what is in it.
        num_train_timesteps: Timesteps of the diffusion process.
        first_batch: Number of the first batch that is wanted: the batches from there on are the same as if those before had
            been loaded too. A stream reads past the images of those, without decoding them.
        num_workers: Processes that load images (0: load in this one). A stream gives other batches for other numbers.
        rank: Number of this process.
        world_size: How many processes share a global batch.

    Raises:
        ValueError: There are too few images for one global batch, too few shards for the workers, or a number is out of range.
    """
    _check(1, train_batch_size=batch_size, num_train_timesteps=num_train_timesteps)
    _check(0, seed=seed, first_batch=first_batch, dataloader_num_workers=num_workers)
    _check_rank(rank, world_size)
    plan = _Plan(batch_size, seed, num_train_timesteps, first_batch, rank, world_size)
    common = {
        "batch_size": None,
        "collate_fn": _as_it_is,
        "num_workers": num_workers,
        "worker_init_fn": obey_only_parent,
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),  # of the workers' seeds, which nothing here uses
    }
    if isinstance(images, ImageStream):
        return _BatchLoader(_StreamBatches(images, plan, num_workers), **common)
    return _BatchLoader(_RowBatches(images, plan), sampler=_From(first_batch), **common)


def calibration_batches(
    images: ImageRows | ImageStream,
    num_batches: int,
    batch_size: int,
    *,
    num_train_timesteps: int,
    seed: int,
    step: int,
    rank: int = 0,
    world_size: int = 1,
    broken: BrokenImages | None = None,
) -> list[DiffusionBatch]:
    """Batches that scores are taken on: a function of `seed` and `step`, with evenly spread timesteps.

    Args:
        images: The training images, from which each batch takes different ones.
        num_batches: How many batches (>= 1).
        batch_size: Images of a batch on each process (fewer if there are not that many).
        num_train_timesteps: Timesteps of the diffusion process.
        seed: Seed of the run.
        step: Step at which the ranking is made.
        rank: Number of this process, which gets its block of every global batch and decodes only that.
        world_size: How many processes share a global batch, in blocks of equal size.
        broken: Counts images that could not be read and were replaced.

    Returns:
        Batches: images and noise, float32 with shape `(n, channels, height, width)`, timesteps, int64 with shape `(n,)`, and
        `class_labels` alike if the model is class conditional.

    Raises:
        ValueError: There are fewer images than processes, or a number is out of range.
    """
    _check(1, calibration_batches=num_batches, calibration_batch_size=batch_size, num_train_timesteps=num_train_timesteps)
    _check(0, seed=seed, step=step)
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
        batch, unread = stack_examples(examples, times, num_train_timesteps)
        if broken is not None:
            broken.add(unread)
        batches.append(batch)
    return batches


def _row_blocks(
    images: ImageRows, num_batches: int, batch_size: int, seed: int, step: int, rank: int, world_size: int
) -> Iterator[list[EncodedImage]]:
    """This process's block of every calibration batch."""
    size = min(batch_size, images.num_images // world_size)
    for number in range(num_batches):
        generator = random_generator(seed, CALIBRATION, step, number)
        chosen = generator.choice(images.num_images, size * world_size, replace=False)
        yield [images[index] for index in chosen[rank * size : (rank + 1) * size]]


def _stream_blocks(
    images: ImageStream, num_batches: int, batch_size: int, seed: int, step: int, rank: int, world_size: int
) -> Iterator[list[EncodedImage]]:
    """As `_row_blocks`, in the order of passes over the stream that are made for this step."""
    passes = (images.shuffled(random_generator(seed, CALIBRATION, step, number)) for number in itertools.count())
    stream, wanted = next(passes), batch_size * world_size
    for _ in range(num_batches):
        batch = list(itertools.islice(stream, wanted))
        if len(batch) < wanted:  # the end: begin again, and if a whole pass is too short, that is all there is
            stream = next(passes)
            batch = list(itertools.islice(stream, wanted))
        size = len(batch) // world_size
        yield batch[rank * size : (rank + 1) * size]
