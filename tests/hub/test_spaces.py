"""hub/spaces.py: what a Space holds, that its app starts without this package installed, and pushes of runs with one."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from gradio_client import Client
from huggingface_hub import HfApi, SpaceCard, file_download
from huggingface_hub.utils import _http
from packaging.requirements import Requirement
from PIL import Image

from diffusers_gfprune.hub import PushError, push_folder, push_space, write_space
from diffusers_gfprune.hub.__main__ import main
from diffusers_gfprune.hub.spaces import GRADIO_VERSION, LEFT_OUT, requirements
from helpers.hub import contents, digest, make_run
from helpers.hub_server import READ, WRITE, HubServer
from helpers.scripts import ROOT

REPO, SPACE = "alice/digits", "alice/digits-demo"
REPORT = {"base_model": {"name": "org/dense", "hub_id": "org/dense", "revision": None, "license": None}}


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


def in_space(server: HubServer) -> dict[str, bytes]:
    return {name: data for name, data in server.files(SPACE, repo_type="space").items() if name != ".gitattributes"}


# --- its files ---------------------------------------------------------------------------------------------------------


def test_settings_of_a_space(tmp_path: Path) -> None:
    written = write_space(tmp_path, REPO, SPACE, REPORT)
    assert set(written) == set(contents(tmp_path))
    card = SpaceCard.load(tmp_path / "README.md")
    known = {"sdk": "gradio", "sdk_version": GRADIO_VERSION, "app_file": "app.py", "models": [REPO, "org/dense"]}
    assert {name: getattr(card.data, name) for name in known} == known
    assert card.data.title == "digits-demo" and len(card.data.short_description) <= 60
    assert "https://huggingface.co/org/dense" in card.text and "{" not in card.text
    app = (tmp_path / "app.py").read_text()
    compile(app, "app.py", "exec")
    assert f"load_models('{REPO}')" in app
    assert card.data.short_description == "A pruned diffusion model beside the dense one"
    beside = "beside those of the dense model"
    assert f"{beside}, from the same noise. Written" in app and f"{beside} ([org/dense]" in card.text
    write_space(tmp_path / "branch", REPO, SPACE, {"base_model": {"hub_id": None}}, revision="v2")
    assert f"load_models('{REPO}', revision='v2')" in (tmp_path / "branch/app.py").read_text()
    assert SpaceCard.load(tmp_path / "branch/README.md").data.models == [REPO]


def test_a_space_without_the_dense_model_does_not_speak_of_it(tmp_path: Path) -> None:
    """It is a folder of the machine that pruned it, so the page shows the pruned model alone."""
    write_space(tmp_path, REPO, SPACE, {"base_model": {"name": "teacher", "hub_id": None}})
    card, app = SpaceCard.load(tmp_path / "README.md"), (tmp_path / "app.py").read_text()
    assert card.data.short_description == "A pruned diffusion model"
    assert "a pruned diffusion model.\n" in card.text and app.startswith(f'"""Images of {REPO}. Written by')
    assert not [text for text in (card.text, app) if "dense" in text or "noise" in text]


