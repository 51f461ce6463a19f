"""The routes of the server, as an ASGI application."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from moec.errors import MoecError
from moec.serving.access import Access
from moec.serving.answer import Answer
from moec.serving.errors import ApiError, invalid, response
from moec.serving.fields import (
    OF_CHATS,
    OF_TEXTS,
    EmbeddingFields,
    Fields,
    json_body,
    read_embedding_fields,
    read_fields,
)
from moec.serving.service import ServedModels, Service
from moec.serving.worker import SHUTTING_DOWN

REFERENCES = "#/components/schemas/{name}"
ERRORS = {
    "400": "a field is wrong, not known or not supported; error.param is its name",
    "401": "the key is missing or wrong",
    "403": "a page of a foreign origin sent the request",
    "404": "the model is not served here",
    "408": "the body did not come in time",
    "413": "the body is too long",
    "415": "the body's type is not application/json",
    "421": "the host is no name of this server",
    "429": "too many texts run or wait; Retry-After has the seconds",
    "500": "the model failed",
    "503": "the server is shutting down",
}
TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}}

SCHEMA = {"type": "object", "properties": {"schema": {"type": "object"}}, "required": ["schema"]}
OF_FORMATS: dict[str, dict[str, Any]] = {
    "text": {},
    "json_object": {},
    "json_schema": {"json_schema": SCHEMA},
    "regex": {"regex": {"type": "string"}},
}
FORMATS = [
    {"type": "object", "properties": {"type": {"const": kind}} | more, "required": ["type", *more]}
    for kind, more in OF_FORMATS.items()
]


def document(models: Sequence[str], keyed: bool) -> dict[str, Any]:
    """The document of a server of models; `keyed` where requests need a key."""
    _, components = msgspec.json.schema_components(
        [Fields, EmbeddingFields], ref_template=REFERENCES
    )
    every = components.pop("Fields")["properties"] | {"model": {"enum": [*models]}}
    every["response_format"] = {"anyOf": FORMATS}
    every["logit_bias"]["propertyNames"] = {"pattern": "^[0-9]+$"}
    count, flag = every["top_logprobs"], {"type": "boolean", "default": False}
    chat = {name: f for name, f in every.items() if name not in ("prompt", *OF_TEXTS)}
    chat["logprobs"] = flag
    text = {name: field for name, field in every.items() if name not in {*OF_CHATS, "top_logprobs"}}
    text["logprobs"] = count
    embedding = components.pop("EmbeddingFields")["properties"] | {"model": {"enum": [*models]}}
    tokenized = {"prompt": {"type": "string"}, "messages": every["messages"]}
    result: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "moec serve", "version": version("moec")},
        "paths": {
            "/v1/chat/completions": _post("Continue a chat", chat, "messages"),
            "/v1/completions": _post("Continue texts", text, "prompt"),
            "/v1/embeddings": _post("The vectors of texts", embedding, "input"),
            "/tokenize": _post("The tokens of a text or a chat", tokenized),
            "/detokenize": _post("The text of tokens", {"tokens": TOKENS}, "tokens"),
            "/v1/models": _get("The models"),
            "/v1/models/{model}": _get("A model", "model"),
            "/health": _get("Whether the model advances"),
            "/ready": _get("Whether another request would be accepted"),
            "/metrics": _get("Metrics for Prometheus"),
            "/v1/moec/stats": _get("The load, and the tokens of each expert by layer"),
        },
        "components": {"schemas": components},
    }
    if keyed:
        scheme = {"type": "http", "scheme": "bearer"}
        result["components"]["securitySchemes"] = {"key": scheme}
        result["security"] = [{"key": []}]
    return result


def _get(summary: str, parameter: str = "") -> dict[str, Any]:
    schema = {"name": parameter, "in": "path", "required": True, "schema": {"type": "string"}}
    return {"get": _operation(summary) | ({"parameters": [schema]} if parameter else {})}


def _post(summary: str, fields: dict[str, Any], *required: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": fields, "required": [*required]}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"post": _operation(summary) | {"requestBody": body}}


def _operation(summary: str) -> dict[str, Any]:
    errors = {code: {"description": text} for code, text in ERRORS.items()}
    return {"summary": summary, "responses": {"200": {"description": "done"}} | errors}


@cache
def _content() -> tuple[bytes, str]:
    """The file, and its Content-Security-Policy: the hashes of its style and its script."""
    content = Path(__file__).with_name("page.html").read_bytes()
    policy = ["default-src 'none'", "connect-src 'self'", "img-src data:"]
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), content, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        policy.append(f"{tag}-src 'sha256-{digest}'")
    policy += ["base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    return content, "; ".join(policy)


def page() -> Response:
    """The page, which has no secrets: it sends the key that its user types."""
    content, policy = _content()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(content, media_type="text/html; charset=utf-8", headers=headers)


def stats(service: Service) -> dict[str, Any]:
    """The object of GET /v1/moec/stats. `cache` is the share of the caches in use, 0 to 1."""
    load, routing = service.metrics.load, service.routing
    return {
        "model": service.model,
        "created": service.created,
        "chat": service.tokenizer.template is not None,
        "context": service.engine.room,
        "slots": service.engine.slots,
        "running": load.running,
        "waiting": load.waiting,
        "cache": round(load.cached, 4),
        "tokens_per_second": round(service.metrics.rate.value, 1),
        "experts": routing.read() if routing else None,
        "no_experts": None if routing else service.no_routing,
    }


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
