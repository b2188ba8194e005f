"""GFPruneConfig: invalid values are refused by name, presets have their values, fractions become steps."""

from __future__ import annotations

import json
import re
from dataclasses import fields

import numpy as np
import pytest

from diffusers_gfprune.configuration import PRESETS, GFPruneConfig
from diffusers_gfprune.criteria import criteria
from diffusers_gfprune.pruning.schedules import PruningSchedule

INVALID = [
    ("target", "flops"),
    ("depth", "deep"),
    ("attention_unit", "head"),
    ("latency_batch_size", 0),
    ("latency_batch_size", 1.5),
    ("latency_dtype", "int8"),
    ("latency_backend", "tensorrt"),
    ("target_device", "tpu"),
    ("criterion", "activations"),
    ("hvp", "approximate"),
    ("hessian_batches", "sum"),
    ("aggregation", "mean"),
    ("score_at", "sparse"),
    ("ranking", "layer"),
    ("sparsity_schedule", "quadratic"),
    ("mask_schedule", "step"),
    ("ratio", 0.0),
    ("ratio", 1.0),
    ("ratio", -0.2),
    ("ratio", 50),
    ("ratio", float("nan")),
    ("channel_multiple", 0),
    ("channel_multiple", -8),
    ("min_keep_ratio", -0.1),
    ("min_keep_ratio", 1.0),
    ("score_decay", 1.0),
    ("score_decay", -0.5),
    ("diff_pruning_threshold", 1.5),
    ("diff_pruning_threshold", -0.05),
    ("revival_margin", -0.1),
    ("sensitivity_exponent", -0.2),
    ("sensitivity_exponent", float("inf")),
    ("sensitivity_exponent", float("nan")),
    ("total_steps", 0),
    ("total_steps", 2.5),
    ("total_steps", float("nan")),
    ("total_steps", float("inf")),
    ("soft_fraction", -0.1),
    ("soft_fraction", 0.3),  # later than hard_fraction, 0.2
    ("hard_fraction", 1.2),
    ("hard_fraction", 0.05),  # earlier than soft_fraction, 0.1
    ("update_interval", 0),
    ("update_interval", 2.5),
    ("update_interval", -5),
    ("pruning_seed", 1.5),
    ("pruning_seed", 2**70),
]


@pytest.mark.parametrize(("name", "value"), INVALID)
def test_invalid_field_is_refused_by_name_and_value(name: str, value) -> None:
    """The error names the argument and its value."""
    with pytest.raises(ValueError) as error:
        GFPruneConfig(**{name: value})
    assert f"{name}={value}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("interpolate_masks", "false", "True or False"),
        ("interpolate_masks", 1, "True or False"),
        ("ratio", None, "a number"),
        ("ratio", True, "a number"),
        ("min_keep_ratio", "0.1", "a number"),
        ("sensitivity_exponent", "0.3", "a number"),
        ("latency_batch_size", "4", "a whole number"),
        ("update_interval", "4", "a whole number"),
        ("total_steps", None, "a whole number"),
        ("criterion", ["taylor"], "text"),
        ("ranking", 1, "text"),
    ],
)
def test_values_of_another_type_are_refused_by_name(name: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}={value!r}')} must be {words}$"):
        GFPruneConfig(**{name: value})


def test_numbers_of_numpy_are_numbers() -> None:
    config = GFPruneConfig(ratio=np.float32(0.5), total_steps=np.int64(100))
    assert config.ratio == 0.5 and type(config.total_steps) is int


def test_signed_scores_do_not_rank_blocks() -> None:
    """The lowest would have to go first, whatever it saves."""
    GFPruneConfig.from_preset("paper", total_steps=100)
    with pytest.raises(ValueError, match="aggregation=signed must be abs or sum_abs with depth=allow"):
        GFPruneConfig.from_preset("paper", total_steps=100, depth="allow")


def test_every_field_with_choices_has_an_invalid_value_above() -> None:
    """A choice that is added without validation would otherwise go unnoticed."""
    with_choices = {f.name for f in fields(GFPruneConfig) if "choices" in f.metadata}
    assert with_choices <= {name for name, _ in INVALID}


@pytest.mark.parametrize("field", [f for f in fields(GFPruneConfig) if "choices" in f.metadata], ids=lambda f: f.name)
def test_every_choice_is_accepted(field) -> None:
    """The choices in the help text are those of the validation."""
    for choice in field.metadata["choices"]:
        assert getattr(GFPruneConfig(**{field.name: choice}), field.name) == choice
    assert getattr(GFPruneConfig(), field.name) in field.metadata["choices"]


