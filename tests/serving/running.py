"""A server in a thread of the test, and its official client."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
from prometheus_client import generate_latest

import moec
from moec.runtime.call.caches import Cache
from moec.runtime.call.executor import Executor
from moec.runtime.dtypes import Array
from moec.runtime.package import Package
from moec.runtime.text.chats.chat import ChatTemplate
from moec.runtime.text.engine import Engine
from moec.serving.access import Access
from moec.serving.metrics import MetricFamilies
from moec.serving.routing_watch import RoutingWatch
from moec.serving.server import Limits, Server, listen
from moec.serving.service import POOL_SECONDS, ServedModels, Service, WorkPool

ROOT = Path(__file__).parents[1]
TEMPLATE = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}def "
MODEL, PROMPT = "tiny", "def main("
LOCAL, LIMITS = Access(), Limits()
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}


TEXT = {"prompt": PROMPT}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}


class Paced:
    """An executor each of whose calls takes some seconds more, or fails."""

    def __init__(self, executor: Executor) -> None:
        self.executor, self.seconds = executor, 0.0
        self.account = executor.account
        self.fails: Exception | None = None

    holds_all_texts = True

    @property
    def package(self) -> Package:
        return self.executor.package

    def number_requests(self, count: int) -> Array:
        return self.executor.number_requests(count)

    def new_caches(self, texts: int, room: int) -> list[Cache]:
        return self.executor.new_caches(texts, room)

    def decode(
        self, counts: Sequence[Array], caches: Sequence[Cache], requests: Array, lengths: Array
    ) -> Array:
        if self.fails:
            raise self.fails
        time.sleep(self.seconds)
        return self.executor.decode(counts, caches, requests, lengths)


@dataclass
class Running:
    """A server in a thread of the test, and what it serves."""

    service: Service
    executor: Paced
    port: int
    client: openai.OpenAI
    lenient: openai.OpenAI
    """For streams of completions: their chunks have `finish_reason` null until the last, from
    OpenAI too, and the client's type has no null."""

    def send(
        self, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, Any], dict[str, str]]:
        """The status, the object, and the headers of a response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body)
        headers = {"Content-Type": "application/json"} | headers
        with contextlib.closing(connection):
            connection.request("GET" if body is None else "POST", path, content, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read()), dict(response.headers)

    def post(self, path: str, body: Any) -> tuple[int, str]:
        """The status and the text of a response, which may be a stream."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json"}
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def metric(self, name: str, model: str = MODEL) -> float:
        text = generate_latest(self.service.families.registry).decode()
        (value,) = re.findall(rf'^moec:{name}{{model_name="{model}"}} (.*)$', text, re.MULTILINE)
        return float(value)


@contextlib.contextmanager
def serving(
    model: moec.LoadedModel,
    slots: int = 4,
    queue: int = 60,
    access: Access = LOCAL,
    limits: Limits = LIMITS,
    prefix_tokens: int = 0,
    recorded: bool = False,
    paced: type[Paced] = Paced,
    twin: str = "",
    pool_seconds: float = POOL_SECONDS,
) -> Iterator[Running]:
    """Serves a model, and with `twin` once more under that name, in an engine of its own."""
    executor = paced(model.executor)
    tokenizer = replace(model.tokenizer, template=ChatTemplate(TEMPLATE))
    engine = Engine(executor, slots, 512, prefix_tokens=prefix_tokens)
    routing = RoutingWatch(model.executor) if recorded else None
    families = MetricFamilies()
    service = Service(MODEL, "0123", engine, tokenizer, tokenizer.stop, queue, families, routing)
    models = {MODEL: service}
    if twin:
        other = Engine(model.executor, slots, 256)
        models[twin] = Service(twin, "4567", other, tokenizer, tokenizer.stop, queue, families)
    served = ServedModels(models, families, WorkPool(seconds=pool_seconds))
    server = Server(served, access, 0, limits)
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    port = listener.getsockname()[1]
    clients = [
        openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key="none",
            max_retries=0,
            timeout=60,
            _strict_response_validation=checks,
        )
        for checks in (True, False)
    ]
    running = Running(service, executor, port, *clients)
    try:
        until(lambda: server.started)
        yield running
    finally:
        for client in clients:
            client.close()
        server.should_exit = True
        thread.join()
    assert routing is None or not routing.counting
    assert service.used == 0
    if not service.worker.error:
        assert not engine.busy
        assert engine.cached == 0


def until(condition: Callable[[], Any], seconds: float = 20.0) -> float:
    """Waits for a condition; returns the seconds it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "the condition did not come true"
        time.sleep(0.002)
    return time.monotonic() - start


def exchange(port: int, request: str, seconds: float = 20.0) -> tuple[int, dict[str, str], bytes]:
    """The status, the headers in lower case, and the body of the answer to some bytes; status 0
    where the server ended the connection without one."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(request.encode("latin-1"))
        return received(connection, request.partition(" ")[0])


def received(connection: socket.socket, method: str) -> tuple[int, dict[str, str], bytes]:
    """As `exchange`, where the request was sent."""
    response = http.client.HTTPResponse(connection, method=method)
    try:
        response.begin()
    except (http.client.RemoteDisconnected, ConnectionResetError):
        return 0, {}, b""
    headers = {name.lower(): value for name, value in response.headers.items()}
    return response.status, headers, response.read()


def continuation(model: moec.LoadedModel, prompt: str, count: int, **options: Any) -> str:
    text: str = model.generate(prompt, max_new_tokens=count, **options)
    return text.removeprefix(prompt)


@contextlib.contextmanager
def process(path: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`moec serve` in a process, and its port."""
    command = [sys.executable, "-m", "moec", "serve", str(path), "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as child:
        try:
            assert child.stderr is not None
            line = child.stderr.readline()
            port = re.search(r"^tiny(?:, .*)? at http://127.0.0.1:(\d+)/v1$", line)
            if not port:
                child.kill()  # so that the rest of its words has an end
            assert port, line + child.stderr.read()
            yield child, int(port[1])
        finally:
            child.kill()
