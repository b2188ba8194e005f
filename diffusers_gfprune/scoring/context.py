"""ScoringContext: inputs and helper methods of a criterion.

Gradients refer to *global* batches. With several processes, `batches` are this rank's rows of them (the same number on every
rank), and `gradients`, `mean_gradient` and `summed_gradients` return means over ranks. A criterion that only uses these
methods does not depend on the number of processes. Losses are those of this rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..configuration import GFPruneConfig
from ..criteria import criteria, find_criterion
from ..diffusion.batch import DiffusionBatch
from ..diffusion.process import DiffusionProcess, per_image
from ..diffusion.schedulers import training_process
from ..distributed import mean_over_ranks, world_size
from ..families.lookup import family_of
from ..pruning.channel_groups import ChannelGroup
from ..pruning.masking import MASKS_MODULE, dense_parameters

__all__ = ["JointScores", "Scores", "ScoringContext", "check_batch", "check_criterion", "equal_batches"]

Scores = dict[str, Tensor]


@dataclass(frozen=True)
class JointScores:
    """Scores of single units, and what units change together.

    Attributes:
        scores: Scores by group name, float32 with shape `(num_units,)`.
        changes: Changes along random directions by group name, float32 with shape `(rows, num_units)`; the same rows in all
            groups. The mean squared change of the predictions when a set of units is removed is, to first order, the sum of
            squares over rows of the sum over units.
    """

    scores: Scores
    changes: dict[str, Tensor]


def check_batch(unet: nn.Module, process, batch: DiffusionBatch) -> None:
    """Check that a calibration batch fits the model.

    Args:
        unet: The model.
        process: The process of the model's training.
        batch: The batch.

    Raises:
        ValueError: A tensor has a wrong shape, dtype or range, or class labels are missing or not supported.
    """
    batch.check(unet.config.in_channels, process)
    family_of(unet).check_conditioning(unet, batch.conditioning, len(batch))


def check_criterion(name: str, process: DiffusionProcess) -> None:
    """Check that a criterion can score models of a process.

    Raises:
        ValueError: The criterion is unknown, or it needs a target that the process does not have.
    """
    if find_criterion(name).needs_target and not process.has_target:
        free = ", ".join(other for other in criteria() if not find_criterion(other).needs_target)
        raise ValueError(
            f"criterion={name} must be one of {free}: the model is {process.title}, which has no target for a loss"
        )


def equal_batches(batch: DiffusionBatch, batches: Sequence[DiffusionBatch]) -> float:
    """How many batches of the size of `batch` have as many images as `batches`.

    Divided by this, means over batches add up to the mean over images, also if the last batch is a short one.
    """
    return sum(map(len, batches)) / len(batch)


@dataclass
class ScoringContext:
    """Inputs of a criterion.

    Attributes:
        unet: The model, in evaluation mode, with float32 weights.
        groups: Its channel groups.
        batches: Calibration batches; with several processes, the rows of this rank.
        process: The process of the model's training; it may be given as a scheduler.
        config: All options.
        ranking: Number of this ranking, from which random directions follow (>= 0).
        parameters: Parameters with a slice in a group, by dense name.
    """

    unet: nn.Module
    groups: Sequence[ChannelGroup]
    batches: Sequence[DiffusionBatch]
    process: DiffusionProcess
    config: GFPruneConfig
    ranking: int = 0
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.process = training_process(self.process)
        names = {piece.name for group in self.groups for piece in group.slices}
        self.parameters = {n: p for n, p in dense_parameters(self.unet).items() if n in names}

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(iter(self.parameters.values())).device

    def loss(self, batch: DiffusionBatch, sample_weights: Tensor | None = None) -> Tensor:
        """Loss of a batch on this rank: the mean of sample losses times `sample_weights`, with shape `(batch,)`; a scalar."""
        errors = self.sample_losses(batch)
        return errors.mean() if sample_weights is None else (errors * sample_weights).mean()

    def predictions(self, batch: DiffusionBatch) -> Tensor:
        """Predictions for the noisy images of a batch, float32 with the shape of the images.

        If the process scales outputs in sampling (`output_scale`), these are the scaled ones.

        Raises:
            ValueError: The prediction has another shape.
        """
        inputs = batch.to(self.device).inputs(self.process, self.unet.dtype)
        prediction = family_of(self.unet).predict(self.unet, inputs).float()
        if prediction.shape != inputs.sample.shape:
            raise ValueError(
                f"the prediction has shape {tuple(prediction.shape)}, its target has {tuple(inputs.sample.shape)}"
            )
        scale = self.process.output_scale(batch.timesteps)
        return prediction if scale is None else prediction * per_image(scale, prediction)

    def sample_losses(self, batch: DiffusionBatch) -> Tensor:
        """Mean squared error of each sample, with shape `(batch,)`; the process needs a target."""
        prediction = self.predictions(batch)
        target = batch.to(self.device).target(self.process)
        return ((prediction - target) ** 2).mean(dim=(1, 2, 3))

    def gradients(self, loss: Tensor, create_graph: bool = False) -> dict[str, Tensor]:
        """Gradient of a scalar by parameter name: the mean over ranks, or with `create_graph` that of this rank."""
        gradients = torch.autograd.grad(loss, list(self.parameters.values()), create_graph=create_graph)
        if not create_graph and world_size() > 1:
            gradients = [gradient.clone() for gradient in gradients]  # autograd may return views or shared tensors
            mean_over_ranks(gradients)
        return dict(zip(self.parameters, gradients))

    def summed_gradients(self, losses: Iterable[Tensor]) -> dict[str, Tensor]:
        """Gradient of a sum of scalars by parameter name, accumulated in place, then the mean over ranks.

        Autograd accumulates into `.grad`, which avoids a second set of gradients; existing values of `.grad` are restored.
        """
        parameters = list(self.parameters.values())
        held = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            for loss in losses:
                torch.autograd.backward(loss, inputs=parameters)
            gradients = {
                name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                for name, parameter in self.parameters.items()
            }
        finally:
            for parameter, gradient in zip(parameters, held):
                parameter.grad = gradient
        mean_over_ranks(gradients.values())
        return gradients

    def mean_gradient(self, batches: Sequence[DiffusionBatch]) -> dict[str, Tensor]:
        """Gradient of the mean loss over the images of batches, on all ranks."""
        return self.summed_gradients(self.loss(batch) / equal_batches(batch, batches) for batch in batches)

    def reduce(self, contributions: Mapping[str, Tensor], aggregation: str, derivatives: bool = False) -> Scores:
        """Sum per-weight contributions over the slices of each unit.

        Args:
            contributions: For each name in `parameters`, a tensor with the parameter's shape.
            aggregation: `"signed"` (sum), `"abs"` (absolute value of the sum) or `"sum_abs"` (sum of absolute values).
            derivatives: Whether contributions are derivatives by weights, times any values. With `score_at="midpoint"` they
                have the factor m of their unit's mask: weights that produce it are multiplied by m, and those that read it
                read a multiple of m. Sums are then divided by m, so that halved and kept units are compared alike.

        Returns:
            Scores by group name, float32 with shape `(num_units,)`.
        """
        masks = getattr(self.unet, MASKS_MODULE, None)
        by_mask = derivatives and self.config.score_at == "midpoint" and masks is not None and not masks.all_ones
        along: dict[tuple[str, int], Tensor] = {}
        scores = {}
        for group in self.groups:
            total = None
            for piece in group.slices:
                key = (piece.name, piece.dim)
                if key not in along:
                    values = contributions[piece.name].float()
                    values = values.abs() if aggregation == "sum_abs" else values
                    along[key] = values.transpose(0, piece.dim).flatten(1).sum(1) if values.ndim > 1 else values
                part = along[key][list(piece.positions)]
                part = part.sum(dim=0, keepdim=True) if piece.role == "branch" else part
                total = part.clone() if total is None else total.add_(part)
            total = group.unit_sums(total)
            if by_mask:
                mask = masks[group.name].to(total)
                total = total / torch.where(mask == 0, 1, mask)
            scores[group.name] = total.abs() if aggregation == "abs" else total
        return scores
