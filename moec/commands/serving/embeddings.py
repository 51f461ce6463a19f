"""`/v1/embeddings`: the vectors of texts."""

from __future__ import annotations

import asyncio
import base64
from typing import Any, Literal

import msgspec

from moec.commands.serving.errors import invalid
from moec.commands.serving.fields import IGNORED, refusal
from moec.commands.serving.service import Service
from moec.errors import InputError, MoecError

DIMENSIONS = "embeddings have all dimensions of the model's hidden states: leave it out"


class EmbeddingFields(msgspec.Struct, forbid_unknown_fields=True):
    """A text, tokens, or a list of either."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"


async def embeddings(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """The answer. Raises ApiError, naming the field, for one that is wrong."""
    if service.embed is None:
        raise invalid("model", service.no_embeddings)
    present = {name: value for name, value in body.items() if name not in IGNORED}
    if "dimensions" in present:
        raise invalid("dimensions", DIMENSIONS)
    try:
        fields = msgspec.convert(present, EmbeddingFields)
    except msgspec.ValidationError as error:
        raise refusal(str(error)) from None
    given = fields.input
    if not given:
        raise invalid("input", "it is missing or empty")
    if not isinstance(given, str) and len({type(item) for item in given}) > 1:
        raise invalid("input", "give texts, or tokens, not both")
    alone = isinstance(given, str) or any(isinstance(item, int) for item in given)
    items, encode = [given] if alone else given, service.tokenizer.encode
    count, data = 0, []
    service.admit(1)  # texts of a request come one after the other, between the engine's steps
    try:
        for index, item in enumerate(items):
            tokens: Any = await asyncio.to_thread(encode, item) if isinstance(item, str) else item
            if len(tokens) > service.engine.room:
                room = f"a text has at most {service.engine.room}: shorten it"
                raise InputError(f"text {index} has {len(tokens)} tokens, and {room}")
            vector = await asyncio.to_thread(service.embed, tokens)
            packed = base64.b64encode(vector.tobytes()).decode()
            shown = packed if fields.encoding_format == "base64" else vector.tolist()
            data.append({"object": "embedding", "index": index, "embedding": shown})
            count += len(tokens)
    except MoecError as error:
        raise invalid("input", str(error)) from error
    finally:
        service.used -= 1
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": data, "model": service.model, "usage": usage}
