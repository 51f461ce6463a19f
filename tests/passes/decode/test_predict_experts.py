"""Guesses of the next layer's experts; layers without one, with a reason."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from moec.interpret.evaluate import evaluate
from moec.ir.graph import Graph, Program, Stage
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import PassResult, run
from moec.passes.decode.predict_experts import PredictExperts
from moec.pipeline import decode_passes

GATE = '<k=2, renormalize=true, dtype="f32", compute=f32, logits=f32>'
NORM = '<kind="rms", epsilon=1e-05, round_first=true>'
STEP = f"""\
graph step(h: f32[T, 8], a: f32[T, 8], b: f32[T, 8]; n0: f32[8], n1: f32[8], r0: f32[4, 8], \
r1: f32[4, 8], w0: f32[4, 8, 8], w1: f32[4, 8, 8]) {{
  size T in [0, inf]
  t: f32[T, 8], y: f32[T, 8] = nn.add_norm(h, a, n0) {NORM} @ layers.0
  w: f32[T, 2], i: i64[T, 2] = moe.gate(y, r0) {GATE} @ layers.0.gate
  order: i32[2*T], slots: i32[T, 2], ends: i32[4] = moe.sort(i) <num_experts=4> @ layers.0.experts
  p: f32[2*T, 8] = grouped.linear(y, ends, w0, order) <matrices=1, dtype=f32, gather=2> \
@ layers.0.experts
  c: f32[T, 8] = moe.combine(p, slots, w, t) <k=2, tokens={{T}}, dtype=f32, weighted=true, \
added=true> @ layers.0
  u: f32[T, 8], z: f32[T, 8] = nn.add_norm(c, b, n1) {NORM} @ layers.1
  s: f32[T, 8] = aten.add.Tensor(z, y) @ layers.1
  v: f32[T, 2], j: i64[T, 2] = moe.gate(z, r1) {GATE} @ layers.1.gate
  order_1: i32[2*T], slots_1: i32[T, 2], ends_1: i32[4] = moe.sort(j) <num_experts=4> \
@ layers.1.experts
  q: f32[2*T, 8] = grouped.linear(z, ends_1, w1, order_1) <matrices=1, dtype=f32, gather=2> \
@ layers.1.experts
  d: f32[T, 8] = moe.combine(q, slots_1, v, u) <k=2, tokens={{T}}, dtype=f32, weighted=true, \
added=true> @ layers.1
  return d
}}
"""


# the second layer computes some of the rows only, as the last one does
LAYERS = STEP.partition("  u: ")
SOME = re.sub(r"\bT\b", "Q", "".join(LAYERS[1:])).replace(
    "  u:", "  e: f32[Q, 8] = aten.index_select.default(c, rows) <dim=0> @ layers.1\n  u:"
)
SOME = LAYERS[0] + SOME.replace("(c, b, n1)", "(e, b, n1)").replace(
    "  s: f32[Q, 8] = aten.add.Tensor(z, y) @ layers.1\n", ""
)
SOME = SOME.replace("b: f32[T, 8]", "b: f32[Q, 8], rows: i64[Q]")
SOME = SOME.replace("  size T in [0, inf]\n", "  size T in [0, inf]\n  size Q in [0, inf]\n")


def predicted(graph: Graph) -> PassResult:
    return run(Program(graph, {}), [PredictExperts()], stage=Stage.GROUPED)[-1]


@pytest.mark.parametrize("text", [STEP, SOME], ids=["all", "some"])
def test_golden(text: str, golden: Callable[[str], None]) -> None:
    golden(print_graph(predicted(parse(text)).program.graph))


def test_no_result_depends_on_it() -> None:
    before = parse(STEP)
    after = predicted(before).program.graph
    inputs = [torch.randn(5, 8) for _ in before.inputs]
    weights = {p.name: torch.randn([int(str(d)) for d in p.shape]) for p in before.params}
    right, same = (evaluate(graph, inputs, weights) for graph in (before, after))
    assert torch.equal(right[0], same[0])


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            '(c, b, n1) <kind="rms", epsilon=1e-05, round_first=true>',
            '(c, b, n1) <kind="layer", epsilon=1e-05>',
            "z is a layer norm with a fused sum",
        ),
        ("moe.gate(z, r1)", "moe.gate(b, r1)", "the router of layers.1 reads b, an input of the"),
        ("moe.gate(z, r1)", "moe.gate(u, r1)", "reads u, of nn.add_norm, without a norm"),
        ("moe.gate(z, r1)", "moe.gate(c, r1)", "reads c, of moe.combine, without a norm"),
        ("moe.gate(z, r1)", "moe.gate(s, r1)", "the router of layers.1 reads 2 norms, and not o"),
    ],
)
def test_declined(old: str, new: str, reason: str) -> None:
    assert old in STEP
    check_declined(STEP.replace(old, new), reason)


def test_declined_rows() -> None:
    late = "  r: i64[Q] = aten.add.Tensor(rows, rows)\n  e:"
    check_declined(
        SOME.replace("  e:", late).replace("default(c, rows)", "default(c, r)"),
        "r is computed after the layer before",
    )
    check_declined(
        SOME.replace("index_select.default(c, rows) <dim=0>", "slice.Tensor(c) <dim=0, end={Q}>"),
        "e is f32[Q, 8], and the layer before has t, f32[T, 8]",
    )


def check_declined(text: str, reason: str) -> None:
    result = predicted(parse(text))
    assert result.rewrites == 0
    assert [reason in declined.reason for declined in result.declined] == [True]


def test_where_it_runs() -> None:
    assert PredictExperts() not in decode_passes()
    assert PredictExperts() in decode_passes(1, stored=True)
    assert PredictExperts() not in decode_passes(2, "-predict-experts", stored=True)
    assert PredictExperts() not in decode_passes(0, stored=True)
