"""Pipelines and models that are pushed by themselves, from Python: files, cards, and results of what they replace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline
from huggingface_hub import HfApi, ModelCard, file_download
from huggingface_hub.utils import _http

from diffusers_gfprune import GFPrunedUNet2DModel, PruneDDPMPipeline
from diffusers_gfprune.hub import push_folder
from diffusers_gfprune.remote.pipeline_prune_ddpm import COMPANIONS, is_as_rendered
from helpers.hub import make_run
from helpers.hub_server import WRITE, HubServer
from helpers.scripts import RUN_FILES

REPO = "alice/digits"
PUSHED = RUN_FILES
UNMEASURED = {*RUN_FILES} - {*COMPANIONS} | {"README.md"}  # what there is of a pipeline without results
CODE = GFPrunedUNet2DModel.source().encode()  # the file that is saved with a pruned model


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    for module in (_http, file_download):  # no waits between attempts
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda _: None))
    with HubServer() as hub:
        hub.use(monkeypatch, tmp_path / "home", WRITE)
        yield hub


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def on_hub(server: HubServer, repo: str = REPO, revision: str = "main") -> dict[str, bytes]:
    return {name: data for name, data in server.files(repo, revision).items() if name != ".gitattributes"}


def other_pipeline(run: Path) -> PruneDDPMPipeline:
    """A pipeline in memory, with other weights than the run."""
    pipe = DDPMPipeline.from_pretrained(run)
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0] += 1e-3
    return PruneDDPMPipeline(unet=pipe.unet, scheduler=pipe.scheduler)


def test_pipeline_of_a_run_is_pushed_with_its_card(server: HubServer, run: Path) -> None:
    PruneDDPMPipeline.from_pretrained(run).push_to_hub(REPO)
    pushed = on_hub(server)
    assert set(pushed) == PUSHED
    assert pushed["README.md"] == (run / "README.md").read_bytes().replace(b'"digits-gfpruned"', b'"alice/digits"')
    assert pushed["unet/diffusers_gfprune.py"] == CODE


def test_saving_with_push_to_hub_keeps_the_card(server: HubServer, run: Path) -> None:
    card = (run / "README.md").read_bytes()
    PruneDDPMPipeline.from_pretrained(run).save_pretrained(str(run), push_to_hub=True, repo_id=REPO)
    assert on_hub(server)["README.md"].replace(b'"alice/digits"', b'"digits-gfpruned"') == card
    assert (run / "README.md").read_bytes() == card
    assert set(on_hub(server)) == PUSHED


def test_pipeline_pushes_nothing_that_lies_beside_it(server: HubServer, run: Path) -> None:
    (run / "checkpoint-5").mkdir()
    for name in ("optimizer.bin", "checkpoint-5/.env", "unet/optimizer.safetensors"):
        (run / name).write_text("stays")
    PruneDDPMPipeline.from_pretrained(run).save_pretrained(str(run), push_to_hub=True, repo_id=REPO)
    assert set(on_hub(server)) == PUSHED


def test_pipeline_of_diffusers_keeps_the_card_on_the_hub(server: HubServer, run: Path) -> None:
    push_folder(run, REPO)
    card = on_hub(server)["README.md"]
    pipe = DDPMPipeline.from_pretrained(REPO)
    assert type(pipe) is DDPMPipeline
    pipe.push_to_hub(REPO)
    assert ModelCard(on_hub(server)["README.md"].decode()).text == ModelCard(card.decode()).text
    assert set(on_hub(server)) == PUSHED


def test_model_alone(server: HubServer, run: Path, tmp_path: Path) -> None:
    unet = GFPrunedUNet2DModel.from_pretrained(run, subfolder="unet")
    unet.push_to_hub("alice/unet")
    assert {"config.json", "diffusers_gfprune.py", "diffusion_pytorch_model.safetensors"} < set(on_hub(server, "alice/unet"))
    again = GFPrunedUNet2DModel.from_pretrained("alice/unet")
    assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), again.state_dict().values()))

    folder = tmp_path / "unet"
    unet.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# My model\n")
    unet.save_pretrained(str(folder), push_to_hub=True, repo_id="alice/carded")
    assert on_hub(server, "alice/carded")["README.md"] == (folder / "README.md").read_bytes()


def test_model_into_its_subfolder(server: HubServer, run: Path) -> None:
    push_folder(run, REPO)
    before = on_hub(server)
    GFPrunedUNet2DModel.from_pretrained(REPO, subfolder="unet").push_to_hub(REPO, subfolder="unet")
    after = on_hub(server)
    old, new = (json.loads(files.pop("unet/config.json")) for files in (before, after))
    assert new == {**old, "removed_blocks": None}  # the table of blocks came later than this repository
    assert after == {**before, "unet/diffusers_gfprune.py": CODE}


# --- over a run --------------------------------------------------------------------------------------------------------


def test_a_pipeline_without_results_replaces_those_of_a_run(server: HubServer, run: Path, tmp_path: Path) -> None:
    """With the generic card, since that of the run has its figures; also by `save_pretrained`."""
    pipe, saved = other_pipeline(run), tmp_path / "saved"
    for push in (
        lambda: pipe.push_to_hub(REPO),
        lambda: pipe.save_pretrained(str(saved), push_to_hub=True, repo_id=REPO),
    ):
        push_folder(run, REPO)
        push()
        found = on_hub(server)
        assert set(found) == UNMEASURED
        card = ModelCard(found["README.md"].decode())
        assert card.data.library_name == "diffusers" and not card.data.eval_results and "rendered by" not in card.text
    assert (saved / "README.md").read_bytes() == found["README.md"]
    assert torch.equal(DDPMPipeline.from_pretrained(REPO).unet.conv_in.weight, pipe.unet.conv_in.weight)


def test_a_card_of_ones_own_replaces_that_of_a_run(server: HubServer, run: Path, tmp_path: Path) -> None:
    push_folder(run, REPO)
    pipe, saved = other_pipeline(run), tmp_path / "saved"
    pipe.save_pretrained(saved)
    (saved / "README.md").write_text("---\nlicense: mit\n---\n# My model\n")
    pipe.save_pretrained(str(saved), push_to_hub=True, repo_id=REPO)
    assert set(on_hub(server)) == UNMEASURED and on_hub(server)["README.md"] == (saved / "README.md").read_bytes()


def test_an_edited_card_of_a_run_outlives_its_results(server: HubServer, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    push_folder(run, REPO)
    edited = on_hub(server)["README.md"] + b"\nMine.\n"
    HfApi().upload_file(path_or_fileobj=edited, path_in_repo="README.md", repo_id=REPO)
    other_pipeline(run).push_to_hub(REPO)
    assert set(on_hub(server)) == UNMEASURED and on_hub(server)["README.md"].endswith(b"\nMine.\n")
    assert f"The card of {REPO} was edited on the Hub and stays, but its results are deleted." in caplog.messages


def test_results_stay_while_the_measured_weights_stay(server: HubServer, run: Path) -> None:
    """Loaded from the Hub and pushed again, or a variant beside them."""
    push_folder(run, REPO)
    before = on_hub(server)
    PruneDDPMPipeline.from_pretrained(REPO).push_to_hub(REPO)
    again = on_hub(server)
    assert set(again) == PUSHED and all(again[name] == before[name] for name in COMPANIONS if name in before)
    other_pipeline(run).push_to_hub(REPO, variant="ema")
    assert on_hub(server).keys() - again.keys() == {"unet/diffusion_pytorch_model.ema.safetensors"}
    assert is_as_rendered(on_hub(server)["README.md"].decode())


def test_files_of_a_repository_without_a_run_stay(server: HubServer, run: Path) -> None:
    """They may have the same names."""
    server.add_repo(REPO, {"results.json": b"{}", "samples.png": b"mine"})
    other_pipeline(run).push_to_hub(REPO)
    assert set(on_hub(server)) == {*UNMEASURED, "results.json", "samples.png"}


def test_a_card_edited_on_the_hub_stays(server: HubServer, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As with `hub push`; but not if the card of the run was edited, too, or over another run."""
    pipe = PruneDDPMPipeline.from_pretrained(run)
    pipe.push_to_hub(REPO)
    edited = on_hub(server)["README.md"] + b"\nMine.\n"
    HfApi().upload_file(path_or_fileobj=edited, path_in_repo="README.md", repo_id=REPO)
    pipe.push_to_hub(REPO)
    assert on_hub(server)["README.md"] == edited and set(on_hub(server)) == PUSHED
    assert f"The card of {REPO} was edited on the Hub and stays: delete it there to replace it." in caplog.messages
    rendered = (run / "README.md").read_text()
    (run / "README.md").write_text(rendered + "\nOurs.\n")
    pipe.push_to_hub(REPO)
    assert on_hub(server)["README.md"].endswith(b"\nOurs.\n")
    (run / "README.md").write_text(rendered)
    report = json.loads((run / "pruning_report.json").read_text())
    (run / "pruning_report.json").write_text(json.dumps({**report, "dense_step_loss": 0.5}))
    pipe.push_to_hub(REPO)
    assert is_as_rendered(on_hub(server)["README.md"].decode())
