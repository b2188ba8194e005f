"""Serializable state of a pruning run: tensors by flat name, and values for JSON.

    tensors   masks/<group>        current mask of the model, float32 in [0, 1]
              kept/<group>         units kept by the last ranking, bool
              scores/<group>       averaged scores, float32                                after the first ranking
              changes/<group>      averaged joint changes, float32 with shape (rows, num_units)     with ranking="joint"
              path_start/<group>   masks at the step of the last ranking                   while masks move
              path_goal/<group>    masks at the goal step of the last ranking              while masks move
    values    groups               number of units by group name
              path                 {"start_step", "goal_step"}, or null
              history              list of `MaskUpdate.to_dict()`
              finished, by_hand    bool
              latency              measured times for a latency budget (`latency.budget`), or null
              curves               `DamageCurve.to_dict()` by group name with ranking="curves", or null
              plan                 budget and schedule (`plan_settings`), which a run that continues must share
              planned_for          type of the device that possible widths are for; a run continues with them on any device

All other tensors have the shape `(num_units,)`. Group names contain dots, but no slashes. Tensors are stored as safetensors,
values as JSON, which restore every number bit for bit. Other options are not stored, as they follow from the configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from .channel_groups import ChannelGroup
from .cost_model import CostModel
from .damage_curves import DamageCurve
from .masking import check_mask

__all__ = ["MaskPath", "MaskUpdate", "PrunerState", "check_plan", "plan_settings"]


@dataclass(frozen=True)
class MaskUpdate:
    """The changes of one ranking.

    Attributes:
        step: Training step.
        phase: `"soft"` or `"hard"`.
        sparsity: Share of the target's dense cost that is removed, in [0, 1].
        mask_value: p_t, the mask value of pruned units, in [0, 1]. With `interpolate_masks`, masks reach it at the next
            ranking.
        kept_units: Number of units with mask 1, likewise.
        revived_units: Number of kept units that were pruned in the previous ranking.
        newly_pruned_units: Number of pruned units that were kept in the previous ranking.
        kept_channels: Number of channels in kept units, including fixed channels.
        macs: MACs of the model that consists of the kept units.
        params: Number of parameters of that model.
    """

    step: int
    phase: str
    sparsity: float
    mask_value: float
    kept_units: int
    revived_units: int
    newly_pruned_units: int
    kept_channels: int
    macs: float
    params: float

    @classmethod
    def of(
        cls,
        step: int,
        phase: str,
        mask_value: float,
        before: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        cost: CostModel,
        target: str,
        widths: np.ndarray,
    ) -> MaskUpdate:
        """The changes from one choice of units to the next.

        Args:
            step: As the attribute.
            phase: Likewise.
            mask_value: Likewise.
            before: Kept units of the previous ranking by group name, bool with shape `(num_units,)`.
            kept: Those of this one.
            cost: The cost model.
            target: The cost of the budget.
            widths: Channels that each group keeps, with shape `(groups,)`.
        """
        return cls(
            step=step,
            phase=phase,
            sparsity=cost.removed(target, widths),
            mask_value=mask_value,
            kept_units=sum(int(units.sum()) for units in kept.values()),
            revived_units=sum(int((units & ~before[name]).sum()) for name, units in kept.items()),
            newly_pruned_units=sum(int((~units & before[name]).sum()) for name, units in kept.items()),
            kept_channels=int(cost.channels(widths)),
            macs=cost.macs(widths),
            params=cost.parameters(widths),
        )

    def to_dict(self) -> dict:
        """All fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class MaskPath:
    """Linear interpolation of masks between two rankings.

    Attributes:
        start_step: Step of the ranking.
        goal_step: Step at which `goals` are reached (>= `start_step`).
        starts: Masks at `start_step` by group name, each with shape `(num_units,)`.
        goals: Masks at `goal_step`.
    """

    start_step: int
    goal_step: int
    starts: dict[str, Tensor]
    goals: dict[str, Tensor]

    def at(self, step: int) -> dict[str, Tensor]:
        """Masks at `step`. From `goal_step` on exactly `goals`, since compaction needs exact zeros and ones."""
        if step >= self.goal_step:
            return self.goals
        share = (step - self.start_step) / (self.goal_step - self.start_step)
        return {name: torch.lerp(self.starts[name], goal, share) for name, goal in self.goals.items()}


