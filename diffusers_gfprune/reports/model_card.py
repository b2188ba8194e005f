"""Model cards: a README for the Hub, rendered from `results.json` and `pruning_report.json`.

All figures on the card are read from these two files. The template is `model_cards/template.md.jinja`; a missing field is an
error. `check_card` checks what the Hub's client does not: licence ids, tags, task, and that figures are finite.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files

import jinja2
import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
    parse_eval_result_entries,
)

from ..configuration import criterion_of
from ..errors import one_line
from ..formatting import format_count
from ..metrics.speedup import CONFIDENCE, compare_speeds
from ..remote.pipeline_prune_ddpm import DISTRIBUTION, seal_of
from .pipeline_kinds import TASKS, example_of, kind_of, pipeline_of, process_of, task_of
from .results import PRUNING_RUN, ModelFigures, Results

__all__ = ["LICENSES", "check_card", "check_eval_results", "render_card", "render_eval_results"]

METHOD = "[gradient-flow pruning](https://arxiv.org/abs/2501.09464)"
GRADIENT_FLOW = "gradient-flow"
PACKAGE = "diffusers_gfprune"
TAGS = ["pruning", "model-compression", "diffusers-gfprune"]
NOT_FID = "Not FID: compare it with nothing else."
CITATIONS = """\
@article{wan2025pruning,
  title   = {Pruning for Sparse Diffusion Models based on Gradient Flow},
  author  = {Wan, Ben and Zheng, Tianyi and Chen, Zhaoyu and Wang, Yuxiao and Wang, Jia},
  journal = {arXiv preprint arXiv:2501.09464},
  year    = {2025}
}
"""
# Papers of the processes of the dense models, by `DiffusionProcess.name`
PROCESS_CITATIONS = {
    "ddpm": """\
@inproceedings{ho2020denoising,
  title     = {Denoising Diffusion Probabilistic Models},
  author    = {Ho, Jonathan and Jain, Ajay and Abbeel, Pieter},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2020}
}""",
    "consistency": """\
@inproceedings{song2023consistency,
  title     = {Consistency Models},
  author    = {Song, Yang and Dhariwal, Prafulla and Chen, Mark and Sutskever, Ilya},
  booktitle = {International Conference on Machine Learning},
  year      = {2023}
}""",
    "edm": """\
@inproceedings{karras2022elucidating,
  title     = {Elucidating the Design Space of Diffusion-Based Generative Models},
  author    = {Karras, Tero and Aittala, Miika and Aila, Timo and Laine, Samuli},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2022}
}""",
    "flow matching": """\
@inproceedings{lipman2023flow,
  title     = {Flow Matching for Generative Modeling},
  author    = {Lipman, Yaron and Chen, Ricky T. Q. and Ben-Hamu, Heli and Nickel, Maximilian and Le, Matt},
  booktitle = {International Conference on Learning Representations},
  year      = {2023}
}""",
}

# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
    """.split()
)


def _revived(update: Mapping) -> int:
    """Units that were revived at a ranking; older reports count channels."""
    return update["revived_channels"] if "revived_channels" in update else update["revived_units"]


def _share_removed(dense: float, pruned: float) -> float:
    return 1 - pruned / dense


def _link(entry: Mapping, kind: str) -> str:
    """A source as Markdown: a link if it is on the Hub, else its name."""
    if entry["hub_id"] is None:
        return f"`{entry['name']}`"
    return f"[{entry['hub_id']}](https://huggingface.co/{kind}{entry['hub_id']})"


def _distances(results: Results) -> list[dict]:
    """Measured distances to real images, with their features."""
    return [
        {
            "id": name.replace("_", "-"),
            "title": described["title"],
            "dense": results.reference_model.quality[name],
            "pruned": results.model.quality[name],
            "features": described["features"],
            "reference_images": described["reference_images"],
            "warning": "" if name in ("fid", "kid") else NOT_FID,
        }
        for name, described in results.evaluation["distances"].items()
    ]


def _similarities(results: Results) -> list[dict]:
    if not results.evaluation["num_images"]:
        return []
    titles = {
        "ssim_to_dense": ("ssim", "SSIM to the dense samples"),
        "psnr_to_dense": ("psnr", "PSNR to the dense samples (dB)"),
    }
    return [
        {"id": name, "title": title, "pruned": results.model.quality[key]}
        for key, (name, title) in titles.items()
        if results.model.quality.get(key) is not None  # no SSIM for small images, no PSNR for equal ones
    ]


