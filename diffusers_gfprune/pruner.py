"""GradientFlowPruner: progressive soft pruning, then hard pruning, then compaction (arXiv 2501.09464, section III).

At each ranking the units of channels (`channel_groups`) are scored (`importance`), a budget says how many channels each group
keeps (`budget`), and the lowest units go: their masks fall to the p_t of the schedule (`schedules`). Everything is ranked
again at the next update, so that a unit comes back to 1 when its rank recovers. Weights train throughout: the pruner only sets
masks (`masking`).

Departures from the published form, each an option. Scores are gradient norms in the metric of predictions
(`criterion="gradient-flow"`), which tell what units matter on a trained network. Because rankings are noisy, masks of the
soft phase move in a straight line from ranking to ranking (`interpolate_masks`), and a unit comes back only on clear
evidence (`revival_margin`). Because layers do not matter alike, scores also say what share of its channels each group loses
(`ranking="sensitivity"`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, ModelMixin
from torch import Tensor

from .configuration import GFPruneConfig
from .criteria import find_criterion
from .diffusion.batch import DiffusionBatch
from .diffusion.process import training_process
from .distributed import check_identical
from .families.lookup import family_of
from .latency.budget import measured_latency_model
from .latency.calibration import LatencyCheck, LatencyMeter
from .pruning import masking
from .pruning.budget import (
    BUDGET_TOLERANCE,
    aligned_ladder,
    allocate_by_sensitivity,
    allocate_global,
    allocate_per_group,
    check_reachable,
    hardware_multiple,
    select_units,
    width_ladder,
)
from .pruning.channel_groups import ChannelGroup, trace_channel_groups
from .pruning.compaction import CompactionPlan, carry_ema, carry_optimizer, check_ema, compact, plan_compaction
from .pruning.cost_model import CostModel
from .pruning.pruner_state import MaskPath, MaskUpdate, PrunerState
from .scoring.context import check_batch
from .scoring.importance import normalize_scores, score_units

__all__ = ["GradientFlowPruner", "MaskUpdate"]

logger = logging.getLogger(__name__)

# `(clean_images, noise, timesteps[, class_labels])` will do
CalibrationBatch = DiffusionBatch | Sequence[Tensor]


class GradientFlowPruner:
    """Prunes a UNet while it trains.

    Traces the model's channel groups and puts masks on it, in place; parameters stay the same objects, so that an optimizer
    may be made before or after.

    Example:
        ```python
        pruner = GradientFlowPruner(unet, GFPruneConfig(target="macs", ratio=0.5, total_steps=10_000))
        for step, batch in enumerate(dataloader):
            pruner.step(step, calibration_batches)
            if pruner.finished:
                break
            ...  # loss, backward, optimizer step as usual
        small = pruner.compact(optimizer=optimizer, ema=ema)
        ```

    Attributes:
        latency: With `target="latency"`, the measured times that widths are planned with, JSON values; else None.

    Args:
        unet: A dense model of one of the families: a `UNet2DModel`.
        config: Every option.
        noise_scheduler: Of the model; calibration images are noised in its process (default: `DDPMScheduler()`).
        sample_size: Height and width that costs are counted and measured for (default: the model's).
        latency: With `target="latency"`, what the `latency` of an earlier pruner was: nothing is measured then. Else, layers
            and models of planned widths are timed now, on the device where the model is, which takes minutes.
        latency_cache_dir: Where times of layers are kept from run to run (default: nowhere).

    Raises:
        ValueError: The model or its scheduler is of a kind that cannot be pruned, or the budget cannot be met. The model is
            not changed then.
    """

    def __init__(
        self,
        unet: ModelMixin,
        config: GFPruneConfig,
        noise_scheduler=None,
        sample_size: int | tuple[int, int] | None = None,
        latency: Mapping | None = None,
        latency_cache_dir: Path | None = None,
    ) -> None:
        self.unet = unet
        self.config = config
        self.noise_scheduler = DDPMScheduler() if noise_scheduler is None else training_process(noise_scheduler)
        family_of(unet).check_timesteps(unet.config, self.noise_scheduler.config.num_train_timesteps)
        self._sample_size = sample_size
        self.schedule = config.schedule()
        self.history: list[MaskUpdate] = []
        self.groups = trace_channel_groups(unet)
        self.cost, self.latency = CostModel(unet, self.groups, sample_size), None
        if config.target == "latency":
            self._latency_model, self.latency = measured_latency_model(
                unet,
                self.groups,
                config.ratio,
                config.latency_setting(),
                lambda cost: self._choose_ladders(cost)[1],
                sample_size=sample_size,
                attention_unit=config.attention_unit,
                found=latency,
                cache_dir=latency_cache_dir,
                progress="timing layers",
            )
            self.cost.seconds = self._latency_model.seconds
        self._plan_widths()
        if self.widths_are_planned:
            self._warn_if_missed()
        masking.attach(unet, self.groups)
        self.kept = {group.name: torch.ones(group.num_units, dtype=torch.bool) for group in self.groups}
        self.scores: dict[str, Tensor] | None = None
        self.finished = False
        self._path: MaskPath | None = None
        self._by_hand = False  # whether masks were set by hand since the last ranking
        self._last_masks: dict[str, Tensor] = {}  # once they are off the model

    # --- masks ---

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by group name, each with shape `(num_channels,)`, values in [0, 1]; after `detach` the last."""
        masks = self.unit_masks
        return {group.name: group.per_channel(masks[group.name]) for group in self.groups}

    @property
    def unit_masks(self) -> dict[str, Tensor]:
        """The same by unit, each with shape `(num_units,)`."""
        if self._is_masked():
            return self.unet.channel_masks.as_dict()
        return {name: mask.clone() for name, mask in self._last_masks.items()}

    def _is_masked(self) -> bool:
        return hasattr(self.unet, masking.MASKS_MODULE)

    def _check_masked(self) -> None:
        if not self._is_masked():
            raise ValueError("the model has no masks any more: make a new GradientFlowPruner to prune on")

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Set some or all masks by hand.

        Args:
            masks: Values in [0, 1] with shape `(num_channels,)`, by group name.

        Raises:
            ValueError: No such group, or a mask that no smaller model could have: an empty group, heads left with
                different numbers of channels, a norm group that is left in part. Nothing is changed then. Or masks were taken
                off the model.
        """
        self._check_masked()
        groups = {group.name: group for group in self.groups}
        by_unit = {
            name: groups[name].per_unit(torch.as_tensor(mask)) if name in groups else mask for name, mask in masks.items()
        }
        self.unet.channel_masks.set(by_unit)
        self.kept = {name: (mask == 1).cpu() for name, mask in self.unit_masks.items()}
        self._path, self._by_hand = None, True

    @property
    def widths_are_planned(self) -> bool:
        """Whether `planned_widths` are what the run ends with; else scores choose the widths, too."""
        return self.config.ranking == "group"

    def choose_units(
        self, scores: Mapping[str, Tensor], ratio: float | None = None, widths: np.ndarray | None = None
    ) -> dict[str, Tensor]:
        """The units that scores would keep, at a ratio of the target's cost. Masks stay as they are.

        Args:
            scores: By group name, each with shape `(num_units,)`; higher is kept.
            ratio: Share of the target that is removed, in [0, 1] (default: the full `config.ratio`).
            widths: Kept channels of each group with shape `(groups,)` (default: those that the budget gives).

        Returns:
            True for kept units by group name, each with shape `(num_units,)`.
        """
        ratio = self.config.ratio if ratio is None else ratio
        if widths is None:
            widths = self._allocate(ratio, scores)
        return {
            group.name: select_units(group, scores[group.name], int(width), self.config.attention_unit)
            for group, width in zip(self.groups, widths)
        }

    def kept_channels(self) -> np.ndarray:
        """Channels that each group keeps by the last ranking, int64 with shape `(groups,)`."""
        return np.array([int(group.per_channel(self.kept[group.name]).sum()) for group in self.groups])

    # --- the budget ---

    def _plan_widths(self) -> None:
        """Ladders, and the widths that need no scores; whatever has been measured is known."""
        config = self.config
        self.channel_multiple, self.ladders = self._choose_ladders(self.cost)
        check_reachable(self.cost, config.target, config.ratio, self.ladders)
        self.planned_widths = self._allocate(config.ratio)

    def _choose_ladders(self, cost: CostModel) -> tuple[int, list[list[int]]]:
        """The channel multiple and the widths that each group may have.

        With `channel_multiple="auto"`, the largest blocks, up to those of the target device, that let the budget be met.
        """
        config = self.config
        multiple = config.channel_multiple
        if multiple != "auto":
            return multiple, [self._ladder(group, multiple) for group in self.groups]
        device = next(self.unet.parameters()).device.type if config.target_device == "auto" else config.target_device
        multiple = hardware_multiple(device, config.latency_dtype)
        while True:
            ladders = [aligned_ladder(group, multiple, config.min_keep_ratio, config.attention_unit) for group in self.groups]
            widths = allocate_per_group(cost, config.target, config.ratio, ladders)
            if multiple == 1 or abs(cost.removed(config.target, widths) - config.ratio) <= BUDGET_TOLERANCE:
                return multiple, ladders
            multiple //= 2

    def _ladder(self, group: ChannelGroup, multiple: int) -> list[int]:
        return width_ladder(group, multiple, self.config.min_keep_ratio, self.config.attention_unit)

    # --- the schedule ---

    def _allocate(self, ratio: float, scores: Mapping[str, Tensor] | None = None) -> np.ndarray:
        target = self.config.target
        if ratio == 0:
            return self.cost.dense
        if scores is None or self.widths_are_planned:
            return allocate_per_group(self.cost, target, ratio, self.ladders)
        if self.config.ranking == "sensitivity":
            ordered = [scores[group.name] for group in self.groups]
            exponent = self.config.sensitivity_exponent
            return allocate_by_sensitivity(self.cost, target, ratio, self.ladders, ordered, exponent)
        comparable = normalize_scores(scores)
        return allocate_global(self.cost, target, ratio, self.ladders, [comparable[group.name] for group in self.groups])

    def _rank(self, batches: Sequence[DiffusionBatch]) -> dict[str, Tensor]:
        """Scores that units are ranked by: averaged over rankings, with a head start for kept ones."""
        scores = score_units(self.unet, self.groups, batches, self.noise_scheduler, self.config)
        # Scores fall with the loss; in units of their mean, later rankings weigh as much in the average as earlier ones.
        scale = torch.cat([values.abs() for values in scores.values()]).mean().clamp_min(torch.finfo(torch.float32).tiny)
        scores = {name: (values / scale).cpu() for name, values in scores.items()}
        if self.scores is not None:
            decay = self.config.score_decay
            scores = {name: decay * self.scores[name] + (1 - decay) * values for name, values in scores.items()}
        self.scores = scores
        margin = self.config.revival_margin
        # In float64: a large head start would swallow what float32 tells of the scores of kept units.
        return {
            name: values.double() + margin * values.abs().mean() * self.kept[name] if (~self.kept[name]).any() else values
            for name, values in scores.items()
        }

    def step(
        self,
        step: int,
        calibration_batches: Sequence[CalibrationBatch] | Callable[[], Sequence[CalibrationBatch]],
    ) -> MaskUpdate | None:
        """Bring the masks to where the schedule wants them at `step`. Call it before every training step, on every rank.

        Args:
            step: Training step, from 0.
            calibration_batches: Batches `(clean_images, noise, timesteps[, class_labels])`, or a function that returns
                them, which is called only when units are ranked. With several processes, this rank's rows of every batch,
                the same number on each. Labels are taken as they are: where training drops some to a null label, these
                batches should, too.

        Returns:
            What changed, when units were ranked at this step.

        Raises:
            ValueError: A batch is not one of this model; or scores are not finite, or scores and masks are not the same on
                every rank; the last two on all of them.
        """
        if self.finished:
            return None
        self._check_masked()
        update = None
        self._follow_path(step)
        if self.schedule.is_update(step):
            batches = calibration_batches() if callable(calibration_batches) else calibration_batches
            update = self._update(step, [DiffusionBatch.of(batch) for batch in batches])
            self._follow_path(step)
        if step >= self.schedule.end_steps:
            if not self.history:
                raise ValueError(f"step={step} is past the last ranking, and none was made: call step() from 0 on")
            self.finished = True
            if not self.widths_are_planned:
                self._warn_if_missed()
        return update

    def _update(self, step: int, batches: Sequence[DiffusionBatch]) -> MaskUpdate:
        for batch in batches if find_criterion(self.config.criterion).needs_batches else ():
            check_batch(self.unet, self.noise_scheduler, batch)
        ranked = self._rank(batches)
        goal = self.schedule.goal_step(step)
        share = self.schedule.sparsity(goal)
        chosen = self.choose_units(ranked, share * self.config.ratio, self._widths_by_sensitivity(share))
        starts = {name: mask.float().cpu() for name, mask in self.unit_masks.items()}
        found = {"averaged scores": self.scores, "kept units": chosen, "masks": starts}
        check_identical({f"{what} of {name}": tensors[name] for what, tensors in found.items() for name in tensors})
        before, self.kept = self.kept, chosen
        widths = self.kept_channels()
        value = self.schedule.mask_value(goal)
        goals = {name: torch.where(kept, 1.0, value) for name, kept in self.kept.items()}
        self._path, self._by_hand = MaskPath(step, goal, starts, goals), False
        update = MaskUpdate(
            step=step,
            phase="soft" if step < self.schedule.soft_steps else "hard",
            sparsity=self.cost.removed(self.config.target, widths),
            mask_value=value,
            kept_units=sum(int(kept.sum()) for kept in self.kept.values()),
            revived_units=sum(int((self.kept[name] & ~before[name]).sum()) for name in self.kept),
            newly_pruned_units=sum(int((~self.kept[name] & before[name]).sum()) for name in self.kept),
            kept_channels=int(widths.sum()),
            macs=self.cost.macs(widths),
            params=self.cost.parameters(widths),
        )
        self.history.append(update)
        return update

    def _widths_by_sensitivity(self, share: float) -> np.ndarray | None:
        """Kept channels of each group at a share of the budget, with shape `(groups,)`; None: not how widths are chosen.

        What a group is worth is told by the averaged scores alone: the head start of kept units would count for it, too.
        Once a ranking has met the whole budget, widths stand, and units swap within their groups from then on.
        Sensitivities drift a little from ranking to ranking; where masks are binary, one unit more in a group and one less
        in another is a jump of the loss that buys nothing.
        """
        if self.config.ranking != "sensitivity":
            return None
        if self.history and not self._by_hand:
            before = self.schedule.sparsity(self.schedule.goal_step(self.history[-1].step))
            if share == before == 1:
                return self.kept_channels()
        return self._allocate(share * self.config.ratio, self.scores)

    def _follow_path(self, step: int) -> None:
        """Set masks to where the last ranking wants them at `step`."""
        if self._path is None:
            return
        done = step >= self._path.goal_step
        self.unet.channel_masks.set(self._path.at(step), check=done)  # heads may differ on the way
        self._path = None if done else self._path

    def _warn_if_missed(self) -> None:
        """Say aloud that the widths allowed cannot meet the budget."""
        share = self.history[-1].sparsity if self.history else self.cost.removed(self.config.target, self.planned_widths)
        if abs(share - self.config.ratio) > BUDGET_TOLERANCE:
            logger.warning(
                "ratio=%.3f of %s is not met: the nearest that whole norm groups, channel_multiple=%d, attention_unit=%s and "
                "min_keep_ratio=%g allow is %.3f",
                self.config.ratio,
                self.config.target,
                self.channel_multiple,
                self.config.attention_unit,
                self.config.min_keep_ratio,
                share,
            )

    # --- checkpoints ---

    def state_dict(self) -> dict:
        """Everything that decides what the pruner does next, for a checkpoint; the layout is that of `pruner_state`.

        Returns:
            `{"tensors": {name: tensor on the CPU}, "values": {...}}`: tensors for safetensors, values for JSON. A pruner
            made with the same model and configuration goes on from it to the same masks, bit for bit, if it is given the
            same weights and calibration batches.
        """
        masks = {name: mask.float() for name, mask in self.unit_masks.items()}
        state = PrunerState(
            masks, self.kept, self.scores, self._path, self.history, self.finished, self._by_hand, self.latency
        )
        return state.to_dict()

    def load_state_dict(self, state: Mapping) -> None:
        """Go on from what `state_dict` returned.

        The masks go onto this pruner's model. That may be another object than the one that was masked, and need not be what
        trains: to resume after compaction, mask the dense model, load the state, and `compact()` gives a model of the widths
        that the checkpoint's weights have. Where `detach` took the masks off, they are remembered for reports and
        `compaction_plan`, and the model stays dense.

        Args:
            state: From a pruner with the same channel groups.

        Raises:
            ValueError: It is of other groups, incomplete, or damaged. Nothing is changed then.
        """
        found = PrunerState.from_dict(state, self.groups)
        if (found.latency is None) != (self.latency is None):
            raise ValueError(f"the pruner's state must be one of target={self.config.target}, which this pruner has")
        if found.latency is not None:
            self._latency_model.load_dict(found.latency["model"])
            self.latency = found.latency
            self._plan_widths()
        if self._is_masked():
            self.unet.channel_masks.set(found.masks, check=False)  # heads may differ on the way
        else:
            self._last_masks = found.masks
        self.kept, self.scores, self.history = found.kept, found.scores, found.history
        self.finished, self._path, self._by_hand = found.finished, found.path, found.by_hand

    # --- the end ---

    def compaction_plan(self) -> CompactionPlan:
        """What `compact` keeps; masks must be binary."""
        return plan_compaction(self.unet, self.groups, self.unit_masks)

    def compact(self, optimizer: torch.optim.Optimizer | None = None, ema=None) -> ModelMixin:
        """The small model that the binary masks leave, with the outputs of the masked one.

        Args:
            optimizer: An optimizer of the masked model, which goes on with the small one, state and all.
            ema: A Diffusers `EMAModel` of the masked model, which goes on likewise.

        Returns:
            The small model. The masked model is left as it is.

        Raises:
            ValueError: Masks are not binary, or the optimizer or the average is not this model's, or has state of an
                unknown kind. Both are as they were then.
        """
        plan = self.compaction_plan()
        small = compact(self.unet, plan)
        if ema is not None:
            check_ema(ema, self.unet)  # before the optimizer is touched: both go on, or neither
        if optimizer is not None:
            carry_optimizer(optimizer, self.unet, small, plan)
        if ema is not None:
            carry_ema(ema, self.unet, small, plan)
        return small

    def check_latency(self, dense: ModelMixin, small: ModelMixin) -> LatencyCheck:
        """Measure whether a budget in time was met, and warn if it was not. With several processes, for one of them.

        Args:
            dense: The dense model, on the device that is meant.
            small: What `compact` gave, on the same device.

        Raises:
            ValueError: The target is another one.
        """
        if self.latency is None:
            raise ValueError(f"target={self.config.target} must be latency to have a budget in time")
        setting = self.config.latency_setting()
        with LatencyMeter(dense, setting, self._sample_size) as meter:
            pair = meter.measure(small)
        check = LatencyCheck(setting, self.config.ratio, self._latency_model.removed(self.kept_channels()), pair)
        check.warn()
        return check

    def detach(self) -> ModelMixin:
        """Take the masks off: the dense model back, bit for bit, with the weights as trained since."""
        self._last_masks = self.unit_masks
        masking.detach(self.unet)
        return self.unet
