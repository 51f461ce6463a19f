"""Answers of a hub that are damaged or forged: the model as it was announced, or one sentence. No
file but those of the cache, no endless download."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from huggingface_hub import close_session, constants

from moec.errors import MoecError
from moec.files import hub_files, hub_transfer
from tests.attack.mutate import mutated_bytes, mutated_json
from tests.attack.refusal import LONGEST, SECONDS
from tests.files.hub_server import Hub, Repository, commit, serve

_NAME, _INDEX = "org/x", "model.safetensors.index.json"
_FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}" * 100,
    "a.safetensors": b"w" * 3000,
    "b.safetensors": b"v" * 70_000,
    _INDEX: json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}).encode(),
}
_NAMES = (
    *("../evil", "../../../../../evil", "/evil", "a/../../evil", "", ".", "..", "a/b", "x\0y"),
    *("evil" * 100, "\x1b[2J", "é", "config.json", "refs/main", "..%2fevil", "C:evil", "a\\..\\b"),
)
_HEADERS = {
    "ETag": (*_NAMES, "0" * 40, 'W/"../evil"'),
    "X-Linked-ETag": _NAMES,
    "X-Repo-Commit": (*_NAMES, commit(1), commit(9), "0" * 39),
    "X-Linked-Size": ("0", "-1", "1" * 30, "x", "3000", str(2**63)),
    "Content-Length": ("0", "1", "-1", "x", "3000", "70000", str(10**12), str(2**64)),
    "Content-Range": ("bytes 0-1/2", "x", "bytes */-1", f"bytes 0-{10**12}/{10**12}"),
    "Content-Encoding": ("gzip", "br", "identity", "deflate", "x", "zstd"),
    "Transfer-Encoding": ("chunked", "gzip", "x"),
    "Location": (
        *(
            "/org/x/resolve/main/config.json",
            "file:///etc/passwd",
            "//127.0.0.1:1/",
            "http://[",
            "x",
        ),
        *("http://127.0.0.1:9/", "/api/models/org/x", "", "data:,x", "ftp://127.0.0.1/", "?"),
    ),
    "X-Error-Code": ("RepoNotFound", "EntryNotFound", "GatedRepo", "RevisionNotFound", "x"),
    "X-Error-Message": ("x" * 5000, "\x1b[2J"),
    "X-Xet-Hash": ("0" * 64, "../evil", "x"),
    "Retry-After": ("99999999", "x"),
    "Link": ('<../evil>; rel="xet-auth"', "<<<"),
    "Set-Cookie": ("a=b; Path=/", "=" * 5000),
}
_STATUS = (200, 200, 200, 200, 206, 204, 301, 302, 307, 308, 304, 400, 401, 403, 404, 416, 429, 500)
_MOST = 300 << 20  # bytes of an answer without an end
_HEX = re.compile(r"[0-9a-f]{40,64}")


def case(folder: Path, draw: random.Random) -> list[str]:
    """The faults of one model, some of whose answers are odd."""
    shutil.rmtree(folder / "home", ignore_errors=True)
    hub = Hub({_NAME: Repository({commit(1): _FILES}, {"main": commit(1)})})
    for _ in range(draw.randint(1, 3)):
        name = draw.choice((f"/api/models/{_NAME}", f"/api/models/{_NAME}", *_FILES))
        hub.odd[name] = _answer(random.Random(draw.random()))
    with ExitStack() as stack:
        stack.enter_context(serve(hub))
        clock = SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic)
        stack.enter_context(patch.object(hub_transfer, "time", clock))
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(folder / "home/cache"),
            "HF_HUB_DOWNLOAD_TIMEOUT": 2,
        }.items():
            stack.enter_context(patch.object(constants, name, value))
        stack.callback(close_session)
        start = time.process_time()
        faults = _faults(folder)
        if (seconds := time.process_time() - start) > SECONDS:
            faults.append(f"takes {seconds:.1f} s")
    return [f"{fault} (odd: {', '.join(hub.odd)})" for fault in faults]


def _faults(folder: Path) -> list[str]:
    try:
        files = hub_files.find(_NAME)
        path = hub_files.download(files)
    except MoecError as error:
        message = str(error)
        faults = [] if message.strip() else ["no word"]
        faults += ["more than one line"] if "\n" in message else []
        faults += [f"{len(message)} characters"] if len(message) > LONGEST else []
        return [f"{fault}: {message[:300]}" for fault in [*faults, *_strays(folder)]]
    except BaseException as error:
        return [f"ends in {error!r}"[:500], *_strays(folder)]
    sizes = {name: (path / name).stat().st_size for name in files.names}
    wrong = {n: size for n, size in files.missing.items() if sizes[n] != size}
    return [*([f"other sizes than announced: {wrong}"] if wrong else []), *_strays(folder)]


def _strays(folder: Path) -> list[str]:
    """Files that no download of this model makes, and those that were not completed."""
    home = folder / "home"
    strays = []
    for path in home.rglob("*"):
        parts = path.relative_to(home).parts
        if path.is_dir():
            continue
        allowed = parts[:2] == ("cache", "models--org--x") and (
            (parts[2] == "blobs" and len(parts) == 4 and _HEX.fullmatch(parts[3]))
            or parts[2:] == ("refs", "main")
            or (parts[2] == "snapshots" and _HEX.fullmatch(parts[3]) and len(parts) == 5)
        )
        if not allowed:
            strays.append(f"leaves {'/'.join(parts)!r}")
    return strays


def _answer(draw: random.Random) -> Callable[[BaseHTTPRequestHandler, dict[str, str], bytes], None]:
    """One odd answer: its status, headers and body."""
    headers = {n: draw.choice(_HEADERS[n]) for n in draw.sample([*_HEADERS], draw.randint(0, 3))}
    status, kind, seed = draw.choice(_STATUS), draw.randrange(8), draw.random()

    def write(handler: BaseHTTPRequestHandler, right: dict[str, str], body: bytes) -> None:
        body = _body(kind, body, random.Random(seed))
        handler.send_response(status)
        fields = right | headers
        if kind != 7 and random.Random(seed).random() < 0.5:
            fields = {"Content-Length": str(len(body))} | fields
        for name, value in fields.items():
            handler.send_header(name, value.encode("latin-1", "replace").decode("latin-1"))
        handler.end_headers()
        if handler.command != "GET":
            return
        handler.wfile.write(body)
        for _ in range(_MOST >> 20 if kind == 7 else 0):
            handler.wfile.write(body[:1] * (1 << 20))

    return write


def _body(kind: int, body: bytes, draw: random.Random) -> bytes:
    try:
        content: Any = json.loads(body)
    except ValueError:
        content = None
    match kind:
        case 0 | 1 | 2 if isinstance(content, dict) and "siblings" in content:
            if kind == 0:
                file = draw.choice(content["siblings"])
                file[draw.choice([*file])] = draw.choice(
                    (*_NAMES, 0, -1, 10**30, None, 2999, [], {})
                )
            elif kind == 1:
                content["sha"] = draw.choice((*_NAMES, commit(1)[:-1], None, 5))
            else:
                content = mutated_json(content, draw)
            return json.dumps(content).encode()
        case 0 | 1 if isinstance(content, dict) and "weight_map" in content:
            content["weight_map"]["x"] = draw.choice((*_NAMES, None, 5, []))
            return json.dumps(content).encode()
        case 2 | 3:
            return mutated_bytes(body, draw)
        case 4:
            return body * 2
        case 5:
            return body[: draw.randrange(len(body) + 1)]
        case 6:
            return draw.choice((b"", b"[" * 100_000, b"null", bytes(1 << 20), body + b"x"))
        case _:
            return body
