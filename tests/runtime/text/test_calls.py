"""Calls of functions in a text that comes in pieces."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.runtime.text.calls import FORMS, CallReader, FunctionCall, call_form, schema_of_call

JSON_FORM, LIST_FORM = FORMS
F, G = '{"name": "f", "arguments": {"x": 1}}', '{"name": "g", "arguments": {}}'
CALLS = {F: FunctionCall("f", '{"x": 1}'), G: FunctionCall("g", "{}")}


def read(text: str, cuts: list[int], form=JSON_FORM, inside: bool = False):
    reader = CallReader(form, ("f", "g"), inside)
    bounds = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    parts = [reader.feed(text[a:b]) for a, b in pairwise(bounds)]
    parts.append(reader.feed("", ended=True))
    return "".join(part for part, _ in parts), [call for _, calls in parts for call in calls]


CUTS = st.lists(st.integers(0, 200), max_size=30)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("no call, 1 < 2 <tool", "no call, 1 < 2 <tool", []),
        (f"<tool_call>\n{F}\n</tool_call>", "", [F]),
        (
            f"I call. \n<tool_call>{F}</tool_call>\n<tool_call>\n{G}</tool_call>\n",
            "I call.",
            [F, G],
        ),
        (f"<tool_call>{F}</tool_call> then text ", "then text ", [F]),
        (f"<tool_call>{F}", "", [F]),
        ("<tool_call>not JSON</tool_call>x", "<tool_call>not JSON</tool_call>x", []),
        (
            '<tool_call>{"name": "h", "arguments": {}}',
            '<tool_call>{"name": "h", "arguments": {}}',
            [],
        ),
        (f"<tool_call>[{F}]</tool_call>", f"<tool_call>[{F}]</tool_call>", []),
        (
            '<tool_call>{"name": "f", "arguments": 3}',
            '<tool_call>{"name": "f", "arguments": 3}',
            [],
        ),
        ('<tool_call>{"name": ["f"]}', '<tool_call>{"name": ["f"]}', []),
        ("", "", []),
    ],
)
@given(cuts=CUTS)
def test_calls_of_qwen(text, content, calls, cuts):
    assert read(text, cuts) == (content, [CALLS[call] for call in calls])


@given(CUTS)
def test_calls_of_mistral(cuts):
    assert read(f"Yes [TOOL_CALLS] [{F}, {G}]", cuts, LIST_FORM) == ("Yes", [CALLS[F], CALLS[G]])
    text = f"[TOOL_CALLS] [{F}, 3]"
    assert read(text, cuts, LIST_FORM) == (text, [])


@given(CUTS)
def test_a_text_that_begins_inside_a_call(cuts):
    assert read(f"{F}\n", cuts, inside=True) == ("", [CALLS[F]])


@given(st.text("ab <tool_call>/", max_size=40), CUTS)
def test_text_without_calls_is_not_lost(text, cuts):
    """But for blanks before a marker."""
    content, calls = read(text, cuts)
    assert not calls
    assert content.replace(" ", "") == text.replace(" ", "")


def test_forms_of_templates():
    qwen = "{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}"
    assert call_form(qwen) is JSON_FORM
    assert call_form("{% if tools %}[TOOL_CALLS]{% endif %}") is LIST_FORM
    assert call_form("{% if tools %}<tool_call><function=f>{% endif %}") is None
    assert call_form("<tool_call>") is None
    assert call_form("{{ tools }}") is None


def test_schemas():
    one = schema_of_call(JSON_FORM, {"f": {"type": "object", "properties": {"x": {}}}})
    assert one["properties"]["name"] == {"const": "f"}
    assert one["properties"]["arguments"] == {"type": "object", "properties": {"x": {}}}
    two = schema_of_call(LIST_FORM, {"f": {}, "g": {}})
    assert (two["type"], two["minItems"], two["maxItems"]) == ("array", 1, 1)
    assert [call["properties"]["name"]["const"] for call in two["items"]["anyOf"]] == ["f", "g"]
    json.dumps(two)
