"""A language model without its head."""

from __future__ import annotations

import pytest
import torch

from moec.errors import NoMatch
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.passes.decode.hidden_states import without_head

HEAD = """\
graph main(input_ids: i64[B, S]; table: f32[9, 4], w: f32[4, 4], head: f32[9, 4], cap: f32[]) {
  size B in [0, inf]
  size S in [1, 32]
  e: f32[B, S, 4] = aten.embedding.default(table, input_ids) @ model.tokens
  h: f32[B, S, 4] = aten.linear.default(e, w) @ model.norm
"""
TAIL = """\
  x: f32[B, S, 9] = aten.linear.default(h, head) @ head
  y: f32[B, S, 9] = aten.div.Tensor(x, cap) @ head
  z: f32[B, S, 9] = aten.tanh.default(y) @ head
  logits: f32[B, S, 9] = aten.mul.Tensor(z, cap) @ head
  return logits
}
"""
EXPECTED = """\
graph main(input_ids: i64[B, S]; table: f32[9, 4], w: f32[4, 4]) {
  size B in [0, inf]
  size S in [1, 32]
  e: f32[B, S, 4] = aten.embedding.default(table, input_ids) @ model.tokens
  h: f32[B, S, 4] = aten.linear.default(e, w) @ model.norm
  return h
}
"""


def program(text: str = HEAD + TAIL) -> Program:
    graph = parse(text)
    return Program(graph, {p.name: torch.ones([int(d) for d in p.shape]) for p in graph.params})


def test_what_the_head_reads() -> None:
    hidden = without_head(program())
    assert print_graph(hidden.graph) == EXPECTED
    assert set(hidden.weights) == {"table", "w"}
    (states,) = evaluate(hidden.graph, [torch.tensor([[1, 2]])], hidden.weights)
    assert states.tolist() == [[[4.0] * 4] * 2]


FLAT = """\
  f: f32[B*S, 4] = aten.reshape.default(h) <shape=({B*S}, 4)> @ head
  x0: f32[B*S, 9] = aten.linear.default(f, head) @ head
  x: f32[B, S, 9] = aten.reshape.default(x0) <shape=({B}, {S}, 9)> @ head
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEAD + TAIL.replace(TAIL.splitlines(keepends=True)[0], FLAT), "the head reads f: f32"),
        (EXPECTED, "the model returns no logits"),
    ],
)
def test_models_without_hidden_states(text: str, words: str) -> None:
    with pytest.raises(NoMatch, match=words):
        without_head(program(text))
