"""Importance scores of units from calibration batches. The units with the lowest scores are pruned.

With weights theta, noise-prediction loss L, gradient g = dL/dtheta, Hessian H, and sums over the slices of all channels of a
unit c:

    gradient-flow           E |df/dm_c|^2       the squared gradient norm that removing c causes, in the metric of
                                                predictions f (`natural_gradient`)
    gradient-flow-weights   sum_c |theta (H g)| the same in the metric of weights; with `aggregation="signed"`, without
                                                absolute values, as published in arXiv 2501.09464. Derived as in GraSP
                                                (Wang et al., arXiv 2002.07376): removing c changes ||g||^2 by
                                                -2 theta_c . (H g)_c to first order
    taylor                  | sum_c theta g |   Molchanov et al., arXiv 1906.10771
    diff-pruning            sum_c | theta g |   Fang et al., arXiv 2305.10924: g over timesteps whose loss is at least a
                                                share (0.05) of the largest
    magnitude               sum_c theta^2       Li et al., arXiv 1608.08710, with the squared L2 norm
    random                  uniform in [0, 1)

With masks of 1/2 (`score_at="midpoint"`), derivatives by weights have this factor, and their sums are divided by it
(`ScoringContext.reduce`).

A criterion is a function that maps a `ScoringContext` to scores by group name, with a record (`criteria.Criterion`).
`register_criterion` adds a criterion:

    @register_criterion("my-criterion")
    def my_criterion(context):
        return context.reduce({name: p.detach() ** 4 for name, p in context.parameters.items()}, "sum_abs")
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..configuration import GFPruneConfig
from ..criteria import Criterion, find_criterion, register_criterion
from ..diffusion.batch import DiffusionBatch
from ..distributed import check_identical, gather_rows
from ..precision import check_float64
from ..pruning.blocks import RemovableBlock
from ..pruning.channel_groups import ChannelGroup
from .context import JointScores, Scores, ScoringContext, equal_batches
from .hessian_product import HESSIAN_PRODUCTS
from .mode import scoring_mode
from .natural_gradient import joint_changes, prediction_changes

__all__ = [
    *("ScoringContext", "average_scores", "normalize_scores", "score_units", "score_units_jointly"),
    "scoring_context",
]

# For criteria that do not use images
WEIGHTS_ONLY = {"derivatives": 0, "needs_batches": False, "needs_target": False, "passes": 0.0}


def _check_batches(batches: Sequence[DiffusionBatch], criterion: Criterion) -> None:
    """Check that batches have the same shapes on all ranks, before ranks wait for each other."""
    shapes = [size for batch in batches for column in batch.tensors() for size in column.shape]
    check_identical({"shapes of calibration batches": torch.tensor([len(batches), *shapes])})
    if criterion.needs_batches and len(batches) == 0:
        raise ValueError(f"criterion={criterion.name} needs calibration batches, got none")


def _check_finite(scores: Mapping[str, Tensor]) -> None:
    """Check that scores are finite on every rank; errors are raised on all ranks."""
    broken = torch.tensor([[not bool(torch.isfinite(values).all()) for values in scores.values()]])
    for name, is_broken in zip(scores, gather_rows(broken).any(dim=0).tolist()):
        if is_broken:
            raise ValueError(
                f"scores of {name} are not finite: the weights (did training diverge?) or the calibration images contain "
                f"NaN or infinity"
            )


def score_units(
    unet: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[DiffusionBatch],
    process,
    config: GFPruneConfig,
) -> Scores:
    """Score all units with `config.criterion`. Weights, masks, gradients and mode of the model are not changed.

    Scores are computed in float32 (float64 for float64 weights), independently of the training precision. A model with
    half-precision weights is copied. With several processes, all must call this, each with its rows of every batch.

    Args:
        unet: The dense or masked model.
        groups: Its channel groups.
        batches: Calibration batches (see `ScoringContext`).
        process: Scheduler of the model, or its process.
        config: The criterion and its options.

    Returns:
        Scores by group name, float32 with shape `(num_units,)`; the same on every rank.

    Raises:
        ValueError: The criterion is unknown, batches are missing, shapes of batches differ between ranks, or scores are not
            finite or differ between ranks. The last three are raised on all ranks.
    """
    with scoring_context(unet, groups, batches, process, config) as (criterion, context):
        scores = _checked_scores(criterion.function(context), groups)
    check_identical({f"scores of {name}": values for name, values in scores.items()})
    return scores


def score_units_jointly(
    unet: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[DiffusionBatch],
    process,
    config: GFPruneConfig,
    ranking: int = 0,
) -> JointScores:
    """`score_units` with the joint changes of units, for a criterion that measures them (`Criterion.joint`).

    `ranking` is the number of the ranking (>= 0). Changes of different rankings are added up, which needs independent random
    directions, also where all rankings have the same batches.

    Raises:
        ValueError: As `score_units`, or the criterion does not measure joint changes.
    """
    if find_criterion(config.criterion).joint is None:
        raise ValueError(f"criterion={config.criterion} does not measure joint changes")
    with scoring_context(unet, groups, batches, process, config, ranking) as (criterion, context):
        joint = criterion.joint(context)
    joint = JointScores(_checked_scores(joint.scores, groups), joint.changes)
    check_identical({f"scores of {name}": values for name, values in joint.scores.items()})
    check_identical({f"joint changes of {name}": values for name, values in joint.changes.items()})
    return joint


@contextmanager
def scoring_context(
    unet: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[DiffusionBatch],
    process,
    config: GFPruneConfig,
    ranking: int = 0,
) -> Iterator[tuple[Criterion, ScoringContext]]:
    """Context in which a criterion can be computed: batches are checked, and the model is in `scoring_mode`.

    The arguments and errors are those of `score_units_jointly`.
    """
    criterion = find_criterion(config.criterion)
    _check_batches(batches, criterion)
    check_float64(next(unet.parameters()).device)
    if any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in unet.parameters()):
        unet = copy.deepcopy(unet).float()
    context = ScoringContext(unet, groups, batches, process, config, ranking)
    mode = scoring_mode(
        unet,
        list(context.parameters.values()),
        dense=config.score_at == "dense",
        differentiate=1 if config.takes_hessian and config.hvp == "finite-difference" else criterion.derivatives,
        keep_activations=criterion.keeps_activations,
    )
    with mode:
        yield criterion, context


def _checked_scores(scores: Scores, groups: Sequence[ChannelGroup]) -> Scores:
    """Scores in float32, in the order of the groups; a criterion may be a user's.

    Raises:
        ValueError: A group has no scores, or scores have a wrong shape or are not finite. It is raised on all ranks.
    """
    for group in groups:
        found = tuple(scores[group.name].shape) if group.name in scores else None
        if found != (group.num_units,):
            has = "no scores" if found is None else f"scores with shape {found}"
            raise ValueError(f"the criterion gives {group.name} {has}, and not one for each of its {group.num_units} units")
    scores = {group.name: scores[group.name].float() for group in groups}
    _check_finite(scores)
    return scores


def average_scores(
    before: tuple[Scores | None, Scores | None], latest: tuple[Scores, Scores | None], decay: float
) -> tuple[Scores, Scores | None]:
    """Moving average of scores and joint changes over rankings.

    Scores decrease with the loss. Divided by their mean, all rankings have the same weight. Rows of joint changes come from
    independent random directions with mean 0, so that the sum of rows with the square roots of the weights has the averaged
    square (`natural_gradient`).

    Args:
        before: Averaged scores by group name and joint changes, both None before the first ranking.
        latest: Scores of this ranking, and its joint changes or None.
        decay: Weight of `before`, in [0, 1).

    Returns:
        Averaged scores on the CPU, float32 with shape `(num_units,)`, and joint changes, likewise with shape
        `(rows, num_units)`, or None.
    """
    scores, changes = latest
    scale = torch.cat([values.abs() for values in scores.values()]).mean().clamp_min(torch.finfo(torch.float32).tiny)
    scores = {name: (values / scale).cpu() for name, values in scores.items()}
    if changes is not None:
        changes = {name: (values / scale.sqrt()).cpu() for name, values in changes.items()}
    older_scores, older_changes = before
    if older_scores is not None:
        scores = {name: decay * older_scores[name] + (1 - decay) * values for name, values in scores.items()}
    if older_changes is not None and changes is not None:
        changes = {
            name: _stacked(decay**0.5 * older_changes[name], (1 - decay) ** 0.5 * values) for name, values in changes.items()
        }
    return scores, changes


def _stacked(older: Tensor, newer: Tensor) -> Tensor:
    """Row by row the sum of two tables; rows that only one of them has are appended."""
    longer, shorter = (older, newer) if len(older) >= len(newer) else (newer, older)
    total = longer.clone()
    total[: len(shorter)] += shorter
    return total


def normalize_scores(scores: Scores, groups: Sequence[ChannelGroup]) -> Scores:
    """Make scores of different groups comparable: divide those of each group by the mean absolute score of a channel.

    A mean over units would make the scores of channels small where units are large. Removable blocks have one score each, and
    are divided by the mean over all of them: on average, a block counts as much as a channel.

    Args:
        scores: Scores by group name, each with shape `(num_units,)`.
        groups: The groups.

    Returns:
        New scores; a group of zeros is unchanged.
    """
    tiny = torch.finfo(torch.float32).tiny
    blocks = [scores[group.name] for group in groups if isinstance(group, RemovableBlock)]
    normalized = {}
    for group in groups:
        values = scores[group.name]
        if isinstance(group, RemovableBlock):
            mean = torch.cat(blocks).abs().mean()
        else:
            mean = values.abs().sum() / max(1, int(group.unit_sizes.sum()))
        normalized[group.name] = values / mean.clamp_min(tiny)
    return normalized


# --- criteria ----------------------------------------------------------------------------------------------------------


@register_criterion(
    "gradient-flow",
    title="gradient flow",
    derivatives=1,
    joint=joint_changes,
    needs_target=False,
    keeps_activations=True,  # hooks do not see the outputs that checkpointing recomputes
    ranking="sensitivity",
    passes=2.0,
    block_passes=1 / 3,  # a forward
    weight_gradients=False,
    activation_memory=3.2,  # 4.0 (digits) and 3.2 times (CIFAR-10) by the peaks of benchmarks/cost.py, overhead included
)
def _gradient_flow(context: ScoringContext) -> Scores:
    return prediction_changes(context)


@register_criterion(
    "gradient-flow-weights",
    title="gradient flow, in weights",
    ranking="sensitivity",
    sensitivity_exponent=0.5,  # its sums spread less (benchmarks/README.md)
    passes=3.0,
)
def _theta_hg(context: ScoringContext) -> Scores:
    product = HESSIAN_PRODUCTS[context.config.hvp]
    batches = [[batch] for batch in context.batches]
    if context.config.hessian_batches == "mean":
        batches = [list(context.batches)]
    total: Scores = {}
    for chosen in batches:
        hg = product(context, chosen)
        theta_hg = {name: value.mul_(context.parameters[name].detach()) for name, value in hg.items()}
        part = context.reduce(theta_hg, context.config.aggregation, derivatives=True)
        share = equal_batches(chosen[0], context.batches)
        for name, values in part.items() if len(batches) > 1 else ():
            total[name] = total.get(name, 0) + values / share
    return total or part


@register_criterion("taylor", title="Taylor", derivatives=1)
def _taylor(context: ScoringContext) -> Scores:
    gradient = context.mean_gradient(context.batches)
    return context.reduce({n: context.parameters[n].detach() * g for n, g in gradient.items()}, "abs", derivatives=True)


@register_criterion("diff-pruning", title="Diff-Pruning", derivatives=1)
def _diff_pruning(context: ScoringContext) -> Scores:
    # From all ranks, in the order of the global batches: a single rank would find another threshold.
    timesteps = torch.cat([gather_rows(batch.timesteps).cpu() for batch in context.batches])
    with torch.no_grad():
        losses = torch.cat([gather_rows(context.sample_losses(batch)).cpu() for batch in context.batches])
    # Timesteps in ascending order are skipped from the first one whose loss is below the threshold. Losses are means over
    # buckets of neighbouring timesteps.
    order = timesteps.argsort(stable=True)
    bucket_losses = [bucket.mean().item() for bucket in losses[order].chunk(min(20, len(order)))]
    end, largest = math.inf, 0.0
    for bucket, bucket_loss in zip(timesteps[order].chunk(len(bucket_losses)), bucket_losses):
        largest = max(largest, bucket_loss)
        if bucket_loss < largest * context.config.diff_pruning_threshold:
            end = bucket[0].item()
            break
    counted = ((batch, (batch.timesteps < end).float().to(context.device)) for batch in context.batches)
    total = context.summed_gradients(
        context.loss(batch, weights) / equal_batches(batch, context.batches) for batch, weights in counted
    )
    theta_g = {n: context.parameters[n].detach() * g for n, g in total.items()}
    return context.reduce(theta_g, "sum_abs", derivatives=True)


@register_criterion("magnitude", **WEIGHTS_ONLY)
def _magnitude(context: ScoringContext) -> Scores:
    return context.reduce({name: p.detach() ** 2 for name, p in context.parameters.items()}, "sum_abs")


@register_criterion("random", **WEIGHTS_ONLY)
def _random(context: ScoringContext) -> Scores:
    generator = torch.Generator().manual_seed(context.config.pruning_seed)
    return {group.name: torch.rand(group.num_units, generator=generator) for group in context.groups}
