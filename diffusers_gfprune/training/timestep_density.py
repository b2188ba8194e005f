"""Where training draws timesteps: more often where student and target are far apart (`--timestep_sampling importance`).

The loss is a mean over u, the position of a timestep in its distribution, uniform in [0, 1). Drawn with a density p and
weighted by 1 / p(u), it has the same mean, and its gradient has the least variance for

    p(u) ~ sqrt(E |g|^2 at u)

with the gradient g of an image's loss. This is importance sampling, as Katharopoulos and Fleuret (arXiv 1803.00942) draw
images and Nichol and Dhariwal (arXiv 2102.09672, section 3.3) timesteps. In place of g stands the gradient with respect to
the model's output, which needs no further pass. Its square is proportional to the squared error of the image, and to the
square of the image's weight in the loss (`objective.BatchLoss`).

[0, 1) is divided into 32 equal parts, with one p each. Means of squares are over about the last 100 steps and over all
processes. A tenth of the draws ignores them, so that no weight is larger than 10. Until all parts have been seen, p is 1.

u may be drawn independently or be stratified. If it is stratified, each part gets its share of every batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..diffusion.batch import DiffusionBatch
from ..diffusion.process import DiffusionProcess

__all__ = ["DECAY", "PARTS", "UNIFORM", "UPDATE_STEPS", "TimestepDensity"]

PARTS = 32
UPDATE_STEPS, DECAY = 10, 0.9
UNIFORM = 0.1


class TimestepDensity:
    """The density of a run, measured as it trains.

    Args:
        device: Device of the losses. It is synchronized once in `UPDATE_STEPS` steps.

    Attributes:
        step: Number of steps so far.
        totals: Sums of squares of the images and their number by part, weighted by `DECAY`, with shape `(2, PARTS)`.
        recent: The same of the steps since the last update, float32 on the device. Like `totals`, it is of all processes.
        current: The same of this process in the current step.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.step = 0
        self.totals = np.zeros((2, PARTS))
        self.recent, self.current = torch.zeros(2, 2, PARTS, device=device)

    def density(self) -> np.ndarray:
        """p of each part, with shape `(PARTS,)`, at least `UNIFORM`; the mean is 1."""
        squares, images = self.totals
        if not images.all() or not squares.any():
            return np.ones(PARTS)
        roots = np.sqrt(squares / images)
        return (1 - UNIFORM) * roots / roots.mean() + UNIFORM

    def place(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Positions that are distributed by the density.

        Args:
            times: Uniform positions in [0, 1), floating point with shape `(batch,)`, on the CPU.

        Returns:
            Positions in [0, 1), float64, and the weight of each in the loss, float32, in (0, 1 / `UNIFORM`]. Both have shape
            `(batch,)`.
        """
        density = self.density()
        ends = np.append(0.0, np.cumsum(density) / PARTS)
        uniform = times.double().numpy()
        part = np.clip(np.searchsorted(ends, uniform, side="right") - 1, 0, PARTS - 1)
        placed = (part + (uniform - ends[part]) * PARTS / density[part]) / PARTS
        placed = np.clip(placed, part / PARTS, np.nextafter((part + 1) / PARTS, 0))  # rounding leaves no part
        return torch.from_numpy(placed), torch.from_numpy(1 / density[part]).float()

    def redraw(self, batch: DiffusionBatch, times: Tensor, process: DiffusionProcess) -> tuple[DiffusionBatch, Tensor, Tensor]:
        """A batch with timesteps that are distributed by the density.

        Args:
            batch: The batch.
            times: Uniform positions of its timesteps (`place`).
            process: Process of the model's training.

        Returns:
            The batch, positions, and weights of its images, as `place` returns them.
        """
        times, weights = self.place(times)
        return dataclasses.replace(batch, timesteps=process.timesteps_at(times)), times, weights

    def add(self, times: Tensor, squares: Tensor) -> None:
        """Count the images of a batch.

        Args:
            times: Where they are in [0, 1), with shape `(batch,)`, on any device.
            squares: Squared gradient norms up to a common factor (`BatchLoss`), with shape `(batch,)`. What is not finite, as
                where fp16 overflows, is left out.
        """
        part = one_hot((times * PARTS).long(), PARTS).to(self.current.device, torch.float32)
        finite = squares.isfinite()
        rows = torch.stack([squares.float().where(finite, 0.0), finite.float()])
        self.current += rows @ part  # sums in a fixed order, unlike those of `index_add_` on a GPU

    def finish_step(self, total: Callable[[Tensor], Tensor]) -> None:
        """End an optimizer step. Every `UPDATE_STEPS` steps the density changes, on all processes alike.

        Args:
            total: The sum of a tensor over all processes.
        """
        self.step += 1
        self.recent += total(self.current)
        self.current.zero_()
        if self.step % UPDATE_STEPS == 0:
            self.totals = DECAY * self.totals + self.recent.double().cpu().numpy()
            self.recent.zero_()

    def describe(self, timesteps_at: Callable[[Tensor], Tensor]) -> dict[str, list[float]]:
        """For reports: `density` and the `timesteps` in the middle of the parts.

        Args:
            timesteps_at: Timesteps at positions (`DiffusionProcess.timesteps_at`).
        """
        middles = (torch.arange(PARTS, dtype=torch.float64) + 0.5) / PARTS
        return {"timesteps": timesteps_at(middles).tolist(), "density": self.density().tolist()}

    def values(self) -> dict:
        """The state between two steps, for JSON: the same on all processes."""
        return {"step": self.step, "totals": self.totals.tolist(), "recent": self.recent.tolist()}

    def restore(self, values: Mapping) -> None:
        """Restore what `values` returned."""
        self.step, self.totals = values["step"], np.array(values["totals"])
        self.recent.copy_(torch.tensor(values["recent"]))
