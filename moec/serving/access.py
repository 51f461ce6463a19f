"""Who may use the server: by which names it is reached, from pages of which origins, with which
key."""

from __future__ import annotations

import hmac
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from moec.errors import UsageError
from moec.serving.errors import ApiError, response

KEYLESS = ("/", "/health", "/ready")  # the page has no secrets: it sends the key of its user
ANY = "*"
AUTHORITY = re.compile(r"(?:\[([\da-f:.]+)\]|([\w.-]+?)\.?)(?::\d*)?", re.ASCII)
ORIGIN = re.compile(r"\*|null|[a-z][a-z\d+.-]*://[^/?#@\s]+", re.ASCII)


@dataclass(frozen=True)
class Access:
    """Whose requests are answered. A page of a stranger can send requests to this machine, and read
    the answers where its name leads here, so those with a foreign Host or Origin are refused."""

    address: str = "127.0.0.1"  # that is listened on
    names: frozenset[str] = frozenset()  # by which the server is reached, beside localhost
    origins: tuple[str, ...] = ()  # of pages that may use it, beside its own
    key: str | None = None

    def check(self, scope: Scope) -> None:
        """Raises ApiError for a request that is not to be answered. Nothing else reads the path
        before the routes do, and they read the same."""
        headers = Headers(scope=scope)
        host = ", ".join(headers.getlist("host"))
        if not self._is_own(host_name(host)):
            rule = "is no name of this server: moec serve --allowed-host NAME gives it one"
            raise ApiError(421, f"Host: {host[:100]!r} {rule}")
        if {"transfer-encoding", "content-length"} <= {*headers}:
            raise ApiError(
                400, "the body has a length and comes in chunks: send one of the headers"
            )
        for origin in headers.getlist("origin"):
            allowed = f"http://{host}", f"https://{host}", *self.origins
            if origin not in allowed and ANY not in allowed:
                rule = "moec serve --allow-origin ORIGIN lets pages of that origin use the server"
                raise ApiError(403, f"Origin: {origin[:100]!r} is another: {rule}")
        if self.key is not None and scope["path"] not in KEYLESS and not self._has_key(headers):
            rule = "the key is missing or wrong: send the header Authorization: Bearer KEY"
            raise ApiError(401, rule, code="invalid_api_key")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise ApiError(415, "the body must be JSON: send Content-Type: application/json")

    def _is_own(self, name: str) -> bool:
        if name in {"localhost", *self.names} or ANY in self.names:
            return True
        try:
            address, bound = ip_address(name), ip_address(self.address.partition("%")[0])
        except ValueError:
            return False
        # A page that was reached by an address is of that address: no name leads elsewhere.
        return address.is_loopback or bound.is_unspecified or address == bound

    def _has_key(self, headers: Headers) -> bool:
        """Compares bytes, in constant time; clients write keys in UTF-8."""
        right = (self.key or "").encode()
        scheme, _, key = headers.get("authorization", "").encode("latin-1").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(b" \t"), right)

    def guard(self, app: ASGIApp) -> ASGIApp:
        """`app` behind the checks. Pages of `origins` may read all answers, those of errors too."""

        async def checked(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                try:
                    self.check(scope)
                except ApiError as error:
                    return await response(error)(scope, receive, send)
            await app(scope, receive, send)

        if not self.origins:
            return checked
        return CORSMiddleware(
            checked, self.origins, allow_methods=("GET", "POST"), allow_headers=("*",),
            allow_private_network=True, expose_headers=("Retry-After",),
        )  # fmt: skip


def host_name(host: str) -> str:
    """The name or address of a header Host in lower case, without port and last dot, or ""."""
    match = AUTHORITY.fullmatch(host.lower())
    return (match[1] or match[2]) if match else ""


def read_access(
    listener: socket.socket,
    host: str,
    hosts: Sequence[str],
    origins: Sequence[str],
    key: str | None,
) -> Access:
    """The rules of a server that listens at `host`. Raises UsageError for an option that can never
    match."""
    for name in hosts:
        if name != ANY and not host_name(name):
            raise UsageError(f"--allowed-host {name}: give a name or an address, as in the URL")
    for origin in origins:
        if not ORIGIN.fullmatch(origin):
            rule = "give scheme, name and port, such as https://chat.example:8443, without a path"
            raise UsageError(f"--allow-origin {origin}: {rule}")
    if key is not None and not (key and key.isprintable() and key == key.strip()):
        raise UsageError("--api-key is empty, or has blanks around it or what cannot be printed")
    address, names = listener.getsockname()[0], {host, *hosts}
    if not ip_address(address.partition("%")[0]).is_loopback:
        names.add(socket.gethostname())  # others reach it by that
    readable = {ANY if name == ANY else host_name(name) for name in names}
    return Access(address, frozenset(readable - {""}), tuple(origins), key)
