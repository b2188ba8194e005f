"""helpers/hub_server.py with the real client: uploads can be downloaded, and errors are the Hub's."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, file_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http
from safetensors.torch import save

from helpers.hub_server import OTHER, READ, WRITE, HubServer

REPO = "alice/model"
CARD = b"---\nlicense: mit\nlibrary_name: diffusers\ntags:\n- pruned\n---\n# A model\n"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client would have waited; waits are skipped."""
    seconds: list[float] = []
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=seconds.append))
    return seconds


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as hub:
        hub.use(monkeypatch, tmp_path / "home", WRITE)
        yield hub


@pytest.fixture
def api(server: HubServer) -> HfApi:
    return HfApi()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline as it is saved: a card, a configuration and weights in a subfolder."""
    path = tmp_path / "pipeline"
    (path / "unet").mkdir(parents=True)
    (path / "README.md").write_bytes(CARD)
    (path / "unet/config.json").write_bytes(b'{"sample_size": 8}')
    (path / "unet/model.safetensors").write_bytes(save({"weight": torch.arange(6000.0)}))
    return path


def contents(folder: str | Path) -> dict[str, bytes]:
    """The files of a folder but .gitattributes, by their paths."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if name != ".gitattributes"}


def status_of(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def test_what_is_uploaded_comes_down_again(server: HubServer, api: HfApi, folder: Path) -> None:
    url = api.create_repo("model", private=False)
    assert (url.repo_id, str(url)) == (REPO, f"{server.endpoint}/{REPO}")
    commit = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="All of it")
    assert contents(api.snapshot_download(REPO)) == contents(folder)
    assert server.files(REPO).keys() == {".gitattributes", *contents(folder)}
    assert [upload.received for upload in server.uploads()] == [(folder / "unet/model.safetensors").stat().st_size]
    assert [entry.title for entry in api.list_repo_commits(REPO)] == ["All of it", "initial commit"]
    assert commit.oid == api.model_info(REPO).sha
    # Commits carry small files only, downloads of large ones come from the storage without the token.
    assert max(request.received for request in server.requests if "/commit/" in request.path) < 1000
    assert [r.status for r in server.requests if r.method == "GET" and r.path.startswith("/storage/")] == [200]


def test_nothing_is_uploaded_twice(server: HubServer, api: HfApi, folder: Path) -> None:
    api.create_repo(REPO)
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    server.requests.clear()
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == first.oid
    (folder / "unet/config.json").write_bytes(b"{}")
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid != first.oid
    assert server.uploads() == []
    assert [request.status for request in server.requests if "/commit/" in request.path] == [200]
    assert server.files(REPO)["unet/config.json"] == b"{}"
    assert server.files(REPO, first.oid)["unet/config.json"] == b'{"sample_size": 8}'


def test_large_files_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path) -> None:
    with HubServer(part_size=10_000) as server:
        server.use(monkeypatch, tmp_path, WRITE)
        huggingface_hub.create_repo(REPO)
        huggingface_hub.upload_folder(repo_id=REPO, folder_path=folder)
        assert [upload.received for upload in server.uploads()] == [10_000, 10_000, 4_080]
        assert server.files(REPO)["unet/model.safetensors"] == (folder / "unet/model.safetensors").read_bytes()


def test_another_process(server: HubServer, tmp_path: Path, folder: Path) -> None:
    program = (
        "import sys, huggingface_hub as hub; hub.create_repo('alice/model', private=True);"
        "hub.upload_folder(repo_id='alice/model', folder_path=sys.argv[1]); print(hub.snapshot_download('alice/model'))"
    )
    environment = os.environ | server.environment(tmp_path / "other", WRITE)
    run = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    snapshot = Path(done.stdout.strip())
    assert contents(snapshot) == contents(folder) and snapshot.is_relative_to(tmp_path / "other")
    assert not (tmp_path / "home").exists()


def test_private_repositories(server: HubServer, api: HfApi, tmp_path: Path) -> None:
    api.create_repo(REPO, private=True)
    api.upload_file(repo_id=REPO, path_in_repo="a.bin", path_or_fileobj=b"large")
    assert api.model_info(REPO).private and api.model_info(REPO, token=READ).private
    assert Path(api.hf_hub_download(REPO, "a.bin")).read_bytes() == b"large"
    for token, status in ((False, 401), (OTHER, 404)):
        for ask in (api.model_info, api.list_repo_files, partial(api.snapshot_download, cache_dir=tmp_path / "empty")):
            with pytest.raises(RepositoryNotFoundError) as error:
                ask(REPO, token=token)
            assert status_of(error) == status
        assert not api.repo_exists(REPO, token=token) and not api.file_exists(REPO, "a.bin", token=token)
    api.update_repo_settings(REPO, private=False)
    assert api.repo_exists(REPO, token=False)
    # Objects are for those who were sent there.
    path = next(request.path for request in server.requests if request.method == "GET" and "/storage/" in request.path)
    assert httpx2.get(server.storage_endpoint + path).status_code == 403


