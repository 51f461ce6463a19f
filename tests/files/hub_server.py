"""A server on this machine that speaks the protocol of the Hugging Face hub, as far as models are
read: which files a revision has, and their bytes, also of a range."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

from moec.files import hub_transfer


@dataclass
class Repository:
    """Files by name at each commit; `refs` are branches and tags. `gate` is the X-Error-Code with
    which files are refused without `token`."""

    commits: dict[str, Mapping[str, bytes]]
    refs: dict[str, str]
    gate: str = ""
    token: str = ""


@dataclass
class Hub:
    """What a server has, and the requests that it got: method, path, and range of each request.

    `cuts` has, by name of a file, the bytes after which the next answers end. Every request is
    answered with `status`, if it is not 0. `odd` has, by the end of a path, what answers a request
    for it, given the headers and the body of the right answer: all that a hostile server may.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    odd: dict[str, Callable[[BaseHTTPRequestHandler, dict[str, str], bytes], None]] = field(
        default_factory=dict
    )
    status: int = 0
    url: str = ""

    @property
    def downloads(self) -> list[str]:
        """The names of the files whose bytes were sent."""
        return [path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET"
                and "/resolve/" in path]  # fmt: skip


def commit(number: int) -> str:
    return f"{number:040x}"


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, *args: Any) -> None: ...

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range", "")))
            if hub.status:
                self._send(hub.status)
            elif path.startswith("/api/models/"):
                org, name, *rest = path.removeprefix("/api/models/").split("/", 3)
                self._info(f"{org}/{name}", rest[1] if len(rest) == 2 else "main")
            elif "/resolve/" not in path:
                self._send(404)
            else:
                org, name, _, revision, file = path.removeprefix("/").split("/", 4)
                self._file(f"{org}/{name}", revision, file)

        def _revision(self, name: str, revision: str) -> tuple[Repository, str] | None:
            """The repository and the commit, or None where an error was sent."""
            repository = hub.repositories.get(name)
            if repository is None:
                self._send(401, {"X-Error-Code": "RepoNotFound"})
                return None
            sha = repository.refs.get(revision, revision)
            if sha not in repository.commits:
                self._send(404, {"X-Error-Code": "RevisionNotFound"})
                return None
            return repository, sha

        def _info(self, name: str, revision: str) -> None:
            answer = self._revision(name, revision)
            if answer is None:
                return
            repository, sha = answer
            files = [
                {"rfilename": file, "size": len(content), "blobId": _etag(content)}
                for file, content in repository.commits[sha].items()
            ]
            content = {"id": name, "sha": sha, "siblings": files, "tags": [], "private": False}
            self._send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

        def _file(self, name: str, revision: str, file: str) -> None:
            answer = self._revision(name, revision)
            if answer is None:
                return
            repository, sha = answer
            token = self.headers.get("Authorization", "")
            if repository.gate and token != f"Bearer {repository.token}":
                status = 403 if token else 401
                self._send(status, {"X-Error-Code": repository.gate})
                return
            content = repository.commits[sha].get(file)
            if content is None:
                self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
                return
            headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": sha}
            start, status = 0, 200
            if part := self.headers.get("Range"):
                start, status = int(part.removeprefix("bytes=").partition("-")[0]), 206
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            cuts = hub.cuts.get(file)
            end = cuts.pop(0) if cuts and self.command == "GET" else None
            self._send(status, headers, content[start:], end)

        def _send(
            self,
            status: int,
            headers: Mapping[str, str] | None = None,
            body: bytes = b"",
            end: int | None = None,
        ) -> None:
            path = unquote(urlsplit(self.path).path)
            for name, answer in hub.odd.items():
                if path.endswith(name):
                    with suppress(OSError):  # who has enough hangs up
                        answer(self, dict(headers or {}), body)
                    self.close_connection = True
                    return
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body if end is None else body[:end])
            if end is not None:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def connected(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """`serve`, and this process takes the server for the hub, with an empty cache in `folder`."""
    with serve(hub):
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        # a download that is cut is tried again after a second
        clock = SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic)
        monkeypatch.setattr(hub_transfer, "time", clock)
        yield hub
        close_session()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
