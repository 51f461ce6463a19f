"""A hub, or whoever answers for it, that lies: no name, no size and no end is its choice."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, file_download

from moec.errors import UsageError
from moec.files import hub_files, hub_transfer
from moec.model_path import local_path
from tests.files.hub_server import Hub, Repository, commit, connected

NAME = "org/x"
INDEX = "model.safetensors.index.json"
FILES = {"config.json": b"{}", "model.safetensors": b"w" * 3000}
Answer = Callable[[BaseHTTPRequestHandler, dict[str, str], bytes], None]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    repository = Repository({commit(1): FILES}, {"main": commit(1)})
    with connected(Hub({NAME: repository}), tmp_path / "home", monkeypatch) as server:
        yield server


def sent(
    handler: BaseHTTPRequestHandler, headers: dict[str, str], body: bytes, status: int = 200
) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body)


def answer(status: int = 200, times: int = 1, **headers: str) -> Answer:
    """The right body, perhaps several times, with other headers; without Content-Length unless it
    is given."""
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, right, body: sent(handler, right | more, body * times, status)


def endless(status: int = 200, **headers: str) -> Answer:
    def write(handler: BaseHTTPRequestHandler, right: dict[str, str], body: bytes) -> None:
        answer(status, **headers)(handler, right, b"[")
        while handler.command == "GET":
            handler.wfile.write(b"[" * 100_000)

    return write


def announced(change: Callable[[Any], Any]) -> Answer:
    """The list of files of the repository, changed."""

    def write(handler: BaseHTTPRequestHandler, right: dict[str, str], body: bytes) -> None:
        sent(handler, right, json.dumps(change(json.loads(body))).encode())

    return write


def refusal() -> str:
    with pytest.raises(UsageError) as raised:
        local_path(NAME)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


def names_below(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


@pytest.mark.parametrize("name", ["ETag", "X-Linked-ETag", "X-Repo-Commit"])
@pytest.mark.parametrize("value", ["../../../../evil", "TMP/evil", "", "a/b", ".." * 200])
def test_no_header_names_a_file(name: str, value: str, hub: Hub, tmp_path: Path) -> None:
    """huggingface_hub joined the ETag to the folder of its cache."""
    value = value.replace("TMP", str(tmp_path))
    hub.odd["/config.json"] = answer(**{name: f'"{value}"' if "ETag" in name else value})
    path = Path(local_path(NAME))
    assert (path / "config.json").read_bytes() == b"{}"
    assert [p.name for p in tmp_path.iterdir()] == ["home"]
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["cache"]
    hexadecimal = {n for n in names_below(tmp_path) if set(n) <= set("0123456789abcdef")}
    assert names_below(tmp_path) - hexadecimal == {*FILES, "main"}


@pytest.mark.parametrize(("change", "words"), [
    (lambda info: info | {"sha": "../../../evil"}, "is no list of files of a model"),
    (lambda info: info | {"sha": None}, "is no list of files of a model"),
    (lambda info: [info], "is no list of files of a model"),
    (lambda info: info | {"siblings": {"rfilename": "config.json"}}, "is no list of files"),
    (lambda info: changed(info, size="3000"), "is no list of files of a model"),
    (lambda info: changed(info, size=-1), "is no list of files of a model"),
    (lambda info: changed(info, size=10**30), "is no list of files of a model"),
    (lambda info: changed(info, size=10**18), "GB more in"),
    (lambda info: changed(info, blobId="../../../evil"), "is no list of files of a model"),
    (lambda info: changed(info, lfs={"sha256": "../evil"}), "is no list of files of a model"),
    (lambda info: changed(info, size=2999), "sends more than the 2,999 bytes that were announced"),
    (lambda info: changed(info, size=3001), "sent 3,000 of the 3,001 bytes announced"),
])  # fmt: skip
def test_what_is_announced(change: Any, words: str, hub: Hub, tmp_path: Path) -> None:
    hub.odd[f"/api/models/{NAME}"] = announced(change)
    assert words in refusal()
    assert {p.name for p in tmp_path.iterdir()} <= {"home"}
    assert "model.safetensors" not in names_below(tmp_path)


def changed(info: Any, **fields: Any) -> Any:
    """With other fields of the weights."""
    files = [f | fields if f["rfilename"].startswith("model") else f for f in info["siblings"]]
    return info | {"siblings": files}


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "..", ".", "a\0b"])
def test_a_name_that_leads_out_of_the_cache(name: str, hub: Hub, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": name}}).encode()
    files = {"config.json": b"{}", INDEX: index, name: b"w"}
    hub.repositories[NAME].commits[commit(1)] = files
    assert f"of {NAME} is no name of a file" in refusal()
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize(("path", "odd", "words"), [
    ("/model.safetensors", endless(), "sends more than the 3,000 bytes that were announced"),
    ("/model.safetensors", endless(404), "sends more than the 1,048,576 bytes"),
    ("/model.safetensors", answer(302, Location="/org/x/resolve/main/model.safetensors"),
     "leads on and on, more than 10 times"),
    ("/model.safetensors", endless(302, Location="/org/x/resolve/main/model.safetensors"),
     "leads on and on, more than 10 times"),
    ("/model.safetensors", answer(302, Location="file:///etc/passwd"), "ended early"),
    ("/model.safetensors", answer(Content_Encoding="gzip"), "answers with compressed bytes"),
    ("/model.safetensors", answer(times=0), "sent 0 of the 3,000 bytes announced"),
    ("/model.safetensors", answer(206, times=2), "sends more than the 3,000 bytes"),
    ("/api/models/org/x", endless(), "sends more than the 67,108,864 bytes"),
    ("/api/models/org/x", endless(500), "sends more than the 1,048,576 bytes"),
    ("/api/models/org/x", answer(times=2), "is no list of files of a model"),
    ("/api/models/org/x", answer(Location="/api/models/org/x", status=307), "leads on and on"),
])  # fmt: skip
def test_no_answer_is_endless(path: str, odd: Answer, words: str, hub: Hub, tmp_path: Path) -> None:
    hub.odd[path] = odd
    assert words in refusal()
    assert "model.safetensors" not in names_below(tmp_path)
    assert not [n for n in names_below(tmp_path) if n.endswith(".tmp")]


def test_compressed_bytes_are_not_unpacked(hub: Hub) -> None:
    bomb = gzip.compress(bytes(100_000_000))
    hub.odd[f"/api/models/{NAME}"] = lambda handler, right, body: sent(
        handler, {"Content-Encoding": "gzip"}, bomb
    )
    assert "answers with compressed bytes, which were not asked for" in refusal()


def test_an_answer_that_hardly_comes(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, and all together never."""
    now = iter(range(0, 10**6, 50))
    clock = SimpleNamespace(monotonic=lambda: next(now), sleep=lambda seconds: None)

    def drip(handler: BaseHTTPRequestHandler, right: dict[str, str], body: bytes) -> None:
        sent(handler, right | {"Content-Length": "3000"}, b"")
        for at in range(20):
            handler.wfile.write(body[at : at + 1])
            time.sleep(0.01)

    hub.odd["/model.safetensors"] = drip
    files = hub_files.find(NAME)
    monkeypatch.setattr(hub_transfer, "time", clock)
    with pytest.raises(UsageError, match=r"sent \d+ bytes in \d+ s, which never ends"):
        hub_files.download(files)


