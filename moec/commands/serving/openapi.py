"""The interface of the server, as an OpenAPI document."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import msgspec

from moec.commands.serving.fields import OF_CHATS, OF_TEXTS, EmbeddingFields, Fields

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
