"""A causal language model is rewritten, op by op, to take tokens in chunks.

Token-wise ops stay. Values computed from the positions 0 .. S-1 are computed from positions that
the caller provides. For ops that mix tokens, the caller supplies a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import sympy

from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Value
from moec.ir.ops.dense.attention import Attention
from moec.passes.core.rewrite import Builder
from moec.passes.decode.emit import OpEmitter
from moec.passes.decode.positions import (
    ResizedTokens,
    broadcast_shape,
    counts_tokens,
    position_values,
)
from moec.passes.decode.tokenwise import require_tokenwise


@dataclass
class ChunkRewrite:
    """The state of the rewrite.

    `line` emits i64[B*S], the position of each token; `carry` has, by op name, the rules for ops
    that mix tokens. `caches` are the states between chunks: (before, after).
    """

    graph: Graph
    batch: sympy.Symbol
    sequence: sympy.Symbol
    builder: Builder
    line: Callable[[ChunkRewrite, Op], Value]
    carry: Mapping[str, Carry]
    new: dict[Value, Value] = field(default_factory=dict)
    caches: list[tuple[Value, Value]] = field(default_factory=list)
    positions: set[Value] = field(default_factory=set)
    shaped: dict[tuple[Value, tuple[object, ...]], Value] = field(default_factory=dict)


Carry = Callable[[ChunkRewrite, Op], None]
"""Rewrites an op that mixes tokens."""


def tokens_of(graph: Graph) -> tuple[Value, sympy.Symbol, sympy.Symbol]:
    """The one input i64[B, S], its batch and its sequence.

    Raises NoMatch if the graph has other inputs, or states.
    """
    if graph.states:
        raise NoMatch(f"the model has its own state, {graph.states[0].before.name}")
    if len(graph.inputs) != 1:
        names = ", ".join(value.name for value in graph.inputs)
        raise NoMatch(f"the model takes {names}, not only token ids")
    (tokens,) = graph.inputs
    named = all(isinstance(dim, sympy.Symbol) for dim in tokens.shape)
    if tokens.dtype != "i64" or len(tokens.shape) != 2 or not named:
        raise NoMatch(f"the model takes {tokens}, and not token ids i64[B, S] of any B and S")
    batch, sequence = tokens.shape
    assert isinstance(batch, sympy.Symbol)
    assert isinstance(sequence, sympy.Symbol)
    return tokens, batch, sequence


def rewrite_ops(c: ChunkRewrite) -> None:
    """Fills `c.builder`. Raises NoMatch, naming the op, where tokens cannot come in chunks."""
    graph, sequence = c.graph, c.sequence
    c.new |= {value: value for value in (*graph.inputs, *graph.params)}
    c.positions = position_values(graph, c.batch, sequence)
    line: Value | None = None
    flat = ResizedTokens(sequence, c.batch * sequence)
    for op in graph.ops:
        if op.name in ("moe.capacity", "moec.size"):
            raise NoMatch(f"{op.name} at {op.origin} depends on all tokens of a call")
        if op.outputs[0] in c.positions:
            if counts_tokens(op, sequence):
                line = line or c.line(c, op)
                c.new[op.outputs[0]] = line
                continue
            require_tokenwise(op, sequence.name)
            _emit(c, op, flat)
        elif op.name in c.carry:
            c.carry[op.name](c, op)
        elif all(value in c.new for value in op.outputs):
            continue
        else:
            require_tokenwise(op, sequence.name)
            inputs = [_read(c, op, value) for value in op.inputs]
            outputs = c.builder.append(replace(op, inputs=tuple(inputs)))
            c.new |= dict(zip(op.outputs, outputs, strict=True))
    if not c.caches:
        raise NoMatch("no attention of the model was recognised")


def _emit(c: ChunkRewrite, op: Op, stretch: ResizedTokens) -> None:
    types = [stretch.type(value.type) for value in op.outputs]
    outputs = c.builder.emit(
        op.name,
        [c.new[value] for value in op.inputs],
        types,
        like=op,
        attrs=stretch.attrs(op.attrs),
        body=op.body,
    )
    c.new |= dict(zip(op.outputs, outputs, strict=True))


def _read(c: ChunkRewrite, op: Op, value: Value) -> Value:
    if value not in c.positions:
        return c.new[value]
    shape = broadcast_shape(op, value, c.batch, c.sequence)
    key = (value, shape)
    if key not in c.shaped:
        c.shaped[key] = OpEmitter(c.builder, op).reshape(c.new[value], shape)
    return c.shaped[key]


def causal(c: ChunkRewrite, op: Op) -> Attention:
    """The attributes of a causal self-attention over S tokens. Raises NoMatch for any other."""
    a = Attention.of(op)
    where = op.origin or op.outputs[0].name
    if not a.causal:
        raise NoMatch(f"the attention at {where} is not causal")
    if a.mask is not None:
        raise NoMatch(f"the attention at {where} has an unsupported mask, {a.mask.name}")
    if (a.shape("q")[2], a.shape("k")[2]) != (c.sequence, c.sequence):
        raise NoMatch(f"the attention at {where} is between {a.q} and {a.k}")
    if a.q in c.positions or a.k in c.positions or a.v in c.positions:
        raise NoMatch(f"the attention at {where} reads positions only")
    if any(isinstance(a.shape(name)[1], sympy.Expr) for name in "qk"):
        raise NoMatch(f"the attention at {where} has no fixed number of heads")
    return a
