"""The page at /: one file, with a policy by which a browser runs nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import Response


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
