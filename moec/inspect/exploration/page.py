"""The page as one file: what is in web/, with data, and a policy by which nothing else runs."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path
from typing import Any


class PageText(str):
    """HTML; a notebook shows it in a frame."""

    def _repr_html_(self) -> str:
        frame = 'sandbox="allow-scripts allow-downloads" width="100%" height="800"'
        return f'<iframe {frame} srcdoc="{escape(self)}"></iframe>'


def page(data: Mapping[str, Any]) -> PageText:
    """The HTML, which loads nothing from elsewhere."""
    head, middle, tail = _parts()
    text = head + escape(str(data["title"])) + middle + script_json(data) + tail
    return PageText(text.encode("utf-8", "backslashreplace").decode())  # halves of surrogate pairs


def script_json(data: Any) -> str:
    """JSON that cannot close the surrounding script element, for any names in it; numbers that are
    not finite, which JSON lacks, are null."""
    text = json.dumps(_finite(data), separators=(",", ":"), ensure_ascii=False)
    return re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _finite(data: Any) -> Any:
    match data:
        case float():
            return data if math.isfinite(data) else None
        case dict():
            return {key: _finite(value) for key, value in data.items()}
        case list() | tuple():
            return [_finite(value) for value in data]
    return data


@cache
def _parts() -> tuple[str, str, str]:
    """page.html with the files that it names, cut where the title and the data go, with the hashes
    of its style and script; modules are one script, without their imports and exports."""
    folder = Path(__file__).with_name("web")
    content = "%page.html%"
    for _ in range(2):
        content = re.sub(r"%([a-z][\w./]+)%", lambda m: (folder / m[1]).read_text("utf-8"), content)
    content = re.sub(r"^(import .*?;\n|export )", "", content, flags=re.MULTILINE)
    policy = ["default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", content, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        policy.append(f"{tag}-src 'sha256-{digest}'")
    head, middle, tail = re.split("%TITLE%|%DATA%", content.replace("%POLICY%", "; ".join(policy)))
    return head, middle, tail
