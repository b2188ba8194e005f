"""A Hugging Face Hub on the loopback interface, for the real `huggingface_hub` client to talk to.

    with HubServer() as server:
        subprocess.run([...], env=os.environ | server.environment(tmp_path, token=WRITE))  # another process
        server.use(monkeypatch, tmp_path, token=WRITE)  # this process
        assert server.files("alice/model")["config.json"] == b"{}"

Everything is kept in memory. Repositories begin, as on the Hub, with a commit that holds .gitattributes.
Large files (by suffix, by size, or binary) go by Git LFS to a second origin, the "storage", whose URLs carry a
signature; like the real one it refuses requests that bring a token along. Xet is never offered, but the client takes
it for granted wherever `hf_xet` is installed: it must be told HF_HUB_DISABLE_XET=1 (both helpers do). Then
`upload_folder` uploads everything and makes one commit of it.

What the client does when something fails (no variable changes it):

- Preupload, LFS batch, the PUT of an object or a part, completion, verify and tree listings are repeated five times,
  after 1, 2, 4, 8 and 8 s (23 s in all), upon 408, 429, 500, 502, 503, 504 and upon any broken connection: one
  failure costs a test one second, and only `times=6` is final. "Retry-After: N" makes a wait N + 1 s. Other statuses,
  501 and 507 among them, are final at once. What ends the upload of a large file arrives as a RuntimeError ("Error
  while uploading ..."), whose cause is the error of the request.
- The rest of the API (whoami, create, validate-yaml, model info, commit, refs, tags, paths-info, delete) is asked
  once, and its error raised at once: a broken connection as an error of httpx2, not as HfHubHTTPError.
- A download begins with a HEAD that is asked once. If it fails, a file in the cache is used silently, unless the
  Hub answered EntryNotFound or RevisionNotFound, or the connection broke half-way, which are raised. With nothing in the
  cache, one of these statuses, a timeout or a refused connection makes the client ask again, now with the five
  repetitions: one failure costs no time, and only `times=7` is final.
- The GET of a file is repeated upon 408 and 429 only, other statuses are raised at once. After an answer that was cut
  it continues, after 1 s, with a Range from the bytes written; it writes in pieces of 10 MB, so that smaller files
  start again.
- `snapshot_download` answers errors of the API, but RevisionNotFound, from the cache, if that is complete.

Not supported: pull requests, names without namespace, organizations, gated repositories, copies from other
repositories, .gitignore rules, pages of long listings, lists of models, Xet, and git itself. A 401 means a missing
repository to the client only over https; here the server adds the X-Error-Code that makes it so.
"""

from __future__ import annotations

import re
import socket
import socketserver
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from helpers.hub_protocol import Call, Hub, json_answer
from helpers.hub_storage import Blob, Repository, is_large

WRITE, READ, OTHER = "hf_alice_write", "hf_alice_read", "hf_bob_write"
TOKENS = {WRITE: ("alice", "write"), READ: ("alice", "read"), OTHER: ("bob", "write")}


class Request(NamedTuple):
    """A request: its path without the query, the status of the answer (0 if there was none), body bytes received."""

    method: str
    path: str
    status: int
    received: int


@dataclass
class _Fault:
    """What is to go wrong, and how often: a status in place of the answer, or (without) a closed connection."""

    method: str
    path: str
    times: float
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    after_bytes: int | None = None


