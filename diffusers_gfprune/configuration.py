"""GFPruneConfig: every choice of a pruning run, with its range. The command line is made from these fields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from .criteria import RANKINGS, find_criterion
from .metrics.speed import DTYPES, SpeedSetting
from .pruning.budget import ATTENTION_UNITS
from .pruning.cost_model import TARGETS
from .pruning.schedules import SCHEDULES, PruningSchedule

__all__ = ["PRESETS", "GFPruneConfig", "criterion_of"]

DEVICES = ("auto", "cpu", "cuda")
LATENCY_BACKENDS = ("eager", "compile")
HVP_METHODS = ("exact", "finite-difference")
SCORE_AT = ("dense", "masked")
AGGREGATIONS = ("signed", "abs", "sum_abs")
HESSIAN_BATCHES = ("mean", "each")

# Options of earlier versions, with the one value that is left
REMOVED = {"score_slices": "all", "normalization": "mean", "cost_aware": False}

# Gradient flow as arXiv 2501.09464 states it; the defaults below are what benchmarks/README.md led to.
PRESETS: dict[str, dict] = {
    "default": {},
    "paper": {
        "criterion": "gradient-flow-weights",
        "aggregation": "signed",
        "hessian_batches": "mean",
        "score_at": "masked",
        "score_decay": 0.0,
        "ranking": "group",
        "interpolate_masks": False,
        "revival_margin": 0.0,
        "sparsity_schedule": "linear",
        "mask_schedule": "linear",
        "soft_fraction": 0.1,
        "hard_fraction": 0.2,
    },
    "one-shot": {"soft_fraction": 0.0, "hard_fraction": 0.0},
}


def criterion_of(config: Mapping) -> str:
    """The criterion of a saved configuration, by the name that it has now.

    Earlier versions had one criterion `gradient-flow`, in weights at first, and then in the metric that `flow_metric` names.

    Args:
        config: Of `GFPruneConfig.to_dict`, of this version or an earlier one.
    """
    metric = config.get("flow_metric", "weights" if "score_slices" in config else "predictions")
    by_weights = config["criterion"] == "gradient-flow" and metric == "weights"
    return "gradient-flow-weights" if by_weights else config["criterion"]


def _choice(default: str, choices: tuple[str, ...], text: str):
    return field(default=default, metadata={"help": f"{text} Choices: {', '.join(choices)}.", "choices": list(choices)})


@dataclass
class GFPruneConfig:
    """Options of `GradientFlowPruner`; every field says what it is in `metadata["help"]`.

    Raises:
        ValueError: A value is out of its range.
    """

    _argument_group_name = "pruning"

    # budget
    target: str = _choice("macs", TARGETS, "The cost that is reduced.")
    ratio: float = field(default=0.5, metadata={"help": "Share of the target that is REMOVED, in (0, 1)."})
    channel_multiple: str = field(
        default="auto",
        metadata={
            "help": "Kept channels of a group are a multiple of this (a number >= 1); auto: they fill the blocks in which "
            "target_device computes channels, as far as norm groups allow and the budget is still met."
        },
    )
    target_device: str = _choice(
        "auto", DEVICES, "What the pruned model is for, with channel_multiple=auto; auto: the device that it is pruned on."
    )
    min_keep_ratio: float = field(default=0.1, metadata={"help": "Share of each group that is always kept, in [0, 1)."})
    attention_unit: str = _choice("head_dim", ATTENTION_UNITS, "Shrink all heads alike, or remove whole heads.")
    latency_batch_size: int = field(
        default=1,
        metadata={
            "help": "target=latency: samples in the forward whose time is reduced (>= 1). A large batch gains more from few "
            "channels than a single sample, whose time is partly that of launching operations."
        },
    )
    latency_dtype: str = _choice(
        "float32", DTYPES, "Dtype that the pruned model is to run in, for target=latency and channel_multiple=auto."
    )
    latency_backend: str = _choice("eager", LATENCY_BACKENDS, "target=latency: as it is, or compiled by torch.compile.")

    # criterion
    criterion: str = field(
        default="gradient-flow",
        metadata={
            "help": "Importance: gradient-flow (in the metric of predictions), gradient-flow-weights (theta * H g, as "
            "published), taylor, diff-pruning, magnitude or random (in Python, also one you register)."
        },
    )
    hvp: str = _choice(
        "exact", HVP_METHODS, "gradient-flow-weights: how H g is computed, by double backward or by differences of gradients."
    )
    hessian_batches: str = _choice(
        "each",
        HESSIAN_BATCHES,
        "gradient-flow-weights: g and H of the mean loss over all calibration batches, or of each batch in turn.",
    )
    aggregation: str = _choice(
        "sum_abs", AGGREGATIONS, "gradient-flow-weights: how theta * H g is summed over a unit, sum, |sum| or sum of |.|."
    )
    score_at: str = _choice("dense", SCORE_AT, "Score with every mask at 1, or at the masked weights.")
    ranking: str | None = field(
        default=None,
        metadata={
            "help": "What groups lose: the same share (group), more where they cost much and score low (sensitivity), or "
            "the lowest-scored units of all (global). Default: sensitivity for gradient flow, whose sums tell how much a "
            "group matters, group for other criteria. "
            f"Choices: {', '.join(RANKINGS)}.",
            "choices": list(RANKINGS),
        },
    )
    sensitivity_exponent: float | None = field(
        default=None,
        metadata={
            "help": "Ranking by sensitivity: groups lose shares in proportion to this power of cost / summed scores (>= 0); 0 "
            "is the same share for all. Default: 0.5 for gradient-flow-weights, 0.3 for other criteria."
        },
    )
    score_decay: float = field(
        default=0.9, metadata={"help": "Weight of earlier scores at each update, in [0, 1); 0 forgets them."}
    )
    diff_pruning_threshold: float = field(
        default=0.05, metadata={"help": "diff-pruning: timesteps with a lower share of the largest loss are left out."}
    )

    # schedule
    total_steps: int = field(default=100_000, metadata={"help": "Training steps of the whole run (>= 1)."})
    soft_fraction: float = field(default=0.1, metadata={"help": "N: end of the soft phase, as a share of all steps."})
    hard_fraction: float = field(default=0.2, metadata={"help": "M: end of the hard phase, as a share of all steps."})
    update_interval: int | None = field(
        default=None, metadata={"help": "Steps between two rankings (>= 1; default: a tenth of the soft phase)."}
    )
    sparsity_schedule: str = _choice("cubic", SCHEDULES, "Shape of s_t, which rises to the target.")
    mask_schedule: str = _choice("linear", SCHEDULES, "Shape of p_t, which falls from 1 to 0.")
    interpolate_masks: bool = field(
        default=True, metadata={"help": "Soft phase: move masks in a straight line from ranking to ranking, without jumps."}
    )
    revival_margin: float = field(
        default=0.2,
        metadata={
            "help": "A pruned unit comes back only if its score is higher than that of a kept one by this share of the "
            "group's mean |score| (>= 0)."
        },
    )
    pruning_seed: int = field(default=0, metadata={"help": "Seed of the random criterion."})

    def __post_init__(self) -> None:
        criterion = find_criterion(self.criterion)
        for name in ("ranking", "sensitivity_exponent"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(criterion, name))
        for name, choices in (
            ("target", TARGETS),
            ("target_device", DEVICES),
            ("attention_unit", ATTENTION_UNITS),
            ("latency_dtype", DTYPES),
            ("latency_backend", LATENCY_BACKENDS),
            ("hvp", HVP_METHODS),
            ("hessian_batches", HESSIAN_BATCHES),
            ("aggregation", AGGREGATIONS),
            ("score_at", SCORE_AT),
            ("ranking", RANKINGS),
            ("sparsity_schedule", SCHEDULES),
            ("mask_schedule", SCHEDULES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)} must be one of {', '.join(choices)}")
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio} must lie between 0 and 1: it is the share of {self.target} removed")
        if self.channel_multiple != "auto":
            if not str(self.channel_multiple).isdecimal() or int(self.channel_multiple) < 1:
                raise ValueError(f"channel_multiple={self.channel_multiple} must be auto or a number, at least 1")
            self.channel_multiple = int(self.channel_multiple)
        if self.latency_batch_size < 1:
            raise ValueError(f"latency_batch_size={self.latency_batch_size} must be at least 1")
        for name in ("min_keep_ratio", "score_decay", "diff_pruning_threshold"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        for name in ("revival_margin", "sensitivity_exponent"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a number >= 0")
        if self.total_steps < 1:
            raise ValueError(f"total_steps={self.total_steps} must be at least 1")
        if not 0 <= self.soft_fraction <= self.hard_fraction <= 1:
            raise ValueError(
                f"soft_fraction={self.soft_fraction} and hard_fraction={self.hard_fraction} must satisfy "
                f"0 <= soft_fraction <= hard_fraction <= 1"
            )
        if self.update_interval is not None and self.update_interval < 1:
            raise ValueError(f"update_interval={self.update_interval} must be at least 1")

    @classmethod
    def from_preset(cls, preset: str, **overrides) -> GFPruneConfig:
        """A named setting (one of `PRESETS`) with some fields replaced."""
        if preset not in PRESETS:
            raise ValueError(f"preset={preset} must be one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[preset], **overrides})

    @property
    def takes_hessian(self) -> bool:
        """Whether scores may take products with the Hessian."""
        return find_criterion(self.criterion).derivatives == 2

    def latency_setting(self) -> SpeedSetting:
        """How the forward is run whose time `target="latency"` reduces."""
        return SpeedSetting(self.latency_batch_size, self.latency_dtype, compiled=self.latency_backend == "compile")

    def schedule(self) -> PruningSchedule:
        """The schedule in steps."""
        soft = round(self.soft_fraction * self.total_steps)
        end = round(self.hard_fraction * self.total_steps)
        interval = self.update_interval or max(1, (soft or end) // 10)
        return PruningSchedule(soft, end, interval, self.sparsity_schedule, self.mask_schedule, self.interpolate_masks)

    def to_dict(self) -> dict:
        """All fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping) -> GFPruneConfig:
        """From what `to_dict` returned, in this version or an earlier one.

        Raises:
            ValueError: A value is out of its range, or an option that is gone has another value than the one that is left.
        """
        for name, left in REMOVED.items():
            if values.get(name, left) != left:
                raise ValueError(f"{name}={values[name]} of an earlier version must be {left}, the one value that is left")
        kept = {name: value for name, value in values.items() if name not in ("flow_metric", *REMOVED)}
        return cls(**{**kept, "criterion": criterion_of(values)})
