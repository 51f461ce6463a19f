"""Serves one page to browsers of this machine."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from moec.errors import SetupError
from moec.files.os_errors import reason

HOST = "127.0.0.1"
SECONDS = 10.0  # for a request and its answer
MOST_THREADS = 64  # two for each connection


class PageServer(ThreadingHTTPServer):
    """Each connection has a thread, for a time."""

    def verify_request(self, request: object, client_address: object) -> bool:
        return threading.active_count() < MOST_THREADS


def page_server(html: str, port: int, seconds: float = SECONDS) -> PageServer:
    """A server of the page at /, bound to a port (0: a free one). Raises UsageError where the port
    cannot be used."""
    content = html.encode()

    class PageHandler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            end = threading.Timer(seconds, self.connection.shutdown, [socket.SHUT_RDWR])
            end.daemon = True
            end.start()
            with contextlib.suppress(OSError):
                super().handle()
            end.cancel()

        def do_GET(self) -> None:
            # A page of a stranger whose name leads to 127.0.0.1 has another Host.
            hosts = {host.partition(":")[0] for host in self.headers.get_all("Host", [""])}
            status = 403 if hosts - {HOST, "localhost"} else 200 if self.path == "/" else 404
            body = content if status == 200 else b""
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the terminal shows the address alone."""

    try:
        return PageServer((HOST, port), PageHandler)
    except OSError as error:
        raise SetupError(f"--port {port} cannot be used: {reason(error)}") from error


def serve(html: str, port: int, tell: Callable[[str], None]) -> None:
    """Serve until Ctrl-C; `tell` is called with the address."""
    with page_server(html, port) as server:
        tell(f"http://{HOST}:{server.server_port}/")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