@dataclass
class PrunerState:
    """State of a `GradientFlowPruner`.

    Attributes:
        masks: Masks by group name, float32 with shape `(num_units,)`.
        kept: Units kept by the last ranking, bool.
        scores: Averaged scores, None before the first ranking.
        changes: Averaged joint changes, each with shape `(rows, num_units)`; None before the first ranking and for rankings
            that do not use them.
        path: Interpolation of masks, None while masks are constant.
        history: One entry per ranking.
        finished: Whether masks are frozen.
        by_hand: Whether masks were set explicitly since the last ranking.
        latency: `GradientFlowPruner.latency`.
        curves: `GradientFlowPruner.damage_curves`.
    """

    masks: dict[str, Tensor]
    kept: dict[str, Tensor]
    scores: dict[str, Tensor] | None = None
    changes: dict[str, Tensor] | None = None
    path: MaskPath | None = None
    history: list[MaskUpdate] = field(default_factory=list)
    finished: bool = False
    by_hand: bool = False
    latency: dict | None = None
    curves: dict[str, DamageCurve] | None = None

    def to_dict(self) -> dict:
        """`{"tensors": {flat name: tensor on the CPU}, "values": JSON values}`."""
        families = {"masks": self.masks, "kept": self.kept, "scores": self.scores or {}, "changes": self.changes or {}}
        if self.path is not None:
            families |= {"path_start": self.path.starts, "path_goal": self.path.goals}
        return {
            "tensors": {
                f"{family}/{name}": tensor.detach().cpu().clone()
                for family, tensors in families.items()
                for name, tensor in tensors.items()
            },
            "values": {
                "groups": {name: len(mask) for name, mask in self.masks.items()},
                "path": {"start_step": self.path.start_step, "goal_step": self.path.goal_step} if self.path else None,
                "history": [update.to_dict() for update in self.history],
                "finished": self.finished,
                "by_hand": self.by_hand,
                "latency": self.latency,
                "curves": None if self.curves is None else {name: curve.to_dict() for name, curve in self.curves.items()},
            },
        }

    @classmethod
    def from_dict(cls, state: Mapping, groups: Iterable[ChannelGroup]) -> PrunerState:
        """Read the output of `to_dict`.

        Args:
            state: `{"tensors": ..., "values": ...}`; its tensors are copied.
            groups: Channel groups of the model.

        Raises:
            ValueError: The state has other groups, is incomplete, or is inconsistent.
        """
        sizes = {group.name: group for group in groups}
        try:
            tensors, values = dict(state["tensors"]), state["values"]
            theirs, path, history = values["groups"], values["path"], _read_history(values["history"])
            flags = {name: values[name] for name in ("finished", "by_hand")}
        except (KeyError, TypeError) as error:
            raise ValueError(f"the pruner's state is incomplete or malformed: {error!r}") from error
        _check_groups(theirs, sizes)
        dtypes = {"masks": torch.float32, "kept": torch.bool}
        dtypes |= {"scores": torch.float32} if history else {}
        dtypes |= {"changes": torch.float32} if any(name.startswith("changes/") for name in tensors) else {}
        dtypes |= {"path_start": torch.float32, "path_goal": torch.float32} if path else {}
        loaded: dict[str, dict[str, Tensor]] = {
            family: {name: _read_tensor(tensors, family, group, dtype) for name, group in sizes.items()}
            for family, dtype in dtypes.items()
        }
        if tensors:
            raise ValueError(f"the pruner's state has {len(tensors)} unexpected tensors, such as {next(iter(tensors))}")
        if len({len(changes) for changes in loaded.get("changes", {}).values()}) > 1:
            raise ValueError("joint changes of the pruner's state must have the same number of rows in all groups")
        masks, kept = loaded["masks"], loaded["kept"]
        moving = _read_path(path, loaded["path_start"], loaded["path_goal"]) if path else None
        for name, group in sizes.items():
            goal = moving.goals[name] if moving else masks[name]
            check_mask(group, goal)
            if (goal[kept[name]] != 1).any():
                raise ValueError(f"kept/{name} of the pruner's state does not match its masks: kept units must have mask 1")
        count = sum(int(flags.sum()) for flags in kept.values())
        expected = history[-1].kept_units if history else sum(group.num_units for group in sizes.values())
        if count != expected and not flags["by_hand"]:
            raise ValueError(f"the pruner's state keeps {count} units, but its history has {expected}")
        # Checkpoints of earlier versions have neither latency nor curves
        return cls(
            masks,
            kept,
            loaded.get("scores"),
            loaded.get("changes"),
            moving,
            history,
            **flags,
            latency=values.get("latency"),
            curves=_read_curves(values.get("curves"), sizes),
        )

    def check_ranking(self, ranking: str) -> None:
        """Check that the state has what a ranking continues from.

        Raises:
            ValueError: It was saved with another ranking.
        """
        if ranking == "joint" and self.history and not (self.finished or self.changes):
            raise ValueError("the pruner's state must have joint changes for ranking=joint: it was saved with another ranking")
        if ranking == "curves" and self.history and not self.curves:
            raise ValueError(
                "the pruner's state must have damage curves for ranking=curves: it was saved with another ranking"
            )


