"""Settings of the study: each is the run of a data set's recipe with a few changed arguments.

Rows of main, budget, steps, width-budgets, data, trajectory and rates have the training of today's recipes: timesteps by
importance, suitable learning rates. So have two of igsm. Others have independent timesteps and, on CIFAR-10 images, a lower
learning rate, unless they say otherwise; and no recovery.

Parts of the study:

    main        the default and its rivals, with the same training
    budget      the same at 30 % and 70 % of the MACs removed
    steps       the same on the digits, in a third of the steps
    earlier     more rivals, with the training before: criteria, one-shot and progressive, with the dense model as teacher
                and without; earlier-budget has the main ones at 30 % and 70 %
    widths      the share of channels that each group loses, by criterion; width-budgets has the default with other widths
                than its own, at each budget
    metric      gradient norms in weights, as published, instead of predictions
    phases      length and effect of the two phases
    schedules   shapes of s_t and p_t
    iterations  the same, with sample quality at every ranking until masks freeze
    revival     whether pruned units may be revived
    scores      options of the score that arXiv 2501.09464 leaves open
    data        without data: the dense model draws the images
    depth       widths and blocks of the latent models of the digits, which also run some rows of the earlier part
    features    block outputs of the teacher in the loss, besides its predictions, and recovery with it
    timesteps   how timesteps of training are drawn and weighed
    trajectory  the default with states of the sampler's own trajectories at the end of the run
    rates       other learning rates, for the default and its rivals
    igsm        IGSM (arXiv 2506.05398): its losses, weights and schedule, after its choice of channels; with the default's
                training; and its losses for the default
    recovery    least squares before compaction or at rankings, in two phases and in one shot, at 30, 50 and 70 % of the
                MACs removed
    convergence runs of a tenth of the steps, beside the rivals' whole runs

The five from phases to scores study the two phases. They run on the digits, for a third of the steps: more short runs are
affordable, and they differ more, since long fine-tuning reduces the differences.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from diffusers_gfprune.criteria import find_criterion

__all__ = [
    *("BASE", "CRITERIA", "CURVE_STEPS", "DATASETS", "EVERY", "FORMER_DEFAULTS", "LATENT", "SCORES", "SETTINGS"),
    *("SHARED", "TEACHERS", "Setting"),
]

DATASETS = ("digits", "cifar10")
# Latent models of the digits
LATENT = ("digits-dit", "digits-ldm", "digits-text")
EVERY = (*DATASETS, *LATENT)

# Arguments of every run of a data set. `CURVE_STEPS`: steps between two points of the curves, for data sets that have them.
# Recovery and the density of timesteps are defaults of the script today, and no part of what criteria and schedules are
# compared for. The CIFAR-10 recipe had another learning rate.
RECIPES = {"cifar10": "benchmarks/cifar10/prune.yaml", **{name: name.replace("-", "_") for name in ("digits", *LATENT)}}
FORMER_DEFAULTS = {
    name: {
        **{"--recovery": "none", "--timestep_sampling": "independent"},
        **({"--learning_rate": "3e-4"} if name == "cifar10" else {}),
    }
    for name in EVERY
}
BASE = {name: ("--recipe", RECIPES[name], *itertools.chain.from_iterable(FORMER_DEFAULTS[name].items())) for name in EVERY}
TEACHERS = {
    "digits": "training/digits/teacher",
    "cifar10": "benchmarks/cifar10/teacher",
    **{name: f"training/digits/{name.removeprefix('digits-')}" for name in LATENT},
}
CURVE_STEPS = {"digits": 250, "cifar10": 200}

# Titles of the criteria that are compared in full
CRITERIA = {name: find_criterion(name).title for name in ("random", "magnitude", "taylor", "diff-pruning", "gradient-flow")}

# Titles of the criteria whose scores are compared with damage
SCORES = {**CRITERIA, "gradient-flow-weights": find_criterion("gradient-flow-weights").title}


@dataclass(frozen=True)
class Setting:
    """One row of a table.

    Attributes:
        name: Name in its result files.
        title: In tables.
        part: Of the study.
        arguments: Of `training/prune_ddpm.py`, after those of `BASE`.
        curves: Whether sample quality is measured along the way, too, on data sets with curves.
        curve_steps: Steps between two points of these curves; None: those of the data set.
        datasets: Data sets that it is run on.
        own: Further arguments by data set.
        kind: `"prune"` runs `prune_ddpm.py`; `"scratch"`, `"torch-pruning"` and `"by-hand"` run `study_baselines.py`;
            `"trajectory"` runs `study_trajectory.py`.
        more: Arguments of this script that `prune_ddpm.py` does not have.
    """

    name: str
    title: str
    part: str
    arguments: tuple[str, ...] = ()
    curves: bool = False
    curve_steps: int | None = None
    datasets: tuple[str, ...] = DATASETS
    own: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kind: str = "prune"
    more: tuple[str, ...] = ()


ONE_SHOT = ("--preset", "one-shot", "--calibration_batches", "4")  # a single ranking can use more images
UNIFORM = ("--ranking", "group")  # the same share of every group, as in all published rivals
MEASURED = ("--ranking", "curves")  # by the damage of narrowing each group
WEIGHTS = ("--criterion", "gradient-flow-weights")
MENDED = ("--recovery", "rankings")
STRATIFIED = ("--timestep_sampling", "stratified")
IMPORTANCE = ("--timestep_sampling", "importance")
OURS = (*MENDED, *IMPORTANCE)
# The peak learning rate of a recipe, where rows had another one before; and others that it is compared with
RATE = {"cifar10": ("--learning_rate", "2.4e-3")}
OTHER_RATES = {"digits": ("2e-3",), "cifar10": ("3e-4", "1.2e-3", "4.8e-3")}
STEEPER = ("--sensitivity_exponent", "0.5")  # for sums with a smaller spread than the default's
NO_TEACHER = ("--distillation_weight", "0")
DIGITS = ("digits",)
# Rows of the earlier part that latent models have, too
ONE_SHOTS = tuple(f"one-shot-{name}" for name in ("gradient-flow", "diff-pruning", "magnitude"))
SHARED = ("two-phase", *ONE_SHOTS, "earlier-torch-pruning")
# Rankings at every tenth of the soft phase, the default of the script; both recipes rank less often
TENTHS = {"digits": ("--update_interval", "15"), "cifar10": ("--update_interval", "6")}
SHORT = ("--max_train_steps", "500", "--update_interval", "25")  # rankings at the same shares of the run as in the recipe
OFTEN = ("--max_train_steps", "500", "--update_interval", "10")  # for settings that differ at rankings


def _main() -> list[Setting]:
    # The same training for all of them, that of the default: only pruning differs
    diff_pruning, magnitude = ((*ONE_SHOT, "--criterion", name, *UNIFORM) for name in ("diff-pruning", "magnitude"))
    rows = [
        ("default", "gradient flow, two phases (default)", MENDED),
        ("no-recovery", "gradient flow, two phases, no recovery", ()),
        ("one-shot", "gradient flow, one-shot, no recovery", ONE_SHOT),
        ("diff-pruning", "Diff-Pruning, one-shot", diff_pruning),
        ("magnitude", "magnitude, one-shot", magnitude),
    ]
    title = "Torch-Pruning as in Diff-Pruning's script"
    found = [
        *(
            Setting(name, title, "main", (*chosen, *IMPORTANCE), curves=True, own=RATE, datasets=EVERY)
            for name, title, chosen in rows
        ),
        Setting("torch-pruning", title, "main", IMPORTANCE, own=RATE, datasets=EVERY, kind="torch-pruning"),
    ]
    for name, title, chosen in (rows[0], *rows[3:]):
        for percent in (30, 70):
            words = (*chosen, *IMPORTANCE, "--ratio", f"0.{percent // 10}")
            found.append(Setting(f"{name}-{percent}", f"{title}, {percent} % removed", "budget", words, own=RATE))
    rivals = [setting for setting in found if setting.part == "main" and setting.name not in ("no-recovery", "one-shot")]
    for whole in rivals:
        words = (*whole.arguments, *SHORT)
        short = replace(whole, name=f"{whole.name}-500", part="steps", arguments=words, curves=False, datasets=DIGITS)
        found.append(replace(short, title=f"{whole.title}, 500 steps"))
    return found


def _earlier() -> list[Setting]:
    """The main part before the learning rates and timesteps of today, most of it pruned by single channels."""
    found: list[Setting] = []
    for teacher, ending, words in (((), "", ""), (NO_TEACHER, "-noise", ", no teacher")):
        for criterion, title in CRITERIA.items():
            chosen = () if criterion == "gradient-flow" else ("--criterion", criterion, *UNIFORM)
            ours = criterion == "gradient-flow"
            rival = criterion in ("magnitude", "diff-pruning", "gradient-flow")
            found.append(
                Setting(
                    f"two-phase{ending}" if ours else f"progressive-{criterion}{ending}",
                    f"{title}, two phases{', no recovery' if ours else ''}{words}",
                    "earlier",
                    (*chosen, *teacher),
                    curves=ours,
                )
            )
            name = f"one-shot-{criterion}{ending}"
            found.append(Setting(name, f"{title}, one-shot{words}", "earlier", (*ONE_SHOT, *chosen, *teacher), curves=rival))
        found.append(
            Setting(f"scratch{ending}", f"scratch, at the widths of two phases{words}", "earlier", teacher, kind="scratch")
        )
        title = f"Torch-Pruning as in Diff-Pruning's script{words}"
        found.append(Setting(f"earlier-torch-pruning{ending}", title, "earlier", teacher, kind="torch-pruning"))
    published, taught = ("--preset", "paper"), ("--preset", "paper", "--distillation_weight", "1")
    title = "gradient flow as published, two phases"
    found.append(Setting("paper", f"{title}, no teacher", "earlier", published, curves=True, own=TENTHS))
    found.append(Setting("paper-teacher", title, "earlier", taught, own=TENTHS))
    for name, title, arguments in (
        ("two-phase", "gradient flow, two phases, no recovery", ()),
        ("one-shot-diff-pruning", "Diff-Pruning, one-shot", (*ONE_SHOT, "--criterion", "diff-pruning", *UNIFORM)),
        ("one-shot-magnitude", "magnitude, one-shot", (*ONE_SHOT, "--criterion", "magnitude", *UNIFORM)),
    ):
        for percent in (30, 70):
            told, words = f"{title}, {percent} % removed", (*arguments, "--ratio", f"0.{percent // 10}")
            found.append(Setting(f"{name}-{percent}", told, "earlier-budget", words))
    return [
        replace(setting, title=f"{setting.title} (earlier)", datasets=EVERY if setting.name in SHARED else DATASETS)
        for setting in found
    ]


def _widths() -> list[Setting]:
    rows = [
        ("two-phase-group", "gradient flow, two phases, the same share of every group", UNIFORM),
        ("one-shot-group", "gradient flow, one-shot, the same share of every group", (*ONE_SHOT, *UNIFORM)),
    ]
    for exponent in ("0.1", "0.5", "0.7"):
        title = f"gradient flow, two phases, widths by sensitivity, exponent {exponent}"
        rows.append((f"exponent-{exponent}", title, ("--sensitivity_exponent", exponent)))
    for criterion in ("diff-pruning", "taylor", "magnitude"):
        chosen = (*ONE_SHOT, "--criterion", criterion, "--ranking", "sensitivity", *STEEPER)
        title = f"{CRITERIA[criterion]}, one-shot, widths by its own sensitivity, exponent 0.5"
        rows.append((f"sensitivity-{criterion}", title, chosen))
    rows += [
        ("ranking-global", "gradient flow, two phases, global ranking", ("--ranking", "global")),
        ("ranking-joint", "gradient flow, two phases, units chosen together", ("--ranking", "joint")),
        ("ranking-curves", "gradient flow, two phases, widths by damage curves", MEASURED),
        ("one-shot-curves", "gradient flow, one-shot, widths by damage curves", (*ONE_SHOT, *MEASURED)),
    ]
    everywhere = ("ranking-curves", "two-phase-group", "exponent-0.7")
    found = [
        Setting(name, title, "widths", arguments, datasets=EVERY if name in everywhere else DATASETS)
        for name, title, arguments in rows
    ]
    # With today's training and recovery, beside the default at each budget
    for percent in (50, 30, 70):
        ending, words = ("", "") if percent == 50 else (f"-{percent}", f", {percent} % removed")
        for name, title, ranked in (
            ("default-curves", "widths by damage curves", MEASURED),
            ("default-group", "the same share of every group", UNIFORM),
        ):
            told = f"gradient flow, two phases (default), {title}{words}"
            arguments = (*ranked, *OURS, "--ratio", f"0.{percent // 10}")
            found.append(Setting(f"{name}{ending}", told, "width-budgets", arguments, own=RATE))
    return found


def _metric() -> list[Setting]:
    rows = [
        ("weights-two-phase", "in weights, two phases, exponent 0.5", WEIGHTS),
        ("weights-one-shot", "in weights, one-shot, exponent 0.5", (*WEIGHTS, *ONE_SHOT)),
        ("weights-two-phase-group", "in weights, two phases, the same share of every group", (*WEIGHTS, *UNIFORM)),
        ("weights-one-shot-group", "in weights, one-shot, the same share of every group", (*WEIGHTS, *ONE_SHOT, *UNIFORM)),
    ]
    return [Setting(name, f"gradient flow {title}", "metric", arguments) for name, title, arguments in rows]


def _phases() -> list[Setting]:
    def phases(soft: float, hard: float, interval: int) -> tuple[str, ...]:
        fractions = ("--soft_fraction", f"{soft:g}", "--hard_fraction", f"{hard:g}")
        return (*SHORT, *fractions, "--update_interval", str(interval))  # three rankings, as in the default

    rows = [
        ("short", "gradient flow, two phases (N = 10 %, M = 20 %, as by default)", SHORT),
        ("short-one-shot", "gradient flow, one-shot", (*SHORT, *ONE_SHOT)),
        ("short-diff-pruning", "Diff-Pruning, one-shot", (*SHORT, *ONE_SHOT, "--criterion", "diff-pruning", *UNIFORM)),
        ("short-magnitude", "magnitude, one-shot", (*SHORT, *ONE_SHOT, "--criterion", "magnitude", *UNIFORM)),
        ("phases-5-10", "N = 5 %, M = 10 %", phases(0.05, 0.1, 13)),
        ("phases-20-40", "N = 20 %, M = 40 %", phases(0.2, 0.4, 50)),
        ("soft-only", "soft only, N = M = 20 %", phases(0.2, 0.2, 34)),
        ("hard-only", "hard only, M = 20 %", phases(0, 0.2, 34)),
    ]
    return [Setting(name, title, "phases", arguments, datasets=DIGITS) for name, title, arguments in rows]


SHAPES = (
    ("--mask_schedule", ("cosine", "exponential", "cubic")),
    ("--sparsity_schedule", ("linear", "cosine", "exponential")),
)


def _schedules() -> list[Setting]:
    # The whole run is phases 1 and 2, at a constant learning rate; fewer samples, since they are drawn at every ranking
    phases = ("--soft_fraction", "0.5", "--hard_fraction", "1", "--lr_scheduler", "constant")
    iterations = (*("--max_train_steps", "200", "--update_interval", "20"), *phases)
    iterations += ("--eval_images", "500", "--ddim_num_inference_steps", "20")
    default = "p_t linear, s_t cubic (default)"
    found = [
        Setting("often", default, "schedules", OFTEN, datasets=DIGITS),
        Setting("iterations", default, "iterations", iterations, True, 20, DIGITS),
    ]
    for option, shapes in SHAPES:
        letter = {"--mask_schedule": "p", "--sparsity_schedule": "s"}[option]
        for shape in shapes:
            name, title, shaped = f"{letter}-{shape}", f"{letter}_t {shape}", (option, shape)
            found.append(Setting(name, title, "schedules", (*shaped, *OFTEN), datasets=DIGITS))
            found.append(Setting(f"iterations-{name}", title, "iterations", (*iterations, *shaped), True, 20, DIGITS))
    return found


def _revival() -> list[Setting]:
    rows = [
        ("frozen-first", "ranked by the first scores alone", ("--score_decay", "0.999999", "--revival_margin", "1e3")),
        ("no-revival", "none comes back in another's place", ("--revival_margin", "1e3")),
        ("free-revival", "units come back at once", ("--revival_margin", "0")),
        ("no-memory", "units come back at once, scores of the moment", ("--revival_margin", "0", "--score_decay", "0")),
        ("mask-jumps", "masks jump at rankings", ("--interpolate_masks", "false")),
    ]
    return [Setting(name, title, "revival", (*arguments, *OFTEN), datasets=DIGITS) for name, title, arguments in rows]


def _scores() -> list[Setting]:
    rows = [
        ("scores-weights", "in weights: sums of absolute values, batch by batch", WEIGHTS),
        ("scores-signed", "in weights: signed sums", (*WEIGHTS, "--aggregation", "signed")),
        ("scores-abs", "in weights: absolute value of sums", (*WEIGHTS, "--aggregation", "abs")),
        ("scores-mean-loss", "in weights: g and H of the mean loss", (*WEIGHTS, "--hessian_batches", "mean")),
        ("finite-difference", "in weights: Hg by finite differences", (*WEIGHTS, "--hvp", "finite-difference")),
        ("scores-masked", "in predictions: at the masked weights", ("--score_at", "masked")),
        ("batches-1", "in predictions: 1 calibration batch in place of 2", ("--calibration_batches", "1")),
        ("batches-8", "in predictions: 8 calibration batches in place of 2", ("--calibration_batches", "8")),
    ]
    return [Setting(name, title, "scores", (*arguments, *SHORT), datasets=DIGITS) for name, title, arguments in rows]


def _data() -> list[Setting]:
    def drawn(images: int, steps: int) -> tuple[str, ...]:
        return ("--num_teacher_images", str(images), "--teacher_num_inference_steps", str(steps))

    title, words = "gradient flow, two phases (default), without data", (*OURS, "--train_data", "teacher")
    found = []
    # Steps of the sampler stay: does the number of images matter?
    for name, told, times in (("without-data", title, 1), ("without-data-more", f"{title}, four times the images", 4)):
        own = {"digits": drawn(1500 * times, 50), "cifar10": (*drawn(4000 * times, 25), *RATE["cifar10"])}
        found.append(Setting(name, told, "data", words, own=own))
    return found


def _depth() -> list[Setting]:
    timed = ("--target", "latency", "--latency_batch_size", "16")
    both = "gradient flow, two phases, channels and blocks"
    rows = [
        ("depth-allow", both, ("--depth", "allow"), "prune"),
        ("depth-only", "gradient flow, two phases, blocks only", ("--depth", "only"), "prune"),
        ("by-hand", "blocks by hand (every other layer, or as in BK-SDM)", (), "by-hand"),
        ("timed-depth-allow", f"{both}, as fast as blocks by hand", ("--depth", "allow", *timed), "prune"),
        ("timed-depth-only", "gradient flow, two phases, blocks only, as fast", ("--depth", "only", *timed), "prune"),
    ]
    # The share of the dense time that models without these blocks save, in the table of latent models
    saved = {name: ("--ratio", ratio) for name, ratio in zip(LATENT, ("0.44", "0.58", "0.585"), strict=True)}
    return [
        Setting(name, title, "depth", arguments, datasets=LATENT, own=saved if "timed" in name else {}, kind=kind)
        for name, title, arguments, kind in rows
    ]


def _features() -> list[Setting]:
    title, words = "gradient flow, two phases, block outputs of the teacher", ("--feature_distillation_weight", "0.03")
    recovery = f"{title}, recovery"
    return [
        Setting("features", title, "features", words, datasets=EVERY),
        Setting("features-recovery", recovery, "features", (*words, *MENDED), datasets=EVERY),
    ]


def _timesteps() -> list[Setting]:
    ours = "gradient flow, two phases (default)"
    rows = [
        ("stratified", f"{ours}, stratified timesteps", (*MENDED, *STRATIFIED)),
        ("independent", f"{ours}, independent timesteps", MENDED),
        ("min-snr", f"{ours}, independent timesteps, Min-SNR weights", (*MENDED, "--snr_gamma", "5")),
    ]
    rival = (*ONE_SHOT, "--criterion", "diff-pruning", *UNIFORM, *STRATIFIED)
    rows.append(("one-shot-diff-pruning-stratified", "Diff-Pruning, one-shot, stratified timesteps", rival))
    return [Setting(name, title, "timesteps", arguments, curves=True) for name, title, arguments in rows]


def _trajectory() -> list[Setting]:
    rows = [
        ("trajectory-none", "gradient flow, two phases (default), run again", "0"),
        ("trajectory-10", "gradient flow, two phases, trajectories for the last 10 %", "0.1"),
    ]
    return [
        Setting(name, title, "trajectory", OURS, own=RATE, kind="trajectory", more=("--fraction", fraction))
        for name, title, fraction in rows
    ]


def _rates() -> list[Setting]:
    diff_pruning = (*ONE_SHOT, "--criterion", "diff-pruning", *UNIFORM)
    rows = [("", "gradient flow, two phases (default)", MENDED), ("diff-pruning-", "Diff-Pruning, one-shot", diff_pruning)]
    found = []
    for dataset, rates in OTHER_RATES.items():
        for rate, (name, title, chosen) in itertools.product(rates, rows):
            words = (*chosen, *IMPORTANCE, "--learning_rate", rate)
            title = f"{title}, learning rate {rate}"
            found.append(Setting(f"{name}rate-{rate}", title, "rates", words, curves=True, datasets=(dataset,)))
    lower = next(setting for setting in found if setting.name == "rate-1.2e-3")
    words, title = (*lower.arguments, "--ratio", "0.3"), f"{lower.title}, 30 % removed"
    return [*found, replace(lower, name="rate-1.2e-3-30", title=title, arguments=words)]


def _igsm() -> list[Setting]:
    """IGSM (arXiv 2506.05398) as its public code has it, and its losses for the default.

    Its CIFAR-10 scripts prune by Diff-Pruning with threshold 0.04, the same share of every layer, and train with the sums of
    squares of noise and teacher and 0.1 times that of second-order Jacobian matching, at a constant learning rate of 2e-4 and
    with dropout 0.1. In means over the values of an image, the last weight is 0.05 for 32x32 RGB pixels. It is scaled by the
    number of values here, so that terms are as large beside one another as there.
    """
    matching = {
        dataset: ("--sensitivity_matching_weight", f"{0.05 * values / (3 * 32 * 32):.4f}")
        for dataset, values in (("digits", 8 * 8), ("cifar10", 3 * 16 * 16))
    }
    pruned = (*ONE_SHOT, "--criterion", "diff-pruning", "--diff_pruning_threshold", "0.04", *UNIFORM)
    losses = ("--distillation_weight", "0.5")
    published = (*pruned, *losses, "--dropout", "0.1")
    constant = ("--learning_rate", "2e-4", "--lr_scheduler", "constant", "--lr_warmup_steps", "0")
    today = {dataset: (*words, *RATE.get(dataset, ())) for dataset, words in matching.items()}
    rows = [
        ("igsm", "IGSM: Diff-Pruning, one-shot, its losses and schedule", (*published, *constant), matching),
        ("igsm-today", "IGSM with timesteps and learning rates of the default", (*published, *IMPORTANCE), today),
        ("igsm-losses", "gradient flow, two phases (default), losses of IGSM", (*OURS, *losses), today),
    ]
    return [Setting(name, title, "igsm", arguments, own=own) for name, title, arguments, own in rows]


def _recovery() -> list[Setting]:
    joint = (*ONE_SHOT, "--ranking", "joint")
    diff_pruning = (*ONE_SHOT, "--criterion", "diff-pruning", *UNIFORM)
    rows = [
        ("two-phase", "gradient flow, two phases", ()),
        ("one-shot", "gradient flow, one-shot", ONE_SHOT),
        ("joint", "gradient flow, one-shot, units chosen together", joint),
        ("diff-pruning", "Diff-Pruning, one-shot", diff_pruning),
    ]
    found = []
    for percent in (50, 30, 70):
        ending, words = ("", "") if percent == 50 else (f"-{percent}", f", {percent} % removed")
        for name, title, arguments in rows:
            # In one shot, both kinds of recovery are the same; where runs are not short, two rows stand in other parts
            for recovery in ("none", "compaction", "rankings")[: 3 if name == "two-phase" else 2]:
                told = {"none": "", "compaction": ", with recovery", "rankings": ", with recovery at rankings"}[recovery]
                chosen = (*arguments, "--recovery", recovery, "--ratio", f"0.{percent // 10}")
                elsewhere = name == "two-phase" and recovery != "compaction"
                found.append(
                    Setting(
                        f"recovery-{recovery}-{name}{ending}",
                        f"{title}{told}{words}",
                        "recovery",
                        chosen,
                        datasets=DIGITS if elsewhere else EVERY,
                        own={"digits": SHORT},
                    )
                )
    ranked = {"digits": (*SHORT, "--update_interval", "5"), "cifar10": TENTHS["cifar10"]}
    for recovery, told in (("none", ""), ("rankings", ", with recovery at rankings")):
        title = f"gradient flow, two phases, 19 rankings{told}"
        found.append(Setting(f"recovery-{recovery}-tenths", title, "recovery", ("--recovery", recovery), own=ranked))
    return found


def _convergence() -> list[Setting]:
    # Rankings, warmup and validation at the same shares of the run as in the recipes
    own = {
        "digits": ("--max_train_steps", "150", "--update_interval", "8", "--lr_warmup_steps", "3"),
        "cifar10": ("--max_train_steps", "60", "--update_interval", "3", "--lr_warmup_steps", "3", "--validation_steps", "10"),
    }
    joint = (*ONE_SHOT, "--ranking", "joint", "--recovery", "compaction")
    rows = [
        ("default", "gradient flow, two phases (default)", OURS),
        ("two-phase", "gradient flow, two phases, no recovery", ()),
        ("one-shot", "gradient flow, one-shot, no recovery", ONE_SHOT),
        ("recovery", "gradient flow, one-shot, with recovery", (*ONE_SHOT, "--recovery", "compaction")),
        ("joint", "gradient flow, one-shot, units chosen together, with recovery", joint),
    ]
    return [
        Setting(f"tenth-{name}", f"{title}, a tenth of the steps", "convergence", arguments, own=own)
        for name, title, arguments in rows
    ]


SETTINGS = {
    setting.name: setting
    for part in (
        _main,
        _earlier,
        _widths,
        _metric,
        _phases,
        _schedules,
        _revival,
        _scores,
        _data,
        _depth,
        _features,
        _timesteps,
        _trajectory,
        _rates,
        _igsm,
        _recovery,
        _convergence,
    )
    for setting in part()
}