def test_who_may_write(server: HubServer, api: HfApi) -> None:
    server.add_repo(REPO, {"config.json": b"{}"})
    add = [CommitOperationAdd("config.json", b"[]")]
    for token, status in ((False, 401), (OTHER, 403), (READ, 403)):
        with pytest.raises(HfHubHTTPError) as error:
            api.create_commit(REPO, add, commit_message="x", token=token)
        assert status_of(error) == status
        with pytest.raises(HfHubHTTPError) as error:
            api.create_repo("alice/other", token=token)
        assert status_of(error) == status
        with pytest.raises(HfHubHTTPError) as error:
            api.delete_repo(REPO, token=token)
        assert status_of(error) == status
    assert server.files(REPO)["config.json"] == b"{}"
    assert api.create_repo(REPO, token=READ, exist_ok=True).repo_id == REPO
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(REPO)


def test_tokens(server: HubServer, api: HfApi) -> None:
    server.add_repo(REPO, {"config.json": b"{}"})
    assert (api.whoami()["name"], api.whoami(token=READ)["auth"]["accessToken"]["role"]) == ("alice", "read")
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as error:
        api.whoami(token="hf_wrong")
    assert status_of(error) == 401
    for ask in (api.model_info, api.snapshot_download):
        with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as error:
            ask(REPO, token="hf_wrong")
        assert type(error.value) is HfHubHTTPError


def test_creating_what_exists(server: HubServer, api: HfApi) -> None:
    server.add_repo(REPO, {}, private=True)
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert api.create_repo("model", private=False, exist_ok=True).repo_id == REPO
    assert api.model_info(REPO).private
    with pytest.raises(HfHubHTTPError, match="already created") as error:
        api.create_repo(REPO)
    assert status_of(error) == 409


def test_revisions(server: HubServer, api: HfApi) -> None:
    first = server.add_repo(REPO, {"a.json": b"1", "a.bin": b"1"})
    api.create_tag(REPO, tag="v1.0")
    api.create_branch(REPO, branch="exp/one")
    second = server.commit(REPO, {"a.json": b"2", "a.bin": b"2"})
    api.upload_file(repo_id=REPO, path_in_repo="a.json", path_or_fileobj=b"3", revision="exp/one")
    for revision, content in ((first, b"1"), ("v1.0", b"1"), (second, b"2"), (None, b"2"), ("exp/one", b"3")):
        assert Path(api.hf_hub_download(REPO, "a.json", revision=revision)).read_bytes() == content
    assert contents(api.snapshot_download(REPO, revision=first)) == {"a.json": b"1", "a.bin": b"1"}
    assert api.model_info(REPO, revision="v1.0").sha == first != api.model_info(REPO).sha == second
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1.0": first}
    assert {ref.ref for ref in refs.branches} == {"refs/heads/main", "refs/heads/exp/one"}
    for create in (api.create_tag, api.create_branch):
        name = {"tag": "v1.0"} if create == api.create_tag else {"branch": "main"}
        create(REPO, **name, exist_ok=True)
        with pytest.raises(HfHubHTTPError, match="already exists") as error:
            create(REPO, **name)
        assert status_of(error) == 409
    api.delete_tag(REPO, tag="v1.0")
    api.delete_branch(REPO, branch="exp/one")
    assert not api.revision_exists(REPO, "v1.0") and not api.revision_exists(REPO, "exp/one")


def test_what_is_missing(server: HubServer, api: HfApi) -> None:
    server.add_repo(REPO, {"a.json": b"1"})
    assert api.file_exists(REPO, "a.json") and not api.file_exists(REPO, "b.json")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "b.json")
    for ask in (api.model_info, api.snapshot_download, api.list_repo_files):
        with pytest.raises(RevisionNotFoundError):
            ask(REPO, revision="v2")
        with pytest.raises(RepositoryNotFoundError):
            ask("alice/none")