def test_runtimes_are_measured_in_float32() -> None:
    """Where time is the target; otherwise the dtype is that of the training device's blocks."""
    with pytest.raises(ValueError, match="^latency_dtype=bfloat16 must be float32 in openvino$"):
        GFPruneConfig(target="latency", latency_backend="openvino", latency_dtype="bfloat16")
    assert GFPruneConfig(latency_backend="openvino", latency_dtype="bfloat16").latency_runtime is None
    config = GFPruneConfig(target="latency", latency_backend="onnxruntime")
    assert config.latency_runtime == config.latency_setting().mode == "onnxruntime"
    assert GFPruneConfig(target="latency", latency_backend="compile").latency_setting().mode == "compiled"


def test_unknown_options_are_named() -> None:
    with pytest.raises(TypeError, match="^unknown option raito: it is no argument of the function, and no field of GFPruneC"):
        GFPruneConfig.from_preset("one-shot", raito=0.3, target="macs")


def test_options_of_another_target_are_told() -> None:
    """With MACs as the target, options of a budget in time do nothing."""
    assert GFPruneConfig().doubts() == GFPruneConfig(target="latency", latency_batch_size=16).doubts() == []
    assert GFPruneConfig(latency_batch_size=16, latency_backend="compile").doubts() == [
        "latency_batch_size=16 has no effect with target=macs: it is for target=latency",
        "latency_backend=compile has no effect with target=macs: it is for target=latency",
    ]


def test_widths_are_chosen_by_scores_that_tell_how_much_a_group_matters() -> None:
    """Sums of squared weights, for example, do not, but can be requested explicitly."""
    assert GFPruneConfig().ranking == GFPruneConfig(criterion="gradient-flow-weights").ranking == "sensitivity"
    assert GFPruneConfig(criterion="magnitude").ranking == "group"
    assert GFPruneConfig(criterion="magnitude", ranking="sensitivity").ranking == "sensitivity"
    assert GFPruneConfig.from_preset("paper").ranking == "group"  # as published
    assert GFPruneConfig.from_preset("one-shot", criterion="diff-pruning").ranking == "group"


def test_the_exponent_is_that_of_the_criterion() -> None:
    """The sums of gradient flow in weights spread less."""
    found = {name: GFPruneConfig(criterion=name).sensitivity_exponent for name in criteria()[:3]}
    assert found == {"gradient-flow": 0.3, "gradient-flow-weights": 0.5, "taylor": 0.3}
    assert GFPruneConfig(criterion="gradient-flow-weights", sensitivity_exponent=0.0).sensitivity_exponent == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_keep_ratio", 0.0),
        ("score_decay", 0.0),
        ("diff_pruning_threshold", 0.0),
        ("revival_margin", 0.0),
        ("channel_multiple", 1),
        ("total_steps", 1),
        ("update_interval", 1),
    ],
)
def test_ends_of_ranges_are_accepted(name: str, value) -> None:
    """Ranges are closed at their lower end."""
    assert getattr(GFPruneConfig(**{name: value}), name) == value


def test_whole_numbers_are_integers() -> None:
    """As steps and batch sizes are used in ranges."""
    config = GFPruneConfig(total_steps=1e4, update_interval=500.0)
    assert (type(config.total_steps), type(config.update_interval)) == (int, int)
    assert config.schedule().update_steps() == [0, 500, 1500]


def test_equal_fractions_are_accepted() -> None:
    """No hard phase, and one-shot pruning, are both legal."""
    assert GFPruneConfig(soft_fraction=0.2, hard_fraction=0.2).schedule().soft_steps == 20_000
    assert GFPruneConfig(soft_fraction=0.0, hard_fraction=0.0).schedule().end_steps == 0


def test_every_field_has_help_text() -> None:
    """The command line is made from the fields; each needs a help text."""
    for field in fields(GFPruneConfig):
        text = field.metadata.get("help", "")
        assert len(text) > 10 and text.endswith("."), field.name


def test_paper_preset_is_the_method_of_the_paper() -> None:
    """arXiv 2501.09464: signed sums of theta (H g) on masked weights, linear schedules, N = 10 % and M = 20 %."""
    config = GFPruneConfig.from_preset("paper")
    assert (config.criterion, config.aggregation, config.hessian_batches) == ("gradient-flow-weights", "signed", "mean")
    assert (config.score_at, config.score_decay) == ("masked", 0.0)
    assert (config.sparsity_schedule, config.mask_schedule) == ("linear", "linear")
    assert (config.interpolate_masks, config.revival_margin) == (False, 0.0)
    schedule = config.schedule()
    assert (schedule.soft_steps, schedule.end_steps) == (10_000, 20_000)


