"""Each rule of the table that decides whether a text may be decoded token by token: what it lets
through, and what it refuses, whichever operand has the tokens."""

from __future__ import annotations

import pytest

from moec.errors import NoMatch
from moec.ir.text import parse
from moec.passes.decode.tokenwise import require_tokenwise

GRAPH = """
graph main(x: f32[B, S, 4], ids: i64[B, S], line: i64[S], first: f32[B, 3, 4], rows: f32[S, 4],
           counts: i64[5], wide: f32[B, 4, S], pairs: f32[B, S, S];
           w: f32[4, 4], table: f32[5, 4], e: f32[5]) {
  size B in [1, inf]
  size S in [1, inf]
  OP
  return y
}"""

TOKENWISE = (
    "y: f32[B, S, 4] = aten.add.Tensor(x, x)",
    "y: f32[B, 4, S] = aten.permute.default(x) <dims=(0, 2, 1)>",
    "y: f32[B, S, 2, 2] = aten.reshape.default(x) <shape=({B}, {S}, 2, 2)>",
    "y: f32[B, S, 4] = aten.linear.default(x, w)",
    "y: f32[B, S, 4] = aten.softmax.int(x) <dim=-1>",
    "y: f32[B, S, 8] = aten.cat.default(x, x) <tensors=($0, $1), dim=-1>",
    "y: f32[B, S, 4] = aten.layer_norm.default(x) <normalized_shape=(4,)>",
    "y: f32[B, S, 8] = aten.repeat.default(x) <repeats=(1, 1, 2)>",
    "y: f32[B, S, 4] = aten.index.Tensor(table, ids) <indices=($1,)>",
    "y: f32[B, S, 4] = aten.embedding.default(table, ids)",
    "y: f32[S, 4] = aten.index_select.default(table, line) <dim=0>",
    "y: f32[S] = aten.gather.default(e, line) <dim=0>",
)
MIXES = (
    "y: f32[B, S, S, 1] = aten.reshape.default(pairs) <shape=({B}, {S}, {S}, 1)>",
    "y: f32[B, S, S] = aten.matmul.default(x, wide)",
    "y: f32[B, 4, 4] = aten.matmul.default(wide, x)",
    "y: f32[B, S, 4] = aten.softmax.int(x) <dim=1>",
    "y: f32[B, S, 4] = aten.cumsum.default(x) <dim=1>",
    "y: f32[B, 4] = aten.sum.dim_IntList(x) <dim=(1,)>",
    "y: f32[B, S + 3, 4] = aten.cat.default(first, x) <tensors=($0, $1), dim=1>",
    "y: f32[B, S + 3, 4] = aten.cat.default(x, first) <tensors=($0, $1), dim=1>",
    "y: f32[B, S, 4] = aten.flip.default(x) <dims=(1,)>",
    "y: f32[S, 4] = aten.layer_norm.default(rows) <normalized_shape=({S}, 4)>",
    "y: f32[B, 2*S, 4] = aten.repeat.default(x) <repeats=(1, 2, 1)>",
    "y: f32[B, S, 4] = aten.index.Tensor(rows, ids) <indices=($1,)>",
    "y: f32[B, S, 4] = aten.embedding.default(rows, ids)",
    "y: f32[S, 4] = aten.index_select.default(rows, line) <dim=0>",
    "y: f32[B, S, S] = aten.index_select.default(x, line) <dim=2>",
    "y: i64[5] = aten.scatter_add.default(counts, line, line) <dim=0>",
)


@pytest.mark.parametrize("op", TOKENWISE)
def test_tokenwise(op: str) -> None:
    require_tokenwise(parse(GRAPH.replace("OP", op)).ops[0], "S")


@pytest.mark.parametrize("op", MIXES)
def test_mixes_tokens(op: str) -> None:
    with pytest.raises(NoMatch, match=r"aten\..* at y mixes tokens"):
        require_tokenwise(parse(GRAPH.replace("OP", op)).ops[0], "S")


def test_an_op_without_a_rule() -> None:
    op = "y: f32[B, S, 4] = aten.roll.default(x) <shifts=(1,), dims=(1,)>"
    with pytest.raises(NoMatch, match="may mix tokens: no rule is known for this op"):
        require_tokenwise(parse(GRAPH.replace("OP", op)).ops[0], "S")
