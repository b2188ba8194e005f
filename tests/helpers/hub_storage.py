"""The storage of helpers/hub_server.py: repositories with commits, branches, tags and large files, all in memory."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import yaml

# Suffixes that the .gitattributes of a new repository gives to Git LFS (those that a model repository may hold).
LFS_SUFFIXES = (
    *(".7z", ".arrow", ".bin", ".bz2", ".ckpt", ".ftz", ".gz", ".h5", ".joblib", ".mlmodel", ".model", ".msgpack"),
    *(".npy", ".npz", ".onnx", ".ot", ".parquet", ".pb", ".pickle", ".pkl", ".pt", ".pth", ".rar", ".safetensors"),
    *(".tar", ".tflite", ".tgz", ".wasm", ".xz", ".zip", ".zst"),
)
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
# Larger files are large files to the Hub whatever they are called.
REGULAR_SIZE_LIMIT = 10_000_000
# The metadata of a card are the YAML between the first two lines of dashes.
CARD_METADATA = re.compile(r"\A\s*---\r?\n(.*?\r?\n)??---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
# Settings of a Space
SDKS = ("gradio", "docker", "static", "streamlit")
COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")


class HubError(Exception):
    """An answer that is an error: its status, its message and the value of X-Error-Code, if it has one."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers: dict[str, str] = {}


def revision_not_found(revision: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


@dataclass(frozen=True)
class Blob:
    """The content of one file, and whether it is stored as a large file."""

    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def pointer(self) -> bytes:
        """What Git has in place of a large file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @cached_property
    def oid(self) -> str:
        """The id of the blob in Git: of the pointer where the file is large."""
        blob = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        """What the client compares and names its cached file after."""
        return self.sha256 if self.lfs else self.oid


Tree = dict[str, Blob]


@dataclass(frozen=True)
class Commit:
    """One commit and the whole tree at it."""

    id: str
    parent: Commit | None
    tree: Tree
    title: str
    message: str
    author: str
    date: str


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub stores a file as a large file: by its name, by its size, or because it is binary."""
    return path.endswith(LFS_SUFFIXES) or size > REGULAR_SIZE_LIMIT or b"\0" in sample


def card_metadata(card: str, kind: str = "models") -> dict[str, Any]:
    """The metadata of a card in a repository of this kind.

    Raises ValueError with what the Hub would object to, one objection a line.
    """
    found = CARD_METADATA.match(card)
    if not found:
        return {}
    try:
        metadata = yaml.safe_load(found[1] or "")
    except yaml.YAMLError as error:
        raise ValueError(f"YAML metadata cannot be parsed: {error}".replace("\n", " ")) from error
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict):
        raise ValueError("YAML metadata must be an object")
    problems = []
    for key, types, wanted in (
        ("tags", list, "an array"),
        ("license", (str, list), "a string or an array"),
        ("datasets", (str, list), "a string or an array"),
        ("library_name", str, "a string"),
        ("pipeline_tag", str, "a string"),
        ("model-index", list, "an array"),
    ):
        if metadata.get(key) is not None and not isinstance(metadata[key], types):
            problems.append(f'"{key}" must be {wanted}')
    problems += _space_problems(metadata) if kind == "spaces" else []
    if not problems:
        problems += [
            f'"tags[{i}]" must be a string' for i, tag in enumerate(metadata.get("tags") or []) if type(tag) is not str
        ]
        problems += _model_index_problems(metadata.get("model-index") or [])
    if problems:
        raise ValueError("\n".join(problems))
    return metadata


def _space_problems(metadata: dict[str, Any]) -> list[str]:
    """What the card of a Space needs and has not: its settings."""
    problems = []
    for key, allowed in (("sdk", SDKS), ("colorFrom", COLORS), ("colorTo", COLORS)):
        if (key == "sdk" or key in metadata) and metadata.get(key) not in allowed:
            problems.append(f'"{key}" must be one of [{", ".join(allowed)}]')
    if len(metadata.get("short_description") or "") > 60:
        problems.append('"short_description" length must be less than or equal to 60 characters long')
    for key in ("sdk_version", "python_version", "app_file", "title", "emoji"):
        if metadata.get(key) is not None and not isinstance(metadata[key], str):
            problems.append(f'"{key}" must be a string')
    if not isinstance(metadata.get("models", []), list):
        problems.append('"models" must be an array')
    return problems