def test_one_shot_preset_prunes_at_step_zero() -> None:
    """No phase is left, only the ranking at step 0."""
    schedule = GFPruneConfig.from_preset("one-shot", total_steps=1000).schedule()
    assert (schedule.soft_steps, schedule.end_steps, schedule.update_steps()) == (0, 0, [0])


def test_default_preset_is_the_default() -> None:
    """Otherwise `--preset default` would differ from no preset."""
    assert GFPruneConfig.from_preset("default") == GFPruneConfig()


@pytest.mark.parametrize("preset", PRESETS)
def test_overrides_win_over_the_preset(preset: str) -> None:
    """A named setting is a start, not a cage."""
    config = GFPruneConfig.from_preset(preset, ratio=0.3, criterion="magnitude")
    assert (config.ratio, config.criterion) == (0.3, "magnitude")


def test_presets_name_fields_only() -> None:
    """A typo in a preset would only show when somebody uses it."""
    names = {field.name for field in fields(GFPruneConfig)}
    assert all(set(preset) <= names for preset in PRESETS.values())


def test_unknown_preset_is_refused() -> None:
    """The message lists the presets."""
    with pytest.raises(ValueError, match="preset=fast .*paper"):
        GFPruneConfig.from_preset("fast")


def test_overrides_of_a_preset_are_validated() -> None:
    """A soft phase does not fit into the one-shot preset, which ends at step 0."""
    with pytest.raises(ValueError, match="soft_fraction=0.1 and hard_fraction=0.0"):
        GFPruneConfig.from_preset("one-shot", soft_fraction=0.1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"total_steps": 10_000}, (1000, 2000, 100)),
        ({"total_steps": 10_000, "update_interval": 50}, (1000, 2000, 50)),
        ({"total_steps": 1000, "soft_fraction": 0.25, "hard_fraction": 0.25}, (250, 250, 25)),
        # without a soft phase, the default interval is a tenth of the hard one
        ({"total_steps": 1000, "soft_fraction": 0.0, "hard_fraction": 0.5}, (0, 500, 50)),
        # an interval is at least one step, however short the run
        ({"total_steps": 30}, (3, 6, 1)),
        ({"total_steps": 1, "soft_fraction": 0.0, "hard_fraction": 0.0}, (0, 0, 1)),
    ],
)
def test_schedule_in_steps(options: dict, expected: tuple[int, int, int]) -> None:
    """Fractions of the run become N, M and an interval; shapes are handed on."""
    for interpolate in (True, False):
        config = GFPruneConfig(
            sparsity_schedule="cosine", mask_schedule="exponential", interpolate_masks=interpolate, **options
        )
        schedule = PruningSchedule(*expected, "cosine", "exponential", interpolate=interpolate)
        assert config.schedule() == schedule


def test_to_dict_goes_through_json_and_back() -> None:
    """Saved runs hold the configuration as JSON."""
    config = GFPruneConfig(target="params", ratio=0.3, update_interval=7)
    assert GFPruneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("saved", "criterion"),
    [
        ({"criterion": "gradient-flow", "flow_metric": "weights"}, "gradient-flow-weights"),
        ({"criterion": "gradient-flow", "flow_metric": "predictions"}, "gradient-flow"),
        ({"criterion": "gradient-flow", "score_slices": "all"}, "gradient-flow-weights"),
        ({"criterion": "taylor", "flow_metric": "weights", "normalization": "mean", "cost_aware": False}, "taylor"),
    ],
)
def test_configurations_of_earlier_versions_are_read(saved: dict, criterion: str) -> None:
    """Reports keep them. The metric of gradient flow was an option."""
    config = GFPruneConfig.from_dict({**saved, "ratio": 0.3, "sensitivity_exponent": 0.3})
    assert config == GFPruneConfig(criterion=criterion, ratio=0.3, sensitivity_exponent=0.3)


def test_options_that_are_gone_are_not_forgotten() -> None:
    """Nothing that was chosen otherwise is read as if it were the same."""
    with pytest.raises(ValueError, match="score_slices=output of an earlier version must be all"):
        GFPruneConfig.from_dict({"criterion": "taylor", "score_slices": "output"})


def test_options_that_are_unknown_are_refused() -> None:
    """Of a later version, or misspelt."""
    with pytest.raises(ValueError, match="^warp=9 must be left out: this version has no such option$"):
        GFPruneConfig.from_dict({**GFPruneConfig().to_dict(), "warp": 9})