def _check_groups(theirs: Mapping[str, int], groups: Mapping[str, ChannelGroup]) -> None:
    for name in [*groups, *theirs]:
        if name not in groups or name not in theirs:
            where = "the model" if name in groups else "the state"
            raise ValueError(f"the pruner's state belongs to another model: only {where} has channel group {name}")
        if theirs[name] != groups[name].num_units:
            raise ValueError(
                f"the pruner's state belongs to another model: {name} has {theirs[name]} units, not {groups[name].num_units}"
            )


def _read_tensor(tensors: dict[str, Tensor], family: str, group: ChannelGroup, dtype: torch.dtype) -> Tensor:
    """Remove one tensor from the flat names and check it."""
    name = f"{family}/{group.name}"
    if name not in tensors:
        raise ValueError(f"the pruner's state has no {name}")
    tensor = tensors.pop(name)
    rows = tensor.shape[: tensor.ndim - 1] if family == "changes" else ()
    if tensor.shape != (*rows, group.num_units) or tensor.dtype != dtype or len(rows) != (family == "changes"):
        shape = f"(rows, {group.num_units})" if family == "changes" else f"({group.num_units},)"
        raise ValueError(
            f"{name} of the pruner's state is {tensor.dtype} with shape {tuple(tensor.shape)}, not {dtype} with shape {shape}"
        )
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} of the pruner's state contains NaN or infinity")
    if family in ("masks", "path_start", "path_goal") and not ((tensor >= 0) & (tensor <= 1)).all():
        raise ValueError(f"{name} of the pruner's state has values from {tensor.min():g} to {tensor.max():g}, outside [0, 1]")
    return tensor.detach().cpu().clone()


def _read_path(path: Mapping, starts: dict[str, Tensor], goals: dict[str, Tensor]) -> MaskPath:
    try:
        mask_path = MaskPath(path["start_step"], path["goal_step"], starts, goals)
        if 0 <= mask_path.start_step < mask_path.goal_step:
            return mask_path
    except (KeyError, TypeError):
        pass
    raise ValueError(f"path={path} of the pruner's state must have 0 <= start_step < goal_step")


def _read_curves(curves: Mapping | None, groups: Mapping[str, ChannelGroup]) -> dict[str, DamageCurve] | None:
    if curves is None:
        return None
    if not isinstance(curves, Mapping) or curves.keys() != groups.keys():
        raise ValueError("curves of the pruner's state must have one damage curve for each channel group")
    return {name: DamageCurve.from_dict(values) for name, values in curves.items()}


def _read_history(entries: Iterable[Mapping]) -> list[MaskUpdate]:
    history = [MaskUpdate(**entry) for entry in entries]  # TypeError: fields of another version
    wrong = [
        update
        for update in history
        if not all(isinstance(getattr(update, f.name), str if f.name == "phase" else (int, float)) for f in fields(update))
    ]
    steps = [update.step for update in history if update not in wrong]
    if wrong or steps != sorted(set(steps)) or any(update.phase not in ("soft", "hard") for update in history):
        raise ValueError("history of the pruner's state must be mask updates in the order of their steps")
    return history


def plan_settings(config) -> dict:
    """What a run that continues from a state must have in common with the run that saved it, as JSON values.

    Args:
        config: The `GFPruneConfig`.
    """
    names = ("target", "ratio", "depth", "attention_unit")
    return {name: getattr(config, name) for name in names} | asdict(config.schedule())


def check_plan(saved: Mapping | None, config) -> None:
    """Check that a state was saved with the budget and schedule of a configuration.

    Args:
        saved: `plan_settings` of the run that saved it; None: an earlier version saved none.
        config: The `GFPruneConfig` of the run that continues.

    Raises:
        ValueError: One differs.
    """
    for name, value in plan_settings(config).items() if saved else ():
        if saved.get(name, value) != value:
            raise ValueError(f"the pruner's state has {name}={saved[name]}, and this pruner {name}={value}")
