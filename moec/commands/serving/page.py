"""The page at /: one file, with a policy by which a browser runs nothing else; what it shows."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from starlette.responses import Response

from moec.commands.serving.service import Service


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
