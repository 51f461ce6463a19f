"""The routes of the server, as an ASGI application."""

from __future__ import annotations

import asyncio
import base64
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from moec.commands.serving.answer import Answer
from moec.commands.serving.errors import ERROR_HEADERS, ApiError, invalid
from moec.commands.serving.fields import json_body, read_embedding_fields, read_fields
from moec.commands.serving.openapi import document
from moec.commands.serving.page import page
from moec.commands.serving.service import ServedModels, Service
from moec.commands.serving.stats import stats
from moec.commands.serving.worker import SHUTTING_DOWN
from moec.errors import MoecError

MOST_BYTES = 8_000_000  # of a body
OPEN = ("/", "/health", "/ready", "/metrics", "/openapi.json")  # without a key
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass events on

Handler = Callable[[ServedModels, Request], Awaitable[Response]]


def application(served: ServedModels) -> Starlette:
    """The application; its lifespan is that of the engines' threads."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        for service in served.models.values():
            service.worker.start()
        yield
        for service in served.models.values():
            await asyncio.to_thread(service.worker.stop)

    posts: dict[str, Handler] = {
        "/v1/chat/completions": partial(_complete, chat=True),
        "/v1/completions": partial(_complete, chat=False),
        "/v1/embeddings": _embed,
        "/tokenize": _tokenize,
        "/detokenize": _detokenize,
    }
    gets: dict[str, Handler] = {
        "/v1/models": _models,
        "/v1/models/{model:path}": _models,
        "/": _page,
        "/v1/moec/stats": _stats,
        "/health": _health,
        "/ready": _ready,
        "/metrics": _metrics,
        "/openapi.json": _openapi,
    }
    routes = [Route(p, partial(_guarded, served, h), methods=["POST"]) for p, h in posts.items()]
    routes += [Route(p, partial(_guarded, served, h)) for p, h in gets.items()]
    handlers: Any = {ApiError: _error, HTTPException: _http_error, Exception: _defect}
    handlers[ClientDisconnect] = lambda *_: Response(status_code=499)
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


async def _guarded(served: ServedModels, handler: Handler, request: Request) -> Response:
    """Raises ApiError where the key is not the server's; compares in constant time."""
    if served.key is not None and request.url.path not in OPEN:
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(key.encode("latin-1"), served.key.encode()):
            rule = "the key is missing or wrong: send the header Authorization: Bearer KEY"
            raise ApiError(401, rule, code="invalid_api_key")
    return await handler(served, request)


async def _complete(served: ServedModels, request: Request, chat: bool) -> Response:
    if served.draining:
        raise ApiError(503, SHUTTING_DOWN)
    service, body = await _body(served, request)
    service.check_open()
    fields = read_fields(body, chat)
    use = await run_in_threadpool(service.tool_use, fields)
    prompts = await run_in_threadpool(service.tokens, fields, use)
    guide = await run_in_threadpool(service.guide, fields, use)
    service.check_open()  # again, as time has passed
    answer = Answer(service, fields, prompts, guide, chat, use)
    if fields.stream:
        return _Events(answer)
    work = asyncio.ensure_future(answer.complete())
    left = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(work.result()) if work.done() else Response(status_code=499)
    finally:
        answer.close("error" if work.done() else "abort")
        work.cancel()
        left.cancel()


async def _embed(served: ServedModels, request: Request) -> Response:
    service, body = await _body(served, request)
    service.check_open()
    if service.embed is None:
        raise invalid("model", service.no_embeddings)
    fields, data = read_embedding_fields(body), dict[int, Any]()
    service.admit(1)  # texts of a request are computed batch by batch, between the engine's steps
    try:
        texts = await run_in_threadpool(service.embedded_tokens, fields)
        async for index, vector in iterate_in_threadpool(service.embed(texts)):
            packed = base64.b64encode(vector.tobytes()).decode()
            shown = packed if fields.encoding_format == "base64" else vector.tolist()
            data[index] = {"object": "embedding", "index": index, "embedding": shown}
    except MoecError as error:
        raise invalid("input", str(error)) from error
    finally:
        service.used -= 1
    count = sum(map(len, texts))
    usage = {"prompt_tokens": count, "total_tokens": count}
    items = [data[index] for index in range(len(texts))]
    content = {"object": "list", "data": items, "model": service.model, "usage": usage}
    return JSONResponse(content)


class _Events(StreamingResponse):
    """A stream of events, whose texts end with it, however that comes."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.events(), media_type="text/event-stream", headers=HEADERS)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(served: ServedModels, request: Request) -> tuple[Service, dict[str, Any]]:
    """The body, and its model. Raises ApiError for one that is too long, no JSON object, or for a
    model that is not served."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MOST_BYTES:
            raise ApiError(413, f"the body has more than {MOST_BYTES} bytes: send a shorter one")
    body = json_body(bytes(content))
    return served.of(body.get("model")), body


async def _models(served: ServedModels, request: Request) -> Response:
    if name := request.path_params.get("model"):
        return JSONResponse(_model(served.of(name)))
    models = [_model(service) for service in served.models.values()]
    return JSONResponse({"object": "list", "data": models})


def _model(service: Service) -> dict[str, Any]:
    model = {"id": service.model, "object": "model", "created": service.created}
    return model | {"owned_by": "moec", "max_model_len": service.engine.room}


async def _tokenize(served: ServedModels, request: Request) -> Response:
    service, body = await _body(served, request)
    if "messages" in body:
        (tokens,) = await run_in_threadpool(service.tokens, read_fields(body, chat=True))
    else:
        tokens = await _checked(service.tokenizer.encode, body, "prompt")
    return JSONResponse({"tokens": tokens, "count": len(tokens)})


async def _detokenize(served: ServedModels, request: Request) -> Response:
    service, body = await _body(served, request)
    return JSONResponse({"prompt": await _checked(service.tokenizer.decode, body, "tokens")})


async def _checked(function: Callable[[Any], Any], body: dict[str, Any], field: str) -> Any:
    """The result of a function of a field. Raises ApiError where the function refuses it."""
    try:
        return await run_in_threadpool(function, body.get(field))
    except MoecError as error:
        raise invalid(field, str(error)) from error


async def _health(served: ServedModels, request: Request) -> Response:
    sick = [service for service in served.models.values() if not service.worker.healthy]
    words = [f"{s.model}: {s.worker.error or 'the engine is stuck'}" for s in sick]
    content = {"status": "; ".join(words) or "ok"}
    return JSONResponse(content, 503 if sick else 200)


async def _ready(served: ServedModels, request: Request) -> Response:
    return JSONResponse({"ready": served.ready}, 200 if served.ready else 503)


async def _metrics(served: ServedModels, request: Request) -> Response:
    content = generate_latest(served.families.registry)
    return Response(content, media_type=CONTENT_TYPE_PLAIN_0_0_4)


async def _page(served: ServedModels, request: Request) -> Response:
    return page()


async def _stats(served: ServedModels, request: Request) -> Response:
    service = served.of(request.query_params.get("model"))
    content = stats(service) | {"models": [*served.models]}
    return JSONResponse(content, headers={"Cache-Control": "no-store"})


async def _openapi(served: ServedModels, request: Request) -> Response:
    return JSONResponse(document([*served.models], served.key is not None))


async def _error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, ERROR_HEADERS.get(error.status))


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail.lower()}"
    return await _error(request, ApiError(error.status_code, message))


async def _defect(request: Request, error: Exception) -> Response:
    message = f"{type(error).__name__}: this is a bug in moec, and its log has the traceback"
    return await _error(request, ApiError(500, message))