def _measured_with(results: Results, report: Mapping) -> Mapping:
    """The data set that figures were measured with: that of a later evaluation, or the run's."""
    return results.evaluation.get("dataset") or report["dataset"]


# Terms of the loss that compare more than predictions with the dense model, by the argument that is their weight
FURTHER_TERMS = {
    "feature_distillation_weight": "block outputs",
    "sensitivity_matching_weight": "responses to small changes of the input",
}


def _further_terms(report: Mapping) -> list[str]:
    """What the training loss compares with the dense model beside its prediction, with the weights."""
    weights = {name: report["arguments"].get(name) for name in FURTHER_TERMS}  # earlier versions lack some
    return [f"{FURTHER_TERMS[name]} (weight {weight:g})" for name, weight in weights.items() if weight]


def _images_per_step(report: Mapping) -> int:
    """Images of an optimizer step, over all processes."""
    arguments = report["arguments"]
    return arguments["train_batch_size"] * arguments.get("gradient_accumulation_steps", 1) * report.get("num_processes", 1)


def _metadata(results: Results, report: Mapping, model_name: str) -> ModelCardData:
    base, dataset, pipeline = report["base_model"], report["dataset"], pipeline_of(report)
    task = task_of(pipeline)
    metrics, measured_with = [*_distances(results), *_similarities(results)], _measured_with(results, report)
    eval_results = [
        EvalResult(
            task_type=task,
            dataset_type=measured_with["hub_id"] or "other",
            dataset_name=measured_with["name"],
            metric_type=metric["id"],
            metric_name=metric["title"],
            metric_value=metric["pruned"],
        )
        for metric in metrics
    ]
    options = {}
    # The base model's Hub id, or the Hub ids of the models that a local base model was made from
    if (base_model := base["hub_id"] or base.get("derived_from")) is not None:
        options = {"base_model": base_model, "base_model_relation": "finetune"}
    if dataset["hub_id"] is not None and not dataset.get("drawn"):
        options["datasets"] = [dataset["hub_id"]]
    if eval_results:
        options.update(model_name=model_name, eval_results=eval_results, metrics=sorted({metric["id"] for metric in metrics}))
    license = base["license"] or "unknown"
    options |= {name: base[name] for name in ("license_name", "license_link") if name in base}
    tags = ["diffusers", kind_of(pipeline), *TAGS]
    tags += [GRADIENT_FLOW] if report["config"]["criterion"].startswith(GRADIENT_FLOW) else []
    return ModelCardData(license=license, library_name="diffusers", pipeline_tag=task, tags=tags, **options)


# What models of a DDPM predict, by `prediction_type`
TARGETS = {"epsilon": "noise", "v_prediction": "velocity", "sample": "image"}
FILTERS = {
    "thousands": lambda value: f"{value:,}",
    "percent": lambda value: f"{value:.1%}",
    "change": lambda value: f"{0.0 - round(value, 3):+.1%}",  # no minus zero
    "count": format_count,
    "mebibytes": lambda value: f"{value / 2**20:.2f} MiB",
    "milliseconds": lambda value: "-" if value is None else f"{value:.2f} ms",
    "share": lambda value: f"{value:.0%}",
    "figure": lambda value: f"{value:.4g}",
    "steps": lambda value: "one step" if value == 1 else f"{value} steps",
}


def _strict(form: Callable[..., str]) -> Callable[..., str]:
    """A filter whose error names a missing field, which formatting alone does not, and that refuses NaN and infinity."""

    def checked(value: object, *options: str) -> str:
        str(value)  # raises if it is undefined
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("the card would show a figure that is not finite")
        return form(value, *options)

    return checked


def _removed_parts(report: Mapping) -> list[str]:
    """What was removed. Groups of channels inside of removed blocks keep nothing."""
    blocks = ["residual blocks"] if report.get("removed_blocks") else []
    narrowed = any(0 < group["kept_channels"] < group["dense_channels"] for group in report["channel_groups"])
    return [*(["channels"] if narrowed or not blocks else []), *blocks]


def _speeds(dense: ModelFigures, pruned: ModelFigures) -> tuple[list[dict], float | None]:
    """A line for each setting; for results of format versions 1 and 2, which have one latency only, its removed share."""
    if pruned.speed and not {"speedup", "error"} & pruned.speed[0].keys():
        return [], _share_removed(dense.speed[0]["latency_ms"], pruned.speed[0]["latency_ms"])
    return compare_speeds(dense.speed, pruned.speed), None


