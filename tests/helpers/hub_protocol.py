"""The protocol of helpers/hub_server.py: the Hub's responses to the requests of the `huggingface_hub` client."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

from helpers.hub_storage import SDKS, Commit, HubError, Repository, card_metadata, is_large


@dataclass
class Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def json_answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    body = json.dumps(value, default=str).encode()
    return Answer(status, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})


@dataclass
class Call:
    """A request on its way through the server. `user` and `role` are None without a token."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    user: str | None = None
    role: str | None = None

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")


def _is_private(wanted: dict[str, Any]) -> bool:
    """Visibility in a request (version 1 of the client uses another key)."""
    return wanted.get("visibility") == "private" or wanted.get("private") is True


INVALID_TOKEN = "Invalid credentials in Authorization header"
NO_TOKEN = "Invalid username or password."
REPO = r"(?P<repo>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>models|datasets|spaces)/{REPO}"
SITE = rf"/(?:(?P<kind>datasets|spaces)/)?{REPO}"
REVISION, OBJECT = r"(?P<revision>[^/]+)", r"(?P<oid>[0-9a-f]{64})"
# Where the client takes a 401 for a missing repository (it looks for these paths after https:// only).
ABOUT_A_REPOSITORY = re.compile("/api/(models|datasets|spaces)/.+|/.+/resolve/.+")
_routes: list[tuple[str, re.Pattern[str], bool, Callable[..., Answer]]] = []


