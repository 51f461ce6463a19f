"""A causal language model -> the same model for tokens that come in pieces, with caches.

    logits = f(input_ids[B, S])
    ->  logits, caches = g(input_ids[B, S], first[B], caches)

first[b] says how many tokens of sequence b came before. Each attention writes its keys and
values into a cache of L places a sequence (nn.append) and attends to what the cache holds; what
was computed from the places 0 .. S-1 is computed from first[b] + 0 .. S-1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import sympy

from moec.errors import NoMatch
from moec.ir import Graph, Op, State, TensorType, Value
from moec.ops.attention import Attention
from moec.passes.incremental.emit import Emitter
from moec.passes.incremental.positions import Stretch, beside, is_line, of_places
from moec.passes.incremental.tokenwise import require_tokenwise
from moec.passes.rewrite import Builder, rebuild
from moec.sizes import Bounds, normal, symbol

FIRST = "first"
ROOM = "L"  # the size of the caches


@dataclass
class Caching:
    """The graph while it is rewritten."""

    graph: Graph
    batch: sympy.Symbol
    sequence: sympy.Symbol
    builder: Builder
    first: Value
    new: dict[Value, Value] = field(default_factory=dict)
    caches: list[tuple[Value, Value]] = field(default_factory=list)
    places: set[Value] = field(default_factory=set)
    shaped: dict[tuple[Value, tuple[object, ...]], Value] = field(default_factory=dict)


def tokens_of(graph: Graph) -> tuple[Value, sympy.Symbol, sympy.Symbol]:
    """The one input i64[B, S], its batch and its sequence.

    Raises NoMatch where the graph takes something else.
    """
    if graph.states:
        raise NoMatch(f"the model keeps a state of its own, {graph.states[0].before.name}")
    if len(graph.inputs) != 1:
        names = ", ".join(value.name for value in graph.inputs)
        raise NoMatch(f"the model takes {names}, and not token ids alone")
    (tokens,) = graph.inputs
    named = all(isinstance(dim, sympy.Symbol) for dim in tokens.shape)
    if tokens.dtype != "i64" or len(tokens.shape) != 2 or not named:
        raise NoMatch(f"the model takes {tokens}, and not token ids i64[B, S] of any B and S")
    batch, sequence = tokens.shape
    assert isinstance(batch, sympy.Symbol)
    assert isinstance(sequence, sympy.Symbol)
    return tokens, batch, sequence


def with_caches(graph: Graph) -> Graph:
    """Raises NoMatch, naming the op, where tokens cannot come in pieces."""
    tokens, batch, sequence = tokens_of(graph)
    builder = Builder(graph)
    first = Value(builder.fresh(FIRST), TensorType("i64", (batch,)))
    c = Caching(graph, batch, sequence, builder, first)
    c.new |= {value: value for value in (*graph.inputs, *graph.params)}
    c.places = of_places(graph, batch, sequence)
    line: Value | None = None
    flat = Stretch(sequence, batch * sequence)
    for op in graph.ops:
        if op.name in ("moe.capacity", "moec.size"):
            raise NoMatch(f"{op.name} at {op.origin} depends on all tokens of a call")
        if op.outputs[0] in c.places:
            if is_line(op, sequence):
                line = line or _line(c, op)
                c.new[op.outputs[0]] = line
                continue
            require_tokenwise(op, sequence.name)
            _emit(c, op, flat)
        elif op.name == "nn.attention":
            _attention(c, op)
        else:
            require_tokenwise(op, sequence.name)
            inputs = [_read(c, op, value) for value in op.inputs]
            made = builder.append(replace(op, inputs=tuple(inputs)))
            c.new |= dict(zip(op.outputs, made, strict=True))
    if not c.caches:
        raise NoMatch("the model has no attention that moec fused")
    stepped = rebuild(graph, builder.ops, c.new)
    return replace(
        stepped,
        inputs=(tokens, first, *(before for before, _ in c.caches)),
        states=tuple(State(before, after) for before, after in c.caches),
        bounds={**graph.bounds, ROOM: Bounds(1, None)},
        name="step",
    )


def _line(c: Caching, like: Op) -> Value:
    """i64[B*S]: where each token stands."""
    b, s = c.batch, c.sequence
    e = Emitter(c.builder, like)
    count = e.op("arange.start_step", (), "i64", (s,), {"start": 0, "end": s})
    places = e.op("add.Tensor", (e.reshape(c.first, (b, 1)), count), "i64", (b, s), {})
    return e.reshape(places, (normal(b * s),))


def _emit(c: Caching, op: Op, stretch: Stretch) -> None:
    types = [stretch.type(value.type) for value in op.outputs]
    made = c.builder.emit(
        op.name,
        [c.new[value] for value in op.inputs],
        types,
        like=op,
        attrs=stretch.attrs(op.attrs),
        body=op.body,
    )
    c.new |= dict(zip(op.outputs, made, strict=True))


def _read(c: Caching, op: Op, value: Value) -> Value:
    if value not in c.places:
        return c.new[value]
    shape = beside(op, value, c.batch, c.sequence)
    key = (value, shape)
    if key not in c.shaped:
        c.shaped[key] = Emitter(c.builder, op).reshape(c.new[value], shape)
    return c.shaped[key]


def _attention(c: Caching, op: Op) -> None:
    a = Attention.of(op)
    where = op.origin or op.outputs[0].name
    if not a.causal:
        raise NoMatch(f"the attention at {where} is not causal")
    if a.mask is not None:
        raise NoMatch(f"the attention at {where} has a mask of its own, {a.mask.name}")
    if (a.q.shape[2], a.k.shape[2]) != (c.sequence, c.sequence):
        raise NoMatch(f"the attention at {where} is between {a.q} and {a.k}")
    if a.q in c.places or a.k in c.places or a.v in c.places:
        raise NoMatch(f"the attention at {where} reads where tokens stand, and nothing else")
    if any(isinstance(v.shape[1], sympy.Expr) for v in (a.q, a.k)):
        raise NoMatch(f"the attention at {where} has no fixed number of heads")
    keys, values = (_append(c, op, value, name) for value, name in _kept(a))
    sinks = None if a.sinks is None else c.new[a.sinks]
    made = replace(a, q=c.new[a.q], k=keys, v=values, sinks=sinks, first=c.first)
    outputs = c.builder.emit("nn.attention", made.inputs, like=op, attrs=made.attrs())
    c.new |= dict(zip(op.outputs, outputs, strict=True))


def _kept(a: Attention) -> Iterator[tuple[Value, str]]:
    yield a.k, "keys"
    yield a.v, "values"


def _append(c: Caching, op: Op, value: Value, name: str) -> Value:
    batch, heads, _, width = value.shape
    type = TensorType(value.dtype, (batch, heads, symbol(ROOM), width))
    cache = Value(c.builder.fresh(f"{name}_{len(c.caches) // 2}"), type)
    (after,) = c.builder.emit(
        "nn.append", [cache, c.new[value], c.first], like=op, named=f"{cache.name}_after"
    )
    c.caches.append((cache, after))
    return after
