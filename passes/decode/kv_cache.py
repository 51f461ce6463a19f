"""A causal language model -> the same model for tokens that come in chunks, with caches.

    logits = f(input_ids[B, S])
    ->  logits, caches = g(input_ids[B, S], first[B], caches)

first[b] is the number of earlier tokens of sequence b. Each attention writes its keys and values
into a cache of L positions a sequence (nn.append) and attends to the cache; values computed from
the positions 0 .. S-1 are computed from first[b] + 0 .. S-1. A causal convolution keeps its last
inputs, and linear attention its recurrent state, in states that start with zeros.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Ref, State, TensorType, Value
from moec.ir.ops.dense.attention import Attention
from moec.ir.sizes.dims import Bounds, canonical, symbol
from moec.passes.core.rewrite import Builder, rebuild
from moec.passes.decode.chunk import Carry, ChunkRewrite, causal, rewrite_ops, tokens_of
from moec.passes.decode.emit import OpEmitter

FIRST = "first"
ROOM = "L"  # the size of the caches


def with_caches(graph: Graph) -> Graph:
    """The graph with caches. Raises NoMatch, naming the op, where tokens cannot come in chunks."""
    tokens, batch, sequence = tokens_of(graph)
    builder = Builder(graph)
    first = Value(builder.fresh(FIRST), TensorType("i64", (batch,)))
    carry: dict[str, Carry] = {
        "nn.attention": partial(_attention, first),
        "aten.convolution.default": _convolution,
        "nn.linear_attention": _linear_attention,
    }
    c = ChunkRewrite(graph, batch, sequence, builder, partial(_flat_positions, first), carry)
    rewrite_ops(c)
    grows = any(symbol(ROOM) in before.shape for before, _ in c.caches)
    stepped = replace(
        graph,
        inputs=(tokens, first, *(before for before, _ in c.caches)),
        states=tuple(State(before, after) for before, after in c.caches),
        bounds={**graph.bounds, ROOM: Bounds(1, None)} if grows else graph.bounds,
        name="step",
    )
    return rebuild(stepped, builder.ops, c.new)


def _flat_positions(first: Value, c: ChunkRewrite, like: Op) -> Value:
    """i64[B*S]: the position of each token."""
    b, s = c.batch, c.sequence
    e = OpEmitter(c.builder, like)
    count = e.op("arange.start_step", (), "i64", (s,), {"start": 0, "end": s})
    positions = e.op("add.Tensor", (e.reshape(first, (b, 1)), count), "i64", (b, s), {})
    return e.reshape(positions, (canonical(b * s),))


def _attention(first: Value, c: ChunkRewrite, op: Op) -> None:
    a = causal(c, op)
    keys, values = (_append(first, c, op, a, *names) for names in (("k", "keys"), ("v", "values")))
    sinks = None if a.sinks is None else c.new[a.sinks]
    attention = replace(a, q=c.new[a.q], k=keys, v=values, sinks=sinks, first=first)
    attention = attention.with_tokens_first({*a.tokens_first} - {"k", "v"})
    outputs = c.builder.emit("nn.attention", attention.inputs, like=op, attrs=attention.attrs())
    c.new |= dict(zip(op.outputs, outputs, strict=True))


def _convolution(c: ChunkRewrite, op: Op) -> None:
    """A causal convolution, padded by K - 1 for a kernel of length K and cut at the end. Its state
    is the last K - 1 inputs, zeros at first."""
    x, where = op.inputs[0], op.origin or op.outputs[0].name
    width = op.inputs[1].shape[-1]
    expected = {"stride": (1,), "dilation": (1,), "padding": (width - 1,), "transposed": False}
    cuts = c.graph.readers.get(op.outputs[0], ())
    causal = len(x.shape) == 3 and all(op.attrs.get(k) == v for k, v in expected.items())
    if not causal or x.shape[2] != c.sequence or not all(map(partial(_cut, c), cuts)):
        raise NoMatch(f"the convolution at {where} is not causal")
    assert isinstance(width, int)
    batch, channels, _ = x.shape
    before = _state(c, "inputs", TensorType(x.dtype, (batch, channels, width - 1)))
    e, long = OpEmitter(c.builder, op), canonical(c.sequence + width - 1)
    shape = (batch, channels, long)
    joined = e.op(
        "cat.default", [before, c.new[x]], x.dtype, shape, {"tensors": (Ref(0), Ref(1)), "dim": 2}
    )
    after = e.op(
        "slice.Tensor",
        [joined],
        x.dtype,
        before.shape,
        {"dim": 2, "start": c.sequence, "end": long},
    )
    c.caches.append((before, after))
    (output,) = c.builder.emit(
        op.name,
        [joined, *(c.new[value] for value in op.inputs[1:])],
        [TensorType(op.outputs[0].dtype, (*op.outputs[0].shape[:2], c.sequence))],
        like=op,
        attrs={**op.attrs, "padding": (0,)},
    )
    c.new |= {value: output for cut in cuts for value in cut.outputs}


def _cut(c: ChunkRewrite, op: Op) -> bool:
    """Whether an op slices the first S positions."""
    selection = (op.attrs.get("dim"), op.attrs.get("start", 0), op.attrs.get("step", 1))
    ends = op.attrs.get("end") == c.sequence
    return op.name == "aten.slice.Tensor" and selection == (2, 0, 1) and bool(ends)


def _linear_attention(c: ChunkRewrite, op: Op) -> None:
    """Linear attention with its recurrent state as a cache."""
    where = op.origin or op.outputs[0].name
    if op.attrs.get("started"):
        raise NoMatch(f"the linear attention at {where} starts from a state of the model itself")
    if op.inputs[0].shape[1] != c.sequence:
        raise NoMatch(f"the linear attention at {where} is over {op.inputs[0]}")
    before = _state(c, "carried", op.outputs[1].type)
    inputs = [c.new[value] for value in op.inputs]
    outputs = c.builder.emit(
        op.name, [*inputs, before], like=op, attrs={**op.attrs, "started": True}
    )
    c.new |= dict(zip(op.outputs, outputs, strict=True))
    c.caches.append((before, outputs[1]))


def _state(c: ChunkRewrite, name: str, type: TensorType) -> Value:
    return Value(c.builder.fresh(f"{name}_{len(c.caches)}"), type)


def _append(first: Value, c: ChunkRewrite, op: Op, a: Attention, operand: str, name: str) -> Value:
    """The cache of k or v, [B, heads, L, width], with the new tokens written."""
    value: Value = getattr(a, operand)
    batch, heads, _, width = a.shape(operand)
    type = TensorType(value.dtype, (batch, heads, symbol(ROOM), width))
    cache = Value(c.builder.fresh(f"{name}_{len(c.caches) // 2}"), type)
    (after,) = c.builder.emit(
        "nn.append",
        [cache, c.new[value], first],
        like=op,
        attrs={"tokens_first": True} if operand in a.tokens_first else {},
        named=f"{cache.name}_after",
    )
    c.caches.append((cache, after))
    return after
