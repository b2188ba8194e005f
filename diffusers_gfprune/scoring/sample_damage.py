"""Damage in samples: how far wrong predictions move the samples of a model, without sampling again for each of them.

A mean over all timesteps says little of samples. On the digits, most of the squared error of a pruned model is at the lowest
noise levels, where a step changes hardly anything; and errors that are alike at all steps add up, while others cancel. What a
step does to the sample is therefore measured. With the trajectory of the dense model from some noise, its predictions
f_1, ..., f_S and the sample x_0, one step at a time takes the prediction f_i' of a slightly narrower model, and all others are
those of the dense model. The change of the sample, which includes all that later steps make of it, has a part along the
change of the prediction and a rest:

    d_i = f_i' - f_i            x_0(f_1, ..., f_i', ..., f_S) - x_0 = a_i d_i + rest
    a_i = E <x_0(...) - x_0, d_i> / E |d_i|^2                         b_i = E |rest|^2 / E |d_i|^2

The damage of any other change of the model is estimated from its changes d_i on the same trajectories. Parts along d_i add up
over steps with their signs, rests as if they were independent:

    D = E |sum_i a_i d_i|^2 + sum_i b_i E |d_i|^2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..diffusion.batch import DiffusionBatch, ModelInputs
from ..distributed import mean_over_ranks
from ..families.lookup import family_of
from .context import ScoringContext

__all__ = ["SAMPLING_STEPS", "SampleDamage"]

SAMPLING_STEPS = 10
SAMPLES = 16  # that weights are measured on, over all processes
MEASURED_SAMPLES = 8  # of these: trajectories that other changes are measured on


class SampleDamage:
    """Trajectories of the dense model, and what changes of each step do to the samples.

    Attributes:
        along: a_i in the order of the steps, float64 with shape `(steps,)`; the same on every rank.
        rest: b_i, likewise.

    Args:
        context: The model, without a graph.
        batch: Noise to start from, and its conditioning, of this rank.
        dense: Masks of the dense model by group name.
        narrower: Masks of a slightly narrower model.
        measured: Number of trajectories of this rank that other changes are measured on (>= 1).
        rows: Number of rows in a forward pass (>= 1).
    """

    def __init__(
        self,
        context: ScoringContext,
        batch: DiffusionBatch,
        dense: Mapping[str, Tensor],
        narrower: Mapping[str, Tensor],
        measured: int,
        rows: int,
    ) -> None:
        self.context, self.batch = context, batch.to(context.device)
        # Pixels are in [-1, 1]; what has other values is not clipped to them, on any rank
        beyond = [(self.batch.clean.abs() > 1).float().mean()]
        mean_over_ranks(beyond)
        self._latents = bool(beyond[0] > 0)
        masks = context.unet.channel_masks
        with masks.replaced(dense):
            sample, inputs, predictions = self._trajectory([])
        with masks.replaced(narrower):
            changed = [self._predict(step) for step in inputs]
        products = []  # of the changes of samples and predictions, with themselves and one another
        with masks.replaced(dense):
            for i, (new, old) in enumerate(zip(changed, predictions)):
                moved = (self._trajectory([*predictions[:i], new])[0] - sample).double()
                change = (new - old).double()
                products.append(torch.stack([moved.square().mean(), (moved * change).mean(), change.square().mean()]))
        table = torch.stack(products)
        mean_over_ranks([table])
        square, product, size = table.T
        size = torch.where(size > 0, size, torch.inf)  # a step that changes nothing
        self.along = product / size
        self.rest = (square / size - self.along**2).clamp_min(0)
        self._rows = rows
        self._inputs = [_first(step, measured) for step in inputs]
        self._predictions = [prediction[:measured] for prediction in predictions]

    def _predict(self, inputs: ModelInputs) -> Tensor:
        return family_of(self.context.unet).predict(self.context.unet, inputs).float()

    def _trajectory(self, given: Sequence[Tensor]) -> tuple[Tensor, list[ModelInputs], list[Tensor]]:
        """Sample with the first predictions given. Returns the samples, and inputs and predictions of each step."""
        process, dtype = self.context.process, self.context.unet.dtype
        steps, spacing, _ = process.fit_sampling(min(SAMPLING_STEPS, process.num_train_timesteps), None)
        sampler = process.sampler(steps, spacing, latents=self._latents)
        generators = [torch.Generator().manual_seed(number) for number in range(len(self.batch))]  # if steps add noise
        conditioning = self.batch.inputs(process, dtype).conditioning
        x, inputs, predictions = self.batch.noise.float() * sampler.init_noise_sigma, [], []
        for i, timestep in enumerate(sampler.timesteps):
            scaled = sampler.scale_model_input(x, timestep).to(dtype)
            inputs.append(ModelInputs(scaled, timestep.to(x.device).expand(len(x)), conditioning))
            predictions.append(given[i] if i < len(given) else self._predict(inputs[-1]))
            x = sampler.step(predictions[-1], timestep, x, generators)
        return x, inputs, predictions

    def of_present(self) -> float:
        """D of the model as it is now, on this rank."""
        parts = [self._predict(part) for part in _split(_joined(self._inputs), self._rows)]
        changes = (torch.cat(parts) - torch.cat(self._predictions)).double()
        changes = changes.view(len(self.along), -1)  # (steps, values of all trajectories)
        return float((self.along @ changes).square().mean() + self.rest @ changes.square().mean(dim=1))


def _first(inputs: ModelInputs, count: int) -> ModelInputs:
    """The first rows."""
    conditioning = {name: rows[:count] for name, rows in inputs.conditioning.items()}
    return ModelInputs(inputs.sample[:count], inputs.timesteps[:count], conditioning)


def _joined(steps: Sequence[ModelInputs]) -> ModelInputs:
    """The rows of all steps in one batch."""
    names = steps[0].conditioning
    conditioning = {name: torch.cat([step.conditioning[name] for step in steps]) for name in names}
    return ModelInputs(torch.cat([s.sample for s in steps]), torch.cat([s.timesteps for s in steps]), conditioning)


def _split(inputs: ModelInputs, size: int) -> list[ModelInputs]:
    """Batches of `size` rows."""
    count = -(-len(inputs.timesteps) // size)
    parts = {name: rows.split(size) for name, rows in inputs.conditioning.items()}
    return [
        ModelInputs(sample, timesteps, {name: parts[name][i] for name in parts})
        for i, sample, timesteps in zip(range(count), inputs.sample.split(size), inputs.timesteps.split(size))
    ]
