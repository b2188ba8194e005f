"""Cards are rendered from results and report alone, and are valid on the Hub."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from diffusers_gfprune.diffusion.schedulers import TRAINABLE_SCHEDULERS
from diffusers_gfprune.remote.pipeline_prune_ddpm import is_as_rendered
from diffusers_gfprune.reports.model_card import (
    CITATIONS,
    LICENSES,
    PROCESS_CITATIONS,
    check_eval_results,
)
from helpers.cards import ROLES, content, in_format_3, render_card, render_eval_results, speed_rows, with_speed

ROOT = Path(__file__).resolve().parents[2]
CARDS = ROOT / "model_cards"
RUNS = sorted(path.parent for path in CARDS.glob("*/results.json"))
PICTURES = {"samples": "samples.png", "widths": "widths.png", "pruning": "pruning.png"}


@pytest.fixture
def files() -> tuple[dict, dict]:
    """Results and report of the default run on the digits, with other figures of speed."""
    results, report = content(CARDS / "digits-gfpruned")
    return with_speed(results, speed_rows()), report


def header(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_the_default_run_has_a_card():
    assert CARDS / "digits-gfpruned" in RUNS
    _, report = content(CARDS / "digits-gfpruned")
    # The last of the arguments in `make prune`
    assert report["phases"]["total_steps"] == 1500 and report["arguments"]["output_dir"] == "runs/digits-gfpruned"


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_committed_card_is_what_its_files_render_to(run):
    card = (run / "README.md").read_text()
    assert card == render_card(*content(run), run.name, PICTURES)
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", card):
        assert (run / picture).is_file()


def test_template_has_no_number_of_its_own():
    template = (CARDS / "template.md.jinja").read_text()
    assert re.findall(r"(?<![A-Za-z_])\d", template) == []


def test_figures_on_the_card_are_those_of_the_files(files):
    results, report = files
    results["pruned"]["parameters"], results["dense"]["parameters"] = 123_456, 1_234_560
    results["pruned"]["quality"] |= {"ssim_to_dense": 0.8765, "fd_pixels": 0.4321}
    results["evaluation"]["seed"] = 97531
    card = render_card(results, report, "me/model")
    assert "| parameters | 1,234,560 | 123,456 | -90.0% |" in card
    assert "| SSIM to the dense samples | | 0.8765 | |" in card
    assert "seed 97531" in " ".join(card.split())
    assert {"type": "fd-pixels", "value": 0.4321, "name": "FD-pixels"} in header(card)["model-index"][0]["results"][0][
        "metrics"
    ]
    assert "FID" in card and "fid" not in header(card)["metrics"]  # what was not measured is not claimed


def test_both_ways_to_load_name_the_repository(files):
    card = render_card(*files, "me/model")
    assert 'from_pretrained("me/model", trust_remote_code=True)' in card
    assert 'from_pretrained("me/model")\n' in card
    assert "# model\n" in card


def test_metadata(files):
    results, report = files
    report["base_model"] = {"name": "org/dense", "hub_id": "org/dense", "revision": "abc", "license": "mit"}
    report["dataset"] = {"name": "org/images", "hub_id": "org/images"}
    data = header(render_card(results, report, "me/model"))
    assert data["base_model"] == "org/dense" and data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["org/images"] and data["license"] == "mit"
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "unconditional-image-generation"
    found = ModelCard(render_card(results, report, "me/model")).data.eval_results
    assert {result.metric_type for result in found} == {"fd-pixels", "ssim", "psnr"}
    assert {result.dataset_name for result in found} == {"org/images"}


def test_models_that_a_local_one_was_made_of_are_its_base_models(files):
    results, report = files
    report["base_model"]["derived_from"] = ["org/a", "org/b"]
    card = render_card(results, report, "me/model")
    assert header(card)["base_model"] == ["org/a", "org/b"]
    assert "huggingface.co/org/" not in card.split("---")[2]  # what was pruned is the local one


def test_evaluation_results_are_what_the_client_reads(files):
    results, report = files
    assert render_eval_results(results, report) is None  # the data set is not on the Hub
    report["dataset"] = {"name": "org/images", "hub_id": "org/images"}
    (entry,) = parse_eval_result_entries(yaml.safe_load(render_eval_results(results, report)))
    figure = results["pruned"]["quality"]["fd_pixels"]
    assert (entry.dataset_id, entry.task_id, entry.value) == ("org/images", "fd-pixels", figure)
    wanted = "FD-pixels, 1000 samples (DDIM, 50 steps), 1500 images. Not FID: compare it with nothing else."
    assert entry.notes == wanted
    results["evaluation"]["distances"] = {}
    assert render_eval_results(results, report) is None
    del results["evaluation"]["distances"]
    with pytest.raises(ValueError, match="lacks the field 'distances'"):
        render_eval_results(results, report)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- dataset: {id: org/x, task_id: fid}\n  value: .nan\n", "value=nan of fid .* must be a finite number"),
        ("- dataset: {id: org/x, task_id: fid}\n  value: high\n", "value='high' of fid"),
        ("- dataset: {id: 'no id', task_id: fid}\n  value: 1\n", "dataset='no id' of the evaluation results must be a Hub id"),
        ("- dataset: {id: org/x}\n  value: 1\n", "cannot be read: KeyError.'task_id'."),
        ("- 3\n", "cannot be read"),
        ("{", "cannot be read"),
    ],
)
def test_evaluation_results_that_the_hub_would_not_read(text, message):
    with pytest.raises(ValueError, match=message):
        check_eval_results(text)


def test_local_sources_are_no_hub_ids(files):
    data = header(render_card(*files, "me/model"))
    assert "base_model" not in data and "datasets" not in data


@pytest.mark.parametrize("license", [None, "unknown"])
def test_unknown_licence_is_a_warning(files, license):
    results, report = files
    report["base_model"]["license"] = license
    card = render_card(results, report, "me/model")
    assert "**The licence of the base model is not recorded.**" in card
    assert header(card)["license"] == "unknown"


def test_known_licence_is_inherited(files):
    results, report = files
    report["base_model"]["license"] = "cc-by-nc-4.0"
    card = render_card(results, report, "me/model")
    assert "`cc-by-nc-4.0`, inherited" in card and "not recorded.**" not in card


def test_other_criteria_are_not_called_gradient_flow(files):
    results, report = files
    report["config"]["criterion"] = "magnitude"
    card = render_card(results, report, "me/model")
    assert "structured pruning (criterion `magnitude`)" in card
    assert "gradient-flow pruning](" not in card and "gradient-flow" not in header(card)["tags"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"criterion": "gradient-flow"}, "metric of predictions"),
        ({"criterion": "gradient-flow-weights", "aggregation": "signed"}, "aggregation `signed`"),
        # of earlier versions
        ({"criterion": "gradient-flow", "flow_metric": "predictions", "score_slices": "all"}, "metric of predictions"),
        ({"criterion": "gradient-flow", "flow_metric": "weights", "score_slices": "all"}, "aggregation `sum_abs`"),
        ({"criterion": "gradient-flow", "score_slices": "all"}, "aggregation `sum_abs`"),
    ],
)
def test_the_metric_of_gradient_flow_is_said(files, config: dict, words: str):
    results, report = files
    common = {name: v for name, v in report["config"].items() if name not in ("flow_metric", "score_slices")}
    card = render_card(results, {**report, "config": {**common, **config}}, "me/model")
    assert words in card and "gradient-flow pruning](" in card and "gradient-flow" in header(card)["tags"]
    assert ("metric of predictions" in card) == (words == "metric of predictions")


def test_sampler_with_noise_says_so(files):
    results, report = files
    assert ", eta" not in render_card(results, report, "small")
    results["evaluation"]["eta"] = 0.5
    assert "(leading spacing, eta 0.5), seed" in render_card(results, report, "small")


def test_run_without_samples(files):
    results, report = files
    results["evaluation"]["num_images"] = 0
    results["evaluation"]["distances"] = {}
    card = render_card(results, report, "me/model")
    assert "SSIM" not in card and "FD-pixels" not in card and "model-index" not in header(card)


def test_speed_is_a_ratio_with_its_interval(files):
    card = render_card(*files, "me/model")
    prose = " ".join(card.split())
    gains = "no difference (0.97 to 1.04) at batch 1, eager; 1.32 times as fast (1.28 to 1.35) at batch 16, eager. "
    assert f"Speed of a forward pass compared with the dense model, on abacus (2 threads): {gains}" in prose
    assert "| latency, batch 1, eager | 10.00 ms | 9.90 ms | no difference (0.97 to 1.04) |\n" in card
    assert "| latency, batch 16, eager | 160.00 ms | 121.21 ms | 1.32 times as fast (1.28 to 1.35) |\n" in card
    failed = "dense not measured: InvalidCxxCompiler: none of a/b works"
    assert f"| latency, batch 16, compiled | - | - | {failed} |\n| step loss" in card
    assert "float32, on abacus (2 threads)." in prose and "with its 95% confidence interval" in prose


def test_speed_in_a_runtime_names_it(files):
    """With its version. It ran on the CPU, the other modes on a GPU."""
    results, report = files
    pair = speed_rows()[:2]
    rows = [{**row, "device": "cuda", "hardware": "loom"} for row in pair]
    rows += [{**row, "mode": "openvino", "runtime_version": "2026.4", "peak_memory_bytes": None} for row in pair]
    card = render_card(with_speed(results, rows), report, "me/model")
    prose = " ".join(card.split())
    assert "at batch 1, eager, cuda; no difference (0.97 to 1.04) at batch 1, openvino, cpu. " in prose
    assert "on loom and abacus (2 threads). Speed-up" in prose
    assert "- Runtimes: both models, exported for the batch size, in openvino 2026.4 on the CPU.\n" in card
    assert "Runtimes" not in render_card(*files, "me/model")


def test_run_without_speed(files):
    results, report = files
    card = render_card(with_speed(results, []), report, "me/model")
    assert "atency" not in card and "Speed of" not in card and "| step loss (held out) | 0.07" in card


def test_results_of_an_earlier_version_have_the_same_card(files):
    results, report = files
    earlier = in_format_3(results)
    assert render_card(earlier, report, "me/model") == render_card(results, report, "me/model")
    del earlier["speed"]
    with pytest.raises(ValueError, match="speed"):
        render_card(earlier, report, "me/model")


def test_results_of_an_earlier_version_have_one_latency(files):
    results, report = in_format_3(files[0]), files[1]
    del results["speed"]
    setting = {"batch_size": 16, "dtype": "float32", "device": "cpu", "hardware": "abacus", "threads": 2}
    for name, latency in (("dense", 16.0), ("pruned", 12.0)):
        results[name]["latency"] = {"latency_ms": latency, **setting}
    card = render_card(results, report, "me/model")
    assert "| latency of a forward pass | 16.00 ms | 12.00 ms | -25.0% |\n| step loss" in card
    assert "- Latency: median, batch 16, float32, on\n  abacus (2 threads).\n- Step loss" in card
    for name in ("dense", "pruned"):
        results[name]["latency"] = None
    card = render_card(results, report, "me/model")
    assert "atency" not in card and "| step loss (held out) | 0.07" in card


def test_results_of_an_evaluation_have_no_card(files):
    results, report = files
    figures = {"name": "small", "quality": {}}
    evaluation = {"format_version": 4, "kind": "evaluation", "model": figures, "evaluation": {}, "command": ""}
    with pytest.raises(ValueError, match="results.json has kind=evaluation, which must be pruning run"):
        render_card(evaluation, report, "me/model")


@pytest.mark.parametrize(
    ("weight", "words"),
    [(1.0, "noise prediction alone."), (0.25, "noise prediction, with weight 0.25, and on the noise itself")],
)
def test_the_teacher_is_named(files, weight, words):
    results, report = files
    report["arguments"]["distillation_weight"] = weight
    assert f"dense model's {words}" in " ".join(render_card(results, report, "me/model").split())


@pytest.mark.parametrize(
    ("weight", "further", "words"),
    [
        (
            *(1.0, {"feature_distillation_weight": 0.03}),
            "trained on the dense model's noise prediction. Further terms of the loss are distances to its block outputs "
            "(weight 0.03).",
        ),
        (
            *(0.5, {"feature_distillation_weight": 0.03, "sensitivity_matching_weight": 0.05}),
            "with the remaining weight. Further terms of the loss are distances to its block outputs (weight 0.03) and its "
            "responses to small changes of the input (weight 0.05).",
        ),
        (
            *(0.0, {"sensitivity_matching_weight": 0.05}),
            "- Distillation: trained on the noise itself. Further terms of the loss are distances to the dense model's "
            "responses to small changes of the input (weight 0.05).",
        ),
    ],
)
def test_further_terms_of_the_loss_are_named(files, weight, further, words):
    results, report = files
    report["arguments"] |= {"distillation_weight": weight, **further}
    card = " ".join(render_card(results, report, "me/model").split())
    assert words in card and "prediction alone" not in card


def test_further_terms_of_a_consistency_model_are_named(files):
    results, report = files
    report["pipeline"] |= {"class_name": "ConsistencyModelPipeline", "process": "consistency"}
    report["arguments"] |= {"distillation_weight": 1.0, "feature_distillation_weight": 0.1}
    card = " ".join(render_card(results, report, "me/model").split())
    assert "trained by the output of the dense model, in distance of the images that both make in one step. Further" in card
    assert "distances to its block outputs (weight 0.1)." in card


@pytest.mark.parametrize(
    ("predicted", "word"), [(None, "noise"), ("epsilon", "noise"), ("v_prediction", "velocity"), ("sample", "image")]
)
def test_what_the_model_predicts_is_named(files, predicted, word):
    """Step loss and distillation are of that; reports of earlier versions do not say what it is."""
    results, report = files
    report["pipeline"] = {"class_name": "DDPMPipeline", "component": "unet", "process": "ddpm", "condition": None}
    report["pipeline"] |= {} if predicted is None else {"prediction_type": predicted}
    report["arguments"]["distillation_weight"] = 0.5
    card = " ".join(render_card(results, report, "me/model").split())
    assert f"Step loss: {word}-prediction error" in card
    assert f"dense model's {word} prediction, with weight 0.5, and on the {word} itself" in card


def test_a_step_has_the_images_of_all_processes(files):
    results, report = files
    report["arguments"] |= {"train_batch_size": 32, "gradient_accumulation_steps": 2}
    assert "(batch 64, learning rate" in render_card(results, report, "me/model")
    assert "(batch 256, learning rate" in render_card(results, {**report, "num_processes": 4}, "me/model")


def test_figures_of_an_evaluation_are_of_its_data_set(files):
    """A run without data, or on other images, is evaluated with `evaluate.py --update_model_card`."""
    results, report = files
    results["evaluation"]["dataset"] = {"name": "org/other", "hub_id": "org/other"}
    results["evaluation"]["distances"]["fid"] = {**results["evaluation"]["distances"]["fd_pixels"], "title": "FID"}
    for role in ROLES:
        results[role]["quality"]["fid"] = 9.0
    report["dataset"] = {"name": "org/images", "hub_id": "org/images"}
    card = render_card(results, report, "me/model")
    assert header(card)["datasets"] == ["org/images"]
    assert {result.dataset_name for result in ModelCard(card).data.eval_results} == {"org/other"}
    link = "[org/other](https://huggingface.co/datasets/org/other)"
    assert f"Figures were measured on {link}." in card and "training images" not in card
    assert {entry["dataset"]["id"] for entry in yaml.safe_load(render_eval_results(results, report))} == {"org/other"}
    report["dataset"] = {"name": "images drawn by the dense model", "hub_id": None}
    report["dataset"] |= {"drawn": True, "sampler": "DDIM", "measured": False}
    report["arguments"]["num_teacher_images"] = 100
    assert f"Measured on {link}." in render_card(results, report, "me/model")


def test_another_licence_has_its_name_and_link(files):
    results, report = files
    link = "https://huggingface.co/org/dense/blob/main/LICENSE.md"
    report["base_model"] |= {"license": "other", "license_name": "our-terms", "license_link": link}
    card = render_card(results, report, "me/model")
    data = header(card)
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "our-terms", link)
    assert f"[our-terms]({link}), inherited from the base model." in card


@pytest.mark.parametrize(
    ("recovery", "words"),
    [
        ("rankings", "by least squares, at every ranking."),
        ("compaction", "by least squares, before compaction."),
        ("none", ""),
    ],
)
def test_recovery_is_named(files, recovery, words):
    results, report = files
    report["arguments"]["recovery"] = recovery
    card = render_card(results, report, "me/model")
    assert ("Recovery" in card) == bool(words) and words in card
    del report["arguments"]["recovery"]  # an earlier version
    assert "Recovery" not in render_card(results, report, "me/model")


@pytest.mark.parametrize("change", [{"distillation_weight": 0.0}, {}], ids=["none", "an earlier version"])
def test_no_teacher_is_named_where_there_was_none(files, change):
    results, report = files
    del report["arguments"]["distillation_weight"]
    report["arguments"].update(change)
    assert "Distillation" not in render_card(results, report, "me/model")


PATHS = [
    ("results", "dense", "macs"),
    ("results", "pruned", "step_loss"),
    ("results", "pruned", "speed", 0, "latency_ms"),
    ("results", "pruned", "speed", 1, "speedup_interval"),
    ("results", "pruned", "speed", 2, "hardware"),
    ("results", "pruned", "weight_file_bytes"),
    ("results", "evaluation", "seed"),
    ("results", "evaluation", "distances"),
    ("results", "evaluation", "distances", "fd_pixels", "reference_images"),
    ("results", "pruned", "quality", "fd_pixels"),
    ("report", "base_model"),
    ("report", "base_model", "license"),
    ("report", "base_model", "revision"),
    ("report", "dataset"),
    ("report", "command"),
    ("report", "config", "ratio"),
    ("report", "phases", "soft_end_step"),
    ("report", "mask_updates"),
    ("report", "arguments", "seed"),
    ("report", "versions"),
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_missing_field_is_an_error_that_names_it(files, path):
    holder = dict(zip(("results", "report"), copy.deepcopy(files)))
    at = holder
    for key in path[:-1]:
        at = at[key]
    del at[path[-1]]
    with pytest.raises(ValueError, match=path[-1]):
        render_card(holder["results"], holder["report"], "me/model")


@pytest.mark.parametrize("name", ["nan", "me/inf"])
def test_names_that_read_like_numbers_are_no_figures(files, name):
    assert f'from_pretrained("{name}"' in render_card(*files, name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("path", [("pruned", "step_loss"), ("pruned", "quality", "ssim_to_dense")], ids=".".join)
def test_figures_that_are_not_finite_are_refused(files, path, value):
    results, report = files
    at = results
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(ValueError, match="finite"):
        render_card(results, report, "me/model")


MALFORMED = [("report", "config", []), ("results", "dense", {"macs": None}), ("report", "mask_updates", 3)]


@pytest.mark.parametrize(("which", "key", "value"), MALFORMED, ids=lambda value: str(value))
def test_malformed_field_is_an_error(files, which, key, value):
    holder = dict(zip(("results", "report"), files))
    holder[which][key] = {**holder[which][key], **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match="malformed"):
        render_card(holder["results"], holder["report"], "me/model")


def test_edited_cards_are_told_from_rendered_ones(files):
    card = render_card(*files, "me/model")
    assert is_as_rendered(card)
    assert not is_as_rendered(card.replace("# model", "# My model")) and not is_as_rendered(card + "More.\n")
    assert not is_as_rendered("") and not is_as_rendered("# a card\n")


def test_licences_and_citations():
    assert {"apache-2.0", "mit", "cc-by-4.0", "openrail", "unknown", "other"} <= LICENSES
    assert "2501.09464" in CITATIONS and "Denoising Diffusion Probabilistic Models" in PROCESS_CITATIONS["ddpm"]
    assert set(PROCESS_CITATIONS) == {process.name for process in TRAINABLE_SCHEDULERS.values()}


def test_only_what_was_removed_is_said_to_be(files) -> None:
    """Channels, blocks, or both. Groups of channels inside of removed blocks keep nothing."""
    results, report = files
    assert "Whole\nchannels are removed: the model" in render_card(results, report, "me/small")
    report["removed_blocks"] = ["mid_block.attentions.0"]
    assert "Whole\nchannels and residual blocks are removed: the model" in render_card(results, report, "me/small")
    for number, group in enumerate(report["channel_groups"]):
        group["kept_channels"] = 0 if number == 0 else group["dense_channels"]
    assert "Whole\nresidual blocks are removed: the model" in render_card(results, report, "me/small")


def test_numbers_of_one_and_nothing(files) -> None:
    results, report = files
    report["config"]["ratio"], report["mask_updates"] = 0.3, report["mask_updates"][:1]
    results["evaluation"]["num_images"] = 1
    results["pruned"]["parameters"] = results["dense"]["parameters"]
    card = render_card(results, report, "me/small")
    for words in ("remove 30.0% of `macs`", "- Samples: 1 image, ", "- 1 ranking; 0 revivals of pruned units", "| +0.0% |"):
        assert words in card
