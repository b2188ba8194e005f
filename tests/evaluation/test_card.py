"""evaluation/card.py: results and card of a pruning run are both updated with the figures of an evaluation, or neither."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from diffusers_gfprune.hub import files_to_push, update_card
from diffusers_gfprune.metrics.model_size import count_macs, count_parameters
from diffusers_gfprune.metrics.quality import SamplingSettings
from diffusers_gfprune.remote.pipeline_prune_ddpm import is_as_rendered
from diffusers_gfprune.reports.model_card import render_card
from diffusers_gfprune.reports.results import Results
from helpers.architectures import build, pruned
from helpers.evaluations import run, save_dense, save_pruned, write_images
from helpers.hub import CARD, contents

ADDED = ("command", "dataset", "step_loss_timesteps")
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


def make_run(folder: Path) -> Path:
    """A pruning run as it was pushed to alice/small: the models of the tests, the report of a run that happened."""
    save_pruned(folder)
    for path in CARD.iterdir():
        shutil.copy(path, folder)
    (folder / "README.md").unlink()
    results = json.loads((FIXTURES / "results-format-3.json").read_text())  # of a run of an older version
    for name, unet in (("dense", build("base")), ("pruned", pruned("base"))):
        results[name] |= {"parameters": count_parameters(unet), "macs": count_macs(unet)}
        results[name].pop("latency", None)
    setting = {"batch_size": 1, "dtype": "float32", "mode": "compiled", "memory_format": "contiguous"}
    machine = {"device": "cpu", "hardware": "abacus", "threads": 1}
    results["speed"] = [{"model": name, **setting, "error": "no compiler", **machine} for name in ("dense", "pruned")]
    (folder / "results.json").write_text(json.dumps(results))
    update_card(folder, "alice/small")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its dense model and images."""
    folder = tmp_path_factory.mktemp("card")
    save_dense(folder / "dense")
    write_images(folder / "images")
    make_run(folder / "run")
    return folder


@pytest.fixture
def arguments(world: Path, tmp_path: Path) -> list:
    """An evaluation of a copy of the run, which goes into its card."""
    shutil.copytree(world / "run", tmp_path / "small")
    models = ["--model", tmp_path / "small", "--reference_model", world / "dense", "--dataset_name", world / "images"]
    return [*models, "--evaluation_cache_dir", world / "cache", "--num_images", 70, "--seed", 7, "--update_model_card"]


def test_card_shows_the_figures_of_the_evaluation(arguments: list, tmp_path: Path) -> None:
    """Cost and speed stay those of the run; samples, their picture, their settings and the step loss are new."""
    folder = tmp_path / "small"
    before = json.loads((folder / "results.json").read_text())
    found = run(tmp_path, *arguments)
    after = json.loads((folder / "results.json").read_text())
    assert (before["format_version"], after["format_version"]) == (3, 4)
    for name, argument in (("pruned", "model"), ("dense", "reference_model")):
        for kept in ("parameters", "macs", "weight_file_bytes"):
            assert after[name][kept] == before[name][kept]
        assert after[name]["speed"] == [{k: v for k, v in row.items() if k != "model"} for row in before["speed"][:1]]
        assert after[name]["step_loss"] == found[argument]["step_loss"] != before[name]["step_loss"]
        shown = {k: v for k, v in found[argument]["quality"].items() if k != "kd_pixels"}
        assert after[name]["quality"] == shown
    assert after["pruned"]["weights"] == found["model"]["weights"]  # those that a push looks for
    e = after["evaluation"]
    assert (e["num_images"], e["num_inference_steps"], e["seed"], e["ema"]) == (70, 2, 7, True)
    assert set(e["distances"]) == {"fd_pixels"} and e["distances"]["fd_pixels"]["reference_images"] == 120
    assert e["command"] == found["command"] and set(e) == {*before["evaluation"], *ADDED}
    assert e["step_loss_timesteps"] == 4  # that of a run is the default
    assert e["dataset"] == {"name": "images", "hub_id": None}
    card = (folder / "README.md").read_text()
    assert is_as_rendered(card) and 'from_pretrained("alice/small")' in card
    assert "held-out images, with fixed noise and\n  4 timesteps." in card
    figures = {**after["pruned"], **after["pruned"]["quality"]}
    for name in ("fd_pixels", "ssim_to_dense", "step_loss"):
        assert f"{figures[name]:.4g}" in card and f"{before['pruned'][name]:.4g}" not in card
    assert "- Samples: 70 images, DDIM with\n  2 steps (leading spacing), seed\n  7" in card
    assert (folder / "samples.png").read_bytes() == (tmp_path / "out/samples.png").read_bytes()
    report = json.loads((folder / "pruning_report.json").read_text())
    pictures = {"samples": "samples.png", "widths": "widths.png", "pruning": "pruning.png"}
    assert card == render_card(Results.from_dict(after), report, "alice/small", pictures)
    assert not list(folder.glob(".*")) and files_to_push(folder)