def test_an_answer_that_is_cut_without_end(hub: Hub) -> None:
    """Each try brings a byte."""

    def cut(handler: BaseHTTPRequestHandler, right: dict[str, str], body: bytes) -> None:
        status = 206 if handler.headers.get("Range") else 200
        sent(handler, {"Content-Length": "3000"}, b"w", status)

    hub.odd["/model.safetensors"] = cut
    assert "ended early" in refusal()
    assert len(hub.downloads) < 10


def test_a_disk_without_links(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    path = Path(local_path(NAME))
    assert {p.name: p.read_bytes() for p in path.iterdir()} == FILES
    assert not any(p.is_symlink() for p in path.iterdir())
    assert local_path(NAME) == str(path)


def test_the_protocol_of_the_official_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files above 50 GB come by no other; another server is not asked for it."""
    fetched = []

    def xet_get(incomplete_path: Path, expected_size: int, **others: Any) -> None:
        fetched.append(others["displayed_filename"])
        incomplete_path.write_bytes(FILES[fetched[-1]][:expected_size])

    xet = {"X-Xet-Hash": "0" * 64, "X-Xet-Refresh-Route": f"{hub.url}/token"}
    hub.odd["/model.safetensors"] = answer(**{name.replace("-", "_"): v for name, v in xet.items()})
    monkeypatch.setattr(file_download, "xet_get", xet_get)
    assert Path(local_path(NAME), "model.safetensors").read_bytes() == b"w" * 3000
    assert fetched == []
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_HOME", f"{hub.url}/")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE + "2")
    assert Path(local_path(NAME), "model.safetensors").read_bytes() == b"w" * 3000
    assert fetched == ["model.safetensors"]
