"""Graphs of two artifacts get the same text where they are equal."""

from __future__ import annotations

from dataclasses import replace
from textwrap import indent

import pytest

from moec.inspect.comparison.compare import aligned
from moec.ir.graph import Graph, Stage
from moec.ir.interpret.verifier import verify
from moec.ir.text import parse, print_graph


def graph(lines: str, result: str) -> Graph:
    body = indent(lines, "  ")
    head = "graph main(x: f32[T, 8]) {\n  size T in [0, 8]\n"
    return parse(f"{head}{body}\n  return {result}\n}}\n")


A = graph(
    """a1: f32[T, 8] = aten.relu.default(x) @ one
a2: f32[T, 8] = aten.exp.default(a1) @ one
a3: f32[T, 8] = aten.neg.default(a2) @ two
a4: f32[T, 8] = aten.relu.default(a3) @ two""",
    "a4",
)
RENUMBERED = """a2: f32[T, 8] = aten.relu.default(x) @ one
a1: f32[T, 8] = aten.exp.default(a2) @ one
a4: f32[T, 8] = aten.neg.default(a1) @ two
a3: f32[T, 8] = aten.relu.default(a4) @ two"""


def ops(of: Graph) -> list[str]:
    return [line.strip() for line in print_graph(of).splitlines() if " = " in line]


def test_other_numbers_are_no_difference() -> None:
    one, two = aligned(A, graph(RENUMBERED, "a3"))
    assert print_graph(one) == print_graph(two) == print_graph(A)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        # An op instead of another: what reads its result is the same.
        ("aten.exp.default(a2)", "aten.sin.default(a2)", {"a2: f32[T, 8] = aten.sin.default(a1)"}),
        # One more op, with a name that the other graph has for another value.
        (
            "aten.exp.default(a2) @ one",
            "aten.exp.default(a2) @ one\na5: f32[T, 8] = aten.cos.default(a1) @ one\n"
            "a6: f32[T, 8] = aten.cos.default(a5) @ one",
            {"a5: f32[T, 8] = aten.cos.default(a2)", "a6: f32[T, 8] = aten.cos.default(a5)"},
        ),
        (
            "a4: f32[T, 8] = aten.neg.default(a1)",
            "a1_2: f32[8, T] = aten.permute.default(a1) <dims=(1, 0)> @ one\n"
            "a4: f32[T, 8] = aten.neg.default(a1)",
            {"a1_2: f32[8, T] = aten.permute.default(a2) <dims=(1, 0)>"},
        ),
    ],
)
def test_differences(before: str, after: str, expected: set[str]) -> None:
    assert before in RENUMBERED
    _, two = aligned(A, graph(RENUMBERED.replace(before, after), "a3"))
    verify(two, Stage.ATEN)
    assert {line.partition(" @ ")[0] for line in set(ops(two)) - set(ops(A))} == expected


def test_a_name_of_another_value_gets_a_prime() -> None:
    more = "a3: f32[8, T] = aten.permute.default(x) <dims=(1, 0)> @ zero\n"
    text = more + RENUMBERED.replace("a3", "a5")
    one, two = aligned(A, graph(text, "a5"))
    assert ops(two) == [
        '"a3\'": f32[8, T] = aten.permute.default(x) <dims=(1, 0)> @ zero',
        *ops(one),
    ]
    verify(two, Stage.ATEN)


def test_lines_of_either() -> None:
    """An op that only one of both has in a kernel gets its line."""
    other = graph(RENUMBERED, "a3")
    lines = ("", "m.py:2", "m.py:3", "")
    a = replace(A, ops=tuple(replace(op, line=n) for op, n in zip(A.ops, lines, strict=True)))
    lines = ("m.py:1", "n.py:2", "", "")
    b = replace(other, ops=tuple(replace(o, line=n) for o, n in zip(other.ops, lines, strict=True)))
    for each in aligned(a, b):
        assert [op.line for op in each.ops] == ["m.py:1", "m.py:2", "m.py:3", ""]
