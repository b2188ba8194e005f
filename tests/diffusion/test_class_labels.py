"""diffusion/class_labels.py: null labels, dropped labels and sampled labels, also in scores and results."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from diffusers_gfprune import PruneDDPMPipeline
from diffusers_gfprune.data import batches as training_batches
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.diffusion.class_labels import LabelDropout, make_label_dropout
from diffusers_gfprune.one_shot import calibration_batches
from diffusers_gfprune.reports.model_card import render_card
from diffusers_gfprune.scripts import prune_ddpm
from diffusers_gfprune.trained_pipelines import load_pipeline
from diffusers_gfprune.training.arguments import parse_arguments
from diffusers_gfprune.training.run_setup import load_run_images
from helpers.architectures import build
from helpers.images import load, model_spec
from helpers.processes import ddpm
from helpers.pruners import SCHEDULER, images
from helpers.scripts import plain_runs

ROOT = Path(__file__).resolve().parents[2]


DIGITS = ROOT / "training/digits"


def test_the_null_label_is_the_one_after_the_last_class() -> None:
    assert make_label_dropout(11, num_classes=10).null_label == 10
    unknown = ((10, 10), (12, 10), (11, None), (None, 10))
    assert [make_label_dropout(labels, num_classes=classes) for labels, classes in unknown] == [None] * 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((None,), None),
        ((None, None, 0.0, 10), None),
        ((10, None, None, 10), None),
        ((11, None, None, 10), LabelDropout(10, 0.1)),
        ((11, None, 0.15, 10), LabelDropout(10, 0.15)),
        ((11, None, 0.0, 10), LabelDropout(10, 0.0)),
        ((11, 10, 0.2, None), LabelDropout(10, 0.2)),
        ((12, 11, None, 10), LabelDropout(11, 0.1)),
    ],
)
def test_arguments_win_over_the_convention(arguments: tuple, expected: LabelDropout | None) -> None:
    assert make_label_dropout(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 3), "null_label=3 needs a class-conditional model"),
        ((None, None, 0.1), "label_dropout=0.1 needs a class-conditional model"),
        ((11, 11), "null_label=11 must be from 0 to 10"),
        ((11, -1), "null_label=-1 must be from 0 to 10"),
        ((1, 0), "null_label=0 must be None: it is the only label of the model, with num_class_embeds=1"),
        ((11, 3, None, 10), "null_label=3 must not be one of the 10 classes"),
        ((10, None, 0.1, 10), "label_dropout=0.1 needs null_label: .*num_class_embeds=10 and 10 classes"),
        ((10, None, 0.1, None), "needs null_label: .* an unknown number of classes"),
        ((11, None, 1.0, 10), r"label_dropout=1.0 must be in \[0, 1\)"),
    ],
)
def test_contradictions_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_label_dropout(*arguments)


def test_labels_below_the_share_are_dropped() -> None:
    dropout = LabelDropout(10, 0.3)
    assert [dropout.one(label, uniform) for label, uniform in ((1, 0.1), (2, 0.3), (3, 0.29), (4, 0.9))] == [10, 2, 10, 4]


@pytest.mark.parametrize(
    ("probability", "count", "dropped"), [(0.25, 8, 2), (0.1, 3, 1), (0.0, 8, 0), (0.1, 1, 0), (0.1, 2, 1), (0.99, 8, 7)]
)
def test_several_labels_lose_their_share_and_at_least_one_but_never_all(probability: float, count: int, dropped: int) -> None:
    labels = torch.arange(count)
    found = LabelDropout(99, probability).several(labels, torch.Generator().manual_seed(0))
    assert int((found == 99).sum()) == dropped and torch.equal(found[found != 99], labels[found != 99])
    assert torch.equal(labels, torch.arange(count))


# --- in batches ---------------------------------------------------------------------------------------------------------


def conditional(**options):
    """The digits for a model of 11 labels."""
    return load(DIGITS, model_spec(classes=11), cache_dir=None, **options)[0]  # not beside the data, in the repository


def drawn(source, count: int = 8, first_batch: int = 0, **options) -> list[DiffusionBatch]:
    """Training batches of 16 images."""
    loader = training_batches.train_dataloader(source, 16, seed=3, process=ddpm(100), first_batch=first_batch, **options)
    return [batch for (batch, *_), _ in zip(loader, range(count))]


def labels_of(batch: DiffusionBatch) -> torch.Tensor:
    return batch.conditioning["class_labels"]


def test_dropping_changes_labels_and_nothing_else() -> None:
    """The same images, noise and timesteps as without; about that share of the labels."""
    kept, dropped = (drawn(conditional(label_dropout=share), 25) for share in (0.0, 0.3))
    changed = []
    for before, after in zip(kept, dropped):
        *same, labels = zip(before.tensors(), after.tensors())
        assert all(torch.equal(one, other) for one, other in same)
        different = labels[0] != labels[1]
        assert (labels[1][different] == 10).all() and (labels[0] < 10).all()
        changed.append(different.float())
    share = torch.cat(changed).mean().item()
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 400)


def test_which_labels_are_dropped_is_a_function_of_the_draw() -> None:
    """Wherever a run resumes, and however many processes share a batch."""
    source = conditional(label_dropout=0.5)
    whole = drawn(source, 4)
    assert torch.equal(labels_of(drawn(source, 1, first_batch=3)[0]), labels_of(whole[3]))
    halves = [
        next(iter(training_batches.train_dataloader(source, 8, seed=3, process=ddpm(100), rank=rank, world_size=2)))[0]
        for rank in range(2)
    ]
    assert torch.equal(torch.cat([labels_of(half) for half in halves]), labels_of(whole[0]))


def test_calibration_batches_drop_labels_evenly() -> None:
    """In their share, at noise levels of all kinds, and the same on any number of processes."""
    source = conditional(label_dropout=0.25)
    options = {"process": ddpm(100), "seed": 0, "step": 5}
    found = training_batches.calibration_batches(source, 2, 64, **options)
    for batch in found:
        for quarter in labels_of(batch).split(16):  # in the order of timesteps
            assert 3 <= int((quarter == 10).sum()) <= 5
    ranks = [training_batches.calibration_batches(source, 2, 32, **options, rank=rank, world_size=2) for rank in range(2)]
    for number, batch in enumerate(found):
        assert torch.equal(torch.cat([labels_of(ranks[0][number]), labels_of(ranks[1][number])]), labels_of(batch))


def test_an_image_with_the_null_label_is_refused() -> None:
    """Where the data set does not tell its classes; where it does, the null label is none of them."""
    source = conditional(label_dropout=0.25)
    source.decoder.label_dropout = LabelDropout(3, 0.25)
    with pytest.raises(ValueError, match="label 3 of row .* must not be null_label=3"):
        drawn(source, 3)


def test_labels_of_all_rows_are_looked_at_before_a_run(tmp_path: Path) -> None:
    """Where the column does not tell its classes; an image that is met late would end a long run."""
    for name in ("train", "validation"):
        rows = datasets.load_dataset(str(DIGITS), split=name, cache_dir=str(tmp_path / "datasets"))
        labels = [3 if name == "train" and number == 1234 else 0 for number in range(len(rows))]
        rows = rows.remove_columns("label").add_column("label", labels)
        rows.to_parquet(tmp_path / f"images/{name}.parquet")
    with pytest.raises(ValueError, match="column label has null_label=3, which no image may have"):
        load(tmp_path / "images", model_spec(classes=11), label_column="label", null_label=3)
    assert load(tmp_path / "images", model_spec(classes=11), label_column="label", null_label=4)[0].decoder.null_label == 4


def test_the_library_drops_labels_when_asked() -> None:
    """The same noise and timesteps as without."""
    labels = torch.arange(8) % 4
    plain = calibration_batches(images(), SCHEDULER, 4, labels)
    dropped = calibration_batches(images(), SCHEDULER, 4, labels, label_dropout=LabelDropout(9, 0.5))
    for before, after in zip(plain, dropped):
        assert all(torch.equal(a, b) for a, b in zip(before.tensors()[:3], after.tensors()[:3]))
    found = torch.cat([labels_of(batch) for batch in dropped])
    assert int((found == 9).sum()) == 4 and torch.equal(found[found != 9], labels[found != 9])


@pytest.mark.slow
def test_one_call_takes_a_null_label() -> None:
    pipe = PruneDDPMPipeline(unet=build("class-embedding"), scheduler=SCHEDULER)
    options = {"target": "params", "ratio": 0.3}
    labels = torch.arange(8) % 4
    plain = pipe.prune(images(), class_labels=labels, **options)
    other = pipe.prune(images(), class_labels=labels, null_label=9, label_dropout=0.5, **options)
    assert any(not torch.equal(a, b) for a, b in zip(plain.unet.parameters(), other.unet.parameters()) if a.shape == b.shape)
    with pytest.raises(ValueError, match="class_labels has null_label=3, which no image may have"):
        pipe.prune(images(), class_labels=labels, null_label=3, **options)
    with pytest.raises(ValueError, match="null_label=9 needs class_labels for the images"):
        pipe.prune(images(), null_label=9, **options)
    with pytest.raises(ValueError, match="label_dropout=0.5 needs null_label"):
        pipe.prune(images(), class_labels=labels, label_dropout=0.5, **options)


def test_drawn_images_have_the_null_label_of_the_data(tmp_path: Path) -> None:
    """It follows from the classes of a data set that is there for measurements; without one it must be named."""
    config = {**build("class-embedding").config, "num_class_embeds": 11}
    DDPMPipeline(UNet2DModel.from_config(config), DDPMScheduler()).save_pretrained(tmp_path / "model")
    pipeline = load_pipeline(str(tmp_path / "model"))
    words = ["--pretrained_model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "run")]
    words += ["--train_data", "teacher", "--num_teacher_images", "8", "--validation_images", "8"]
    found = load_run_images(parse_arguments([*words, "--dataset_name", str(DIGITS)]), pipeline, pipeline.denoiser)
    assert found.training.decoder.null_label == found.measured.decoder.null_label == 10
    assert found.training.decoder.label_dropout.probability == found.measured.decoder.label_dropout.probability == 0.1
    alone, named = (
        load_run_images(parse_arguments([*words, *more]), pipeline, pipeline.denoiser).training
        for more in ((), ("--null_label", "10"))
    )
    assert (alone.decoder.null_label, named.decoder.null_label) == (None, 10)
    for more, message in (
        (("--eval_seed", "0"), "eval_seed=0 is the seed of"),
        (("--center_crop",), "center_crop=True needs"),
    ):
        with pytest.raises(ValueError, match=message):
            load_run_images(parse_arguments([*words, *more]), pipeline, pipeline.denoiser)
    assert ["name it by --null_label" in " ".join(images.summary.lines()) for images in (alone, named)] == [True, False]


# --- in a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of a model of 11 labels on ten digits."""
    folder = tmp_path_factory.mktemp("conditional")
    torch.manual_seed(0)
    config = {**build("class-embedding").config, "num_class_embeds": 11}
    DDPMPipeline(UNet2DModel.from_config(config), DDPMScheduler(num_train_timesteps=50)).save_pretrained(folder / "model")
    with plain_runs():
        prune_ddpm.main(
            [
                *("--pretrained_model_name_or_path", str(folder / "model"), "--dataset_name", str(DIGITS)),
                *("--max_train_steps", "6", "--train_batch_size", "8", "--calibration_batches", "1"),
                *("--validation_images", "16", "--speed_batch_sizes", "0", "--eval_images", "12"),
                *("--ddim_num_inference_steps", "2", "--output_dir", str(folder / "run")),
            ]
        )
    return folder / "run"


