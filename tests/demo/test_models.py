"""demo/models.py: the dense model is found by the report of the run, and both models make the same kind of images."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline

from diffusers_gfprune import PruneDDPMPipeline
from diffusers_gfprune.demo.drawing import Settings, draw
from diffusers_gfprune.demo.models import load_models
from helpers.hub import CARD
from helpers.hub_server import WRITE, HubServer
from helpers.latent_pipelines import save
from helpers.tiny_pipelines import tiny_pipeline

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense and a pruned pipeline, side by side."""
    folder = tmp_path_factory.mktemp("folders")
    dense = tiny_pipeline()
    dense.save_pretrained(folder / "dense")
    dense.prune(torch.rand(4, 1, 8, 8) * 2 - 1, ratio=0.3, recovery=False).save_pretrained(folder / "pruned")
    return folder


@pytest.fixture
def run(folders: Path, tmp_path: Path) -> Path:
    """A pruned pipeline without a report."""
    PruneDDPMPipeline.from_pretrained(folders / "pruned").save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def write_report(run: Path, **base_model: str | None) -> None:
    report = json.loads((CARD / "pruning_report.json").read_text())
    base = {"name": "dense", "hub_id": None, "revision": None, "license": None, **base_model}
    (run / "pruning_report.json").write_text(json.dumps({**report, "base_model": base}))


def test_reference_is_what_the_report_names(folders: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(run, name="dense")
    monkeypatch.chdir(folders)
    models = load_models(str(run))
    assert (models.reference.name, models.notice) == ("dense", None)
    assert models.pruned.macs < models.reference.macs and models.pruned.parameters < models.reference.parameters
    assert models.report["channel_groups"] and models.speed is None


def test_speed_is_what_the_run_measured(run: Path) -> None:
    (run / "results.json").write_bytes((FIXTURES / "results-format-3.json").read_bytes())
    assert re.match(
        r"A forward pass on AMD EPYC, as the run measured it. batch 1, eager: 1.13 times as fast", load_models(str(run)).speed
    )
    (run / "results.json").write_text("{}")
    assert load_models(str(run)).speed is None


def test_reference_on_the_hub(folders: Path, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a Space: the pruned model is there, too."""
    write_report(run, name="alice/dense", hub_id="alice/dense")
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "home", WRITE)
        for name, folder in (("alice/dense", folders / "dense"), ("alice/pruned", run)):
            paths = [path for path in folder.rglob("*") if path.is_file()]
            server.add_repo(name, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})
        models = load_models("alice/pruned")
    assert (models.reference.name, models.notice) == ("alice/dense", None)


def test_without_the_dense_model_the_pruned_one_is_shown_alone(run: Path, capsys: pytest.CaptureFixture) -> None:
    for write, message in (
        (lambda: None, "there is no pruning_report.json that names it"),
        (lambda: write_report(run, name="elsewhere"), "pruning_report.json names elsewhere, which is not a folder here"),
        (lambda: write_report(run, hub_id="org/dense"), "reference=org/dense cannot be loaded: "),
    ):
        write()
        models = load_models(str(run))
        assert models.reference is None and models.notice.startswith(f"The dense model is not shown: {message}")
        assert capsys.readouterr().err.splitlines()[-1].endswith("Pass --reference to show one")


def test_without_memory_for_the_dense_model_the_pruned_one_is_shown_alone(
    folders: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it was requested."""
    write_report(run, name="dense")
    monkeypatch.chdir(folders)
    place, placed = DDPMPipeline.to, []

    def to(pipe, *arguments, **options):
        placed.append(pipe)
        if len(placed) == 2:
            raise torch.OutOfMemoryError("no memory\nis left")
        return place(pipe, *arguments, **options)

    monkeypatch.setattr(DDPMPipeline, "to", to)
    message = "dense does not fit on device=cpu in dtype=float32: no memory is left"
    models = load_models(str(run), device="cpu")
    assert models.reference is None and models.notice == f"The dense model is not shown: {message}"
    placed.clear()
    with pytest.raises(ValueError, match=f"^{message}$"):
        load_models(str(run), "dense", device="cpu")


def test_models_of_other_images_are_refused(folders: Path, tmp_path: Path) -> None:
    tiny_pipeline(sample_size=16).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="^reference=.*other generates 16x16 images .*, but the pruned model 8x8 images"):
        load_models(str(folders / "pruned"), str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype=int8 must be one of float32, float16, bfloat16"),
        ({"device": "cuda:99"}, "device=cuda:99 cannot be used: "),
        ({"device": "abacus"}, "device=abacus cannot be used: "),
        ({"dtype": "bfloat16"}, "dtype=bfloat16 must be float32 or float16: a DDPMPipeline of Diffusers makes no pictures"),
        ({"reference_revision": "v1"}, "reference_revision=v1 needs a reference"),
        ({"reference": "./nothing"}, "reference=./nothing is not a folder"),
    ],
)
def test_mistakes_are_named(folders: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_models(str(folders / "pruned"), **options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["ldm", "dit"])
def test_schedulers_add_no_noise_where_the_pipeline_has_no_generator_for_them(name: str, tmp_path: Path) -> None:
    """Or the images of the two models would not be from the same noise."""
    models = load_models(str(save(name, tmp_path / name)), str(tmp_path / name))
    assert "DDIMScheduler" in models.choices.schedulers and "DDPMScheduler" not in models.choices.schedulers
    for scheduler in models.choices.schedulers:
        settings = Settings(2, 4, scheduler)
        first, second = (draw(models.pruned, settings, models.choices).images for _ in range(2))
        assert torch.equal(first, second) and first.std() > 0.01, scheduler
