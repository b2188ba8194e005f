"""benchmarks/study*.py, approximation.py and sensitivity.py: settings are valid, results are kept, and all scripts run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import sensitivity
import study
import study_report
import study_run
import study_time
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file
from study_run import RememberedTeacher, remembered
from study_settings import DATASETS, EVERY, SETTINGS

from diffusers_gfprune.metrics.cache import TensorCache
from diffusers_gfprune.metrics.model_size import count_parameters
from diffusers_gfprune.objectives.objective import Objective, ObjectiveArguments
from diffusers_gfprune.pruning.masking import ChannelMasks
from diffusers_gfprune.reports.provenance import command_line
from diffusers_gfprune.scripts import prune_ddpm
from diffusers_gfprune.training.arguments import parse_arguments
from helpers.architectures import build
from helpers.compaction import traced
from helpers.figures import lines, saved_figures
from helpers.scripts import ROOT, SHORT, assert_one_error, forget_accelerator, plain_runs, run_script


def results_of(name: str, seed: int, ssim: float, macs: int = 50) -> dict:
    """What a run leaves, with figures that tell it apart."""
    pruned = {"macs": macs * 1_000_000, "step_loss": 0.07, "fd_pixels": 0.04, "ssim_to_dense": ssim, "psnr_to_dense": 20.0}
    dense = {"macs": 100_000_000, "step_loss": 0.06, "fd_pixels": 0.03}
    distances = {"fd_pixels": {"title": "FD-pixels", "features": "raw pixels", "reference_images": 10}}
    ranking = {"step": 0, "revived_units": 1, "newly_pruned_units": 4}
    phases = {"soft_end_step": 50, "hard_end_step": 60, "total_steps": 100}
    return {
        **{"setting": name, "dataset": "digits", "seed": seed, "dense": dense, "pruned": pruned, "steps": 100},
        **{"evaluation": {"distances": distances}, "rankings": [ranking], "widths": {}, "phases": phases},
        "curves": {"quality_steps": [50], "quality": {k: [v / 2] for k, v in pruned.items()}},
    }


@pytest.mark.fast_variants(40)
@pytest.mark.parametrize(("name", "dataset"), [(name, d) for name, setting in SETTINGS.items() for d in setting.datasets])
def test_arguments_of_every_setting_are_understood(name: str, dataset: str) -> None:
    setting = SETTINGS[name]
    words = study.arguments_of(setting, dataset, 3, ["--output_dir", "runs/x"])
    args = parse_arguments(words)
    assert args.run.seed == args.pruning.pruning_seed == 3
    percent = (
        name[-2:]
        if setting.part in ("budget", "earlier-budget", "width-budgets", "rates", "recovery") and name[-3:] in ("-30", "-70")
        else "50"
    )
    if args.pruning.target == "latency":  # as fast as another row
        assert 0.4 < args.pruning.ratio < 0.6
    else:
        assert args.pruning.ratio == int(percent) / 100
    assert bool(args.evaluation.eval_steps) == (setting.curves and dataset in DATASETS)
    assert (args.objective.distillation_weight == 0) == ("no teacher" in setting.title)


def test_the_teacher_of_the_second_data_set_predicts_noise() -> None:
    """Nothing but noise is left at the last timestep, so that a trained model gives it back; one that predicts none has 1."""
    unet = UNet2DModel.from_pretrained(ROOT / "benchmarks/cifar10/teacher/unet", use_safetensors=True).eval()
    wanted = json.loads((ROOT / "benchmarks/cifar10/unet_config.json").read_text())
    assert {name: list(v) if isinstance(v := unet.config[name], tuple) else v for name in wanted} == wanted
    assert count_parameters(unet) == 1_624_323
    noise = torch.randn(16, 3, 16, 16)
    with torch.no_grad():
        assert (unet(noise, 999).sample - noise).square().mean() < 0.02


def test_settings_differ() -> None:
    """No two runs of a data set are the same, but for settings that happen to be the default.

    Rows without recovery repeat some of the phases, whose results are of an earlier build.
    """
    chosen = [s for s in SETTINGS.values() if s.kind == "prune" and not s.name.startswith("recovery-none-")]
    default = vars(parse_arguments(study.arguments_of(SETTINGS["two-phase"], "digits", 0, [])).pruning)
    seen: dict[str, str] = {}
    for setting in chosen:
        args = parse_arguments(study.arguments_of(setting, "digits", 0, []))
        values = json.dumps(
            [vars(args.pruning), vars(args.objective), vars(args.training), vars(args.teacher)], sort_keys=True
        )
        if vars(args.pruning) != default:
            assert values not in seen, f"{setting.name} is {seen.get(values)}"
        seen[values] = setting.name


def test_the_table_has_means_and_spreads(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    folder.mkdir()
    for seed, ssim in enumerate((0.9, 0.92, 0.94)):
        (folder / f"default-seed{seed}.json").write_text(json.dumps(results_of("default", seed, ssim)))
    (folder / "default-30-seed0.json").write_text(json.dumps(results_of("default-30", 0, 0.98, macs=70)))
    found = study_report.load("digits", tmp_path)
    assert {name: len(runs) for name, runs in found.items()} == {"default": 3, "default-30": 1}
    table = study_report.main_table(found, "digits", ["default", "paper"])
    row = next(line for line in table.splitlines() if "(default)" in line)
    assert row.split(" | ")[1:] == ["3", "50.0M", "0.0700 ± 0.0000", "0.0400 ± 0.0000", "0.9200 ± 0.0200", "20.00 ± 0.00 |"]
    assert "30 %" not in table and "| dense | - | 100.0M | 0.0600 | 0.0300 | 1 | - |" in table
    assert "| 1.0 ± 0.0 | 25.0% | 0.0400 ± 0.0000 | 0.9200 ± 0.0200 |" in study_report.revival_table(found, "digits")
    budgets = study_report.tables({"digits": found})["budget digits"].splitlines()[3:]  # after the title, its line, and dense
    assert [line.split(" | ")[2] for line in budgets] == ["50.0M", "70.0M"]  # the default beside those of its part


def test_iterations_are_told_at_the_end_of_either_phase() -> None:
    """Beside the dense model as these runs measured it, on fewer samples than others."""
    found = {"default": [results_of("default", 0, 0.9)], "iterations": [results_of("iterations", 0, 0.9)]}
    found["iterations"][0]["dense"]["fd_pixels"] = 0.08
    dense, row = study_report.iterations_table(found, "digits").splitlines()[-2:]
    assert dense.split(" | ")[1:] == ["-", "0.0800", "0.0800", "1", "1 |"]
    assert row.split(" | ")[1:] == ["1", "0.0200", "0.0400", "0.4500", "0.9000 |"]
    with pytest.raises(ValueError, match="runs of digits have dense distances from 0.03 to 0.08: show them apart"):
        study_report.dense_distance([runs[0] for runs in found.values()], "digits")


def test_time_is_that_of_steps_and_rankings(tmp_path: Path) -> None:
    """40 masked steps at 1.25 and 10 at 1 each with 0.5 for the teacher, and one ranking of 5 with a recovery of 3."""
    run = results_of("default", 0, 0.9)
    run["phases"]["hard_end_step"] = 40
    own = {"compacted": 1.0, "ranking": 5.0, "recovery": 3.0, "teacher": 0.375, "features": 0.125}
    times = {"digits": {"masked": 1.25, "settings": {"default": own}}}
    assert study_time.seconds(run, 50, times["digits"]) == 40 * 1.75 + 10 * 1.5 + 8
    assert study_time.seconds(run, 0, times["digits"]) == 0
    data = {"digits": {"default": [run]}}
    table = study_report.time_table(data, times)  # 40 x 1.75 + 60 x 1.5 + 8
    assert table.splitlines()[-1] == "| digits, 8x8 | gradient flow, two phases (default) | 100 | 168 | 5 | 3 |"
    # A setting that was not timed is not drawn, and does not keep others from it
    data = {"digits": {"paper": [results_of("paper", 0, 0.8)], "default": [run]}}
    with saved_figures() as figures:
        study_report.plot_curves(tmp_path / "time.png", data, study_report.CURVES, times)
    title = SETTINGS["default"].title
    distance, ssim = (lines(axis) for axis in figures[0].axes)
    seconds = [40 * 1.75 + 10 * 1.5 + 8, 168]  # at step 50 and at the end
    assert distance == {title: (seconds, [0.02, 0.04]), "dense": ([0, 1], [0.03, 0.03])}
    assert ssim == {title: (seconds, [0.45, 0.9])}


def test_earlier_rivals_are_drawn_where_others_have_no_times_or_budgets(tmp_path: Path) -> None:
    """A rival without a time, or without results at 30 %, would be missing in a picture."""
    found = {name: [results_of(name, 0, ssim)] for name, ssim in (("default", 0.9), ("diff-pruning", 0.8))}
    found |= {f"one-shot-diff-pruning{end}": [results_of("one-shot-diff-pruning", 0, 0.7)] for end in ("", "-30")}
    own = {"compacted": 1.0, "ranking": 0.0, "recovery": 0.0, "teacher": 0.0, "features": 0.0}
    times = {"digits": {"masked": 1.0, "settings": dict.fromkeys(("default", "one-shot-diff-pruning"), own)}}
    with saved_figures() as figures:
        study_report.plot_curves(tmp_path / "steps.png", {"digits": found}, study_report.CURVES)
        study_report.plot_curves(tmp_path / "time.png", {"digits": found}, study_report.CURVES, times)
        study_report.plot_budgets(tmp_path / "macs.png", {"digits": found})
    steps, time = ({*lines(figure.axes[1])} for figure in figures[:2])
    ours, rival, earlier = (SETTINGS[name].title for name in ("default", "diff-pruning", "one-shot-diff-pruning"))
    assert steps == {ours, rival} and time == {ours, earlier}
    assert {ours, rival, earlier} == {text.get_text() for text in figures[2].axes[0].get_legend().get_texts()}


@pytest.mark.slow
def test_pieces_of_a_run_are_timed(tmp_path: Path) -> None:
    """For the settings that have results, with what each does."""
    kept = study.result_file("digits", SETTINGS["two-phase"], 0).read_text()
    (tmp_path / "digits").mkdir()
    for name in ("no-recovery", "magnitude", "paper", "default", "features-recovery"):
        study.result_file("digits", SETTINGS[name], 0, tmp_path).write_text(kept)
    threads = torch.get_num_threads()
    found = study_time.measure("digits", tmp_path, 1)
    assert torch.get_num_threads() == threads
    assert set(found["settings"]) == {"no-recovery", "magnitude", "paper", "default", "features-recovery"}
    assert set(found["scoring_per_batch"]) == {"magnitude", "gradient-flow", "gradient-flow-weights"}  # one time each
    assert found["settings"]["magnitude"]["ranking"] == 0 < found["settings"]["no-recovery"]["ranking"]
    assert {n: value["teacher"] == found["teacher"] > 0 for n, value in found["settings"].items()} == {
        **dict.fromkeys(("no-recovery", "magnitude", "default", "features-recovery"), True),
        "paper": False,  # which has none
    }
    assert found["recovery"] > 0 and found["features"] > -found["teacher"]  # a small difference of two times
    assert {n: (value["features"], value["recovery"]) for n, value in found["settings"].items()} == {
        **dict.fromkeys(("no-recovery", "magnitude", "paper"), (0, 0)),
        "default": (0, found["recovery"]),
        "features-recovery": (found["features"], found["recovery"]),
    }


def test_a_remembered_teacher_says_the_same_and_is_asked_once(tmp_path: Path) -> None:
    class Doubling(torch.nn.Module):
        asked = 0

        def forward(self, noisy_images, timesteps, conditioning, **options):
            self.asked += 1
            return 2 * noisy_images + timesteps[:, None, None, None]

    teacher = Doubling()
    images, timesteps = torch.randn(2, 1, 4, 4), torch.tensor([1, 2])
    for _ in range(2):  # the second one is another run's
        remembered = RememberedTeacher(teacher, TensorCache(tmp_path))
        for change in (0, 1):
            answer = remembered(images, timesteps + change, return_features=False, pairs=False)
            assert torch.equal(answer, teacher.forward(images, timesteps + change, None))
    assert teacher.asked == 2 + 4  # those of this test are four
    remembered(images, timesteps, {"class_labels": torch.tensor([0, 1])})
    remembered(images.view(2, 4, 1, 4), timesteps)
    assert teacher.asked == 2 + 4 + 2


@pytest.mark.slow
def test_a_run_with_a_remembered_teacher_ends_the_same(tmp_path: Path) -> None:
    """To the bit, whether predictions are made or read: three steps ask three times."""
    weights, kept = [], []
    for name in ("plain", "first", "second"):
        words = [*SHORT, "--recipe", "digits", "--output_dir", str(tmp_path / name), "--max_train_steps", "3"]
        words += ["--preset", "one-shot", "--criterion", "magnitude", "--eval_images", "0", "--speed_batch_sizes", "0"]
        forget_accelerator()
        with plain_runs():
            if name == "plain":
                prune_ddpm.main(words)
            else:
                study_run.main(["--teacher_cache", str(tmp_path / "cache"), "training/prune_ddpm.py", *words])
        weights.append(load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors"))
        kept.append(sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.glob("cache/*")))
    assert all(torch.equal(value, weights[0][key]) for other in weights[1:] for key, value in other.items())
    assert len(kept[1]) == 3 and kept[1] == kept[2]


def test_only_teachers_that_predict_are_remembered(tmp_path: Path) -> None:
    """Block outputs and responses to a step are not kept."""
    masks = ChannelMasks(traced("base"))
    for weights, wanted in (
        ({}, True),
        ({"distillation_weight": 0.0}, False),
        ({"feature_distillation_weight": 0.1}, False),
        ({"sensitivity_matching_weight": 0.1}, False),
    ):
        objective = Objective(ObjectiveArguments(**weights), DDPMScheduler(), build("base"), masks)
        teacher = objective.teacher
        assert remembered(tmp_path, objective) is objective
        assert isinstance(objective.teacher, RememberedTeacher) == wanted
        assert wanted or objective.teacher is teacher


def test_the_table_of_trajectories_has_ratios_of_errors() -> None:
    errors = {"fraction": 0.1, "timesteps": [900, 100], "own": [1.0, 6.0], "dense": [2.0, 3.0], "held_out": [2.0, 2.0]}
    run = {**results_of("trajectory-10", 0, 0.9), "trajectory": errors}
    row = study_report.trajectory_table({"trajectory-10": [run]}, "digits").splitlines()[-1]
    assert row.split(" | ")[1:] == ["1", "0.0400", "0.9000", "1.75", "0.50", "1.25", "1.00 |"]


def test_tables_are_replaced_where_they_are_marked(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- study: main digits -->\nold\n<!-- end -->\nafter <!-- end -->\n")
    for _ in range(2):  # again and again
        study_report.write(document, {"main digits": "| new |", "main cifar10": "| other |"})
    assert document.read_text() == "before\n<!-- study: main digits -->\n\n| new |\n\n<!-- end -->\nafter <!-- end -->\n"
    with pytest.raises(ValueError, match="README.md has a place for main digits, which is not a table"):
        study_report.write(document, {"main cifar10": "| other |"})


def test_no_results_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no results: run benchmarks/study.py first"):
        study_report.main(["--results", str(tmp_path)])


@pytest.mark.parametrize(
    ("dataset", "wanted"),
    [
        ("cifar10", "benchmarks/cifar10/teacher: make cifar10-teacher"),
        ("digits", "training/digits/teacher: make teacher"),
        ("digits-ldm", "training/digits/ldm: make latent-teachers"),
    ],
)
def test_a_teacher_that_is_not_there_is_one_line(
    dataset: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=f"dataset={dataset} needs {wanted}"):
        study.main(["--dataset", dataset, "--results", str(tmp_path)])


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (study_time, ["--repeats", "0"], "repeats=0 must be at least 1"),
        (study_time, ["--results", "nowhere"], "results=nowhere holds no results: run benchmarks/study.py first"),
        (sensitivity, ["--dataset", "digits", "--halves", "0"], "halves=0 must be at least 1"),
        (sensitivity, ["--dataset", "digits", "--units", "1"], "units=1 must be at least 4"),
    ],
)
def test_bad_arguments_are_refused(
    script: ModuleType, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written."""
    monkeypatch.setattr(script, "OUTPUT" if script is study_time else "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        script.main(words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("study_time.py", ["--repeats", "0"], "repeats=0 must be at least 1"),
        ("sensitivity.py", ["--dataset", "digits", "--units", "1"], "units=1 must be at least 4"),
        ("study_run.py", ["--teacher_cache", "x", "training/train_ddpm.py"], "argument script: invalid"),
    ],
)
def test_bad_arguments_are_one_line(script: str, words: list[str], message: str, tmp_path: Path) -> None:
    assert_one_error(run_script(f"benchmarks/{script}", *words, cwd=tmp_path), message)
    assert not list(tmp_path.iterdir())