@pytest.mark.slow
def test_both_losses_are_reported(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["evaluation"]["null_label"] == 10
    for which in ("dense", "pruned"):
        losses = results[which]
        assert losses["step_loss"] > 0 and losses["step_loss_null_label"] > 0
        assert losses["step_loss"] != losses["step_loss_null_label"]
    card = (finished / "README.md").read_text()
    assert "| step loss, null label | " in card and "Null label 10:" in card
    report = json.loads((finished / "pruning_report.json").read_text())
    assert (report["arguments"]["null_label"], report["arguments"]["label_dropout"]) == (10, 0.1)  # as they were found
    assert "It replaced 10.0% of the labels in training and scoring." in " ".join(card.split())


@pytest.mark.parametrize("known", ["by the run", "by the evaluation"])
def test_an_evaluation_replaces_what_a_run_says_of_the_null_label(known: str) -> None:
    """And of guidance. A run of an earlier version has no null label, and its card is still rendered."""
    from diffusers_gfprune.evaluation.card import merged_run_results
    from diffusers_gfprune.reports.results import EVALUATION, ModelFigures, Results

    folder = ROOT / "model_cards/digits-gfpruned"
    measured, report = (json.loads((folder / f"{name}.json").read_text()) for name in ("results", "pruning_report"))
    loss, settings = (None, {}) if known == "by the run" else (0.25, {"null_label": 10})
    if known == "by the run":
        measured["evaluation"] |= {"null_label": 10, "guidance_scale": 3.0}
        for name in ("dense", "pruned"):
            measured[name]["step_loss_null_label"] = 0.5
    figures = {
        name: ModelFigures(name, parameters=measured[name]["parameters"], macs=measured[name]["macs"], step_loss=0.125)
        for name in ("dense", "pruned")
    }
    for found in figures.values():
        found.step_loss_null_label = loss
    evaluation = {**measured["evaluation"], "eta": 0.0, "distances": {}, "step_loss_timesteps": 16}
    evaluation = {name: value for name, value in evaluation.items() if name not in ("null_label", "guidance_scale")}
    results = Results(EVALUATION, figures["pruned"], figures["dense"], evaluation | settings, "evaluate.py")
    merged = merged_run_results(Results.from_dict(measured), results)
    assert [model.step_loss_null_label for model in (merged.reference_model, merged.model)] == [loss, loss]
    assert merged.evaluation.get("null_label") == settings.get("null_label") and "guidance_scale" not in merged.evaluation
    card = render_card(merged, report, "me/model")
    assert ("| step loss, null label | 0.25 | 0.25 | |" in card) == ("Null label 10:" in card) == (loss is not None)


@pytest.mark.slow
def test_an_evaluation_reports_both_losses(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With the null label that the run has recorded, on labels that do not tell how many classes there are."""
    from diffusers_gfprune.scripts import evaluate

    for name in ("train", "validation"):
        rows = datasets.load_dataset(str(DIGITS), split=name, cache_dir=str(tmp_path / "datasets"))
        rows.cast_column("label", datasets.Value("int64")).to_parquet(tmp_path / f"images/{name}.parquet")
    arguments = ["--model", str(finished), "--dataset_name", str(tmp_path / "images"), "--label_column", "label"]
    counts = ["--num_images", "0", "--speed_batch_sizes", "0", "--validation_images", "16"]
    common = ["--output_dir", str(tmp_path / "out"), "--evaluation_cache_dir", str(tmp_path / "cache")]
    evaluate.main([*arguments, *counts, *common])
    figures = json.loads((tmp_path / "out/results.json").read_text())
    known = json.loads((finished / "results.json").read_text())["pruned"]
    assert figures["model"]["step_loss_null_label"] == pytest.approx(known["step_loss_null_label"], rel=1e-6)
    assert "step loss (null label)" in capsys.readouterr().out