def test_edited_card_keeps_its_text(arguments: list, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    readme = tmp_path / "small/README.md"
    text = readme.read_text().replace("## Limitations", "Mine.\n\n## Limitations")
    readme.write_text(text)
    run(tmp_path, *arguments)
    assert readme.read_text() == text
    assert "README.md was edited, so its text and figures are kept" in capsys.readouterr().err
    assert json.loads((tmp_path / "small/results.json").read_text())["evaluation"]["seed"] == 7


def test_an_edited_card_that_the_hub_cannot_show_is_refused_before_sampling(
    arguments: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = tmp_path / "small/README.md"
    card.write_text(re.sub("license: .*", "license: my-own", card.read_text()))
    monkeypatch.setattr(SamplingSettings, "sample", None)
    with pytest.raises(ValueError, match="README.md was edited: license='my-own' of the card must be a licence id of the Hub"):
        run(tmp_path, *arguments)


def test_run_without_a_card_gets_one(arguments: list, tmp_path: Path) -> None:
    (tmp_path / "small/README.md").unlink()
    run(tmp_path, *arguments)
    assert 'from_pretrained("small")' in (tmp_path / "small/README.md").read_text()


@pytest.mark.fast_variants(1)
@pytest.mark.parametrize(
    "where",
    [
        "diffusers_gfprune.hub.pushing.check_card",
        "diffusers_gfprune.evaluation.card.write_json",
        "diffusers_gfprune.run_folder.RunFolder.publish",
    ],
)
def test_failure_leaves_the_run_as_it_was(arguments: list, tmp_path: Path, monkeypatch, where: str) -> None:
    """Whatever goes wrong after the measurement."""

    def fail(*arguments):
        raise ValueError("no such luck")

    readme = tmp_path / "small/README.md"
    readme.write_text(readme.read_text() + "mine")  # so that the card is checked after it is put together
    before = contents(tmp_path / "small")
    monkeypatch.setattr(where, fail)
    with pytest.raises(ValueError, match="no such luck"):
        run(tmp_path, *arguments)
    assert contents(tmp_path / "small") == before and not list((tmp_path / "small").glob(".*"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_is_not_left_half_changed(arguments: list, tmp_path: Path, monkeypatch) -> None:
    """A file that cannot be replaced brings back those that were; the same command then goes through."""
    (tmp_path / "small/samples.png").unlink()
    before = contents(tmp_path / "small")
    replace, replaced = os.replace, []

    def fail(source, target):
        if Path(target).parent == tmp_path / "small" and Path(source).parent.name != "earlier":
            replaced.append(target)
            if len(replaced) == 3:
                raise OSError("no such luck")
        replace(source, target)

    monkeypatch.setattr("diffusers_gfprune.evaluation.card.os.replace", fail)
    with pytest.raises(OSError, match="no such luck"):
        run(tmp_path, *arguments)
    assert contents(tmp_path / "small") == before and not list((tmp_path / "small").glob(".*"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("diffusers_gfprune.evaluation.card.os.replace", replace)
    assert run(tmp_path, *arguments)["evaluation"]["seed"] == 7


@pytest.mark.slow
def test_killed_while_the_run_is_changed(arguments: list, tmp_path: Path, monkeypatch) -> None:
    """The same command changes what is left."""
    with monkeypatch.context() as patch:
        patch.setattr("diffusers_gfprune.evaluation.card.os.replace", killed := Killed(2, tmp_path / "small"))
        patch.setattr("diffusers_gfprune.evaluation.card._restore", lambda *arguments: None)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, *arguments)
    assert killed.left == 0 and (tmp_path / "small/.evaluation.incomplete").is_dir() and not (tmp_path / "out").exists()
    found = run(tmp_path, *arguments)
    after, card = json.loads((tmp_path / "small/results.json").read_text()), (tmp_path / "small/README.md").read_text()
    assert after["pruned"]["step_loss"] == found["model"]["step_loss"]
    assert is_as_rendered(card) and f"{found['model']['quality']['fd_pixels']:.4g}" in card
    assert not list((tmp_path / "small").glob(".*"))


class Killed:
    """`os.replace`, until the process dies: after so many files of a folder."""

    def __init__(self, after: int, folder: Path) -> None:
        self.left, self.folder, self.replace = after, folder, os.replace

    def __call__(self, source, target) -> None:
        if Path(target).is_relative_to(self.folder):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
        self.replace(source, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pruned": {"macs": 1}}, "model has [0-9,]+ parameters and .* MACs, but the pruned model of the run has .* and 1"),
        ({"dense": {"parameters": 5}}, "reference_model has .* parameters and .*, but the dense model of the run has 5 and"),
        ({"dense": {"weights": "0123abcd"}}, "reference_model has other weights than the dense model of the run"),
        ({"evaluation": None}, "malformed|lacks"),
        (None, "results.json cannot be read"),
    ],
)
def test_what_does_not_fit_the_run_is_said_before_sampling(
    arguments: list, tmp_path: Path, monkeypatch, change, message
) -> None:
    path = tmp_path / "small/results.json"
    results = json.loads(path.read_text())
    if change is None:
        path.write_text("{")
    else:
        for name, values in change.items():
            results[name] = None if values is None else {**results[name], **values}
        path.write_text(json.dumps(results))
    before = contents(tmp_path / "small")

    def fail(*arguments, **options):
        raise AssertionError("sampled")

    monkeypatch.setattr(SamplingSettings, "sample", fail)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *arguments)
    assert contents(tmp_path / "small") == before and not (tmp_path / "out").exists()