class HubServer(Hub):
    """The server, running from construction to `close` (or the end of `with`).

    Args:
        tokens: the user and the role ("write" or "read") of every valid token.
        part_size: large files above this size are asked for in parts of it (multipart); never, without.
    """

    def __init__(self, tokens: Mapping[str, tuple[str, str]] = TOKENS, part_size: int | None = None) -> None:
        super().__init__(tokens, part_size)
        self.requests: list[Request] = []
        self._faults: list[_Fault] = []
        self._origins = _Origin(self), _Origin(self)
        self.endpoint, self.storage_endpoint = (origin.url for origin in self._origins)

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for origin in self._origins:
            origin.close()

    # Clients

    def environment(self, cache_dir: str | Path, token: str | None = None) -> dict[str, str]:
        """Variables that send the client of another process here, and all its files under `cache_dir`."""
        cache = Path(cache_dir)
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": token or "",
            "HUGGING_FACE_HUB_TOKEN": "",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HUGGINGFACE_CO_STAGING")
        disabled = ("XET", "TELEMETRY", "PROGRESS_BARS", "UPDATE_CHECK")
        # Every place by name, since the surroundings may set any of them.
        places = ("HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_MODULES_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN_PATH")
        variables |= dict.fromkeys(offline, "0") | {f"HF_HUB_DISABLE_{name}": "1" for name in disabled}
        variables |= {name: str(cache / name.split("_")[1].lower()) for name in places}
        return variables | {"HF_HOME": str(cache)}

    def use(self, monkeypatch: pytest.MonkeyPatch, cache_dir: str | Path, token: str | None = None) -> None:
        """Send the client of this process here: what it made of the variables when it was imported is replaced."""
        from huggingface_hub import constants, hf_api

        variables = self.environment(cache_dir, token)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        replaced: dict[str, Any] = {name: variables[name] for name in ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH")}
        replaced |= {"ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": False}
        replaced |= {"HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"}
        replaced |= {"HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True}
        for name, value in replaced.items():
            monkeypatch.setattr(constants, name, value)
        # huggingface_hub.create_repo and the like are methods of this object.
        monkeypatch.setattr(hf_api.api, "endpoint", self.endpoint)
        if dynamic_modules := sys.modules.get("diffusers.utils.dynamic_modules_utils"):
            monkeypatch.setattr(dynamic_modules, "HF_MODULES_CACHE", variables["HF_MODULES_CACHE"])

    # What goes wrong

    def fail(
        self, method: str, path: str, status: int = 500, times: float = 1, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer the next requests with an error once they are read. `method` and `path` are regular expressions."""
        self._faults.append(_Fault(method, path, times, status, headers or {}))

    def drop(self, method: str, path: str, after_bytes: int | None = 0, times: float = 1) -> None:
        """Close the connection of the next requests after so many bytes: of their body or, if they have none, the answer's.

        With `after_bytes=None` the request is carried out and only its answer lost.
        """
        self._faults.append(_Fault(method, path, times, after_bytes=after_bytes))

    def disk_full(self) -> None:
        """Refuse all uploads and commits with 507 (Insufficient Storage), until `heal`."""
        self.fail("PUT", "^/storage/", 507, times=float("inf"))
        self.fail("POST", "^/api/.*/commit/", 507, times=float("inf"))

    def heal(self) -> None:
        """Forget all that was to go wrong."""
        self._faults.clear()

    def take_fault(self, method: str, path: str) -> _Fault | None:
        """The first fault that is meant for a request."""
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    # Repositories

    def add_repo(self, repo: str, files: Mapping[str, bytes], private: bool = False, repo_type: str = "model") -> str:
        """Make a repository with a second commit that holds these files; returns the commit's id."""
        with self._lock:
            self.repositories[repo_type + "s", repo] = Repository(repo_type + "s", repo, private)
        return self.commit(repo, files, repo_type=repo_type)

    def commit(self, repo: str, files: Mapping[str, bytes], branch: str = "main", repo_type: str = "model") -> str:
        """Add files on top of a branch behind the client's back; returns the commit's id."""
        with self._lock:
            repository = self.repositories[repo_type + "s", repo]
            blobs = {path: Blob(data, is_large(path, len(data), data[:512])) for path, data in files.items()}
            repository.objects |= {blob.sha256: blob.content for blob in blobs.values() if blob.lfs}
            tree = repository.branches[branch].tree | blobs
            return repository.commit(branch, tree, "Upload files", author=repository.namespace).id

    def files(self, repo: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """All files of a repository at a revision, its .gitattributes included."""
        with self._lock:
            tree = self.repositories[repo_type + "s", repo].resolve(revision).tree
            return {path: blob.content for path, blob in sorted(tree.items())}

    def uploads(self) -> list[Request]:
        """The requests so far that brought large files or parts of them."""
        return [request for request in self.requests if request.method == "PUT" and request.path.startswith("/storage/")]


class _Origin(ThreadingHTTPServer):
    """One of the two ports of a HubServer."""

    request_queue_size = 128  # a full queue would cost the client a second

    def __init__(self, hub: HubServer) -> None:
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def server_bind(self) -> None:
        """Bind without asking for the name of the host, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that have disconnected."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()
        for connection in list(self.connections):  # clients keep them open
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class _Handler(BaseHTTPRequestHandler):
    """HTTP itself: bodies in and out, faults, the log."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body leave together
    server: _Origin

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def _read(self, limit: float) -> tuple[bytes, bool]:
        """The body up to the limit, and whether it came to its end before."""
        if "Transfer-Encoding" not in self.headers:
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(int(min(length, limit)))
            return body, len(body) == length and length <= limit
        body = b""
        while size := int(self.rfile.readline().split(b";")[0].strip() or b"0", 16):
            chunk = self.rfile.read(int(min(size, limit - len(body))))
            body += chunk
            if len(chunk) < size:
                return body, False
            self.rfile.readline()
        self.rfile.readline()
        return body, True

    def _handle(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        path = unquote(url.path)
        fault = hub.take_fault(self.command, path)
        dropped = fault is not None and fault.status is None
        cut = fault.after_bytes if fault and dropped else None
        has_body = "Transfer-Encoding" in self.headers or int(self.headers.get("Content-Length", 0)) > 0
        body, whole = self._read(float("inf") if cut is None else cut)
        if not whole or (cut is not None and (has_body or self.command == "HEAD")):
            return self._hang_up(path, len(body))
        if fault and fault.status:
            message = f"tests/hub_server.py was told to fail with {fault.status}"
            answer = json_answer({"error": message}, fault.status, fault.headers)
        else:
            call = Call(self.command, url.path, parse_qs(url.query), self.headers, body)
            answer = hub.answer(call, at_storage=self.server.url == hub.storage_endpoint)
        if dropped and cut is None:
            return self._hang_up(path, len(body))
        hub.requests.append(Request(self.command, path, answer.status, len(body)))
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:cut])
        self.close_connection = self.close_connection or dropped

    def _hang_up(self, path: str, received: int) -> None:
        self.server.hub.requests.append(Request(self.command, path, 0, received))
        self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle
