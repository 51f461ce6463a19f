"""uvicorn, with limits for what clients send, and with signals that let the texts under way end
before the process does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from moec.commands.output.echo import echo
from moec.errors import SetupError
from moec.files.os_errors import reason
from moec.serving.access import Access
from moec.serving.app import application
from moec.serving.errors import ApiError
from moec.serving.service import ServedModels

SIGNALS = (signal.SIGTERM, signal.SIGINT)
OTHER_FILES = 128  # that the process has open
CLOSE_SECONDS = 5  # for the last bytes of answers that were cut


@dataclass(frozen=True)
class Limits:
    """Of what clients send, and how long they may take for it."""

    head_bytes: int = 16_384  # a request's first line and its headers
    head_seconds: float = 10.0  # also of a connection without a request
    body_bytes: int = 8_000_000
    body_seconds: float = 10.0  # without a byte; in all, one more for each `slowest` bytes
    slowest: int = 128_000
    small_body: int = 65_536  # uncounted, so that large bodies do not keep small ones out
    all_bodies: int = 64_000_000  # of requests that are being read or answered
    unread_seconds: float = 60.0  # without any progress of an answer
    linger_seconds: float = 2.0  # for the rest of a request that was answered early
    connections: int = 1024  # beside those of texts


class Bodies:
    """An application that gets bodies within limits, in their size, their time and their sum."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits
        self._held = 0  # bytes of all requests, without `small_body` of each

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        limits, loop, size, ended = self._limits, asyncio.get_running_loop(), 0, False
        start = loop.time()
        announced = int(Headers(scope=scope).get("content-length", 0))

        async def read() -> Message:
            """Raises ApiError where the body is too long or too slow, or bodies are too many."""
            nonlocal size, ended
            if ended:
                return await receive()
            latest = min(start + size / limits.slowest, loop.time()) + limits.body_seconds
            try:
                async with asyncio.timeout_at(latest):
                    message = await receive() if announced <= limits.body_bytes else {}
            except TimeoutError:
                rule = f"is not complete, {size} bytes came: send it faster"
                raise ApiError(408, f"the body {rule}") from None
            before, size = size, size + len(message.get("body", b""))
            ended = not message.get("more_body", False)
            self._held += self._counted(size) - self._counted(before)
            if max(size, announced) > limits.body_bytes:
                rule = f"has more than {limits.body_bytes} bytes: send a shorter one"
                raise ApiError(413, f"the body {rule}")
            if self._held > limits.all_bodies and size > limits.small_body:
                raise ApiError(503, "other requests have too long bodies: retry later")
            return message

        try:
            await self._app(scope, read, send)
        finally:
            self._held -= self._counted(size)

    def _counted(self, size: int) -> int:
        return max(0, size - self._limits.small_body)


class Connection(H11Protocol):
    """A client's connection, which ends where the client is too slow; see `Limits`."""

    _state: tuple[Any, ...] = ()
    _since = 0.0
    _refused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Where there are too many, some of those end that have waited longest for a request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._since = time.monotonic()
        if len(self.connections) >= (self.limit_concurrency or math.inf):
            every = (c for c in self.connections if isinstance(c, Connection) and c is not self)
            waiting = sorted((c for c in every if c._waits), key=lambda c: c._since)
            for connection in waiting[: len(waiting) // 8 + 1]:
                connection.transport.abort()
                self.connections.discard(connection)  # now: requests count what is left

    def data_received(self, data: bytes) -> None:
        """In parts, so that the length of a head is noticed however it comes."""
        size = self.config.h11_max_incomplete_event_size or len(data)
        for start in range(0, len(data), size):
            if not self._refused:
                super().data_received(data[start : start + size])

    def send_400_response(self, msg: str) -> None:
        """Called by H11Protocol where it handles h11's error."""
        status = getattr(sys.exception(), "error_status_hint", 400)
        size = self.config.h11_max_incomplete_event_size
        self._refuse(status, f"its head has more than {size} bytes" if status == 431 else msg)

    @property
    def _waits(self) -> bool:
        return self.conn.their_state is h11.IDLE and not self.transport.is_closing()

    def _refuse(self, status: int, rule: str) -> None:
        """Answer what is no request, and ignore what still comes: a client that still sends would
        lose the answer if the connection ended at once."""
        self._refused = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                return self.transport.close()
        content = json.dumps(ApiError(status, rule).body).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        )
        head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        self.transport.write(head.encode() + content)
        self.transport.write_eof()

    def expire(self, limits: Limits) -> None:
        """End the connection if nothing has changed for as long as its client may take."""
        now, seconds = time.monotonic(), math.inf
        if self._refused:
            seconds = limits.linger_seconds
        elif self.flow.write_paused or self.transport.is_closing():
            seconds = limits.unread_seconds
        elif self._waits:
            seconds = limits.head_seconds
        elif self.conn.their_state is h11.SEND_BODY and self.cycle.response_complete:
            seconds = limits.linger_seconds
        left = self.transport.get_write_buffer_size()
        state = seconds, self.conn.their_state, self.cycle, left
        if state != self._state:
            self._state, self._since = state, self._since if not self._state else now
        elif now - self._since > seconds:
            if not self._waits or self._refused:
                self.transport.abort()
            elif self.conn.trailing_data[0]:
                self._refuse(408, "the head of the request is not complete")
            else:
                self.transport.close()


class Server(uvicorn.Server):
    """The first signal refuses new requests, waits up to `drain` seconds for those under way, and
    ends the rest with an error; the second ends the process."""

    def __init__(
        self, served: ServedModels, access: Access, drain: float, limits: Limits = Limits()
    ) -> None:
        texts = sum(service.places for service in served.models.values())
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        super().__init__(
            uvicorn.Config(
                Bodies(application(served, access), limits), http=Connection, ws="none",
                log_level="error", lifespan="on", proxy_headers=False,
                timeout_graceful_shutdown=CLOSE_SECONDS,
                h11_max_incomplete_event_size=limits.head_bytes,
                limit_concurrency=max(8, min(limits.connections + texts, files - OTHER_FILES)),
            )
        )  # fmt: skip
        self._served, self._drain, self._limits = served, drain, limits

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn each .1 s."""
        for connection in [*self.server_state.connections]:
            if isinstance(connection, Connection):
                connection.expire(self._limits)
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Replaces uvicorn's, which raises the signal again at the end: the exit code is 0."""
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():  # others get no signals
            for number in SIGNALS:
                loop.add_signal_handler(number, self._stop, number)
        yield

    def _stop(self, number: int) -> None:
        if self._served.draining:
            os._exit(128 + number)
        self._served.drain()
        self._task = asyncio.ensure_future(self._finish())  # the loop holds it but weakly
        texts, seconds = self._served.texts, self._drain
        with contextlib.suppress(OSError):  # nobody may read what the server says
            echo(f"shutting down: {texts} texts under way have {seconds:g} s", err=True)

    async def _finish(self) -> None:
        await self._until_idle(self._drain)
        for service in self._served.models.values():
            await asyncio.to_thread(service.worker.stop)
        await self._until_idle(CLOSE_SECONDS)
        self.should_exit = True

    async def _until_idle(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._served.texts:
                    await asyncio.sleep(0.02)


def listen(host: str, port: int) -> socket.socket:
    """A socket for connections; port 0 is any free one. Raises UsageError where it is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise SetupError(f"--host {host} --port {port}: {reason(error)}") from error