def _model_index_problems(model_index: list[Any]) -> list[str]:
    """The entries that a `model-index` needs and has not."""
    problems = []

    def need(parent: Any, key: str, where: str) -> Any:
        value = parent.get(key) if isinstance(parent, dict) else None
        if value is None:
            problems.append(f'"{where}.{key}" is required')
        return value

    def need_list(parent: Any, key: str, where: str) -> list[tuple[str, Any]]:
        value = need(parent, key, where)
        if value is not None and not isinstance(value, list):
            problems.append(f'"{where}.{key}" must be an array')
        return [(f"{where}.{key}[{i}]", item) for i, item in enumerate(value)] if isinstance(value, list) else []

    for i, model in enumerate(model_index):
        need(model, "name", f"model-index[{i}]")
        for where, result in need_list(model, "results", f"model-index[{i}]"):
            need(need(result, "task", where), "type", f"{where}.task")
            dataset = need(result, "dataset", where)
            for key in ("name", "type"):
                need(dataset, key, f"{where}.dataset")
            for metric_where, metric in need_list(result, "metrics", where):
                for key in ("type", "value"):
                    need(metric, key, metric_where)
    return problems


class Repository:
    """A repository: every commit keeps its whole tree; large files are kept from their upload on."""

    def __init__(self, kind: str, name: str, private: bool) -> None:
        self.kind, self.name, self.private = kind, name, private
        self.namespace = name.split("/")[0]
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, Commit] = {}
        self.tags: dict[str, Commit] = {}
        # sha256 -> content, committed or not, and the parts of those under way
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.commit("main", {".gitattributes": Blob(GITATTRIBUTES, lfs=False)}, "initial commit", author="system")

    def commit(self, branch: str, tree: Tree, title: str, message: str = "", author: str = "system") -> Commit:
        """Put a tree on top of a branch."""
        parent = self.branches.get(branch)
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        # The number of commits makes ids differ where everything else is the same.
        facts = [
            parent and parent.id,
            len(self.commits),
            title,
            author,
            sorted((path, blob.oid) for path, blob in tree.items()),
        ]
        new = Commit(hashlib.sha1(repr(facts).encode()).hexdigest(), parent, tree, title, message, author, date)
        self.commits[new.id] = self.branches[branch] = new
        return new

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag or an id (or the first seven digits, or more, of one)."""
        for refs in (self.branches, self.tags, self.commits):
            if revision in refs:
                return refs[revision]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            for commit in self.commits.values():
                if commit.id.startswith(revision):
                    return commit
        raise revision_not_found(revision)

    def history(self, revision: str) -> Iterable[Commit]:
        """The commit of a revision and all before it, latest first."""
        commit: Commit | None = self.resolve(revision)
        while commit:
            yield commit
            commit = commit.parent

    def blob(self, revision: str, path: str) -> tuple[Commit, Blob]:
        """A file at a revision; the error for a missing file has the commit, which the client caches."""
        commit = self.resolve(revision)
        if path not in commit.tree:
            error = HubError(404, "Entry not found", "EntryNotFound")
            error.headers["X-Repo-Commit"] = commit.id
            raise error
        return commit, commit.tree[path]

    def apply(self, branch: str, lines: list[dict[str, Any]], author: str) -> Commit:
        """Commit all operations in the lines of the client's request, or none."""
        if branch not in self.branches:
            raise revision_not_found(branch)
        head = self.branches[branch]
        if not lines or lines[0].get("key") != "header":
            raise HubError(400, "The first line of a commit must be its header")
        header = lines[0]["value"]
        if not head.id.startswith(header.get("parentCommit", head.id)):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(head.tree)
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            path = value["path"]
            if key == "file":
                tree[path] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.objects:
                    raise HubError(400, f"LFS pointer of {path} points to a file that does not exist")
                tree[path] = Blob(self.objects[value["oid"]], lfs=True)
            elif key in ("deletedFile", "deletedFolder"):
                prefix = path.rstrip("/") + "/"
                gone = [name for name in tree if name.startswith(prefix)] if key == "deletedFolder" else [path]
                if not gone or gone[0] not in tree:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                for name in gone:
                    del tree[name]
            else:
                raise HubError(400, f"Unknown operation {key}")
        if "README.md" in tree:
            try:
                card_metadata(tree["README.md"].content.decode(), self.kind)
            except ValueError as error:
                raise HubError(400, f"Invalid metadata in README.md: {error}") from error
        return self.commit(branch, tree, header.get("summary", ""), header.get("description", ""), author)

    def listing(self, commit: Commit, path: str, recursive: bool, expand: bool) -> list[dict[str, Any]]:
        """The files and folders in a folder of a commit."""
        prefix = path + "/" if path else ""
        names: set[str] = set()
        for name in commit.tree:
            if name.startswith(prefix):
                parts = name[len(prefix) :].split("/")
                names.update(prefix + "/".join(parts[:depth]) for depth in range(1, len(parts) + 1 if recursive else 2))
        if path and not names:
            raise HubError(404, f'"{path}" does not exist on this revision', "EntryNotFound")
        return [self.entry(commit, name, expand) for name in sorted(names)]

    def entry(self, commit: Commit, path: str, expand: bool = False) -> dict[str, Any]:
        """What the Hub tells of a file or a folder."""
        inside = self._under(commit, path)
        if path in commit.tree:
            blob = commit.tree[path]
            entry = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
            if blob.lfs:
                entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
        else:
            entry = {"type": "directory", "oid": hashlib.sha1(repr(inside).encode()).hexdigest(), "size": 0, "path": path}
        if expand:
            while commit.parent and self._under(commit.parent, path) == inside:
                commit = commit.parent
            entry["lastCommit"] = {"id": commit.id, "title": commit.title, "date": commit.date}
        return entry

    @staticmethod
    def _under(commit: Commit, path: str) -> list[tuple[str, str]]:
        """Paths and ids of a file, or of all files in a folder."""
        return sorted((name, b.oid) for name, b in commit.tree.items() if name == path or name.startswith(path + "/"))

    def info(self, revision: str, blobs: bool) -> dict[str, Any]:
        """What the Hub tells of the repository at a revision."""
        commit = self.resolve(revision)
        siblings = []
        for path, blob in sorted(commit.tree.items()):
            sibling: dict[str, Any] = {"rfilename": path}
            if blobs:
                sibling.update(size=blob.size, blobId=blob.oid)
                if blob.lfs:
                    sibling["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
            siblings.append(sibling)
        *_, first = self.history(revision)
        info = {
            **{"_id": hashlib.sha1(self.name.encode()).hexdigest()[:24], "id": self.name, "modelId": self.name},
            **{"author": self.namespace, "sha": commit.id, "private": self.private, "gated": False, "disabled": False},
            **{"lastModified": commit.date, "createdAt": first.date, "downloads": 0, "likes": 0, "siblings": siblings},
        }
        card: dict[str, Any] = {}
        if "README.md" in commit.tree:
            try:
                card = card_metadata(commit.tree["README.md"].content.decode(), self.kind)
            except ValueError:
                pass  # only where a test put a broken card there itself
        info |= {key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card}
        if card:
            info["cardData"] = card
        if self.kind == "spaces":
            info["sdk"] = card.get("sdk")
        library, license = card.get("library_name"), card.get("license")
        tags = [library] if library else []
        tags += ["safetensors"] if any(path.endswith(".safetensors") for path in commit.tree) else []
        tags += [tag for tag in card.get("tags") or [] if tag not in tags]
        tags += [f"license:{license}"] if isinstance(license, str) else []
        return info | {"tags": [*tags, "region:us"]}
