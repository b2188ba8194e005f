"""GradientFlowPruner: progressive soft pruning, then hard pruning, then compaction (arXiv 2501.09464, section III).

At each ranking, the units of channels (`channel_groups`) are scored (`scoring`), those that meet the budget with the least
damage are chosen (`unit_choice`), and the masks of the others fall to the p_t of the schedule (`schedules`). All units are
ranked again at the next update, and the mask of a unit returns to 1 when its rank recovers. Weights train throughout: the
pruner only sets masks (`masking`).

The defaults differ from the published form in these ways, each an option:

- Scores are gradient norms in the metric of predictions (`criterion="gradient-flow"`), which rank the units of a trained
  network better. They are taken without masks (`score_at`).
- Rankings are noisy. Scores are averaged over rankings (`score_decay`), masks of the soft phase are interpolated linearly
  between rankings (`interpolate_masks`), and a unit is revived only if its score is clearly higher (`revival_margin`).
- The share of pruned units rises as a cubic (`sparsity_schedule`).
- Layers differ in importance. Scores also determine the share of channels that each group loses (`ranking="sensitivity"`), or
  the damage of narrowing each group is measured (`ranking="curves"`). Without recovery and training after it,
  units of all groups are better chosen together, by what they change jointly. The best of a few such choices is found by
  measuring what they change (`ranking="joint"`).

In training runs, the dense model is the teacher, layers that read pruned channels are refitted by least squares (`recovery`),
and more timesteps are drawn where student and teacher are far apart (`timestep_sampling`).
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
from .diffusion.schedulers import training_process
from .distributed import check_identical
from .families.lookup import family_of
from .latency.budget import check_setting, measured_latency_model
from .latency.calibration import LatencyCheck, latency_meter
from .precision import usual_modes
from .pruning import masking
from .pruning.blocks import trace_groups
from .pruning.compaction import CompactionPlan, carry_ema, carry_optimizer, check_ema, compact, plan_compaction
from .pruning.cost_model import CostModel
from .pruning.damage_curves import DamageCurve
from .pruning.pruner_state import MaskPath, MaskUpdate, PrunerState, check_plan, plan_settings
from .pruning.recovery import RIDGE, recover, recover_averaged
from .ranking import Ranking
from .scoring.context import check_batch, check_criterion
from .unit_choice import UnitChoice, possible_widths

__all__ = ["GradientFlowPruner", "MaskUpdate"]

logger = logging.getLogger(__name__)

# A sequence is `(clean_images, noise, timesteps[, class_labels])`
CalibrationBatch = DiffusionBatch | Sequence[Tensor]


class GradientFlowPruner:
    """Prunes a model during training.

    Traces the model's channel groups and attaches masks in place. Parameters stay the same objects, so that an optimizer can
    be created before or after.

    Example:
        ```python
        pruner = GradientFlowPruner(unet, GFPruneConfig(target="macs", ratio=0.5, total_steps=10_000))
        for step, batch in enumerate(dataloader):
            pruner.step(step, calibration_batches)
            if pruner.finished:
                break
            ...  # loss, backward, optimizer step as usual
        small = pruner.compact(optimizer=optimizer, ema=ema)  # to train for the other 8,000 steps
        ```

    Attributes:
        process: The process of the model's training.
        latency: With `target="latency"`, the measured times from which widths are planned, as JSON values; else None.

    Args:
        unet: A dense model of a supported family (`families.lookup.FAMILIES`).
        config: All options.
        noise_scheduler: Scheduler of the model, or its process, which adds the noise to calibration images (default:
            `DDPMScheduler()`).
        sample_size: Height and width in pixels for counting and measuring costs (default: the model's).
        latency: With `target="latency"`, the attribute `latency` of an earlier pruner, which replaces the measurements.
            Otherwise layers and models of planned widths are timed, on the model's device or in the runtime of
            `latency_backend`, which takes minutes.
        latency_cache_dir: Cache directory for layer times (default: no cache).

    Raises:
        ImportError: The runtime of `latency_backend` is not installed.
        ValueError: The model or its scheduler cannot be pruned, or the budget cannot be met. The model is unchanged.
    """

    @usual_modes()
    def __init__(
        self,
        unet: ModelMixin,
        config: GFPruneConfig,
        noise_scheduler=None,
        sample_size: int | tuple[int, int] | None = None,
        latency: Mapping | None = None,
        latency_cache_dir: Path | None = None,
    ) -> None:
        config.check_installed()
        self.unet = unet
        self.config = config
        self.process = training_process(DDPMScheduler() if noise_scheduler is None else noise_scheduler)
        check_criterion(config.criterion, self.process)
        family_of(unet).check_process(unet.config, self.process)
        self._sample_size = sample_size
        self.schedule = config.schedule()
        self.history: list[MaskUpdate] = []
        self.groups = trace_groups(unet, config.depth)
        if sample_size is not None:
            family_of(unet).check_sample_size(unet.config, sample_size)
        self.cost, self.latency = CostModel(unet, self.groups, sample_size), None
        if config.target == "latency":
            self._latency_model, self.latency = measured_latency_model(
                unet,
                self.groups,
                config.ratio,
                config.latency_setting(),
                lambda cost: possible_widths(cost, config, self._device_type())[1],
                sample_size=sample_size,
                attention_unit=config.attention_unit,
                measurements=latency,
                cache_dir=latency_cache_dir,
                progress=True,
            )
            self.cost.seconds = self._latency_model.seconds
        self._plan_widths()
        if self.choice.widths_are_planned:
            self.choice.warn_if_missed(self.cost.removed(config.target, self.planned_widths))
        masking.attach(unet, self.groups)
        self.kept = {group.name: torch.ones(group.num_units, dtype=torch.bool) for group in self.groups}
        self.finished = False
        self._path: MaskPath | None = None
        self._by_hand = False  # whether masks were set explicitly since the last ranking
        self._last_masks: dict[str, Tensor] = {}  # after detach

    # --- masks ---

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by group name, each with shape `(num_channels,)`, values in [0, 1]; after `detach`, the last masks."""
        masks = self.unit_masks
        return {group.name: group.per_channel(masks[group.name]) for group in self.groups}

    @property
    def unit_masks(self) -> dict[str, Tensor]:
        """The masks by group name, one value per unit, each with shape `(num_units,)`."""
        if self._is_masked():
            return self.unet.channel_masks.as_dict()
        return {name: mask.clone() for name, mask in self._last_masks.items()}

    def _is_masked(self) -> bool:
        return hasattr(self.unet, masking.MASKS_MODULE)

    def _check_masked(self) -> None:
        if not self._is_masked():
            raise ValueError("the masks of the model were removed: make a new GradientFlowPruner to continue pruning")

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Set some or all masks explicitly.

        Args:
            masks: Values in [0, 1] with shape `(num_channels,)`, by group name.

        Raises:
            ValueError: The group does not exist, the masks were removed from the model, or a mask cannot be compacted: it
                leaves an empty group, heads of different sizes, or a part of a norm group. Nothing is changed.
        """
        self._check_masked()
        groups = {group.name: group for group in self.groups}
        by_unit = {
            name: groups[name].per_unit(torch.as_tensor(mask)) if name in groups else mask for name, mask in masks.items()
        }
        self.unet.channel_masks.set(by_unit)
        self.kept = {name: (mask == 1).cpu() for name, mask in self.unit_masks.items()}
        self._path, self._by_hand = None, True

    def choose_units(
        self, scores: Mapping[str, Tensor], ratio: float | None = None, widths: np.ndarray | None = None
    ) -> dict[str, Tensor]:
        """Select the units to keep from scores. Masks are not changed.

        Args:
            scores: Scores by group name, each with shape `(num_units,)`; the highest are kept.
            ratio: Share of the target cost to remove, in [0, 1] (default: `config.ratio`).
            widths: Kept channels of each group with shape `(groups,)` (default: determined by the budget).

        Returns:
            True for kept units by group name, each with shape `(num_units,)`.

        Raises:
            ValueError: `ranking="joint"` and `"curves"` need what an earlier ranking has measured, or widths.
        """
        ratio = self.config.ratio if ratio is None else ratio
        if widths is None and self.config.ranking == "joint":
            if self.ranking.changes is None:
                why = "the checkpoint of a finished run has none" if self.history else "units were not ranked yet"
                raise ValueError(f"{why}: ranking=joint needs joint changes, or pass widths")
            return self.choice.joint_units(ratio, scores, self.ranking.changes)[0]
        if widths is None and self.config.ranking == "curves" and self.ranking.curves is None:
            raise ValueError("units were not ranked yet: ranking=curves needs damage curves, or pass widths")
        widths = self.choice.widths(ratio, scores, self.ranking.curves) if widths is None else widths
        return self.choice.best_units(scores, widths)

    def kept_channels(self) -> np.ndarray:
        """Channels that each group keeps after the last ranking, int64 with shape `(groups,)`."""
        return np.array([int(group.per_channel(self.kept[group.name]).sum()) for group in self.groups])

    # --- the budget ---

    def _device_type(self) -> str:
        """Type of the device that the budget is for: in a runtime the CPU, otherwise that of the model."""
        return "cpu" if self.config.latency_runtime is not None else next(self.unet.parameters()).device.type

    def _plan_widths(self, device_type: str | None = None) -> None:
        """Compute the widths that are possible, by default on the device of the budget. Latency has been measured before."""
        device_type = device_type or self._device_type()
        self.choice, self._planned_for = UnitChoice(self.cost, self.config, device_type), device_type
        self.channel_multiple, self.ladders = self.choice.channel_multiple, self.choice.ladders
        self.planned_widths = self.choice.planned_widths
        self.ranking = Ranking(self.unet, self.process, self.config, self.choice)

    def _fixed_widths(self, share: float) -> np.ndarray | None:
        """Widths that a ranking must keep: None before one has met the whole budget, or if scores never change them.

        After that, units are only exchanged within their groups. Scores change slightly between rankings; with binary masks,
        moving one unit from a group to another would raise the loss without a gain.
        """
        if not self.history or self._by_hand or self.choice.widths_are_planned:
            return None
        before = self.schedule.sparsity(self.schedule.goal_step(self.history[-1].step))
        return self.kept_channels() if share == before == 1 else None

    @property
    def scores(self) -> dict[str, Tensor] | None:
        """Averaged scores by group name, each with shape `(num_units,)`; None before the first ranking."""
        return self.ranking.scores

    @property
    def damage_curves(self) -> dict[str, DamageCurve] | None:
        """Measured damage of narrowing each group by name; None before the first ranking, and without `ranking="curves"`."""
        return self.ranking.curves

    # --- the schedule ---

    @usual_modes()
    def step(
        self,
        step: int,
        calibration_batches: Sequence[CalibrationBatch] | Callable[[], Sequence[CalibrationBatch]],
    ) -> MaskUpdate | None:
        """Set the masks according to the schedule at `step`. Call it before every training step, on every rank.

        Args:
            step: Training step, from 0. A second call with the step of a ranking does nothing.
            calibration_batches: Batches `(clean_images, noise, timesteps[, class_labels])`, or a function that returns
                them and is called only when units are ranked. With several processes, each rank passes its rows of every
                batch, the same number on each. Labels are used unchanged: if training replaces some labels by a null label,
                these batches should, too.

        Returns:
            The changes, if units were ranked at this step; else None.

        Raises:
            ValueError: The step is before the last ranking, or rankings were missed; a batch does not fit the model; scores
                are not finite; or scores or masks differ between ranks. The last two are raised on all ranks.
        """
        if self.finished:
            return None
        self._check_masked()
        last = self.history[-1].step if self.history else -1
        if step < last:
            raise ValueError(f"step={step} is before the last ranking, at step {last}: number training steps over all epochs")
        if step == last:  # such as with accumulated gradients
            return None
        if (due := self.schedule.next_update(last)) is not None and due < step:
            raise ValueError(f"step={step}: the ranking at step {due} was missed: call step() before every training step")
        update = None
        self._follow_path(step)
        if self.schedule.is_update(step):
            batches = calibration_batches() if callable(calibration_batches) else calibration_batches
            update = self._update(step, [DiffusionBatch.of(batch) for batch in batches])
            self._follow_path(step)
        if step >= self.schedule.end_steps:
            self.finished = True
            if not self.choice.widths_are_planned:
                self.choice.warn_if_missed(self.history[-1].sparsity)
        return update

    def _update(self, step: int, batches: Sequence[DiffusionBatch]) -> MaskUpdate:
        needs_batches = find_criterion(self.config.criterion).needs_batches or self.config.ranking == "curves"
        for batch in batches if needs_batches else ():
            check_batch(self.unet, self.process, batch)
        if self._device_type() != self._planned_for and not self.history:
            if self.config.target == "latency":
                raise ValueError(
                    f"the model was moved from {self._planned_for}, where it was timed: make the pruner after that"
                )
            self._plan_widths()
        goal = self.schedule.goal_step(step)
        share = self.schedule.sparsity(goal)
        chosen = self.ranking.rank(batches, share, self.kept, self._fixed_widths(share), len(self.history))
        starts = {name: mask.float().cpu() for name, mask in self.unit_masks.items()}
        decisions = {"averaged scores": self.scores, "kept units": chosen, "masks": starts}
        check_identical({f"{what} of {name}": tensors[name] for what, tensors in decisions.items() for name in tensors})
        before, self.kept = self.kept, chosen
        value = self.schedule.mask_value(goal)
        goals = {name: torch.where(kept, 1.0, value) for name, kept in self.kept.items()}
        self._path, self._by_hand = MaskPath(step, goal, starts, goals), False
        phase, widths = "soft" if step < self.schedule.soft_steps else "hard", self.kept_channels()
        self.history.append(MaskUpdate.of(step, phase, value, before, chosen, self.cost, self.config.target, widths))
        return self.history[-1]

    def _follow_path(self, step: int) -> None:
        """Set masks to their position at `step` between the last ranking and its goal."""
        if self._path is None:
            return
        done = step >= self._path.goal_step
        self.unet.channel_masks.set(self._path.at(step), check=done)  # heads may differ until the goal
        self._path = None if done else self._path

    def goal(self, step: int) -> tuple[int, dict[str, Tensor]]:
        """The step at which masks reach the goal of the last ranking, and the masks there, each with shape `(num_units,)`.

        Args:
            step: The current step, which is returned if masks have reached it.
        """
        return (step, self.unit_masks) if self._path is None else (self._path.goal_step, self._path.goals)

    # --- checkpoints ---

    def state_dict(self) -> dict:
        """The state of the pruner for a checkpoint, in the layout of `pruner_state`.

        Returns:
            `{"tensors": {name: tensor on the CPU}, "values": {...}}`: tensors for safetensors, values for JSON. A pruner
            with the same model and configuration continues from it to bit-identical masks, given the same weights and
            calibration batches.
        """
        masks = {name: mask.float() for name, mask in self.unit_masks.items()}
        state = PrunerState(
            masks,
            self.kept,
            self.scores,
            None if self.finished else self.ranking.changes,  # large, and not needed again
            self._path,
            self.history,
            self.finished,
            self._by_hand,
            self.latency,
            self.ranking.curves,
        )
        saved = state.to_dict()
        saved["values"] |= {"plan": plan_settings(self.config), "planned_for": self._planned_for}
        return saved

    @usual_modes()
    def load_state_dict(self, state: Mapping) -> None:
        """Continue from the output of `state_dict`.

        The masks are set on this pruner's model, which does not have to be the trained model: to resume after compaction,
        mask the dense model and load the state; `compact()` then returns a model with the widths of the checkpoint. After
        `detach`, the masks are kept for reports and `compaction_plan`, and the model stays dense.

        Args:
            state: State of a pruner with the same channel groups, budget and schedule.

        Raises:
            ValueError: The state has other groups, another budget or schedule, or is incomplete or damaged. Nothing is
                changed.
        """
        loaded = PrunerState.from_dict(state, self.groups)
        if not loaded.finished:
            check_plan(state["values"].get("plan"), self.config)
        if (loaded.latency is None) != (self.latency is None):
            raise ValueError(f"the pruner's state must have the same target as this pruner, target={self.config.target}")
        loaded.check_ranking(self.config.ranking)
        planned_for = state["values"].get("planned_for") if loaded.history else None  # earlier versions did not save it
        if loaded.latency is not None:
            self._load_latency(loaded.latency, planned_for)
        elif planned_for not in (None, self._planned_for):
            self._plan_widths(planned_for)
        if self._is_masked():
            self.unet.channel_masks.set(loaded.masks, check=False)  # heads may differ until the goal
        else:
            self._last_masks = loaded.masks
        self.kept, self.history = loaded.kept, loaded.history
        self.ranking.scores, self.ranking.changes, self.ranking.curves = loaded.scores, loaded.changes, loaded.curves
        self.finished, self._path, self._by_hand = loaded.finished, loaded.path, loaded.by_hand

    def _load_latency(self, latency: Mapping, device_type: str | None) -> None:
        """Plan with the times of a state; if this fails, times and widths stay."""
        before = self._latency_model.to_dict()
        try:
            check_setting(latency, self.config.latency_setting())
            self._latency_model.load_dict(latency["model"])
            self._plan_widths(device_type)
        except (LookupError, TypeError, ValueError) as error:
            self._latency_model.load_dict(before)
            raise ValueError(f"latency of the pruner's state cannot be used: {error}") from error
        self.latency = dict(latency)

    # --- the end ---

    def compaction_plan(self) -> CompactionPlan:
        """The plan of `compact`; masks must be binary."""
        return plan_compaction(self.unet, self.groups, self.unit_masks)

    @usual_modes()
    def recover(
        self, dense: ModelMixin, calibration_batches: Sequence[CalibrationBatch], ridge: float = RIDGE, ema=None
    ) -> dict[str, float]:
        """Mend most of what pruning changed in closed form (`pruning.recovery`). Call it before `compact`, with binary masks.

        The weights of layers that read pruned channels are changed in place, where they are kept. `detach` then returns a
        model with these changes.

        Args:
            dense: A model with the predictions to recover, on the same device: a copy of the dense model, before pruning.
            calibration_batches: Batches as in `step`; with several processes, the rows of each rank.
            ridge: Penalty on changes of weights, relative to the mean squared input of each layer (> 0).
            ema: A Diffusers `EMAModel` of the masked model, whose averages change by as much as the weights.

        Returns:
            The relative gap of each mended layer before it was mended, by name in the order of execution.

        Raises:
            ValueError: Masks are not binary, a batch does not fit the model, the models differ, or the average belongs to
                another model.
        """
        self._check_masked()
        batches = [DiffusionBatch.of(batch) for batch in calibration_batches]
        for batch in batches:
            check_batch(self.unet, self.process, batch)
        plan = self.compaction_plan()
        if ema is None:
            return recover(dense, self.unet, plan, batches, self.process, ridge)
        return recover_averaged(dense, self.unet, ema, plan, batches, self.process, ridge)

    def compact(self, optimizer: torch.optim.Optimizer | None = None, ema=None) -> ModelMixin:
        """Build the small model from binary masks. Its outputs equal those of the masked model.

        Args:
            optimizer: An optimizer of the masked model; its parameters and state are moved to the small model.
            ema: A Diffusers `EMAModel` of the masked model, which is moved in the same way.

        Returns:
            The small model. The masked model is not modified.

        Raises:
            ValueError: Masks are not binary or prune nothing yet, or the optimizer or average belongs to another model or has
                unknown state. Both are unchanged.
        """
        if not (self.finished or self._by_hand or any((mask != 1).any() for mask in self.unit_masks.values())):
            raise ValueError("no unit is pruned yet: call step() of the pruner until it has finished, then compact()")
        plan = self.compaction_plan()
        small = compact(self.unet, plan)
        if ema is not None:
            check_ema(ema, self.unet)  # before the optimizer is changed: both are moved, or neither
        if optimizer is not None:
            carry_optimizer(optimizer, self.unet, small, plan)
        if ema is not None:
            carry_ema(ema, self.unet, small, plan)
        return small

    def check_latency(self, dense: ModelMixin, small: ModelMixin) -> LatencyCheck:
        """Measure whether a latency budget was met, and warn if it was not. With several processes, call it on one.

        Args:
            dense: The dense model, on the target device.
            small: The model returned by `compact`, on the same device.

        Raises:
            ValueError: The target is not `"latency"`.
        """
        if self.latency is None:
            raise ValueError(f"target={self.config.target} must be latency to check the latency")
        setting = self.config.latency_setting()
        with latency_meter(dense, setting, self._sample_size) as measure:
            pair = measure(small)
        check = LatencyCheck(setting, self.config.ratio, self._latency_model.removed(self.kept_channels()), pair)
        check.warn()
        return check

    def detach(self) -> ModelMixin:
        """Remove the masks and return the dense model with its current weights, bit for bit."""
        self._last_masks = self.unit_masks
        masking.detach(self.unet)
        return self.unet
