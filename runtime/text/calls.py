"""Calls of functions in what a model writes, in the form that its chat template teaches it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CallForm:
    """Calls are between `begin` and `end` ("": the end of the text), each as a JSON object with
    `name` and `arguments`; several calls between them where `listed`."""

    begin: str
    end: str
    listed: bool


FORMS = (
    CallForm("<tool_call>", "</tool_call>", listed=False),  # Hermes, Qwen, Granite 4
    CallForm("[TOOL_CALLS]", "", listed=True),  # Mistral
)
OTHERS = ("<function=", "<arg_key>")
"""Templates with these have the markers of a form, but no JSON between them."""


@dataclass(frozen=True)
class FunctionCall:
    """A call of a function; `arguments` is the JSON text of an object."""

    name: str
    arguments: str


def call_form(template: str) -> CallForm | None:
    """The form of calls of a chat template; None where it has none that is read here."""
    if "tools" not in template or any(other in template for other in OTHERS):
        return None
    return next((form for form in FORMS if form.begin in template), None)


def schema_of_call(form: CallForm, functions: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of one call of any of some functions, whose schemas are by name."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": parameters or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, parameters in functions.items()
    ]
    call = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {"type": "array", "items": call, "minItems": 1, "maxItems": 1} if form.listed else call


class CallReader:
    """Separates the calls in a text from its other characters, while it is written.

    Blanks beside calls are dropped. What is between the markers and is no call of one of
    `names` is text. With `inside`, the text begins after the marker of a call.
    """

    def __init__(self, form: CallForm, names: Collection[str], inside: bool = False) -> None:
        self._form, self._names, self._inside = form, names, inside
        self._held, self._after_call = "", False

    def feed(self, piece: str, ended: bool = False) -> tuple[str, list[FunctionCall]]:
        """The characters and the calls that become certain with a piece of the text."""
        self._held += piece
        text, calls = "", list[FunctionCall]()
        while (part := self._part(ended)) is not None:
            text += part[0]
            calls += part[1]
        return text, calls

    def _part(self, ended: bool) -> tuple[str, list[FunctionCall]] | None:
        """The next characters or calls of the text that is held; None where more is needed."""
        if self._inside:
            return self._call(ended)
        if self._after_call:
            self._held = self._held.lstrip()
        before, marker, after = self._held.partition(self._form.begin)
        if marker:
            self._inside, self._held = True, after
            return before.rstrip(), []
        if not ended:
            before = before[: len(before) - _overlap(before, self._form.begin)].rstrip()
        if not before:
            return None
        self._after_call, self._held = False, self._held[len(before) :]
        return before, []

    def _call(self, ended: bool) -> tuple[str, list[FunctionCall]] | None:
        begin, end = self._form.begin, self._form.end
        content, marker, after = self._held.partition(end) if end else (self._held, "", "")
        if not (marker or ended):
            return None
        self._inside, self._held = False, after
        calls = self._read(content)
        self._after_call = bool(calls)
        return ("", calls) if calls else (begin + content + marker, [])

    def _read(self, content: str) -> list[FunctionCall]:
        """The calls that are written between two markers; none where any is malformed."""
        try:
            written = json.loads(content)
        except (ValueError, RecursionError):
            return []
        calls = []
        for call in written if self._form.listed and isinstance(written, list) else [written]:
            if not (isinstance(call, dict) and call.get("name") in self._names):
                return []
            if not isinstance(arguments := call.get("arguments"), dict):
                return []
            calls.append(FunctionCall(call["name"], json.dumps(arguments, ensure_ascii=False)))
        return calls


def _overlap(text: str, marker: str) -> int:
    """The number of characters at the end of `text` that are a prefix of a marker."""
    return next((n for n in range(len(marker) - 1, 0, -1) if text.endswith(marker[:n])), 0)
