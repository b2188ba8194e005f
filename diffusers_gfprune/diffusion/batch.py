"""Batches of images with noise, and the inputs and targets of a model.

How noise is added, what the model is fed and what it should predict is up to a `DiffusionProcess`, as returned by
`schedulers.training_process`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DiffusionBatch", "ModelInputs", "check_integers"]


class ModelInputs(NamedTuple):
    """Inputs of a model.

    Attributes:
        sample: Noisy images, floating point with shape `(batch, channels, height, width)`.
        timesteps: Timesteps as the model takes them, integers or floating point with shape `(batch,)`, or a single one.
        conditioning: Further arguments by name, such as `class_labels` with shape `(batch,)` or `encoder_hidden_states` with
            shape `(batch, tokens, channels)`; empty for unconditional models.
    """

    sample: Tensor
    timesteps: Tensor
    conditioning: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class DiffusionBatch:
    """Images with their noise.

    Attributes:
        clean: Images in [-1, 1], or latents as the model denoises them, floating point with shape
            `(batch, channels, height, width)`.
        noise: Gaussian noise of the same shape and dtype.
        timesteps: Timesteps as the model takes them, with shape `(batch,)`: int64, or float32 for processes of continuous
            noise levels.
        conditioning: Further arguments of the model by name, with one row for each image, such as `class_labels`, int64 with
            shape `(batch,)`, or `encoder_hidden_states`, floating point with shape `(batch, tokens, channels)`. The family's
            `predict` passes them to the model. Empty for unconditional models.
    """

    clean: Tensor
    noise: Tensor
    timesteps: Tensor
    conditioning: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: DiffusionBatch | Sequence[Tensor]) -> DiffusionBatch:
        """Convert a tuple `(clean_images, noise, timesteps[, class_labels])`; a batch is returned unchanged.

        Raises:
            ValueError: The number of tensors is wrong.
        """
        if isinstance(batch, cls):
            return batch
        if not 3 <= len(batch) <= 4:
            given = f"not {len(batch)} tensors"
            raise ValueError(f"a calibration batch is (clean_images, noise, timesteps[, class_labels]), {given}")
        return cls(*batch[:3], dict(zip(["class_labels"], batch[3:])))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.clean)

    def tensors(self) -> list[Tensor]:
        """All tensors of the batch."""
        return [self.clean, self.noise, self.timesteps, *self.conditioning.values()]

    def seeds(self) -> tuple[int, ...]:
        """A seed for each image, from the first value of its noise: the same however batches are split over processes."""
        return tuple(self.noise.flatten(1)[:, 0].float().view(torch.int32).tolist())

    def _rebuilt(self, tensors: Sequence[Tensor]) -> DiffusionBatch:
        """A batch with other tensors in the order of `tensors()`."""
        return DiffusionBatch(*tensors[:3], dict(zip(self.conditioning, tensors[3:])))

    def to(
        self, device: torch.device, non_blocking: bool = False, memory_format: torch.memory_format | None = None
    ) -> DiffusionBatch:
        """Move the batch to a device, and images and noise to a memory format, if given."""
        moved = [tensor.to(device, non_blocking=non_blocking) for tensor in self.tensors()]
        if memory_format is not None:
            moved[:2] = [tensor.to(memory_format=memory_format) for tensor in moved[:2]]
        return self._rebuilt(moved)

    def pin_memory(self) -> DiffusionBatch:
        """The batch in page-locked memory, for `DataLoader(pin_memory=True)`."""
        return self._rebuilt([tensor.pin_memory() for tensor in self.tensors()])

    def split(self, size: int) -> list[DiffusionBatch]:
        """Split into batches of `size` images (>= 1); the last one may be smaller."""
        return [self._rebuilt(parts) for parts in zip(*(tensor.split(size) for tensor in self.tensors()))]

    def inputs(self, process, dtype: torch.dtype | None = None) -> ModelInputs:
        """Inputs of a model: noisy images, timesteps and conditioning.

        Args:
            process: The `DiffusionProcess` of the model.
            dtype: Dtype of the noisy images and of embeddings in the conditioning (default: unchanged).
        """
        noisy = process.scale_model_input(process.add_noise(self.clean, self.noise, self.timesteps), self.timesteps)
        if dtype is None:
            return ModelInputs(noisy, self.timesteps, self.conditioning)
        # Labels of one number, which may be timesteps, are not rounded
        embeddings = {k: v.to(dtype) for k, v in self.conditioning.items() if v.is_floating_point() and v.ndim > 1}
        return ModelInputs(noisy.to(dtype), self.timesteps, {**self.conditioning, **embeddings})

    def target(self, process) -> Tensor:
        """Target of the prediction, with the shape of `noise`.

        Raises:
            ValueError: The process has no target.
        """
        return process.target(self.clean, self.noise, self.timesteps)

    def check(self, channels: int, process) -> None:
        """Check that a batch fits a model and a process. The model's family checks the conditioning.

        Args:
            channels: `in_channels` of the model.
            process: The process.

        Raises:
            ValueError: A tensor has a wrong shape, dtype or range.
        """
        clean, noise = self.clean, self.noise
        if clean.ndim != 4 or clean.shape[1] != channels:
            given = f"{clean.shape[1]} channels" if clean.ndim == 4 else f"shape {tuple(clean.shape)}"
            raise ValueError(f"clean images have {given}, but the model has in_channels={channels}")
        if len(clean) == 0:
            raise ValueError(f"clean images have shape {tuple(clean.shape)}: a calibration batch needs at least one image")
        if noise.shape != clean.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, but clean images have {tuple(clean.shape)}")
        process.check_timesteps(self.timesteps, len(clean))


def check_integers(name: str, values: Tensor, size: int, count: int, because: str = "") -> None:
    """Check that values are integers from 0 to `count - 1` with shape `(size,)`; `because` adds the reason to the error."""
    requirement = f"{because}they must be integers from 0 to {count - 1}"
    if values.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} have dtype {values.dtype}; {requirement}")
    if values.shape != (size,):
        raise ValueError(f"{name} have shape {tuple(values.shape)}, not {(size,)}; {requirement}")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= count:
        raise ValueError(f"{name} range from {low} to {high}; {requirement}")
