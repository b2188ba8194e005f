"""Recovery in a run: least squares for the layers that read pruned channels (`pruning.recovery`).

`--recovery rankings` mends the model at every ranking, for the masks that the ranking leads to. In the soft phase, targets are
the layer outputs of the dense model: most units go here, and what one ranking cannot mend, the next one can. In the hard phase
the model has been trained for the units it lost, and the outputs of the dense model would undo that. Targets are then those of
the model as it was before the ranking, with the masks and weights of that step.

In the soft phase, the masks of a ranking are reached at the next ranking only. A unit whose mask falls from 1 to m takes
(1 - m) of what it wrote from the layers that read it, in proportion to how far the mask has come. So do the changes of
weights, which follow the masks:

    m(s) = m_0 + s (m_1 - m_0)          W(s) = W + s dW          0 <= s <= 1

while W trains as usual. Channels of units that fall are neither used nor mended.

`--recovery compaction` mends it once, when masks freeze, towards the layer outputs of the dense model. In one shot both are
the same: nothing has been trained by then, and the run starts from a model with most of the damage mended.

The images are those of the ranking with further noise, fewer than in `prune()`, which costs little (benchmarks/FINDINGS.md).
Everything is a function of weights, masks, seed and step, and checkpoints hold dW, so that a resumed run does the same.
Averaged weights change by as much as the weights; the optimizer keeps its moments.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ..diffusion.batch import DiffusionBatch
from ..diffusion.placement import moved
from ..one_shot import recovery_batches
from ..pruning.compaction import CompactionPlan, plan_compaction
from ..pruning.masking import dense_parameters
from ..pruning.recovery import recover

__all__ = [
    *("RECOVERIES", "ROWS", "SAMPLES", "WeightPath", "follow_changes", "mend", "model_before", "plan_changes"),
    "weights_restored",
]

RECOVERIES = ("none", "compaction", "rankings")
SAMPLES, ROWS = 256, 2**13  # images, and rows that a layer reads, at most


@dataclass
class WeightPath:
    """Changes of weights that are made gradually.

    Attributes:
        start_step: Step of the ranking.
        goal_step: Step at which all of the changes are made (>= `start_step`).
        changes: By dense parameter name, of the parameters' shapes and on their device.
        done: Share that has been made, in [0, 1].
    """

    start_step: int
    goal_step: int
    changes: dict[str, Tensor]
    done: float = 0.0

    def share(self, step: int) -> float:
        """Share of the changes at a step, in [0, 1]."""
        return 1.0 if step >= self.goal_step else (step - self.start_step) / (self.goal_step - self.start_step)

    def values(self) -> dict[str, float]:
        """All but the tensors, for JSON."""
        return {"start_step": self.start_step, "goal_step": self.goal_step, "done": self.done}


def mend(reference: ModelMixin, pruner, plan: CompactionPlan, batches: Sequence[DiffusionBatch], seed: int = 0) -> None:
    """Recovery of the masked model of a pruner in place, with the images and rows of a run.

    Args:
        reference: The dense model, or another one of its shapes whose layer outputs are the targets, on the same device.
        pruner: A `GradientFlowPruner`, with the masks that its model is to be mended for.
        plan: Compaction plan of these masks.
        batches: Calibration batches; with several processes, the rows of this rank.
        seed: Seed for further noise.
    """
    images = recovery_batches(batches, pruner.process, seed, SAMPLES)
    recover(reference, pruner.unet, plan, images, pruner.process, rows=ROWS)


@torch.no_grad()
def model_before(unet: ModelMixin, masks: Mapping[str, Tensor], dense: ModelMixin) -> ModelMixin:
    """A model without masks that computes what a masked model does with given masks.

    Args:
        unet: The masked model, on any device.
        masks: By group name, each with shape `(num_units,)`.
        dense: The dense model, of which a copy gets the weights, on its device.
    """
    found = copy.deepcopy(dense)
    with unet.channel_masks.replaced(masks):
        for name, parameter in found.named_parameters():
            module, _, leaf = name.rpartition(".")
            parameter.copy_(getattr(unet.get_submodule(module), leaf))
    return found


@contextmanager
def weights_restored(unet: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Weights of a masked model are at the end what they were; inside, these are at hand by dense name."""
    parameters = dense_parameters(unet)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield before
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])


@torch.no_grad()
def plan_changes(
    state,
    dense: ModelMixin,
    batches: Sequence[DiffusionBatch],
    seed: int,
    device: torch.device | str = "cpu",
    masks_before: Mapping[str, Tensor] | None = None,
) -> None:
    """Compute changes of weights for the masks that the last ranking leads to. All processes must call this function.

    Args:
        state: A `TrainingState`, whose `weight_path` is replaced. Its weights come to the end of the old one.
        dense: The dense model, on any device, which stays as it is.
        batches: This process's rows of calibration batches.
        seed: Seed of the run, for further noise.
        device: Training device.
        masks_before: Masks before the ranking, by group name, each with shape `(num_units,)`. Targets are the layer outputs of
            the model with these and its weights at this step (default: those of the dense model).
    """
    follow_changes(state)
    pruner, unet = state.pruner, state.unet
    goal_step, masks = pruner.goal(state.step)
    plan = plan_compaction(unet, pruner.groups, {name: kept.float() for name, kept in pruner.kept.items()})
    reference = dense if masks_before is None else model_before(unet, masks_before, dense)
    with weights_restored(unet) as before:
        with moved([reference], device), unet.channel_masks.replaced(masks):
            mend(reference, pruner, plan, [batch.to(device) for batch in batches], seed + state.step)
        after = dense_parameters(unet)
        changes = {name: p.detach() - before[name] for name, p in after.items() if not torch.equal(p, before[name])}
    state.weight_path = WeightPath(state.step, goal_step, changes)


@torch.no_grad()
def follow_changes(state) -> None:
    """Change weights and averaged weights of a `TrainingState` to their position at its step."""
    path = state.weight_path
    if path is None:
        return
    share = path.share(state.step)
    parameters = dense_parameters(state.unet)
    averages = {} if state.ema is None else dict(zip(parameters, state.ema.shadow_params))
    for name, change in path.changes.items():
        for tensors in (parameters, averages):
            if name in tensors:
                tensors[name].add_(change.to(tensors[name]), alpha=share - path.done)
    path.done = share
    if share == 1:
        state.weight_path = None
