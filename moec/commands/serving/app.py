"""The routes of the server, as an ASGI application."""

from __future__ import annotations

import asyncio
import base64
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
from starlette.types import ASGIApp, Receive, Scope, Send

from moec.commands.serving.access import Access
from moec.commands.serving.answer import Answer
from moec.commands.serving.errors import ApiError, invalid, response
from moec.commands.serving.fields import json_body, read_embedding_fields, read_fields
from moec.commands.serving.openapi import document
from moec.commands.serving.page import page, stats
from moec.commands.serving.service import ServedModels, Service
from moec.commands.serving.worker import SHUTTING_DOWN
from moec.errors import MoecError

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass events on

Handler = Callable[[ServedModels, Request], Awaitable[Response]]


def application(served: ServedModels, access: Access) -> ASGIApp:
    """The application, behind `access`; its lifespan is that of the engines' threads."""

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
    }
    gets["/openapi.json"] = partial(_openapi, keyed=access.key is not None)
    routes = [Route(path, partial(h, served), methods=["POST"]) for path, h in posts.items()]
    routes += [Route(path, partial(h, served)) for path, h in gets.items()]
    handlers: Any = {ApiError: _error, HTTPException: _http_error, Exception: _defect}
    handlers[ClientDisconnect] = lambda *_: Response(status_code=499)
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False  # a path is one route's, or nothing
    return access.guard(app)


async def _complete(served: ServedModels, request: Request, chat: bool) -> Response:
    if served.draining:
        raise ApiError(503, SHUTTING_DOWN)
    service, body = await _body(served, request)
    service.check_open()
    fields = await served.pool.run(read_fields, body, chat)
    service.admit(fields.count)
    try:
        answer = await served.pool.run(Answer, service, fields, chat)
        service.check_open()  # again, as time has passed
        answer.begin()
    except BaseException:
        service.used -= fields.count
        raise
    if fields.stream:
        return _Events(answer)
    work = asyncio.ensure_future(answer.complete())
    left = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=499)
        return Response(work.result(), media_type="application/json")
    finally:
        answer.close("error" if work.done() else "abort")
        work.cancel()
        left.cancel()


async def _embed(served: ServedModels, request: Request) -> Response:
    service, body = await _body(served, request)
    service.check_open()
    if service.embed is None:
        raise invalid("model", service.no_embeddings)
    fields, data = await served.pool.run(read_embedding_fields, body), dict[int, Any]()
    service.admit(1)  # texts of a request are computed batch by batch, between the engine's steps
    try:
        texts = await served.pool.run(service.embedded_tokens, fields)
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
    return await run_in_threadpool(JSONResponse, content)


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
    """The body, and its model. Raises ApiError for one that is no JSON object, or for a model that
    is not served."""
    body = await served.pool.run(json_body, await request.body())
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
    return await served.pool.run(_tokenized, service, body)


def _tokenized(service: Service, body: dict[str, Any]) -> Response:
    name = "messages" if "messages" in body else "prompt"
    if name == "messages":
        (tokens,) = service.tokens(read_fields(body, chat=True))
    else:
        tokens = _checked(service.encode, body, name)
    if len(tokens) > (room := service.engine.room):
        raise invalid(name, f"it has {len(tokens)} tokens, and a text has at most {room}")
    return JSONResponse({"tokens": tokens, "count": len(tokens)})


async def _detokenize(served: ServedModels, request: Request) -> Response:
    service, body = await _body(served, request)
    text = await served.pool.run(_checked, service.tokenizer.decode, body, "tokens")
    return JSONResponse({"prompt": text})


def _checked(function: Callable[[Any], Any], body: dict[str, Any], field: str) -> Any:
    """The result of a function of a field. Raises ApiError where the function refuses it."""
    try:
        return function(body.get(field))
    except MoecError as error:
        raise invalid(field, str(error)) from error


async def _health(served: ServedModels, request: Request) -> Response:
    sick = {s.model: why for s in served.models.values() if (why := s.worker.sickness)}
    content = {"status": "; ".join(f"{name}: {why}" for name, why in sick.items()) or "ok"}
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


async def _openapi(served: ServedModels, request: Request, keyed: bool) -> Response:
    return JSONResponse(document([*served.models], keyed))


async def _error(request: Request, error: ApiError) -> Response:
    return response(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.scope['path']}: {error.detail.lower()}"
    return await _error(request, ApiError(error.status_code, message))


async def _defect(request: Request, error: Exception) -> Response:
    message = f"{type(error).__name__}: this is a bug in moec, and its log has the traceback"
    return await _error(request, ApiError(500, message))