def test_a_run_whose_results_are_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = study.result_file("digits", SETTINGS["paper"], 0, tmp_path)
    target.parent.mkdir()
    words = study.arguments_of(SETTINGS["paper"], "digits", 0, ["--output_dir", "paper-seed0"])
    command = command_line(words)
    target.write_text(json.dumps({"command": command}))
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a run was started"))
    again = ["--dataset", "digits", "--settings", "paper", "--seeds", "0", "--results", str(tmp_path)]
    study.main(again)
    # Results of other arguments are neither taken for it nor replaced
    for words, other in ((again, command.replace("--update_interval 15", "")), ([*again, "--max_train_steps", "9"], command)):
        target.write_text(json.dumps({"command": other}))
        with pytest.raises(SystemExit, match="1 of 1 runs failed: digits, gradient flow as published"):
            study.main(words)
        assert json.loads(target.read_text())["command"] == other


@pytest.mark.parametrize("dataset", EVERY)
def test_results_are_those_of_their_settings(dataset: str) -> None:
    """Those that are committed, whatever has become of the settings since."""
    for runs in study_report.load(dataset).values():
        for run in runs:
            words = study.arguments_of(SETTINGS[run["setting"]], dataset, run["seed"], [])
            assert study.made_by(run["command"], words, dataset), (run["setting"], run["seed"])


