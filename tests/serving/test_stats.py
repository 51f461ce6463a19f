"""`GET /v1/moec/stats`: load, speed, and the tokens of each expert while somebody reads them."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import moec
from moec.serving.metrics import RATE_SECONDS, Rate
from tests.serving.running import GREEDY, MODEL, PROMPT, Running, process, serving, until


@pytest.fixture(scope="module")
def path(tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_moe, whose routing can be recorded."""
    path = tmp_path_factory.mktemp("stats") / f"{MODEL}.moec"
    moec.compile(tiny_moe, record_routing=True, verify=False).save(path)
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> moec.LoadedModel:
    return moec.load(path)


@pytest.fixture
def server(model: moec.LoadedModel) -> Iterator[Running]:
    with serving(model, recorded=True) as running:
        yield running


def stats(server: Running) -> dict[str, Any]:
    status, content, headers = server.send("/v1/moec/stats")
    assert (status, headers["cache-control"]) == (200, "no-store")
    return content


def complete(server: Running, count: int) -> None:
    server.client.completions.create(prompt=PROMPT, max_tokens=count, **GREEDY)
    until(lambda: not server.service.engine.busy)


def test_load_and_speed(server: Running) -> None:
    before = stats(server)
    assert before | {"created": 0, "experts": []} == {
        "model": MODEL, "created": 0, "chat": True, "context": 512, "slots": 4, "running": 0,
        "waiting": 0, "cache": 0.0, "tokens_per_second": 0.0, "experts": [], "no_experts": None,
        "models": [MODEL],
    }  # fmt: skip
    server.executor.seconds = 0.01
    body: dict[str, Any] = {"prompt": PROMPT, "n": 6, "max_tokens": 400, "stream": True}
    stream = server.lenient.completions.create(**body, **GREEDY)
    until(lambda: stats(server)["running"] == 4)
    assert stats(server)["waiting"] == 2
    until(lambda: stats(server)["cache"] > 0)
    until(lambda: stats(server)["tokens_per_second"] > 10)
    stream.close()
    until(lambda: stats(server)["running"] == 0)


def test_experts_are_counted_while_somebody_looks(server: Running, model: moec.LoadedModel) -> None:
    """The counts are those of a recording of the same text."""
    routing = server.service.routing
    assert routing is not None
    assert [sum(layer["counts"]) for layer in stats(server)["experts"]] == [0, 0, 0, 0]
    complete(server, 9)
    assert routing.counting
    experts = stats(server)["experts"]
    routing.until = 0.0  # as if nobody had looked for long
    complete(server, 9)
    assert not routing.counting
    assert stats(server)["experts"] == experts
    with model.record_routing() as recorder:
        model.generate(PROMPT, max_new_tokens=9)
    layers = model.artifact.package.recorded
    assert experts == [
        {"name": layer.layer, "counts": counts.tolist()}
        for layer, counts in zip(layers, recorder.trace().counts(), strict=True)
    ]


def test_nobody_looks(server: Running) -> None:
    complete(server, 3)
    assert server.service.routing is not None
    assert not server.service.routing.counting


def read(port: int) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/v1/moec/stats")
    content: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return content


def test_what_the_command_serves(
    path: Path, compiled_tiny_moe: moec.CompiledModel, tmp_path: Path
) -> None:
    with process(path) as (_, port):
        content = read(port)
    assert [len(layer["counts"]) for layer in content["experts"]] == [8] * 4
    assert not content["chat"]
    compiled_tiny_moe.save(tmp_path / f"{MODEL}.moec")
    with process(tmp_path / f"{MODEL}.moec") as (_, port):
        content = read(port)
    assert content["experts"] is None
    assert "where the model was compiled with --record-routing" in content["no_experts"]


def test_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now, rate = 100.0, Rate()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert rate.value == 0
    for _ in range(50):
        now += 0.01
        rate.add(3)
    assert rate.value == 150 / RATE_SECONDS
    now += RATE_SECONDS
    assert rate.value < 10
    now += 1
    rate.add(4)
    assert rate.value == 4 / RATE_SECONDS