def test_requirements_are_those_of_the_extra() -> None:
    """Without gradio, whose version is a setting of the Space and must be one that the extra allows."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    wanted = [config["options"]["install_requires"], config["options.extras_require"]["demo"]]
    named = [Requirement(line) for text in wanted for line in text.split("\n") if line.strip()]
    (gradio,) = [line for line in named if line.name == "gradio"]
    assert gradio.specifier.contains(GRADIO_VERSION)
    assert requirements() == sorted({f"{line.name}{line.specifier}" for line in named} - {f"gradio{gradio.specifier}"})


def test_no_module_of_a_space_needs_those_left_out(tmp_path: Path) -> None:
    left_out = re.compile(rf"^from \.+({'|'.join(LEFT_OUT)})\b", re.MULTILINE)
    modules = [Path(tmp_path, name) for name in write_space(tmp_path, REPO, SPACE, REPORT) if name.endswith(".py")]
    assert len(modules) > 80
    assert not [path for path in modules if left_out.search(path.read_text())]


@pytest.mark.slow  # imports everything anew
def test_app_of_a_space_draws(server: HubServer, run: Path, tmp_path: Path) -> None:
    """As the Hub starts it: with the source in the Space, even where another version is installed."""
    main(["push", str(run), REPO, "--space", SPACE])
    for name, data in in_space(server).items():
        path = tmp_path / "space" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {"PYTHONPATH": "", "GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **server.environment(tmp_path / "cache"), **variables}
    with open(tmp_path / "log", "w+") as log:
        app = subprocess.Popen(
            [sys.executable, "-v", "app.py"], cwd=tmp_path / "space", env=environment, stdout=log, stderr=log
        )
        try:
            while app.poll() is None and "serving http:" not in (tmp_path / "log").read_text():
                time.sleep(0.5)
            assert app.poll() is None, (tmp_path / "log").read_text()[-2000:]
            picture, figures = Client(f"http://127.0.0.1:{port}", verbose=False).predict(
                1, 2, "DDIMScheduler", 0, api_name="/draw"
            )
        finally:
            app.kill()
            app.wait()
    with Image.open(picture) as image:
        assert image.size == (128, 128)
    assert re.fullmatch(r"\*\*\d+\.\d\d s\*\*", figures)
    assert str(tmp_path / "space/diffusers_gfprune/demo/page.py") in (tmp_path / "log").read_text()


# --- pushing -----------------------------------------------------------------------------------------------------------


def test_space_is_pushed_after_the_run(server: HubServer, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["push", str(run), REPO, "--space", SPACE])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"pushed: {server.endpoint}/{REPO}/commit/")
    assert printed[1:] == [f"pushed: {server.endpoint}/spaces/{SPACE}"]
    report = json.loads((run / "pruning_report.json").read_text())
    write_space(tmp_path / "expected", REPO, SPACE, report)
    assert in_space(server) == contents(tmp_path / "expected")
    info = HfApi().space_info(SPACE)
    assert info.sdk == "gradio" and not info.private


def test_modules_of_an_earlier_push_do_not_stay(server: HubServer, run: Path) -> None:
    push_folder(run, REPO)
    server.add_repo(SPACE, {"diffusers_gfprune/old/module.py": b"", "notes.md": b"mine"}, repo_type="space")
    assert push_space(run, "digits", "digits-demo") == f"{server.endpoint}/spaces/{SPACE}"
    assert "diffusers_gfprune/old/module.py" not in in_space(server) and in_space(server)["notes.md"] == b"mine"
    assert f"load_models('{REPO}')".encode() in in_space(server)["app.py"]  # with its namespace


def test_private_space(server: HubServer, run: Path) -> None:
    main(["push", str(run), REPO, "--space", SPACE, "--private"])
    assert all(server.repositories[key].private for key in (("models", REPO), ("spaces", SPACE)))
    server.add_repo("alice/open", {}, repo_type="space")
    with pytest.raises(ValueError, match="alice/open exists and is public"):
        push_space(run, REPO, "alice/open", private=True)


@pytest.mark.parametrize("fault", ["/api/models/.*/commit/.*", "/api/spaces/.*/commit/.*"])
def test_failed_push_says_how_to_go_on_with_both(server: HubServer, run: Path, fault: str) -> None:
    server.fail("POST", fault)
    with pytest.raises(SystemExit) as error:
        main(["push", str(run), REPO, "--space", SPACE, "--revision", "main"])
    what = REPO if "models" in fault else f"the Space {SPACE}"
    assert f"push to {what} failed: the server returned status 500" in str(error.value)
    command = f"python -m diffusers_gfprune.hub push {run} {REPO} --space {SPACE} --revision main"
    assert str(error.value).endswith(f"try again: {command}")


def test_space_that_may_not_be_written(server: HubServer, run: Path) -> None:
    push_folder(run, REPO)
    with pytest.raises(PushError, match="push to the Space alice/digits-demo failed: .*write access"):
        push_space(run, REPO, SPACE, token=READ)


def test_malformed_name_is_found_before_anything_is_pushed(server: HubServer, run: Path) -> None:
    with pytest.raises(SystemExit) as error:
        main(["push", str(run), REPO, "--space", "a/b/c"])
    assert re.fullmatch(
        r"python -m diffusers_gfprune.hub: error: space=a/b/c is not a valid repository name: .*", error.value.code
    )
    assert server.requests == []


def test_dry_run_names_the_space(server: HubServer, run: Path, capsys: pytest.CaptureFixture) -> None:
    before = digest(run)
    main(["push", str(run), REPO, "--space", SPACE, "--dry_run"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"would push to the Space {SPACE}: \d+ files, [\d.,]+ [KM]iB", last)
    assert server.requests == [] and digest(run) == before
