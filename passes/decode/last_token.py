"""Logits of some tokens per sequence: values that no cache needs are computed for those only.

    logits[B, S, V]  ->  logits[B, Q, V] of the tokens in rows rows[b, q] of the B*S tokens

Q is 1 where one token is drawn, and S where several guesses of it are verified. What caches or
convolutions need is computed for all tokens. The other ops (the last layer's experts, the norm, the
head) read Q consecutive rows per sequence; `last[b]` is the position of the first in its sequence.
Choices that layers share are sorted again, because the selected rows have another order by expert
than all rows.

Greedy decoding writes logits too: an argmax in the head could save only numpy's argmax. On an AMD
EPYC, that is 3 of 190 µs per token at V = 1,024 (tiny_moe, one thread), and 13 µs of 22 ms at V =
49,155 (a granite of 24 layers, two threads).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import sympy

from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, TensorType, Value
from moec.ir.ops.dense.attention import Attention
from moec.ir.ops.experts.dispatch import SORTS
from moec.ir.sizes.dims import Bounds, canonical, symbol
from moec.passes.core.rewrite import Builder, rebuild
from moec.passes.decode.emit import OpEmitter
from moec.passes.decode.positions import ResizedTokens
from moec.passes.decode.tokenwise import has_tokens

ROWS, LAST = "rows", "last"
QUERIES = "Q"


@dataclass
class Narrowing:
    """The state of the rewrite."""

    graph: Graph
    batch: sympy.Symbol
    sequence: sympy.Symbol
    builder: Builder
    rows: Value  # i64[B*Q]
    chosen: ResizedTokens
    last_rows: dict[Value, Value] = field(default_factory=dict)


def last_only(graph: Graph) -> Graph:
    """A graph of `with_caches` that takes rows i64[B, Q] and last i64[B], and gives [B, Q, V].

    Raises NoMatch if the logits are not of B by S tokens.
    """
    batch, sequence = graph.inputs[0].shape
    assert isinstance(batch, sympy.Symbol)
    assert isinstance(sequence, sympy.Symbol)
    (logits,) = graph.outputs
    if logits.shape[:2] != (batch, sequence) or len(logits.shape) != 3:
        raise NoMatch(f"the logits are {logits}, not one row per token")
    builder = Builder(graph)
    queries = symbol(QUERIES)
    rows, last = (
        Value(builder.fresh(name), TensorType("i64", shape))
        for name, shape in ((ROWS, (batch, queries)), (LAST, (batch,)))
    )
    flat = builder.reshape(rows, (canonical(batch * queries),), like=graph.ops[0], named=ROWS)
    n = Narrowing(graph, batch, sequence, builder, flat, ResizedTokens(sequence, queries))
    shared = _ops_of_all_tokens(graph)
    narrow: dict[Value, Value] = {}
    for op in graph.ops:
        if op in shared:
            builder.append(op)
            continue
        inputs = [narrow[v] if v in narrow else _take(n, op, v) for v in op.inputs]
        if op.name == "nn.attention":  # the first query of a text is at position `last`
            first = Attention.of(op).first
            inputs = [last if v is first else w for v, w in zip(op.inputs, inputs, strict=True)]
        narrow |= _narrow(n, op, inputs)
    if logits not in narrow:
        raise NoMatch(f"the logits {logits} are also stored in a cache")
    made_graph = rebuild(graph, builder.ops, {logits: narrow[logits]})
    tokens, first, *caches = graph.inputs
    return replace(
        made_graph,
        inputs=(tokens, first, rows, last, *caches),
        bounds={**made_graph.bounds, QUERIES: Bounds(1, None)},
    )


def _narrow(n: Narrowing, op: Op, inputs: Sequence[Value]) -> dict[Value, Value]:
    """Emits the op for Q tokens a sequence. Returns the new value of each output."""
    outputs = n.builder.emit(
        op.name,
        inputs,
        [n.chosen.type(value.type) for value in op.outputs],
        like=op,
        attrs=n.chosen.attrs(op.attrs),
        body=op.body,
        named=[value.name for value in op.outputs],
    )
    return dict(zip(op.outputs, outputs, strict=True))


def _is_sorted(graph: Graph, value: Value) -> bool:
    """Whether a value is the order of rows sorted by expert."""
    source = graph.producers.get(value)
    if source is not None and source.name == "aten.reshape.default":
        return _is_sorted(graph, source.inputs[0])
    return source is not None and source.name in SORTS


def _ops_of_all_tokens(graph: Graph) -> set[Op]:
    """Ops that new contents of caches depend on, or convolutions, which read earlier tokens too."""
    needed = {state.after for state in graph.states}
    ops: set[Op] = set()
    for op in reversed(graph.ops):
        if needed.intersection(op.outputs) or op.name == "aten.convolution.default":
            ops.add(op)
            needed.update(op.inputs)
    return ops


def _take(n: Narrowing, op: Op, value: Value) -> Value:
    """Q rows per sequence of a value with all tokens: [B, .., S, ..] or [B*S, ..]."""
    if value not in n.last_rows and _is_sorted(n.graph, value):
        source = n.graph.producers[value]
        n.last_rows |= _narrow(n, source, [_take(n, source, v) for v in source.inputs])
    if value in n.last_rows:
        return n.last_rows[value]
    if not has_tokens(value, n.sequence.name):
        return value
    e = OpEmitter(n.builder, op)
    axis = _token_axis(n, op, value)
    if axis == 0:
        n.last_rows[value] = e.rows(value, n.rows)
    else:
        order = (0, axis, *(a for a in range(1, len(value.shape)) if a != axis))
        first = e.permute(value, order)
        rest = first.shape[2:]
        picked = e.rows(e.reshape(first, (canonical(n.batch * n.sequence), *rest)), n.rows)
        back = tuple(map(order.index, range(len(order))))
        n.last_rows[value] = e.permute(e.reshape(picked, (n.batch, n.chosen.new, *rest)), back)
    return n.last_rows[value]


def _token_axis(n: Narrowing, op: Op, value: Value) -> int:
    """The axis of the tokens; 0 if it is an axis of batch times tokens."""
    if value.shape[0] == canonical(n.batch * n.sequence):
        return 0
    if value.shape[0] == n.batch and value.shape.count(n.sequence) == 1:
        return value.shape.index(n.sequence)
    raise NoMatch(f"{op.name} at {op.origin} reads {value}, which has no separate axis of tokens")
