"""One image of a batch with its random crop, flip, latent, noise and time.

These are a function of the seed and a few numbers (such as the number of the draw in the run), so no random state must be
saved. Generators are NumPy's, seeded through `SeedSequence`, which gives independent streams for consecutive numbers. A CPU
generator of PyTorch uses only 32 bits of its seed, so two of about 65,000 draws would be the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..diffusion.batch import DiffusionBatch
from ..diffusion.process import DiffusionProcess
from .decoding import BrokenImage, EncodedImage
from .sources import ImageSource

__all__ = ["Example", "random_generator", "read_example", "stack_examples"]

# Purpose of a generator
ORDER, DRAW, REPLACEMENT, CALIBRATION, CALIBRATION_LABELS, STRATA = range(6)
MAX_REPLACEMENTS = 10


def random_generator(seed: int, *key: int) -> np.random.Generator:
    """A random generator seeded by all bits of a seed and any number of non-negative integers."""
    words = [word for number in key for word in (number & 0xFFFFFFFF, number >> 32)]  # two words for every number
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=words))


@dataclass
class Example:
    """The sample of an image with its conditioning and noise; `time` is uniform in [0, 1)."""

    sample: Tensor
    conditioning: dict[str, Tensor]
    noise: Tensor
    time: float
    broken: list[str]


def read_example(images: ImageSource, image: EncodedImage, seed: int, *key: int, drop: float | None = None) -> Example:
    """Read an image, or a replacement if it is broken, with the random numbers of (seed, key).

    If labels or captions are dropped, a random number, or `drop` if given, decides whether this one is.
    """
    generator = random_generator(seed, *key)
    *uniforms, time = generator.random(4)
    noise = torch.from_numpy(generator.standard_normal(images.sample_shape, dtype=np.float32))
    drop = generator.random() if drop is None else drop
    broken: list[str] = []
    for replacement in range(MAX_REPLACEMENTS + 1):
        try:
            sample = images.sample(image, uniforms, generator)
            return Example(sample, images.conditioning(image, drop, generator), noise, time, broken)
        except BrokenImage as error:
            broken.append(image.name)
            reason = error
            image = images.spare(random_generator(seed, REPLACEMENT, *key, replacement))
    raise ValueError(f"{len(broken)} images in a row cannot be read or do not fit the model, the last one: {reason}")


def stack_examples(
    examples: Sequence[Example], times: Iterable[float], process: DiffusionProcess
) -> tuple[DiffusionBatch, list[str]]:
    """A batch with timesteps at `times` in the distribution of a process's training, and the names of broken images."""
    names = examples[0].conditioning
    batch = DiffusionBatch(
        torch.stack([example.sample for example in examples]),
        torch.stack([example.noise for example in examples]),
        process.timesteps_at(torch.tensor(list(times), dtype=torch.float64)),
        {name: torch.stack([example.conditioning[name] for example in examples]) for name in names},
    )
    return batch, list(dict.fromkeys(name for example in examples for name in example.broken))