def _machines(rows: Sequence[Mapping]) -> list[str]:
    """Hardware of measurements, with the number of threads on CPUs."""
    threads = {"cpu": " ({threads} threads)"}
    return list(dict.fromkeys(row["hardware"] + threads.get(row["device"], "").format(**row) for row in rows))


def render_card(results: Results, report: Mapping, repo_id: str, pictures: Mapping[str, str] | None = None) -> str:
    """Render the card of a run.

    Args:
        results: Results of a pruning run.
        report: Content of `pruning_report.json`.
        repo_id: Repository of the model, for the loading examples.
        pictures: Picture files in the card's folder, by content: `"samples"`, `"widths"`, `"pruning"`.

    Returns:
        Markdown with a YAML header.

    Raises:
        ValueError: A field is missing, or the rendered card is not valid.
    """
    if results.kind != PRUNING_RUN:
        raise ValueError(f"results.json has kind={results.kind}, which must be {PRUNING_RUN} for a card")
    shown = {"samples": None, "widths": None, "pruning": None, **(pictures or {})}
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters.update({name: _strict(form) for name, form in FILTERS.items()})
    model_name = repo_id.split("/")[-1]
    try:
        dense, pruned, criterion = results.reference_model, results.model, criterion_of(report["config"])
        costs = ("parameters", "macs", "weight_file_bytes")
        for figures, name in itertools.product((dense, pruned), (*costs, "step_loss")):
            if getattr(figures, name) is None:
                raise ValueError(f"{figures.name} has no {name}")
        pipeline = pipeline_of(report)
        removed = {name: _share_removed(getattr(dense, name), getattr(pruned, name)) for name in costs}
        speeds, removed_latency = _speeds(dense, pruned)
        template = environment.from_string(files(f"{PACKAGE}.model_cards").joinpath("template.md.jinja").read_text("utf-8"))
        text = template.render(
            dense=dense,
            pruned=pruned,
            evaluation=results.evaluation,
            latency_budget=results.latency_budget,
            removed_latency=removed_latency,
            report=report,
            repo_id=repo_id,
            model_name=model_name,
            pictures=shown,
            removed=removed,
            removed_parts=_removed_parts(report),
            criterion=criterion,
            method=METHOD if criterion.startswith(GRADIENT_FLOW) else f"structured pruning (criterion `{criterion}`)",
            package=PACKAGE,
            pipeline=pipeline,
            example=example_of(pipeline),
            distribution=DISTRIBUTION,
            base_link=_link(report["base_model"], ""),
            dataset_link=_link(report["dataset"], "datasets/"),
            measured_link=_link(_measured_with(results, report), "datasets/"),
            target=TARGETS.get(pipeline.get("prediction_type"), "noise" if process_of(pipeline) == "ddpm" else "target"),
            distances=_distances(results),
            similarities=_similarities(results),
            speeds=speeds,
            gains=[speed for speed in speeds if None not in (speed["first_ms"], speed["other_ms"])],
            machines=_machines(pruned.speed if speeds else []),
            runtimes=list(
                dict.fromkeys(f"{row['mode']} {row['runtime_version']}" for row in pruned.speed if "runtime_version" in row)
            ),
            confidence=CONFIDENCE,
            revived=sum(_revived(update) for update in report["mask_updates"]),
            license_known=report["base_model"]["license"] not in (None, "unknown"),
            process=process_of(pipeline),
            batch_size=_images_per_step(report),
            taught_only=report["arguments"].get("distillation_weight") == 1,
            further_terms=_further_terms(report),
            citations=CITATIONS + PROCESS_CITATIONS[process_of(pipeline)],
        )
        metadata = _metadata(results, report, model_name).to_yaml()
    except jinja2.UndefinedError as error:
        raise ValueError(f"results.json or pruning_report.json lacks a field of the model card: {error}") from error
    except KeyError as error:
        raise ValueError(f"results.json or pruning_report.json lacks the field {error} of the model card") from error
    except (TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"results.json or pruning_report.json has a malformed field: {error}") from error
    card = f"---\n{metadata}\n---\n\n{re.sub(chr(10) + '{3,}', chr(10) * 2, text)}"
    check_card(card)
    return f"{card}\n{seal_of(card)}\n"


