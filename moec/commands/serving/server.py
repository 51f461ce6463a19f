"""uvicorn, with signals that let the texts under way end before the process does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator

import uvicorn

from moec.commands.output.echo import echo
from moec.commands.serving.access import Access
from moec.commands.serving.app import application
from moec.commands.serving.service import ServedModels
from moec.errors import UsageError
from moec.files.os_errors import reason

SIGNALS = (signal.SIGTERM, signal.SIGINT)
CLOSE_SECONDS = 5  # for the last bytes of answers that were cut


class Server(uvicorn.Server):
    """The first signal refuses new requests, waits up to `drain` seconds for those under way, and
    ends the rest with an error; the second ends the process."""

    def __init__(self, served: ServedModels, access: Access, drain: float) -> None:
        app, close = application(served, access), CLOSE_SECONDS
        super().__init__(
            uvicorn.Config(
                app, http="h11", ws="none", log_level="error", lifespan="on", proxy_headers=False,
                timeout_graceful_shutdown=close,
            )
        )  # fmt: skip
        self._served, self._drain = served, drain

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
        raise UsageError(f"--host {host} --port {port}: {reason(error)}") from error