def test_listings(server: HubServer, api: HfApi) -> None:
    first = server.add_repo(REPO, {"README.md": CARD, "unet/config.json": b"{}", "unet/model.safetensors": b"1" * 100})
    second = server.commit(REPO, {"unet/config.json": b"[]"})
    assert api.list_repo_files(REPO) == [".gitattributes", "README.md", "unet/config.json", "unet/model.safetensors"]
    assert [entry.path for entry in api.list_repo_tree(REPO)] == [".gitattributes", "README.md", "unet"]
    config, weights = api.list_repo_tree(REPO, "unet", expand=True)
    assert (config.last_commit.oid, weights.last_commit.oid) == (second, first)
    assert (config.lfs, weights.lfs.size, weights.size) == (None, 100, 100)
    assert [entry.path for entry in api.get_paths_info(REPO, ["unet", "README.md", "none"])] == ["unet", "README.md"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "a folder/ü"))
    info = api.model_info(REPO, files_metadata=True)
    assert {sibling.rfilename for sibling in info.siblings if sibling.lfs} == {"unet/model.safetensors"}
    assert info.card_data.license == "mit" and info.library_name == "diffusers"
    assert info.tags == ["diffusers", "safetensors", "pruned", "license:mit", "region:us"]
    assert api.model_info(REPO, expand=["sha"]).siblings is None


def test_cards_are_checked(server: HubServer, api: HfApi) -> None:
    api.create_repo(REPO)
    for metadata, message in (
        ("a: [", "cannot be parsed"),
        ("tags: x", '"tags" must be an array'),
        ("model-index:\n- name: x\n  results:\n  - task: {type: y}", r'"model-index\[0\].results\[0\].dataset" is required'),
    ):
        with pytest.raises(ValueError, match=message):
            api.upload_file(repo_id=REPO, path_in_repo="README.md", path_or_fileobj=f"---\n{metadata}\n---\n".encode())
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        api.upload_file(repo_id=REPO, path_in_repo="README.md", path_or_fileobj=b"# Only text")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        api.upload_file(repo_id=REPO, path_in_repo="README.md", path_or_fileobj=CARD)


def test_commits_are_all_or_nothing(server: HubServer, api: HfApi) -> None:
    first = server.add_repo(REPO, {"a.json": b"1", "old/b.json": b"1", "old/c.bin": b"1"})
    add = CommitOperationAdd("a.json", b"2")
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.create_commit(REPO, [add, CommitOperationDelete("none.json")], commit_message="x")
    assert server.files(REPO)["a.json"] == b"1"
    second = server.commit(REPO, {"d.json": b"1"})
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        api.create_commit(REPO, [add], commit_message="x", parent_commit=first)
    assert status_of(error) == 412
    api.create_commit(REPO, [add, CommitOperationDelete("old/")], commit_message="x", parent_commit=second)
    assert server.files(REPO).keys() == {".gitattributes", "a.json", "d.json"}


def upload(api: HfApi, name: str = "a.bin", content: bytes = b"x" * 2_000_000) -> None:
    api.upload_file(repo_id=REPO, path_in_repo=name, path_or_fileobj=content)


def test_an_upload_that_fails_is_repeated(server: HubServer, api: HfApi, waits: list[float]) -> None:
    server.add_repo(REPO, {})
    server.fail("PUT", "/storage/", 503)
    server.drop("PUT", "/storage/", after_bytes=70_000)
    server.fail("POST", "/preupload/", 429, headers={"Retry-After": "3"})
    upload(api)
    assert [(request.status, request.received) for request in server.uploads()] == [(503, 2000000), (0, 70000), (200, 2000000)]
    assert waits == [4, 1, 2]
    server.fail("PUT", "/storage/", 500, times=6)
    with pytest.raises(RuntimeError, match=r"uploading 'b.bin'") as error:
        upload(api, "b.bin", b"y")
    assert isinstance(error.value.__cause__, HfHubHTTPError)
    assert waits[3:] == [1, 2, 4, 8, 8]
    assert "b.bin" not in server.files(REPO)


def test_a_full_disk(server: HubServer, api: HfApi, waits: list[float]) -> None:
    server.add_repo(REPO, {})
    server.disk_full()
    with pytest.raises(RuntimeError) as error:
        upload(api)
    assert "507" in str(error.value.__cause__)
    with pytest.raises(HfHubHTTPError) as refused:
        upload(api, "a.json", b"{}")
    assert status_of(refused) == 507
    server.heal()
    upload(api)
    assert waits == []


def test_a_commit_is_not_repeated(server: HubServer, api: HfApi, waits: list[float]) -> None:
    server.add_repo(REPO, {})
    server.fail("POST", "/commit/", 500)
    with pytest.raises(HfHubHTTPError):
        upload(api)
    assert "a.bin" not in server.files(REPO)
    server.requests.clear()
    server.drop("POST", "/commit/", after_bytes=None)
    with pytest.raises(httpx2.RemoteProtocolError):
        upload(api)
    # The object was there from the first attempt, and the lost answer was that of a commit that was made.
    assert server.uploads() == []
    assert len(server.files(REPO)["a.bin"]) == 2_000_000
    assert waits == []


