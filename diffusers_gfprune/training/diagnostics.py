"""Detection of known failures of pruning by gradient flow. Each has a measure, a threshold and a remedy.

    Hg is wrong           scores by double backward and by finite differences rank units differently
    no gain               on the same batches, the loss without the units that the criterion removes is not lower than
                          without as many units removed by magnitude; in runs with recovery, both are mended first
    p_t falls too fast    the held-out loss rises from ranking to ranking faster than training recovers
    masks flap            a large share of the pruned units is revived at every ranking: scores are noise

The first two are measured on calibration batches. The others use values that every run records. `diagnose` is a pure function
of these inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from ..configuration import GFPruneConfig
from ..criteria import find_criterion
from ..diffusion.batch import DiffusionBatch
from ..distributed import mean_over_ranks
from ..pruner import GradientFlowPruner
from ..pruning.channel_groups import ChannelGroup
from ..pruning.compaction import plan_compaction
from ..pruning.masking import MASKS_MODULE
from ..pruning.pruner_state import MaskUpdate
from ..pruning.recovery import recover
from ..scoring.importance import ScoringContext, score_units
from ..scoring.mode import scoring_mode
from .recovery import weights_restored

__all__ = ["Diagnosis", "check_hessian_gradient_product", "compare_with_magnitude", "diagnose"]

# Units. Swapping two neighbours lowers the rank correlation of a group of 8 to 0.976, of 16 to 0.997.
HANDFUL = 16
# Rows of a layer from which the choices that are compared are mended. A run takes four times as many, and of more images.
COMPARED_ROWS = 2**11

# Thresholds lie between the values measured on the digits DDPM of this project (half of the MACs, 1,500 steps, several seeds)
# in runs with the default options, which keep the quality, and in published runs (`--preset paper`), which lose it.
#
# Held-out loss right after a ranking, relative to the lowest since the previous ranking: default, up to +9 % and once +11 %;
# published, +35 % to +456 % at all rankings but the first. Training does not recover from such a jump before the next ranking;
# small rises are expected of a smaller model, unless they repeat.
LARGE_RISE, RISE, RISES = 0.25, 0.10, 3
# Units revived at a ranking, as a share of those pruned before it: default, up to 2 %; published, 70 % to 100 %.
# Two of the last five rankings, so that a run that has settled is not judged by its beginning.
REVIVED_SHARE, FLAPS, LAST_RANKINGS = 0.2, 2, 5
# Smallest rank correlation of a group between scores by double backward and by differences: 0.9996 or more in both kinds of
# runs. At 0.99, about 4 of 100 units change sides when half are kept (arccos(0.99) / pi). Products without the second
# derivative of group norms just reach that value.
RANK_CORRELATION = 0.99


def check_hessian_gradient_product(
    unet: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[DiffusionBatch],
    process,
    config: GFPruneConfig,
) -> dict:
    """Compare gradient-flow scores by double backward with those by finite differences, on the same batches.

    The two share no second-order derivative formula, so they agree only if both are correct.

    Args:
        unet: The dense or masked model; it is not changed.
        groups: Channel groups of the model.
        batches: Calibration batches, as for `score_units`.
        process: Scheduler of the model, or its process.
        config: Options of the scores; `criterion` and `hvp` are ignored.

    Returns:
        `rank_correlation`, the smallest Spearman correlation of a group with at least 16 units (of all units together if
        no group is that large), in [-1, 1]; `group`, the name of that group (or None); `relative_error`,
        `|exact - difference| / |exact|` over all units of all groups.
    """
    exact, difference = (
        score_units(
            unet,
            groups,
            batches,
            process,
            replace(config, criterion="gradient-flow-weights", ranking=None, score_at=None, hvp=hvp),
        )
        for hvp in ("exact", "finite-difference")
    )
    exact, difference = ({name: values.double().cpu() for name, values in scores.items()} for scores in (exact, difference))
    correlations = {n: _rank_correlation(exact[n], difference[n]) for n in exact if len(exact[n]) >= HANDFUL}
    together, theirs = (torch.cat(list(scores.values())) for scores in (exact, difference))
    worst = min(correlations, key=correlations.get, default=None)
    return {
        "rank_correlation": correlations[worst] if worst else _rank_correlation(together, theirs),
        "group": worst,
        "relative_error": float((together - theirs).norm() / together.norm().clamp_min(torch.finfo(torch.float64).tiny)),
    }


def _rank_correlation(first: Tensor, second: Tensor) -> float:
    if first.equal(second):  # includes constants, such as zeros where nothing is learned
        return 1.0
    if first.min() == first.max() or second.min() == second.max():
        return 0.0
    return float(spearmanr(first, second).statistic)


@torch.no_grad()
def compare_with_magnitude(
    pruner: GradientFlowPruner, batches: Sequence[DiffusionBatch], dense: nn.Module | None = None
) -> dict[str, float]:
    """Prediction loss if pruning ended now, with units chosen by the pruner's scores and by magnitude.

    Both choices meet the full budget: the pruner's as it ranks, magnitude's with the same share of every group. The model is
    not trained in between. For processes without a target, the loss is the mean squared change of the predictions, and 0 for
    the dense model.

    Recovery can turn the order around: on the digits of this project, magnitude did less damage at half of the MACs before it,
    and gradient flow after it. A run that mends its model should compare what is left then.

    Args:
        pruner: The pruner after a ranking; masks and weights of its model are not changed. Comparisons early in the run are
            fairer, since weights adapt to the masks that the pruner chose.
        batches: Calibration batches; with several processes, this rank's rows.
        dense: The dense model, on the same device: both choices are mended by least squares, from the first batch (default:
            they are not).

    Returns:
        `loss_dense`, `loss_criterion`, `loss_magnitude`: means over batches and ranks, >= 0.

    Raises:
        ValueError: Units were not ranked yet, there are no batches, or the model has no masks.
    """
    if len(batches) == 0:
        raise ValueError("batches is empty; the comparison needs calibration batches")
    if pruner.scores is None:
        raise ValueError("units were not ranked yet; compare after the first update")
    if not hasattr(pruner.unet, MASKS_MODULE):
        raise ValueError("the model has no masks; compare before detach()")
    unet, groups, config = (
        pruner.unet,
        pruner.groups,
        replace(pruner.config, criterion="magnitude", ranking=None, score_at=None),
    )
    magnitude = score_units(unet, groups, [], pruner.process, config)
    magnitude = {name: values.cpu() for name, values in magnitude.items()}
    everything = {group.name: torch.ones(group.num_units) for group in groups}
    choices = {
        "loss_dense": everything,
        "loss_criterion": pruner.choose_units(pruner.scores),
        "loss_magnitude": pruner.choose_units(magnitude, widths=pruner.planned_widths),
    }
    before = unet.channel_masks.as_dict()
    context = ScoringContext(unet, groups, batches, pruner.process, config)
    losses, targets = {}, None
    try:
        for name, masks in choices.items():  # the dense model first
            unet.channel_masks.set({group: mask.float() for group, mask in masks.items()})
            if targets is None and not pruner.process.has_target:
                targets = _predictions(context)
            with _mended(pruner, None if name == "loss_dense" else dense, batches[:1]):
                losses[name] = _mean_loss(context, targets)
    finally:
        unet.channel_masks.set(before, check=False)  # heads may differ during pruning
    return losses


@contextmanager
def _mended(pruner: GradientFlowPruner, dense: nn.Module | None, batches: Sequence[DiffusionBatch]) -> Iterator[None]:
    """Inside, the masked model is mended, if there is a dense one to learn from."""
    if dense is None:
        yield
        return
    unet = pruner.unet
    plan = plan_compaction(unet, pruner.groups, unet.channel_masks.as_dict())
    with weights_restored(unet):
        recover(dense, unet, plan, batches, pruner.process, rows=COMPARED_ROWS)
        yield


def _predictions(context: ScoringContext) -> list[Tensor]:
    with scoring_mode(context.unet, [], differentiate=0):
        return [context.predictions(batch) for batch in context.batches]


def _mean_loss(context: ScoringContext, targets: Sequence[Tensor] | None) -> float:
    """Mean loss over batches and ranks; with the given targets if the process has none."""
    if targets is not None:
        loss = torch.stack([(now - then).square().mean() for now, then in zip(_predictions(context), targets)]).mean()
    else:
        with scoring_mode(context.unet, [], differentiate=0):
            loss = torch.stack([context.loss(batch) for batch in context.batches]).mean()
    mean_over_ranks([loss])
    return loss.item()


# --- diagnosis ---------------------------------------------------------------------------------------------------------


class Diagnosis(NamedTuple):
    """A known failure that was detected.

    Attributes:
        kind: `"masks-fall-too-fast"`, `"masks-flap"`, `"no-gain-over-magnitude"` or `"wrong-hessian-product"`.
        message: One line with the measured values and the remedy in command-line arguments.
    """

    kind: str
    message: str


def diagnose(
    history: Iterable[MaskUpdate | Mapping],
    validation: Iterable[tuple[int, float]],
    config: GFPruneConfig,
    comparison: Mapping[str, float] | None = None,
    hessian_check: Mapping | None = None,
) -> list[Diagnosis]:
    """Detect known failures in a run so far.

    Args:
        history: Mask updates of the run, or their dictionaries.
        validation: Steps and held-out losses in the order of measurement, including one at every ranking, after masks are set
            and before weights change. If masks jump (`interpolate_masks=False`), include one before each ranking, too.
        config: Options of the run.
        comparison: Result of `compare_with_magnitude`, if available.
        hessian_check: Result of `check_hessian_gradient_product`, if available.

    Returns:
        Failures in causal order: scores, masks, losses.
    """
    updates = [MaskUpdate(**update) if isinstance(update, Mapping) else update for update in history]
    failures = (
        _wrong_product(hessian_check, config),
        _no_gain(comparison, hessian_check, config),
        _flapping(updates, config),
        _rising(updates, [(step, loss) for step, loss in validation if math.isfinite(loss)], config),
    )
    return [failure for failure in failures if failure is not None]


def _wrong_product(check: Mapping | None, config: GFPruneConfig) -> Diagnosis | None:
    if check is None or check["rank_correlation"] >= RANK_CORRELATION:
        return None
    other = "finite-difference" if config.hvp == "exact" else "exact"
    return Diagnosis(
        "wrong-hessian-product",
        f"Hessian-gradient products by double backward and by finite differences rank the units of "
        f"{check['group'] or 'the model'} differently (rank correlation {check['rank_correlation']:.3f}, should be "
        f"{RANK_CORRELATION} or more): use --hvp {other} and check whether masks change less",
    )


def _no_gain(comparison: Mapping | None, check: Mapping | None, config: GFPruneConfig) -> Diagnosis | None:
    if comparison is None or not find_criterion(config.criterion).needs_batches:
        return None
    ours, theirs = comparison["loss_criterion"], comparison["loss_magnitude"]
    if ours < theirs:
        return None
    if config.criterion == GFPruneConfig.criterion:
        remedy = "raise --calibration_batches"
    elif not config.takes_hessian:
        remedy = "use --criterion gradient-flow or magnitude"
    elif check is None:
        remedy = "check the Hessian-gradient product with --check_scores"
    else:
        remedy = f"raise --calibration_batches, or try another --aggregation (now {config.aggregation})"
    return Diagnosis(
        "no-gain-over-magnitude",
        f"no gain over magnitude: the loss is {ours:.4f} without the units that {config.criterion} removes and "
        f"{theirs:.4f} without those that magnitude removes: {remedy}",
    )


def _flapping(updates: Sequence[MaskUpdate], config: GFPruneConfig) -> Diagnosis | None:
    if not updates:
        return None
    units = updates[0].kept_units + updates[0].newly_pruned_units - updates[0].revived_units
    shares = [update.revived_units / max(1, units - before.kept_units) for before, update in zip(updates, updates[1:])][
        -LAST_RANKINGS:
    ]
    high = [share for share in shares if share > REVIVED_SHARE]
    if len(high) < FLAPS:
        return None
    return Diagnosis(
        "masks-flap",
        f"masks flap: at {len(high)} of the last {len(shares)} rankings more than {REVIVED_SHARE:.0%} of the pruned units "
        f"were revived (up to {max(high):.0%}): raise --calibration_batches, --score_decay (now {config.score_decay:g}) or "
        f"--revival_margin (now {config.revival_margin:g})",
    )


def _rising(updates: Sequence[MaskUpdate], validation: Sequence[tuple[int, float]], config: GFPruneConfig) -> Diagnosis | None:
    if config.soft_fraction == 0:  # one-shot pruning: the jump is expected
        return None
    rises = _rises([update.step for update in updates], validation)
    step = max(rises, key=rises.get, default=None)
    many = sum(rise > RISE for rise in rises.values())
    if step is None or (rises[step] <= LARGE_RISE and many < RISES):
        return None
    jumps = "" if config.interpolate_masks else ", set --interpolate_masks true"
    return Diagnosis(
        "masks-fall-too-fast",
        f"the held-out loss rises at rankings (by {rises[step]:.0%} at step {step}, by more than {RISE:.0%} at {many} of "
        f"{len(rises)}): the mask value falls too fast; raise --soft_fraction (now {config.soft_fraction:g}){jumps} or choose "
        f"a gentler --mask_schedule (now {config.mask_schedule})",
    )


def _rises(rankings: Sequence[int], validation: Sequence[tuple[int, float]]) -> dict[int, float]:
    """Rise of the loss after each ranking, by step, over the lowest since the previous one (first: the last before it)."""
    last_at = {step: index for index, (step, _) in enumerate(validation)}  # the last of several at one step
    marks = [last_at[step] for step in rankings if step in last_at]
    if marks and marks[-1] + 1 < len(validation):
        marks.append(marks[-1] + 1)  # the effect of the last ranking
    starts = [marks[0] - 1, *marks[:-1]] if marks else []
    return {
        validation[mark][0]: validation[mark][1] / min(loss for _, loss in validation[start:mark]) - 1
        for start, mark in zip(starts, marks)
        if start >= 0
    }