def _route(methods: str, path: str, write: bool = False) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Answer requests of these methods and paths; the groups of the path become arguments, `write` asks for the right."""

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        _routes.append((methods, re.compile(path), write, function))
        return function

    return register


class Hub:
    """All that the Hub knows, and its answers.

    Args:
        tokens: the user and the role ("write" or "read") of every valid token.
        part_size: large files above this size are asked for in parts of it (multipart); never, without.
    """

    endpoint: str
    storage_endpoint: str

    def __init__(self, tokens: Mapping[str, tuple[str, str]], part_size: int | None) -> None:
        self.tokens = dict(tokens)
        self.part_size = part_size
        self.repositories: dict[tuple[str, str], Repository] = {}
        self._lock = threading.RLock()
        self._key = secrets.token_bytes(16)

    # From a request to its answer

    def answer(self, call: Call, at_storage: bool) -> Answer:
        """The answer to a request at the Hub or at its storage; never raises."""
        try:
            with self._lock:
                return self._dispatch(call, at_storage)
        except HubError as error:
            message = error.message.replace("\n", " ").encode("ascii", "backslashreplace").decode()
            headers = {"X-Error-Message": message, **error.headers}
            if error.code:
                headers["X-Error-Code"] = error.code
            elif error.status == 401 and error.message != INVALID_TOKEN and ABOUT_A_REPOSITORY.fullmatch(call.path):
                headers["X-Error-Code"] = "RepoNotFound"
            return json_answer({"error": error.message}, error.status, headers)
        except Exception:
            # Not 500, which the client would repeat for 23 s.
            return json_answer({"error": f"tests/hub_protocol.py failed: {traceback.format_exc()}"}, 501)

    def _dispatch(self, call: Call, at_storage: bool) -> Answer:
        if call.path.startswith("/storage/") != at_storage:
            raise HubError(404, "Not found at this origin")
        if at_storage and "Authorization" in call.headers:
            raise HubError(400, "Only one auth mechanism allowed: the signature of the URL")
        self._authenticate(call)
        for methods, pattern, write, function in _routes:
            found = pattern.fullmatch(call.path)
            if found and call.method in methods.split():
                arguments: dict[str, Any] = {key: unquote(text) for key, text in found.groupdict().items() if text}
                if "repo" in arguments:
                    kind = arguments.pop("kind", "models")
                    arguments["repo"] = self._repository(call, kind, arguments["repo"], write)
                return function(self, call, **arguments)
        raise HubError(404, f"tests/hub_protocol.py has no answer to {call.method} {call.path}")

    def _authenticate(self, call: Call) -> None:
        token = call.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            # Even for what everybody may see; the client makes "Invalid user token." of it in whoami.
            raise HubError(401, INVALID_TOKEN)
        call.user, call.role = self.tokens.get(token, (None, None))

    def _repository(self, call: Call, kind: str, name: str, write: bool) -> Repository:
        """The repository, if the caller may see it (else it looks like a missing one) and, for `write`, change it."""
        repository = self.repositories.get((kind, name))
        if not repository or (repository.private and call.user != repository.namespace and not self._is_signed(call)):
            raise HubError(404, "Repository not found", "RepoNotFound") if call.user else HubError(401, NO_TOKEN)
        if write:
            self._check_may_write(call, repository.namespace)
        return repository

    @staticmethod
    def _check_may_write(call: Call, namespace: str) -> None:
        if call.user is None:
            raise HubError(401, NO_TOKEN)
        if call.user != namespace or call.role != "write":
            raise HubError(403, f'You don\'t have the rights to write under the namespace "{namespace}" with this token')

    def _signed(self, method: str, path: str) -> str:
        return f"{path}?signature={hmac.new(self._key, f'{method} {path}'.encode(), 'sha256').hexdigest()}"

    def _is_signed(self, call: Call) -> bool:
        method = "GET" if call.method == "HEAD" else call.method
        return f"{call.path}?signature={call.query.get('signature', [''])[0]}" == self._signed(method, call.path)

    # The account and the repositories

    @_route("GET", "/api/whoami-v2")
    def _whoami(self, call: Call) -> Answer:
        if not call.user:
            raise HubError(401, NO_TOKEN)
        access = {"displayName": "test", "role": call.role}
        account = {"type": "user", "id": call.user, "name": call.user, "fullname": call.user, "isPro": False, "orgs": []}
        return json_answer({**account, "auth": {"type": "access_token", "accessToken": access}})

    @_route("POST", "/api/validate-yaml")
    def _validate_yaml(self, call: Call) -> Answer:
        try:
            wanted = call.json()
            metadata = card_metadata(wanted["content"], wanted.get("repoType", "model") + "s")
        except ValueError as error:
            return json_answer({"errors": [{"message": line} for line in str(error).splitlines()], "warnings": []}, 400)
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return json_answer({"errors": [], "warnings": warnings})

    @_route("POST", "/api/repos/create")
    def _create(self, call: Call) -> Answer:
        wanted = call.json()
        namespace = wanted.get("organization") or call.user
        self._check_may_write(call, namespace)
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}", wanted["name"]):
            raise HubError(400, f"Invalid name {wanted['name']}")
        kind, name = wanted.get("type", "model") + "s", f"{namespace}/{wanted['name']}"
        if kind == "spaces" and wanted.get("sdk") not in SDKS:
            raise HubError(400, f"sdk must be one of {', '.join(SDKS)}")
        url = f"{self.endpoint}/{'' if kind == 'models' else kind + '/'}{name}"
        if (kind, name) in self.repositories:
            # The client reads the address from this answer too.
            return json_answer({"error": f"You already created this {kind[:-1]} repo", "url": url, "name": name}, 409)
        self.repositories[kind, name] = Repository(kind, name, _is_private(wanted))
        return json_answer({"url": url, "name": name, "id": name})

    @_route("DELETE", "/api/repos/delete")
    def _delete(self, call: Call) -> Answer:
        wanted = call.json()
        kind, name = wanted.get("type", "model") + "s", f"{wanted.get('organization') or call.user}/{wanted['name']}"
        self._repository(call, kind, name, write=True)
        del self.repositories[kind, name]
        return json_answer({})

    @_route("PUT", f"{API}/settings", write=True)
    def _settings(self, call: Call, repo: Repository) -> Answer:
        wanted = call.json()
        if "visibility" in wanted or "private" in wanted:
            repo.private = _is_private(wanted)
        return json_answer({"private": repo.private})

    @_route("GET", f"{API}/auth-check")
    def _may_read(self, call: Call, repo: Repository) -> Answer:
        return json_answer({})

    @_route("GET", f"{API}/auth-check/write", write=True)
    def _may_write(self, call: Call, repo: Repository) -> Answer:
        return json_answer({})

    @_route("GET", f"{API}(?:/revision/{REVISION})?")
    def _info(self, call: Call, repo: Repository, revision: str = "main") -> Answer:
        info = repo.info(revision, blobs=call.flag("blobs"))
        if "expand" in call.query:
            info = {key: value for key, value in info.items() if key in ("_id", "id", *call.query["expand"])}
        return json_answer(info)

    @_route("GET", f"{API}/tree/{REVISION}(?:/(?P<path>.+))?")
    def _tree(self, call: Call, repo: Repository, revision: str, path: str = "") -> Answer:
        commit = repo.resolve(revision)
        return json_answer(repo.listing(commit, path.strip("/"), call.flag("recursive"), call.flag("expand")))

    @_route("POST", f"{API}/paths-info/{REVISION}")
    def _paths_info(self, call: Call, repo: Repository, revision: str) -> Answer:
        commit, form = repo.resolve(revision), parse_qs(call.body.decode())
        known = {entry["path"] for entry in repo.listing(commit, "", recursive=True, expand=False)}
        expand = form.get("expand", ["false"])[0].lower() == "true"
        return json_answer([repo.entry(commit, path, expand) for path in form.get("paths", []) if path in known])

    @_route("GET", f"{API}/commits/{REVISION}")
    def _commits(self, call: Call, repo: Repository, revision: str) -> Answer:
        return json_answer(
            [
                {"id": c.id, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": c.date}
                for c in repo.history(revision)
            ]
        )

    @_route("GET", f"{API}/refs")
    def _refs(self, call: Call, repo: Repository) -> Answer:
        def refs(folder: str, commits: dict[str, Commit]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": c.id} for n, c in sorted(commits.items())]

        lists = {"branches": refs("heads", repo.branches), "tags": refs("tags", repo.tags)}
        return json_answer({**lists, "converts": [], "pullRequests": []})

    @_route("POST DELETE", f"{API}/(?P<what>branch|tag)/(?P<name>[^/]+)", write=True)
    def _ref(self, call: Call, repo: Repository, what: str, name: str) -> Answer:
        refs, start = (repo.branches, "main") if what == "branch" else (repo.tags, name)
        if call.method == "POST":
            wanted = call.json()
            name = wanted.get("tag", name)
            if name in refs:
                raise HubError(409, f"Reference already exists: {what} {name}")
            refs[name] = repo.resolve(wanted.get("startingPoint", start))
        elif name not in refs:
            raise HubError(404, f"Reference does not exist: {what} {name}", "RevisionNotFound")
        elif refs is repo.branches and name == "main":
            raise HubError(403, "Cannot delete branch main")
        else:
            del refs[name]
        return json_answer({})

    # Uploads

    @_route("POST", f"{API}/preupload/{REVISION}", write=True)
    def _preupload(self, call: Call, repo: Repository, revision: str) -> Answer:
        tree = repo.resolve(revision).tree
        files = []
        for file in call.json()["files"]:
            path = file["path"]
            large = is_large(path, file["size"], base64.b64decode(file["sample"]))
            present = tree[path].etag if path in tree else None
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": present})
        return json_answer({"files": files})

    @_route("POST", rf"{SITE}\.git/info/lfs/objects/batch", write=True)
    def _batch(self, call: Call, repo: Repository) -> Answer:
        wanted, objects = call.json(), []
        multipart = self.part_size is not None and "multipart" in wanted["transfers"]
        for item in wanted["objects"]:
            oid, size = item["oid"], item["size"]
            if oid in repo.objects:
                objects.append(item)  # no actions: the server has it
                continue
            path = f"/storage/{repo.kind}/{repo.name}/{oid}"
            upload: dict[str, Any] = {"href": self.storage_endpoint + self._signed("PUT", path), "header": {}}
            if multipart and size > self.part_size:
                parts = range(1, -(-size // self.part_size) + 1)
                upload["header"] = {"chunk_size": str(self.part_size)}
                upload["header"] |= {str(n): self.storage_endpoint + self._signed("PUT", f"{path}/{n}") for n in parts}
                complete = f"/api/complete_multipart/{repo.kind}/{repo.name}/{oid}"
                upload["href"] = self.endpoint + self._signed("POST", complete)
            prefix = "" if repo.kind == "models" else repo.kind + "/"
            verify = {"href": f"{self.endpoint}/{prefix}{repo.name}.git/info/lfs/objects/verify", "header": {}}
            objects.append({**item, "authenticated": True, "actions": {"upload": upload, "verify": verify}})
        return json_answer({"transfer": "multipart" if multipart else "basic", "objects": objects})

    @_route("PUT", rf"/storage/(?P<kind>[^/]+)/{REPO}/{OBJECT}(?:/(?P<part>\d+))?")
    def _put(self, call: Call, repo: Repository, oid: str, part: str | None = None) -> Answer:
        if not self._is_signed(call):
            raise HubError(403, "SignatureDoesNotMatch")
        digest = hashlib.sha256(call.body).hexdigest()
        if part:
            repo.parts.setdefault(oid, {})[int(part)] = call.body
        else:
            self._store(repo, oid, call.body)
        return Answer(200, headers={"ETag": f'"{digest}"'})

    @_route("POST", rf"/api/complete_multipart/(?P<kind>[^/]+)/{REPO}/{OBJECT}")
    def _complete(self, call: Call, repo: Repository, oid: str) -> Answer:
        if not self._is_signed(call):
            raise HubError(403, "SignatureDoesNotMatch")
        parts, wanted = repo.parts.get(oid, {}), {part["partNumber"]: part["etag"] for part in call.json()["parts"]}
        if wanted != {number: f'"{hashlib.sha256(part).hexdigest()}"' for number, part in parts.items()}:
            raise HubError(400, "InvalidPart")
        self._store(repo, oid, b"".join(parts[number] for number in sorted(parts)))
        return json_answer({"success": True})

    @staticmethod
    def _store(repo: Repository, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, f"The sha256 of what was uploaded is not {oid}")
        repo.objects[oid] = content
        repo.parts.pop(oid, None)

    @_route("POST", rf"{SITE}\.git/info/lfs/objects/verify", write=True)
    def _verify(self, call: Call, repo: Repository) -> Answer:
        wanted = call.json()
        if len(repo.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, f"Object {wanted['oid']} is not there or not of this size")
        return json_answer({})

    @_route("POST", f"{API}/commit/{REVISION}", write=True)
    def _commit(self, call: Call, repo: Repository, revision: str) -> Answer:
        if call.flag("create_pr"):
            raise HubError(400, "tests/hub_protocol.py has no pull requests")
        lines = [json.loads(line) for line in call.body.splitlines() if line]
        oid = repo.apply(revision, lines, author=str(call.user)).id
        prefix = "" if repo.kind == "models" else repo.kind + "/"
        url = f"{self.endpoint}/{prefix}{repo.name}/commit/{oid}"
        return json_answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    # Downloads

    @_route("GET HEAD", f"{SITE}/resolve/{REVISION}/(?P<path>.+)")
    def _resolve(self, call: Call, repo: Repository, revision: str, path: str) -> Answer:
        commit, blob = repo.blob(revision, path)
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes", "ETag": f'"{blob.oid}"'}
        if not blob.lfs:
            return self._content(call, blob.content, headers)
        at = self._signed("GET", f"/storage/{repo.kind}/{repo.name}/{blob.sha256}")
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        return Answer(302, f"Found. Redirecting to {at}".encode(), headers | {"Location": self.storage_endpoint + at})

    @_route("GET HEAD", rf"/storage/(?P<kind>[^/]+)/{REPO}/{OBJECT}")
    def _get(self, call: Call, repo: Repository, oid: str) -> Answer:
        if not self._is_signed(call):
            raise HubError(403, "SignatureDoesNotMatch")
        return self._content(call, repo.objects[oid], {"Accept-Ranges": "bytes", "ETag": f'"{oid}"'})

    @staticmethod
    def _content(call: Call, content: bytes, headers: dict[str, str]) -> Answer:
        """A file, or the one range of it that is asked for."""
        headers["Content-Type"] = "application/octet-stream"
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", ""))
        if not found or not any(found.groups()):
            return Answer(200, content, headers)
        start, end = found.groups()
        first = int(start) if start else max(len(content) - int(end), 0)
        last = min(int(end), len(content) - 1) if start and end else len(content) - 1
        if first > last:
            return Answer(416, headers={**headers, "Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return Answer(206, content[first : last + 1], headers)