def test_an_upload_is_compared_with_its_hash(server: HubServer, api: HfApi) -> None:
    server.add_repo(REPO, {})
    operation = CommitOperationAdd("a.bin", b"right")
    operation.path_or_fileobj = b"wrong"
    with pytest.raises(RuntimeError) as error:
        api.create_commit(REPO, [operation], commit_message="x")
    assert "sha256" in str(error.value.__cause__)


def test_a_download_that_fails(
    server: HubServer, api: HfApi, waits: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    content = os.urandom(5000)
    server.add_repo(REPO, {"a.bin": content, "b.json": b"{}"})
    server.drop("GET", "/storage/", after_bytes=2500)
    assert Path(api.hf_hub_download(REPO, "a.bin")).read_bytes() == content
    # It continues after the pieces that it has written.
    assert [request.status for request in server.requests if request.method == "GET"] == [200, 206]
    assert waits == [1]
    server.fail("HEAD", "b.json", 503)
    assert Path(api.hf_hub_download(REPO, "b.json")).read_bytes() == b"{}"
    assert waits == [1]
    server.fail("HEAD", "b.json", 503)
    api.hf_hub_download(REPO, "b.json")  # from the cache
    assert waits == [1]
    server.fail("HEAD", "b.json", 503, times=7)
    with pytest.raises(LocalEntryNotFoundError):
        api.hf_hub_download(REPO, "b.json", cache_dir=tmp_path / "empty")
    assert waits[1:] == [1, 2, 4, 8, 8]
    server.drop("HEAD", "b.json")
    with pytest.raises(httpx2.RemoteProtocolError):
        api.hf_hub_download(REPO, "b.json")
    server.fail("GET", "/resolve/.*/b.json", 500)
    with pytest.raises(HfHubHTTPError):
        api.hf_hub_download(REPO, "b.json", cache_dir=tmp_path / "empty")


def test_ranges(server: HubServer) -> None:
    content = bytes(range(100))
    server.add_repo(REPO, {"a.bin": content, "a.txt": b"0123456789"})
    for name, data in (("a.bin", content), ("a.txt", b"0123456789")):
        url = f"{server.endpoint}/{REPO}/resolve/main/{name}"
        for wanted, piece in (("2-4", data[2:5]), ("7-", data[7:]), ("-3", data[-3:]), ("5-1000", data[5:])):
            answer = httpx2.get(url, headers={"Range": f"bytes={wanted}"}, follow_redirects=True)
            assert (answer.status_code, answer.content) == (206, piece)
            assert answer.headers["Content-Range"].endswith(f"/{len(data)}")
        assert httpx2.get(url, headers={"Range": "bytes=1000-"}, follow_redirects=True).status_code == 416
    head = httpx2.head(f"{server.endpoint}/{REPO}/resolve/main/a.bin")
    assert head.status_code == 302 and head.headers["X-Linked-Size"] == "100"
    assert head.headers["Location"].startswith(server.storage_endpoint)


def test_data_sets_have_their_own_names(server: HubServer, api: HfApi) -> None:
    api.create_repo(REPO, repo_type="dataset")
    api.upload_file(repo_id=REPO, repo_type="dataset", path_in_repo="a.parquet", path_or_fileobj=b"PAR1")
    assert Path(api.hf_hub_download(REPO, "a.parquet", repo_type="dataset")).read_bytes() == b"PAR1"
    assert not api.repo_exists(REPO)
    assert server.files(REPO, repo_type="dataset")["a.parquet"] == b"PAR1"


def test_spaces_need_settings(server: HubServer, api: HfApi) -> None:
    api.create_repo("alice/space", repo_type="space", space_sdk="gradio")
    for settings, message in (
        ("title: x", r'"sdk" must be one of \[gradio, '),
        ("sdk: gradio\ncolorFrom: grey", r'"colorFrom" must be one of \[red, '),
        (f"sdk: gradio\nshort_description: {'x' * 61}", '"short_description" length must be less than or equal to 60'),
        ("sdk: gradio\nsdk_version: 6.3", '"sdk_version" must be a string'),
    ):
        card = f"---\n{settings}\n---\n".encode()
        with pytest.raises(ValueError, match=message):
            api.upload_file(repo_id="alice/space", repo_type="space", path_in_repo="README.md", path_or_fileobj=card)
    card = b"---\nsdk: gradio\ncolorFrom: gray\n---\n"
    api.upload_file(repo_id="alice/space", repo_type="space", path_in_repo="README.md", path_or_fileobj=card)
    assert api.space_info("alice/space").sdk == "gradio"
