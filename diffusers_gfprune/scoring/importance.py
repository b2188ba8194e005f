"""Importance: calibration batches in, one score per unit of channels out. The lowest scores are pruned.

With weights theta, noise-prediction loss L, gradient g = dL/dtheta, Hessian H, and sums over the slices of all channels of a
unit c:

    gradient-flow   E |df/dm_c|^2             the squared gradient norm that removing c causes, in the metric of predictions f
                                              (`natural_flow`); in that of weights, `flow_metric="weights"`, as published:
                    sum_c theta (H g)         arXiv 2501.09464; the argument is GraSP's (Wang et al., arXiv 2002.07376):
                                              removing c changes ||g||^2 by -2 theta_c . (H g)_c to first order
    taylor          | sum_c theta g |         Molchanov et al., arXiv 1906.10771
    diff-pruning    sum_c | theta g |         Fang et al., arXiv 2305.10924: g over timesteps whose loss is at least a
                                              share (0.05) of the largest
    magnitude       sum_c theta^2             Li et al., arXiv 1608.08710, with the squared L2 norm
    random          uniform in [0, 1)

A criterion is a function from a `ScoringContext` to scores by group name; `register_criterion` adds your own:

    @register_criterion("my-criterion")
    def my_criterion(context):
        return context.reduce({name: p.detach() ** 4 for name, p in context.parameters.items()}, "sum_abs")
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..configuration import GFPruneConfig
from ..diffusion.batch import DiffusionBatch
from ..distributed import check_identical, gather_rows
from ..pruning.channel_groups import ChannelGroup
from .context import Scores, ScoringContext
from .hessian_product import HESSIAN_PRODUCTS
from .mode import scoring_mode
from .natural_flow import prediction_changes

__all__ = ["ScoringContext", "criteria", "normalize_scores", "register_criterion", "score_units"]

# How often the losses of built-in criteria are differentiated; your own may be twice, too.
_DERIVATIVES = {"taylor": 1, "diff-pruning": 1, "magnitude": 0, "random": 0}

# Criteria that need no batches
WEIGHTS_ONLY = ("magnitude", "random")

_CRITERIA: dict[str, Callable[[ScoringContext], Scores]] = {}


def register_criterion(name: str) -> Callable[[Callable[[ScoringContext], Scores]], Callable[[ScoringContext], Scores]]:
    """Decorator: make a function available as `criterion=name`.

    Raises:
        ValueError: The name is taken.
    """

    def register(function):
        if name in _CRITERIA:
            raise ValueError(f"criterion {name} is registered already")
        _CRITERIA[name] = function
        return function

    return register


def criteria() -> tuple[str, ...]:
    """Names of all registered criteria."""
    return tuple(_CRITERIA)


def _check_batches(batches: Sequence[DiffusionBatch], criterion: str) -> None:
    """Refuse batches that ranks have different shapes of, before one waits for another."""
    shapes = [size for batch in batches for column in batch.tensors() for size in column.shape]
    check_identical({"shapes of calibration batches": torch.tensor([len(batches), *shapes])})
    if criterion not in WEIGHTS_ONLY and len(batches) == 0:
        raise ValueError(f"criterion={criterion} needs calibration batches, got none")


def _check_finite(scores: Mapping[str, Tensor]) -> None:
    """Refuse scores that are not finite on any rank, on all of them."""
    broken = torch.tensor([[not bool(torch.isfinite(values).all()) for values in scores.values()]])
    for name, is_broken in zip(scores, gather_rows(broken).any(dim=0).tolist()):
        if is_broken:
            raise ValueError(
                f"scores of {name} are not finite: the weights (did training diverge?) or the calibration images hold NaN "
                f"or infinity"
            )


def score_units(
    unet: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[DiffusionBatch],
    noise_scheduler,
    config: GFPruneConfig,
) -> Scores:
    """Score every unit by `config.criterion`. Weights, masks, gradients and mode of the model are left as they were.

    Scores are computed in float32 (float64 if the weights are), whatever precision the model is trained in; a model with
    half-precision weights is copied for that.

    With several processes, all of them score together, and each passes its rows of every batch.

    Args:
        unet: The dense or masked model.
        groups: Its channel groups.
        batches: Calibration batches (see `ScoringContext`).
        noise_scheduler: The Diffusers scheduler that adds the noise.
        config: Criterion and its options.

    Returns:
        Scores by group name, float32 with shape `(num_units,)`; the same on every rank.

    Raises:
        ValueError: No such criterion, no batches, batches of other shapes on another rank, or scores that are not finite or
            not the same on every rank; the last three on all ranks.
    """
    if config.criterion not in _CRITERIA:
        raise ValueError(f"criterion={config.criterion} must be one of {', '.join(_CRITERIA)}")
    _check_batches(batches, config.criterion)
    if any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in unet.parameters()):
        unet = copy.deepcopy(unet).float()
    context = ScoringContext(unet, groups, batches, noise_scheduler, config)
    of_predictions = config.criterion == "gradient-flow" and not config.takes_hessian
    once = of_predictions or config.hvp == "finite-difference"
    differentiate = 1 if once else _DERIVATIVES.get(config.criterion, 2)
    # Outputs that checkpointing computes again are not those that a hook has seen
    mode = scoring_mode(
        unet, list(context.parameters.values()), config.score_at == "dense", differentiate, keep_activations=of_predictions
    )
    with mode:
        scores = _CRITERIA[config.criterion](context)
    _check_finite(scores)
    check_identical({f"scores of {name}": values for name, values in scores.items()})
    return scores


def normalize_scores(scores: Scores, method: str) -> Scores:
    """Make scores of different groups comparable.

    Args:
        scores: By group name.
        method: `"none"`, or divide a group's scores by their mean absolute value (`"mean"`), largest absolute value
            (`"max"`) or L2 norm (`"l2"`), or shift and scale them to mean 0 and standard deviation 1 (`"standard"`).

    Returns:
        New scores; a group of zeros stays as it is.
    """
    tiny = torch.finfo(torch.float32).tiny
    forms = {
        "none": lambda s: s,
        "mean": lambda s: s / s.abs().mean().clamp_min(tiny),
        "max": lambda s: s / s.abs().max().clamp_min(tiny),
        "l2": lambda s: s / s.norm().clamp_min(tiny),
        "standard": lambda s: (s - s.mean()) / s.std(correction=0).clamp_min(tiny),
    }
    if method not in forms:
        raise ValueError(f"normalization={method} must be one of {', '.join(forms)}")
    return {name: forms[method](values) for name, values in scores.items()}


# --- criteria ----------------------------------------------------------------------------------------------------------


def _mean_scores(parts: Sequence[Scores]) -> Scores:
    return {name: torch.stack([part[name] for part in parts]).mean(dim=0) for name in parts[0]}


@register_criterion("gradient-flow")
def _gradient_flow(context: ScoringContext) -> Scores:
    if context.config.flow_metric == "predictions":
        return prediction_changes(context)
    product = HESSIAN_PRODUCTS[context.config.hvp]
    batches = [[batch] for batch in context.batches]
    if context.config.hessian_batches == "mean":
        batches = [list(context.batches)]
    parts = []
    for chosen in batches:
        hg = product(context, chosen)
        theta_hg = {name: value.mul_(context.parameters[name].detach()) for name, value in hg.items()}
        parts.append(context.reduce(theta_hg, context.config.aggregation))
    return _mean_scores(parts)


@register_criterion("taylor")
def _taylor(context: ScoringContext) -> Scores:
    gradient = context.mean_gradient(context.batches)
    return context.reduce({n: context.parameters[n].detach() * g for n, g in gradient.items()}, "abs")


@register_criterion("diff-pruning")
def _diff_pruning(context: ScoringContext) -> Scores:
    # Of all ranks, in the order of the global batches: one rank alone would draw the line elsewhere.
    timesteps = torch.cat([gather_rows(batch.timesteps).cpu() for batch in context.batches])
    with torch.no_grad():
        losses = torch.cat([gather_rows(context.sample_losses(batch)).cpu() for batch in context.batches])
    # Timesteps in ascending order; from the first whose loss falls under the threshold on, none counts. Each bucket of
    # neighbouring timesteps has one loss, the mean over its samples.
    order = timesteps.argsort(stable=True)
    bucket_losses = [bucket.mean().item() for bucket in losses[order].chunk(min(20, len(order)))]
    last, largest = timesteps[order[-1]].item(), 0.0
    for bucket, bucket_loss in zip(timesteps[order].chunk(len(bucket_losses)), bucket_losses):
        largest = max(largest, bucket_loss)
        if bucket_loss < largest * context.config.diff_pruning_threshold:
            last = bucket[0].item() - 1
            break
    counted = ((batch, (batch.timesteps <= last).float().to(context.device)) for batch in context.batches)
    total = context.summed_gradients(context.loss(batch, weights) for batch, weights in counted)
    return context.reduce({n: context.parameters[n].detach() * g for n, g in total.items()}, "sum_abs")


@register_criterion("magnitude")
def _magnitude(context: ScoringContext) -> Scores:
    return context.reduce({name: p.detach() ** 2 for name, p in context.parameters.items()}, "sum_abs")


@register_criterion("random")
def _random(context: ScoringContext) -> Scores:
    generator = torch.Generator().manual_seed(context.config.pruning_seed)
    return {group.name: torch.rand(group.num_units, generator=generator) for group in context.groups}