def render_eval_results(results: Results, report: Mapping) -> str | None:
    """Evaluation results in the Hub's format for data sets, `.eval_results/*.yaml`.

    They are distances to the images of a data set on the Hub, with the metric (`fid`, `fd-efflite0`) as the task. The Hub
    lists them if the data set is registered as a benchmark with this task. Similarity to the dense model is not a result on a
    data set and is left out.

    Args:
        results: Results of a pruning run.
        report: Content of `pruning_report.json`.

    Returns:
        YAML, or None if there are no such results.

    Raises:
        ValueError: A field is missing, or a figure is not finite.
    """
    entries = []
    try:
        dataset, drawn = _measured_with(results, report)["hub_id"], results.evaluation
        for metric in _distances(results) if dataset is not None else []:
            samples = f"{drawn['num_images']} samples ({drawn['sampler']}, {drawn['num_inference_steps']} steps)"
            notes = f"{metric['title']}, {samples}, {metric['reference_images']} images. {metric['warning']}".strip()
            entries.append(EvalResultEntry(dataset, task_id=metric["id"], value=metric["pruned"], notes=notes))
    except KeyError as error:
        raise ValueError(f"results.json or pruning_report.json lacks the field {error} of the evaluation results") from error
    if not entries:
        return None
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    check_eval_results(text)
    return text


def check_eval_results(text: str) -> None:
    """Check that the Hub can read evaluation results.

    Args:
        text: Content of a file in `.eval_results`.

    Raises:
        ValueError: The text is not a YAML list of results, lacks a data set, or has a value that is not a finite number.
    """
    try:
        entries = parse_eval_result_entries(yaml.safe_load(text))
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the evaluation results cannot be read: {' '.join(repr(error).split())}") from error
    for entry in entries:
        if not isinstance(entry.dataset_id, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", entry.dataset_id):
            raise ValueError(f"dataset={entry.dataset_id!r} of the evaluation results must be a Hub id")
        number = isinstance(entry.value, (int, float)) and not isinstance(entry.value, bool)
        if not number or not math.isfinite(entry.value):
            raise ValueError(f"value={entry.value!r} of {entry.task_id} in the evaluation results must be a finite number")


def _numbers(value: object) -> list[float]:
    if isinstance(value, Mapping):
        return [number for item in value.values() for number in _numbers(item)]
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, float) else []


def check_card(card: str) -> None:
    """Check that the Hub can show a card correctly.

    Args:
        card: Markdown with a YAML header.

    Raises:
        ValueError: The header does not parse, or has an unknown licence, task or library, malformed tags, a base model or data
            set that is not a Hub id, figures that are not finite, or an empty `model-index`.
    """
    try:
        parsed = ModelCard(card, ignore_metadata_errors=False)
    except Exception as error:  # the client passes on any error of its YAML parser
        raise ValueError(f"the card's metadata cannot be read: {one_line(error)}") from error
    header = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    data = yaml.safe_load(header[1]) if header else None  # as written: the client converts unexpected values to lists
    if not isinstance(data, dict):
        raise ValueError("the card has no metadata")
    if not isinstance(data.get("license"), str) or data["license"] not in LICENSES:
        raise ValueError(f"license={data.get('license')!r} of the card must be a licence id of the Hub")
    for name, allowed in (("library_name", ("diffusers",)), ("pipeline_tag", TASKS)):
        if data.get(name) not in allowed:
            raise ValueError(f"{name}={data.get(name)!r} of the card must be {' or '.join(map(repr, allowed))}")
    tags = data.get("tags")
    if not isinstance(tags, list) or not all(isinstance(tag, str) and re.fullmatch(r"[\w:./+-]+", tag) for tag in tags):
        raise ValueError(f"tags={tags!r} of the card must be a list of words")
    ids = [data.get(name) or [] for name in ("base_model", "datasets")]  # one id, or several
    for hub_id in [hub_id for named in ids for hub_id in (named if isinstance(named, list) else [named])]:
        if not isinstance(hub_id, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id):
            raise ValueError(f"{hub_id!r} in the card's metadata must be a Hub id")
    if not all(math.isfinite(number) for number in _numbers(data)):
        raise ValueError("the card's metadata holds a figure that is not finite")
    if "model-index" in data and not parsed.data.eval_results:
        raise ValueError("the card's model-index has no results")
