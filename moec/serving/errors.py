"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

LONGEST = 500  # characters of a message, which may repeat a request
KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
ERROR_HEADERS = {
    408: {"Connection": "close"},
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": "1"},  # seconds
    503: {"Retry-After": "1"},
}


@dataclass
class ApiError(Exception):
    """A request that is answered with an error. `param` is the field that is wrong."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None

    def __post_init__(self) -> None:
        self.message, self.param = _cut(self.message), self.param and _cut(self.param)

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, KINDS[500] if self.status > 500 else "invalid_request_error")
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}


def response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, ERROR_HEADERS.get(error.status))


def invalid(field: str, rule: str, code: str | None = None) -> ApiError:
    """The error of a field that breaks a rule."""
    return ApiError(400, f"{field}: {rule}", field, code)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
