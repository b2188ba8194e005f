"""prune_ddpm.py pushes its result to a test Hub with the real client."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.hub import contents
from helpers.hub_server import READ, WRITE, HubServer
from helpers.scripts import RUN_FILES, SHORT, run_script

DIGITS = ("--pretrained_model_name_or_path", "training/digits/teacher", "--dataset_name", "training/digits", "--use_ema")


# Two samples, and no figures that take time
UNMEASURED = ("--speed_batch_sizes", 0, "--eval_images", 2, "--eval_features", "none", "--ddim_num_inference_steps", 1)
ONE_STEP = ("--preset", "one-shot", "--criterion", "random", "--max_train_steps", 1, "--validation_images", 4, *UNMEASURED)


def run_short(server: HubServer, folder: Path, *arguments: object, token: str | None) -> subprocess.CompletedProcess[str]:
    """The script in this process, with a client that sends to the test Hub."""
    with pytest.MonkeyPatch.context() as patch:
        server.use(patch, folder / "home", token)
        return run_script("training/prune_ddpm.py", *SHORT, *DIGITS, "--output_dir", folder / "run", *arguments)


@pytest.fixture
def run_quickly(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A run that takes as little as it can."""

    def run(server: HubServer, *arguments: object, token: str | None) -> subprocess.CompletedProcess[str]:
        return run_short(server, tmp_path, *ONE_STEP, *arguments, token=token)

    return run


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, Path, subprocess.CompletedProcess]]:
    """A run that pushes every saved model; the first of these pushes fails."""
    folder = tmp_path_factory.mktemp("pushed")
    with HubServer() as server:
        server.fail("POST", "/api/models/.*/commit/.*")
        options = ("--push_to_hub", "--hub_model_id", "alice/digits", "--hub_private_repo", "--hub_token", WRITE)
        options += ("--push_space", "alice/demo")
        options += ("--save_model_steps", 2, "--hub_strategy", "every_save", "--max_train_steps", 10, *UNMEASURED)
        run = run_short(server, folder, *options, token=None)
        yield server, folder / "run", run


def test_run_is_pushed_whole(pushed) -> None:
    server, folder, run = pushed
    assert run.returncode == 0, run.stderr
    files = {name: data for name, data in server.files("alice/digits").items() if name != ".gitattributes"}
    assert files == contents(folder) and set(files) == RUN_FILES
    assert server.repositories[("models", "alice/digits")].private
    assert f"pushed: {server.endpoint}/alice/digits/commit/" in run.stdout


def test_space_is_pushed_at_the_end(pushed) -> None:
    server, _, run = pushed
    app = server.files("alice/demo", repo_type="space")["app.py"].decode()
    assert "load_models('alice/digits')" in app and server.repositories[("spaces", "alice/demo")].private
    assert run.stdout.splitlines()[-1] == f"pushed: {server.endpoint}/spaces/alice/demo"
    created = [request.path for request in server.requests].index("/api/spaces/alice/demo/auth-check/write")
    commits = [number for number, request in enumerate(server.requests) if "/commit/" in request.path]
    assert created < min(commits)  # before training


def test_saved_models_are_pushed_on_the_way_and_a_failure_does_not_stop_the_run(pushed) -> None:
    server, _, run = pushed
    assert "push to alice/digits failed: the server returned status 500; training continues" in run.stderr
    commits = [
        request.status
        for request in server.requests
        if request.method == "POST" and "/models/alice/digits/commit/" in request.path
    ]
    # after steps 4, 6 and 8, and at the end: after step 2, masks are about to freeze, and the model is still the masked one
    assert commits == [500, 200, 200, 200]


def test_no_token_and_no_path_anywhere(pushed) -> None:
    server, folder, run = pushed
    assert WRITE not in run.stdout + run.stderr
    for name, data in server.files("alice/digits").items():
        assert WRITE.encode() not in data and str(folder.parent).encode() not in data, name


def test_card_on_the_hub_says_where_it_came_from(pushed) -> None:
    card = pushed[0].files("alice/digits")["README.md"].decode()
    assert 'from_pretrained("alice/digits")' in card and "license: apache-2.0" in card
    assert "accelerate launch training/prune_ddpm.py" in card and "--hub_token" not in card


@pytest.mark.slow
def test_push_that_fails_at_the_end_leaves_the_run_whole(run_quickly, tmp_path: Path) -> None:
    with HubServer() as server:
        server.fail("POST", "/api/models/.*/commit/.*")
        run = run_quickly(server, "--push_to_hub", "--hub_model_id", "alice/digits", token=WRITE)
        assert run.returncode == 1
        last = run.stderr.splitlines()[-1]
        assert last.startswith("prune_ddpm.py: error: push to alice/digits failed: the server returned status 500.")
        assert set(contents(tmp_path / "run")) == RUN_FILES
        again = shlex.split(last.partition("try again: ")[2])
        assert again == ["python", "-m", "diffusers_gfprune.hub", "push", str(tmp_path / "run"), "alice/digits"]


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (
            ["--push_to_hub", "--hub_model_id", "alice/read-only"],
            READ,
            "push_to_hub to alice/read-only would fail: .*write access",
        ),
        (["--push_to_hub", "--hub_model_id", "bob/x"], WRITE, "push_to_hub to bob/x would fail: .*write access"),
        (["--push_to_hub"], None, "push_to_hub to run would fail: .*token"),
        (["--push_to_hub", "--push_space", "bob/x"], WRITE, "push_space to bob/x would fail: .*write access"),
        (["--push_space", "alice/x"], WRITE, "push_space=alice/x needs --push_to_hub"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_training(run_quickly, tmp_path: Path, arguments, token, message) -> None:
    with HubServer() as server:
        server.add_repo("alice/read-only", {})
        run = run_quickly(server, *arguments, token=token)
    assert run.returncode == 1
    assert re.search(f"^prune_ddpm.py: error: {message}", run.stderr.splitlines()[-1])
    assert "soft pruning" not in run.stderr and not (tmp_path / "run").exists()
