"""The provenance of a run contains no local paths and no tokens."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download

from diffusers_gfprune.reports.provenance import command_line, describe_base_model, describe_dataset, portable
from helpers.hub_server import WRITE, HubServer

CARD = b"---\nlicense: cc-by-4.0\n---\n# Dense\n"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as hub:
        hub.use(monkeypatch, tmp_path / "home", WRITE)
        yield hub


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("../../home/me/x", "x"),
        ("/home/me/models/x", "x"),
        ("~/x", "x"),
        ("runs/x", "runs/x"),
        ("org/model", "org/model"),
        (3, 3),
        (None, None),
    ],
)
def test_portable(value, wanted):
    assert portable(value) == wanted


def test_command_line():
    words = [
        "--ratio",
        "0.5",
        "--output_dir=/home/me/runs/x",
        "--hub_token",
        "hf_secret",
        "--use_ema",
        "--dataset_name",
        "a b",
    ]
    command = command_line([*words, "--hub_token=hf_secret", "--hub-token", "hf_secret", "--seed", "3"])
    assert "hf_secret" not in command and "/home" not in command
    wanted = ["--ratio", "0.5", "--output_dir=x", "--use_ema", "--dataset_name", "a b", "--seed", "3"]
    assert shlex.split(command.replace("\\\n", " ")) == ["accelerate", "launch", "training/prune_ddpm.py", *wanted]


def test_command_of_several_processes():
    command = command_line(["--seed", "3"], num_processes=4)
    assert command.split(" \\\n")[0] == "accelerate launch --multi_gpu --num_processes 4 training/prune_ddpm.py"


@pytest.mark.parametrize(
    ("link", "found"),
    [
        ("LICENSE.md", "https://huggingface.co/alice/dense/blob/main/LICENSE.md"),
        ("https://example.org/terms", "https://example.org/terms"),
        (None, None),
    ],
)
def test_another_licence_is_known_by_its_name_and_link(server, link, found):
    """As of Stable Diffusion 3. Without them, `other` says nothing."""
    more = f"license_link: {link}\n" if link else ""
    server.add_repo("alice/dense", {"README.md": f"---\nlicense: other\nlicense_name: our-terms\n{more}---\n".encode()})
    described = describe_base_model("alice/dense")
    wanted = {"license": "other", "license_name": "our-terms", "license_link": found} if found else {"license": None}
    assert {name: value for name, value in described.items() if name.startswith("license")} == wanted


def test_local_model_with_and_without_a_card(tmp_path):
    assert describe_base_model(str(tmp_path)) == {"name": tmp_path.name, "hub_id": None, "revision": None, "license": None}
    (tmp_path / "README.md").write_bytes(CARD)
    assert describe_base_model(str(tmp_path))["license"] == "cc-by-4.0"


@pytest.mark.parametrize("header", [b"license: [mit", b"title: @me", b"a: b\n\tc: d", b"- mit", b"title: \xff\xfe"])
def test_a_local_card_that_cannot_be_read_is_a_warning(tmp_path, capsys, header):
    (tmp_path / "README.md").write_bytes(b"---\n" + header + b"\n---\n# Mine\n")
    assert describe_base_model(str(tmp_path))["license"] is None
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {tmp_path}/README.md cannot be read, so its licence is not recorded: ")


COMMIT = "0123456789abcdef" * 2 + "01234567"


def test_folder_in_the_cache_of_the_hub(tmp_path):
    folder = tmp_path / f"models--alice--dense-8px/snapshots/{COMMIT}"
    folder.mkdir(parents=True)
    (folder / "README.md").write_bytes(CARD)
    wanted = {"name": "alice/dense-8px", "hub_id": "alice/dense-8px", "revision": COMMIT, "license": "cc-by-4.0"}
    assert describe_base_model(str(folder)) == wanted


CACHED = f"/root/hub/models--alice--dense/snapshots/{COMMIT}/unet"


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"README.md": "---\nbase_model: org/dense\n---\n"}, ["org/dense"]),
        ({"README.md": "---\nbase_model: [org/a, org/b]\n---\n", "model_index.json": "{}"}, ["org/a", "org/b"]),
        ({"unet/config.json": json.dumps({"_name_or_path": CACHED})}, ["alice/dense"]),
        ({"unet/config.json": json.dumps({"_name_or_path": CACHED.replace("/", "\\")})}, ["alice/dense"]),
        ({"transformer/config.json": json.dumps({"_name_or_path": CACHED})}, ["alice/dense"]),
        ({"model_index.json": json.dumps({"_name_or_path": "alice/known"})}, ["alice/known"]),
        ({"model_index.json": json.dumps({"_name_or_path": "runs/teacher"})}, None),  # a folder, as likely
        ({"model_index.json": json.dumps({"_name_or_path": "/data/models/dense"})}, None),
        ({"model_index.json": "[1]", "unet/config.json": "{"}, None),
        ({"README.md": "---\nbase_model: 3\n---\n", "model_index.json": json.dumps({"_name_or_path": 3})}, None),
    ],
    ids=str,
)
def test_folder_that_says_what_it_was_made_of(server, tmp_path, files, wanted):
    server.add_repo("alice/known", {"model_index.json": b"{}"})
    hf_hub_download("alice/known", "model_index.json")
    for name, text in files.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(text)
    found = describe_base_model(str(tmp_path / "model"))
    assert found.get("derived_from") == wanted and found["hub_id"] is None


def test_model_on_the_hub(server):
    commit = server.add_repo("alice/dense", {"README.md": CARD})
    found = describe_base_model("alice/dense")
    assert found == {"name": "alice/dense", "hub_id": "alice/dense", "revision": str(commit), "license": "cc-by-4.0"}
    server.add_repo("alice/bare", {"config.json": b"{}"})
    assert describe_base_model("alice/bare")["license"] is None


def test_revision_is_that_of_the_files_that_were_loaded(server):
    first = server.add_repo("alice/dense", {"README.md": CARD, "model_index.json": b"{}"})
    hf_hub_download("alice/dense", "model_index.json")
    server.commit("alice/dense", {"model_index.json": b"{ }"})
    assert describe_base_model("alice/dense")["revision"] == str(first)
    server.close()
    assert describe_base_model("alice/dense")["revision"] == str(first)


def test_model_on_a_hub_that_does_not_answer(server):
    server.close()
    found = describe_base_model("alice/dense", "v1")
    assert found == {"name": "alice/dense", "hub_id": "alice/dense", "revision": "v1", "license": None}


def test_licence_that_the_hub_does_not_know_is_unknown(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: my own\n---\n")
    assert describe_base_model(str(tmp_path))["license"] is None
    (tmp_path / "README.md").write_text("---\nlicense: MIT\n---\n")
    assert describe_base_model(str(tmp_path))["license"] == "mit"


def test_dataset(tmp_path):
    assert describe_dataset("org/images", None) == {"name": "org/images", "hub_id": "org/images"}
    assert describe_dataset(str(tmp_path), None) == {"name": tmp_path.name, "hub_id": None}
    assert describe_dataset("hf://datasets/org/images/x.parquet", None)["hub_id"] is None
    assert describe_dataset(None, "/data/faces") == {"name": "faces", "hub_id": None}
