"""GFPruneConfig: all options of a pruning run, with their ranges. The command line is generated from these fields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from .argument_fields import Range, at_least, check_fields, check_types
from .criteria import RANKINGS, find_criterion
from .metrics.speed import DTYPES, SpeedSetting
from .pruning.blocks import DEPTHS
from .pruning.budget import ATTENTION_UNITS
from .pruning.cost_model import TARGETS
from .pruning.schedules import SCHEDULES, PruningSchedule
from .runtimes.requirements import RUNTIMES, check_runtimes

__all__ = ["PRESETS", "GFPruneConfig", "criterion_of"]

DEVICES = ("auto", "cpu", "cuda")
# Modes of the timed forward pass, by the value of `latency_backend`
LATENCY_MODES = {"eager": "eager", "compile": "compiled", **{runtime: runtime for runtime in RUNTIMES}}
LATENCY_BACKENDS = tuple(LATENCY_MODES)
HVP_METHODS = ("exact", "finite-difference")
SCORE_AT = ("midpoint", "dense", "masked")
SEEDS = Range("fit into 64 bits, from -2**63 to 2**63 - 1", lambda seed: -(2**63) <= seed < 2**63)
AGGREGATIONS = ("signed", "abs", "sum_abs")
HESSIAN_BATCHES = ("mean", "each")

# Options that were removed, with the only value that is still accepted
REMOVED = {"score_slices": "all", "normalization": "mean", "cost_aware": False}

# "paper" is gradient flow as in arXiv 2501.09464. The defaults below come from the comparisons in benchmarks/README.md.
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
    """The current name of the criterion of a saved configuration.

    Earlier versions had one criterion `gradient-flow`: first in the metric of weights, later in the metric `flow_metric`.

    Args:
        config: Output of `GFPruneConfig.to_dict`, of this version or an earlier one.
    """
    metric = config.get("flow_metric", "weights" if "score_slices" in config else "predictions")
    by_weights = config["criterion"] == "gradient-flow" and metric == "weights"
    return "gradient-flow-weights" if by_weights else config["criterion"]


def _choice(default: str, choices: tuple[str, ...], text: str):
    return field(default=default, metadata={"help": f"{text} Choices: {', '.join(choices)}.", "choices": list(choices)})


@dataclass
class GFPruneConfig:
    """Options of `GradientFlowPruner`. Every field is described in its `metadata["help"]`.

    Raises:
        ValueError: A value is out of range or has another type.
    """

    _argument_group_name = "pruning"

    # budget
    target: str = _choice("macs", TARGETS, "Cost to reduce.")
    ratio: float = field(default=0.5, metadata={"help": "Share of the target cost to REMOVE, in (0, 1)."})
    channel_multiple: str = field(
        default="auto",
        metadata={
            "help": "Widths below the dense one are multiples of this (a number >= 1). auto: of the block size of "
            "target_device, as far as norm groups and the budget allow."
        },
    )
    target_device: str = _choice(
        "auto", DEVICES, "channel_multiple=auto: device that will run the pruned model; auto: the device used for pruning."
    )
    min_keep_ratio: float = field(default=0.1, metadata={"help": "Minimum share of channels kept in each group, in [0, 1)."})
    depth: str = _choice(
        "none",
        DEPTHS,
        "Whether whole residual blocks may be removed. none: channels only; allow: channels and blocks; only: blocks only.",
    )
    attention_unit: str = _choice("head_dim", ATTENTION_UNITS, "Shrink all heads equally, or remove whole heads.")
    latency_batch_size: int = field(
        default=1,
        metadata={
            "help": "target=latency: batch size of the timed forward pass (>= 1). Large batches gain more from pruning than a "
            "single sample, for which launching operations takes a large part of the time."
        },
    )
    latency_dtype: str = _choice(
        "float32", DTYPES, "Dtype in which the pruned model will run, for target=latency and channel_multiple=auto."
    )
    latency_backend: str = _choice(
        "eager",
        LATENCY_BACKENDS,
        "target=latency: run eagerly, with torch.compile, or exported to a runtime, which executes on the CPU in float32.",
    )

    # criterion
    criterion: str = field(
        default="gradient-flow",
        metadata={
            "help": "Importance criterion: gradient-flow (in the metric of predictions), gradient-flow-weights (theta * H g; "
            "as published with --preset paper), taylor, diff-pruning, magnitude or random; in Python, also a registered one."
        },
    )
    hvp: str = _choice(
        "exact", HVP_METHODS, "gradient-flow-weights: compute H g by double backward or by finite differences of gradients."
    )
    hessian_batches: str = _choice(
        "each",
        HESSIAN_BATCHES,
        "gradient-flow-weights: g and H of the mean loss over all calibration batches, or of each batch separately.",
    )
    aggregation: str = _choice(
        "sum_abs",
        AGGREGATIONS,
        "gradient-flow-weights: signed: sum of theta * H g over a unit; abs: absolute value of this sum; sum_abs: sum of "
        "absolute values.",
    )
    score_at: str | None = field(
        default=None,
        metadata={
            "help": "Masks while scoring: all 1 (dense), the current ones (masked), or 0.5 for the units pruned so far "
            "(midpoint). Default: midpoint for ranking=joint, otherwise dense. "
            f"Choices: {', '.join(SCORE_AT)}.",
            "choices": list(SCORE_AT),
        },
    )
    ranking: str | None = field(
        default=None,
        metadata={
            "help": "How groups share the pruning: by the least joint change of predictions (joint, for gradient-flow; best "
            "without recovery and training), all alike (group), more where costs are high and scores low (sensitivity), by "
            "measured damage (curves), or the lowest scores of all units (global). Default: sensitivity for gradient flow, "
            f"else group. Choices: {', '.join(RANKINGS)}.",
            "choices": list(RANKINGS),
        },
    )
    sensitivity_exponent: float | None = field(
        default=None,
        metadata={
            "help": "ranking=sensitivity: the share removed from a group is proportional to this power of cost / summed "
            "scores (>= 0); 0: the same share for all. Default: 0.5 for gradient-flow-weights, 0.3 for other criteria."
        },
    )
    score_decay: float = field(
        default=0.9, metadata={"help": "Decay of the moving average of scores, in [0, 1); 0: only the latest scores."}
    )
    diff_pruning_threshold: float = field(
        default=0.05,
        metadata={"help": "diff-pruning: skip timesteps whose loss is below this share of the largest loss, in [0, 1)."},
    )

    # schedule
    total_steps: int = field(default=100_000, metadata={"help": "Total number of training steps (>= 1)."})
    soft_fraction: float = field(
        default=0.1, metadata={"help": "N: end of the soft phase, as a share of all training steps, in [0, hard_fraction]."}
    )
    hard_fraction: float = field(
        default=0.2, metadata={"help": "M: end of the hard phase, as a share of all training steps, in [soft_fraction, 1]."}
    )
    update_interval: int | None = field(
        default=None,
        metadata={
            "help": "Steps between rankings (>= 1; default: a tenth of the soft phase, or without one, of the hard phase)."
        },
    )
    sparsity_schedule: str = _choice("cubic", SCHEDULES, "Shape of s_t, which rises to the target.")
    mask_schedule: str = _choice("linear", SCHEDULES, "Shape of p_t, which falls from 1 to 0.")
    interpolate_masks: bool = field(
        default=True, metadata={"help": "Soft phase: interpolate masks linearly between rankings."}
    )
    revival_margin: float = field(
        default=0.2,
        metadata={
            "help": "A pruned unit is revived only if its score exceeds that of a kept unit by this share of the group's mean "
            "|score| (>= 0)."
        },
    )
    pruning_seed: int = field(default=0, metadata={"help": "Seed of the random criterion."})

    def __post_init__(self) -> None:
        check_types(self, other=["channel_multiple"])  # a number or a word
        criterion = find_criterion(self.criterion)
        for name in ("ranking", "sensitivity_exponent"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(criterion, name))
        if self.score_at is None:
            self.score_at = "midpoint" if self.ranking == "joint" else "dense"
        for name, choices in (
            ("target", TARGETS),
            ("target_device", DEVICES),
            ("depth", DEPTHS),
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
        if criterion.derivatives == 2 and self.aggregation == "signed" and self.depth != "none":
            raise ValueError(f"aggregation=signed must be abs or sum_abs with depth={self.depth}, to weigh scores by savings")
        if self.ranking == "joint" and criterion.joint is None:
            raise ValueError(f"ranking=joint must have a criterion that measures joint changes, not {self.criterion}")
        if self.ranking == "joint" and self.score_at == "masked":
            raise ValueError("score_at=masked must be midpoint or dense for ranking=joint: removed units have no derivative")
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio} must be between 0 and 1: it is the share of {self.target} to remove")
        if self.channel_multiple != "auto":
            if not str(self.channel_multiple).isdecimal() or int(self.channel_multiple) < 1:
                raise ValueError(f"channel_multiple={self.channel_multiple} must be auto or a number, at least 1")
            self.channel_multiple = int(self.channel_multiple)
        check_fields(self, at_least(1), "latency_batch_size", "total_steps", "update_interval")
        check_fields(self, SEEDS, "pruning_seed")
        if self.target == "latency":
            try:
                self.latency_setting()
            except ValueError as error:
                raise ValueError(f"latency_{error}") from error
        for name in ("min_keep_ratio", "score_decay", "diff_pruning_threshold"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        for name in ("revival_margin", "sensitivity_exponent"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a number >= 0")
        if not 0 <= self.soft_fraction <= self.hard_fraction <= 1:
            raise ValueError(
                f"soft_fraction={self.soft_fraction} and hard_fraction={self.hard_fraction} must satisfy "
                f"0 <= soft_fraction <= hard_fraction <= 1"
            )

    @classmethod
    def from_preset(cls, preset: str, **overrides) -> GFPruneConfig:
        """A preset (one of `PRESETS`) with some fields overridden.

        Raises:
            TypeError: An option is unknown.
            ValueError: The preset is unknown, or a value is out of range.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset={preset} must be one of {', '.join(PRESETS)}")
        if unknown := overrides.keys() - {option.name for option in fields(cls)}:
            raise TypeError(f"unknown option {min(unknown)}: it is no argument of the function, and no field of GFPruneConfig")
        return cls(**{**PRESETS[preset], **overrides})

    @property
    def takes_hessian(self) -> bool:
        """Whether scoring may compute Hessian-vector products."""
        return find_criterion(self.criterion).derivatives == 2

    def latency_setting(self) -> SpeedSetting:
        """Settings of the forward pass that `target="latency"` measures."""
        return SpeedSetting(self.latency_batch_size, self.latency_dtype, LATENCY_MODES[self.latency_backend])

    @property
    def latency_runtime(self) -> str | None:
        """The runtime that `target="latency"` measures in; None: PyTorch, or another target."""
        return self.latency_setting().runtime if self.target == "latency" else None

    def doubts(self) -> list[str]:
        """A line for each option that has no effect with the others."""
        if self.target == "latency":
            return []
        unused = [option for option in fields(GFPruneConfig) if option.name.startswith("latency_")]
        given = [(o.name, getattr(self, o.name)) for o in unused if getattr(self, o.name) != o.default]
        return [f"{name}={value} has no effect with target={self.target}: it is for target=latency" for name, value in given]

    def check_installed(self) -> None:
        """Check for the runtime that `target="latency"` measures in.

        Raises:
            ImportError: It is not installed. The message has the command that installs it.
        """
        if self.latency_runtime is not None:
            check_runtimes([self.latency_runtime])

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
        """Read the output of `to_dict`, of this version or an earlier one.

        Raises:
            ValueError: A value is out of range, a name is not that of an option, or a removed option does not have its only
                accepted value.
        """
        for name, left in REMOVED.items():
            if values.get(name, left) != left:
                raise ValueError(f"{name}={values[name]} of an earlier version must be {left}, the only value supported")
        kept = {name: value for name, value in values.items() if name not in ("flow_metric", *REMOVED)}
        known = [option.name for option in fields(cls)]
        for name in kept:
            if name not in known:
                raise ValueError(f"{name}={kept[name]} must be left out: this version has no such option")
        return cls(**{**kept, "criterion": criterion_of(values)})
