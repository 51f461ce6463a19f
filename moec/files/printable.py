"""Text for a terminal. Names and messages may come from an untrusted file, and a terminal executes
control characters, which could hide an error or fake one."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and newline, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # characters that reorder the text after them
    "\u2028\u2029]"
)


def printable(text: str) -> str:
    """The text with control characters as escapes, such as \\x1b; tabs and newlines stay."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def printable_json(text: str) -> str:
    """Equivalent JSON, with the control characters in its strings as \\u escapes."""
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def all_printable(content: Any) -> Any:
    """JSON-like content with each string `printable`."""
    if isinstance(content, str):
        return printable(content)
    if isinstance(content, Mapping):
        return {all_printable(key): all_printable(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(all_printable, content))
    return content


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]


def preformatted(text: str) -> str:
    """The text as HTML in a monospaced font, for notebooks; escaped, as names come from files."""
    return f"<pre>{html.escape(text)}</pre>"