def test_old_arguments_are_understood() -> None:
    """What was an option of gradient flow is a criterion now, and runs had other defaults unless they asked for today's."""
    words = ["--recipe", "digits", "--flow_metric", "weights", "--ranking", "group"]
    today = ["--recipe", "digits", "--criterion", "gradient-flow-weights", "--ranking", "group"]
    today += ["--recovery", "none", "--timestep_sampling", "independent"]
    assert study.words_of_today(words, "digits") == today
    asked = ["--recovery", "rankings", "--timestep_sampling", "stratified"]
    assert study.words_of_today(asked, "digits") == asked
    assert study.words_of_today(asked, "cifar10") == [*asked, "--learning_rate", "3e-4"]
    assert study.made_by(command_line(words), today, "digits")
    other = command_line(["--recipe", "digits", "--flow_metric", "predictions", "--ranking", "group"])
    assert not study.made_by(other, today, "digits")


@pytest.mark.slow
def test_the_whole_machinery_works(tmp_path: Path) -> None:
    """As `make study-quick`, with its figures thrown away."""
    environment = {"results": tmp_path / "results", "pictures": tmp_path / "pictures"}
    command = [sys.executable, "benchmarks/study.py", "--quick", "--jobs", "2", "--folder", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    found = study_report.load("digits", environment["results"])
    assert set(found) == set(study.QUICK_SETTINGS) and all(len(runs) == 2 for runs in found.values())
    # The budget is met by what prunes here, whatever the seed; the peer comes as near as its ratio allows
    for name, runs in found.items():
        for run in runs:
            removed = 1 - run["pruned"]["macs"] / run["dense"]["macs"]
            wanted = 0.3 if name.endswith("-30") else 0.5
            assert abs(removed - wanted) < (0.05 if name == "torch-pruning" else 0.01), name
    assert found["scratch"][0]["pruned"]["macs"] == found["two-phase"][0]["pruned"]["macs"]
    times = tmp_path / "times.json"
    study_time.main(["--results", str(environment["results"]), "--output", str(times), "--repeats", "1"])
    words = ["--results", str(environment["results"]), "--pictures", str(environment["pictures"]), "--times", str(times)]
    study_report.main([*words, "--latencies", str(tmp_path / "none.json")])
    names = {path.name for path in environment["pictures"].iterdir()}
    endings = ("over_steps", "over_time", "over_macs", "at_rankings")
    assert names == {f"quality_{ending}.png" for ending in endings}


@pytest.mark.slow
def test_the_approximation_holds_for_small_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient norm changes as predicted where weights move by a thousandth."""
    import approximation

    monkeypatch.setattr(approximation, "REMOVED", approximation.REMOVED[:1])  # shares that are removed together
    output = tmp_path / "approximation.json"
    approximation.main(
        ["--units", "3", "--batches", "1", "--output", str(output), "--picture", str(tmp_path / "approximation.png")]
    )
    for found in json.loads(output.read_text())["models"].values():
        assert found["single"]["by_share"]["0.001"]["pearson"] > 0.99
        assert found["single"]["by_share"]["0.001"]["median_ratio"] == pytest.approx(1, abs=0.2)


@pytest.mark.slow
def test_gradient_flow_tells_how_much_a_group_matters(tmp_path: Path) -> None:
    """What `--ranking sensitivity` rests on: on the digits teacher, over decades; magnitude would be no guide."""
    words = ["--halves", "1", "--units", "4", "--results", str(tmp_path), "--picture", str(tmp_path / "sensitivity.png")]
    with saved_figures() as figures:
        sensitivity.main(["--dataset", "digits", *words, "--calibration_batches", "1"])
    found = json.loads((tmp_path / "digits.json").read_text())
    assert found["groups"] == len(found["damage"]) == 19 and found["damage_decades"] > 2
    correlation = {name: row["log_pearson"] for name, row in found["by_criterion"].items()}
    assert correlation["gradient-flow"] > 0.8 > 0.5 > correlation["magnitude"]
    within = {name: row["within_groups"] for name, row in found["by_criterion"].items()}
    assert within["gradient-flow"] > 0.4 > within["gradient-flow-weights"] > within["random"]
    for axis in figures[0].axes:
        places = axis.collections[0].get_offsets()
        assert sorted(places[:, 1].tolist()) == sorted(found["damage"].values()) and axis.get_xscale() == "log"
    assert "| digits, 8x8 | gradient flow | 0." in study_report.sensitivity_table(tmp_path)
