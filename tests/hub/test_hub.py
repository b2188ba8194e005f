"""Pushing runs to a test Hub with the real client: uploaded files, kept files, and errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, file_download, parse_eval_result_entries, snapshot_download
from huggingface_hub.utils import _http

from diffusers_gfprune import GFPrunedUNet2DModel, PruneDDPMPipeline
from diffusers_gfprune.fingerprints import tensors_fingerprint
from diffusers_gfprune.hub import PushError, files_to_push, push_checkpoint, push_folder, update_card
from diffusers_gfprune.hub.__main__ import main
from diffusers_gfprune.remote.pipeline_prune_ddpm import rename_in_card
from helpers.hub import contents, digest, make_run
from helpers.hub_server import OTHER, READ, WRITE, HubServer
from helpers.scripts import RUN_FILES, run_script

REPO = "alice/digits"
PUSHED = RUN_FILES
CODE = GFPrunedUNet2DModel.source().encode()  # the file that is saved with a pruned model
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


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


# --- what goes, and what stays -----------------------------------------------------------------------------------------


def test_bytes_pulled_are_bytes_pushed(server: HubServer, run: Path, tmp_path: Path) -> None:
    url = push_folder(run, REPO)
    assert url.startswith(f"{server.endpoint}/{REPO}/commit/")
    pulled = contents(snapshot_download(REPO, local_dir=tmp_path / "pulled"))
    pulled = {name: data for name, data in pulled.items() if not name.startswith(".cache")}
    assert pulled == contents(run) and set(pulled) == PUSHED


def test_nothing_else_is_pushed(server: HubServer, run: Path) -> None:
    (run / "checkpoint-5").mkdir()
    stay = ["checkpoint-5/model.safetensors", "optimizer.bin", "unet/optimizer.safetensors", "notes.txt", ".env", "unet/x.py"]
    for name in stay:
        (run / name).write_bytes(b"stays here")
    push_folder(run, REPO)
    assert set(on_hub(server)) == PUSHED
    assert files_to_push(run)[1] == sorted(stay)


def test_card_names_the_repository_it_is_in(server: HubServer, run: Path) -> None:
    push_folder(run, REPO)
    card = on_hub(server)["README.md"].decode()
    assert re.findall(r'from_pretrained\("([^"]+)"', card) == [REPO, REPO]
    push_folder(run, "alice/other")
    assert b'from_pretrained("alice/other"' in on_hub(server, "alice/other")["README.md"]
    assert ModelCard.load("alice/other").data.pipeline_tag == "unconditional-image-generation"


def test_evaluation_results_go_with_the_card(server: HubServer, run: Path, tmp_path: Path) -> None:
    """And leave with it, where there are none any more."""
    name, report = ".eval_results/diffusers_gfprune.yaml", json.loads((run / "pruning_report.json").read_text())
    described = {**report, "dataset": {"name": "org/images", "hub_id": "org/images"}}
    (run / "pruning_report.json").write_text(json.dumps(described))
    push_folder(run, REPO)
    assert set(on_hub(server)) == {*PUSHED, name}
    (entry,) = parse_eval_result_entries(yaml.safe_load(on_hub(server)[name]))
    assert (entry.dataset_id, entry.task_id) == ("org/images", "fd-pixels")
    pipe = PruneDDPMPipeline.from_pretrained(run)
    pipe.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / name).read_bytes() == on_hub(server)[name]
    pipe.push_to_hub("alice/again")
    assert name in on_hub(server, "alice/again")
    (run / "pruning_report.json").write_text(json.dumps(report))
    push_folder(run, REPO)
    assert set(on_hub(server)) == PUSHED and not (run / name).exists()


def test_card_edited_by_hand_keeps_its_text(server: HubServer, run: Path) -> None:
    card = (run / "README.md").read_text() + '\nIn my own words. See `from_pretrained("org/dense")`.\n'
    (run / "README.md").write_text(card)
    push_folder(run, REPO)
    assert on_hub(server)["README.md"].decode() == card.replace('"digits-gfpruned"', f'"{REPO}"')


def test_card_edited_on_the_hub_keeps_its_text(server: HubServer, run: Path, capsys: pytest.CaptureFixture) -> None:
    """Also without the comment at its end; but not if the card of the run was edited, too, or over another run."""
    push_folder(run, REPO)
    edited = on_hub(server)["README.md"].partition(b"<!-- rendered")[0] + b"\nMine.\n"
    HfApi().upload_file(path_or_fileobj=edited, path_in_repo="README.md", repo_id=REPO)
    push_folder(run, REPO)
    assert on_hub(server)["README.md"] == edited and set(on_hub(server)) == PUSHED
    assert f"the card of {REPO} was edited on the Hub and stays" in capsys.readouterr().err
    rendered = (run / "README.md").read_text()
    (run / "README.md").write_text(rendered + "\nOurs.\n")
    push_folder(run, REPO)
    assert on_hub(server)["README.md"].endswith(b"\nOurs.\n")
    (run / "README.md").write_text(rendered)
    report = json.loads((run / "pruning_report.json").read_text())
    (run / "pruning_report.json").write_text(json.dumps({**report, "dense_step_loss": 0.5}))
    push_folder(run, REPO)
    assert on_hub(server)["README.md"] == (run / "README.md").read_bytes()


@pytest.mark.parametrize(("status", "times"), [(503, 2), (429, 99)])
def test_card_edited_on_the_hub_survives_a_server_that_does_not_answer(
    server: HubServer, run: Path, status: int, times: int
) -> None:
    """Copies of an earlier push, in the cache, do not count, nor is a file absent that the server fails to send."""
    push_folder(run, REPO)
    push_folder(run, REPO)
    edited = on_hub(server)["README.md"].partition(b"<!-- rendered")[0] + b"\nMine.\n"
    HfApi().upload_file(path_or_fileobj=edited, path_in_repo="README.md", repo_id=REPO)
    server.fail("HEAD", f"/{REPO}/resolve/.*", status=status, times=times)
    refused = pytest.raises(PushError, match="try again: python -m diffusers_gfprune.hub push")
    with refused if times > 2 else nullcontext():  # the client tries more often than twice
        push_folder(run, REPO)
    assert on_hub(server)["README.md"] == edited
    server.heal()
    push_folder(run, REPO)
    assert on_hub(server)["README.md"] == edited


def test_card_under_another_name_is_no_edited_one(server: HubServer, run: Path) -> None:
    """The pipeline is pushed by itself, then the run, with new results."""
    PruneDDPMPipeline.from_pretrained(run).push_to_hub(REPO)
    results = json.loads((run / "results.json").read_text())
    results["pruned"]["quality"]["ssim_to_dense"] = 0.1234
    (run / "results.json").write_text(json.dumps(results))
    push_folder(run, REPO)
    assert b"| 0.1234 |" in on_hub(server)["README.md"]


def test_card_follows_the_results(server: HubServer, run: Path) -> None:
    push_folder(run, REPO)
    results = json.loads((run / "results.json").read_text())
    results["pruned"]["quality"]["ssim_to_dense"] = 0.1234
    (run / "results.json").write_text(json.dumps(results))
    push_folder(run, REPO)
    assert b"| 0.1234 |" in on_hub(server)["README.md"]


def test_card_that_the_hub_would_show_wrongly_is_refused(server: HubServer, run: Path) -> None:
    (run / "README.md").write_text("---\nlicense: my own\n---\n# Mine\n")
    with pytest.raises(ValueError, match="license='my own'"):
        push_folder(run, REPO)
    assert server.requests == []


def test_pushing_again_uploads_no_weights(server: HubServer, run: Path) -> None:
    push_folder(run, REPO)
    before = len(server.uploads())
    push_folder(run, REPO)
    assert before > 0 and len(server.uploads()) == before


def test_weights_of_an_earlier_push_do_not_stay(server: HubServer, run: Path) -> None:
    unet = GFPrunedUNet2DModel.from_pretrained(run, subfolder="unet")
    (run / WEIGHTS).unlink()
    unet.save_pretrained(run / "unet", max_shard_size="20KB")
    push_folder(run, REPO)
    assert sum(name.endswith(".safetensors") for name in on_hub(server)) > 1
    unet.save_pretrained(run / "unet")
    push_folder(run, REPO)
    assert set(on_hub(server)) == PUSHED


def test_private_repository(server: HubServer, run: Path) -> None:
    push_folder(run, REPO, private=True)
    assert server.repositories[("models", REPO)].private


def test_public_repository_is_not_taken_for_private(server: HubServer, run: Path) -> None:
    push_folder(run, REPO)
    with pytest.raises(ValueError, match=f"{REPO} exists and is public"):
        push_folder(run, REPO, private=True)


def test_checkpoint_is_pushed_without_results(server: HubServer, run: Path) -> None:
    push_folder(run, REPO)  # from an earlier run with other weights
    push_checkpoint(run, REPO, commit_message="Step 5 of 10")
    assert set(on_hub(server)) == {name for name in PUSHED if "/" in name or name in ("model_index.json", "pipeline.py")}


def test_results_of_other_weights_are_not_pushed(server: HubServer, run: Path, capsys: pytest.CaptureFixture) -> None:
    """The UNet was trained further after the run; the command that lists the files says so, too."""
    results, unet = json.loads((run / "results.json").read_text()), GFPrunedUNet2DModel.from_pretrained(run / "unet")
    results["pruned"]["weights"] = tensors_fingerprint(unet.state_dict())
    (run / "results.json").write_text(json.dumps(results))
    push_folder(run, "alice/measured")
    with torch.no_grad():
        unet.conv_in.weight[0, 0] += 1e-3
    unet.save_pretrained(run / "unet")
    before, asked = digest(run), len(server.requests)
    for push in (lambda: push_folder(run, REPO), lambda: main(["push", str(run), REPO, "--dry_run"])):
        with pytest.raises((ValueError, SystemExit), match="its results.json is of other weights than those in unet"):
            push()
    assert digest(run) == before and len(server.requests) == asked and not capsys.readouterr().out


def test_renaming_leaves_other_models_alone(run: Path) -> None:
    card = (run / "README.md").read_text().replace("## Use it", '## Use it\n\nDense: `from_pretrained("org/dense")`\n')
    renamed = rename_in_card(card, "you/other")
    assert renamed.count('from_pretrained("you/other"') == 2 and 'from_pretrained("digits-gfpruned"' not in renamed
    assert 'from_pretrained("org/dense")' in renamed
    assert rename_in_card("# no example\n", "you/other") == "# no example\n"


# --- what must not leave the machine -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "pruning_report.json"])
@pytest.mark.parametrize("secret", ["hf_" + "aB3" * 11, "hf_oauth_" + "aB3" * 11, WRITE], ids=["user", "oauth", "in use"])
def test_tokens_are_not_pushed(server: HubServer, run: Path, name: str, secret: str) -> None:
    if name.endswith(".md"):
        (run / name).write_text((run / name).read_text() + secret)
    else:
        report = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps({**report, "note": secret}))
        update_card(run, "x")
    with pytest.raises(ValueError, match=f"{name} contains an access token"):
        push_folder(run, REPO)
    assert server.requests == []


@pytest.mark.parametrize("path", [str(Path.cwd() / "cache"), "/data/somewhere", str(Path.home())])
def test_paths_of_this_machine_are_not_pushed(server: HubServer, run: Path, path: str) -> None:
    report = json.loads((run / "pruning_report.json").read_text())
    report["arguments"]["cache_dir"] = path
    (run / "pruning_report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="pruning_report.json contains the path"):
        push_folder(run, REPO)
    assert server.requests == []


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("Trained on /data/private/faces.", "/data/private/faces"),
        ("See `/workspace/runs/x` (and others).", "/workspace/runs/x"),
        ("[mine](/home/alice/faces)", "/home/alice/faces"),
        ("file:///Users/alice/faces", "/Users/alice/faces"),
        ("[code](/me/model/blob/main/a.py), https://example.org/data/b and/or/both, ~/runs/x, ../data/b, /usr/bin/env", None),
        ('<img src="/me/model/resolve/main/x.png"> `from_pretrained("/path/to/model")` ${OUT}/data/x $a/data/b$', None),
    ],
)
def test_paths_in_an_edited_card_are_not_pushed(server: HubServer, run: Path, text: str, refused: str | None) -> None:
    (run / "README.md").write_text((run / "README.md").read_text() + f"\n{text}\n")
    if refused is None:
        push_folder(run, REPO)
        return
    with pytest.raises(ValueError, match=f"README.md contains the path {refused} of this machine"):
        push_folder(run, REPO)
    assert server.requests == []


# --- folders without a run ---------------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


BROKEN = {
    "no folder": (lambda run: run.rename(run.parent / "elsewhere"), "is not a folder"),
    "no results": (lambda run: (run / "results.json").unlink(), "has no results.json"),
    "no model index": (lambda run: (run / "model_index.json").unlink(), "has no model_index.json"),
    "no model file": (lambda run: (run / "unet/diffusers_gfprune.py").unlink(), "has no unet/diffusers_gfprune.py"),
    "no weights": (lambda run: (run / WEIGHTS).unlink(), "has no weights"),
    "a dense model": (
        lambda run: (run / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DModel"]}'),
        "does not contain a pruned model",
    ),
    "truncated weights": (lambda run: damage(run / WEIGHTS), "is damaged"),
    "a report that is no JSON": (lambda run: (run / "pruning_report.json").write_text("{"), "is not valid JSON"),
    "a report without its fields": (lambda run: (run / "pruning_report.json").write_text("{}"), "lacks"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_no_finished_run_is_refused(server: HubServer, run: Path, how: str) -> None:
    break_it, message = BROKEN[how]
    break_it(run)
    with pytest.raises(ValueError, match=message) as error:
        push_folder(run, REPO)
    assert "\n" not in str(error.value)
    assert server.requests == []


@pytest.mark.parametrize("repo_id", ["two words", "a/b/c", "a--b", "-a"])
def test_names_that_are_no_repository(server: HubServer, run: Path, repo_id: str) -> None:
    with pytest.raises(ValueError, match=f"repo_id={repo_id} is not a valid repository name"):
        push_folder(run, repo_id)
    assert server.requests == []


# --- when it fails -----------------------------------------------------------------------------------------------------

LFS, COMMIT = "/storage/models/.*", "/api/models/.*/commit/.*"
FAULTS = {
    "server error while creating": (lambda s: s.fail("POST", "/api/repos/create"), "returned status 500"),
    "server error while uploading": (lambda s: s.fail("PUT", LFS, times=99), "returned status 500"),
    "server error in the commit": (lambda s: s.fail("POST", COMMIT), "returned status 500"),
    "connection lost while uploading": (lambda s: s.drop("PUT", LFS, after_bytes=1000, times=99), "connection failed"),
    "connection lost in the commit": (lambda s: s.drop("POST", COMMIT, after_bytes=100), "connection failed"),
    "answer to the commit lost": (lambda s: s.drop("POST", COMMIT, after_bytes=None), "connection failed"),
    "disk of the server full": (lambda s: s.disk_full(), "no storage left"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_failed_push_leaves_the_run_whole_and_says_how_to_go_on(server: HubServer, run: Path, fault: str) -> None:
    update_card(run, REPO)  # which a push writes first of all
    before = digest(run)
    inflict, message = FAULTS[fault]
    inflict(server)
    with pytest.raises(PushError, match=message) as error:
        push_folder(run, REPO)
    assert digest(run) == before
    assert "\n" not in str(error.value)
    assert f"try again: python -m diffusers_gfprune.hub push {run} {REPO}" in str(error.value)

    server.heal()
    done = [upload.path for upload in server.uploads() if upload.status == 200]
    push_folder(run, REPO)
    assert on_hub(server) == contents(run)
    paths = [upload.path for upload in server.uploads() if upload.status == 200]
    assert len(paths) == len(set(paths)) and paths[: len(done)] == done  # nothing that had arrived was sent again


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("hf_unknown", REPO, "token is missing, wrong or expired"),
        (OTHER, REPO, "does not have write access"),
        (READ, REPO, "does not have write access"),
        (READ, "alice/existing", "does not have write access"),
    ],
)
def test_tokens_that_do_not_do(server: HubServer, run: Path, token: str, repo: str, message: str) -> None:
    server.add_repo("alice/existing", {})
    with pytest.raises(PushError, match=message) as error:
        push_folder(run, repo, token=token)
    assert token not in str(error.value)
    assert server.uploads() == []


def test_token_that_no_header_takes_is_not_shown(server: HubServer, run: Path) -> None:
    with pytest.raises(PushError) as error:
        push_folder(run, REPO, token="hf_secret\nline")
    assert "secret" not in str(error.value)


def test_no_such_branch(server: HubServer, run: Path) -> None:
    with pytest.raises(PushError, match="no such branch.*--revision v9"):
        push_folder(run, REPO, revision="v9")


def test_without_a_token(server: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(PushError, match="token"):
        push_folder(run, REPO)


# --- the command line --------------------------------------------------------------------------------------------------


def command(server: HubServer, cache: Path, *words: object, token: str | None = WRITE) -> subprocess.CompletedProcess:
    environment = {**os.environ, **server.environment(cache, token), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "diffusers_gfprune.hub", *map(str, words)]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_command_line(server: HubServer, run: Path, tmp_path: Path) -> None:
    done = command(server, tmp_path / "cache", "push", run, REPO, "--private", "--token", WRITE, token=None)
    assert done.returncode == 0, done.stderr
    assert f"pushed: {server.endpoint}/{REPO}/commit/" in done.stdout
    assert on_hub(server) == contents(run) and server.repositories[("models", REPO)].private
    assert WRITE not in done.stdout + done.stderr
    again = run_script("diffusers_gfprune.hub", "push", run, "bob/digits")
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1].startswith("python -m diffusers_gfprune.hub: error: push to bob/digits failed")


def test_dry_run_lists_and_asks_nobody(server: HubServer, run: Path, capsys: pytest.CaptureFixture) -> None:
    (run / "optimizer.bin").write_bytes(b"stays")
    before = digest(run)
    main(["push", str(run), REPO, "--dry_run"])
    printed = capsys.readouterr().out
    assert [line.split()[-1] for line in printed.splitlines()[1:-1]] == sorted(PUSHED)
    assert printed.splitlines()[-1] == "would leave out: optimizer.bin"
    assert server.requests == [] and digest(run) == before


def test_dry_run_checks_an_edited_card(server: HubServer, run: Path) -> None:
    update_card(run, REPO)
    (run / "README.md").write_text((run / "README.md").read_text().replace("pipeline_tag: ", "pipeline_tag: my-"))
    with pytest.raises(SystemExit) as error:
        main(["push", str(run), REPO, "--dry_run"])
    assert "README.md was edited: pipeline_tag='my-unconditional-image-generation' of the card must be" in error.value.code


def test_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        main(["push", str(tmp_path / "nothing"), REPO])
    assert re.fullmatch(r"python -m diffusers_gfprune.hub: error: folder=.*nothing is not a folder", error.value.code)
