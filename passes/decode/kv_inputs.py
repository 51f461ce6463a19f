"""A causal language model is rewritten to take past keys and values as inputs.

    logits = f(input_ids[B, S])
    ->  logits, present = g(input_ids[B, S], attention_mask[B, past + S], past_key_values)

The graph has no state. The logits are those of all tokens and keep their name; the other names are
those of Hugging Face's exporters: layer N takes `past_key_values.N.key` and `.value`
[B, heads, past, width] and returns `present.N.key` and `.value` [B, heads, past + S, width]; `past`
may be 0. attention_mask is 0 for padding, else 1; padding may be left, right or interleaved. The
position of a token is the number of unpadded tokens before it; it attends to these and itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

from moec.errors import NoMatch
from moec.ir.graph import Attr, Graph, Op, Ref, TensorType, Value
from moec.ir.ops.dense.attention import SWAP, Attention
from moec.ir.sizes.dims import Bounds, Dim, canonical, symbol
from moec.passes.core.rewrite import Builder, rebuild
from moec.passes.decode.chunk import Carry, ChunkRewrite, causal, rewrite_ops, tokens_of
from moec.passes.decode.emit import OpEmitter

MASK, PAST = "attention_mask", "past"


@dataclass
class Padded:
    """The mask, and the values computed from it so far, each emitted at its first use."""

    mask: Value
    memo: dict[object, Value] = field(default_factory=dict)


def with_past(graph: Graph) -> Graph:
    """The graph with past keys and values as inputs.

    Raises NoMatch, naming the op, where tokens cannot come in chunks, or the model has states
    other than keys and values.
    """
    tokens, batch, sequence = tokens_of(graph)
    builder = Builder(graph)
    total = canonical(sequence + symbol(PAST))
    padded = Padded(Value(builder.fresh(MASK), TensorType("i64", (batch, total))))
    carry: dict[str, Carry] = {
        "nn.attention": partial(_attention, padded),
        "aten.convolution.default": _refuse,
        "nn.linear_attention": _refuse,
    }
    c = ChunkRewrite(graph, batch, sequence, builder, partial(_flat_positions, padded), carry)
    rewrite_ops(c)
    stepped = replace(
        graph,
        inputs=(tokens, padded.mask, *(before for before, _ in c.caches)),
        outputs=(*graph.outputs, *(after for _, after in c.caches)),
        bounds={**graph.bounds, PAST: Bounds(0, None)},
    )
    return rebuild(stepped, builder.ops, c.new)


def _refuse(c: ChunkRewrite, op: Op) -> None:
    where = op.origin or op.outputs[0].name
    kind = "linear attention" if op.name == "nn.linear_attention" else "convolution"
    raise NoMatch(
        f"the {kind} at {where} carries a state from token to token, which padding would change"
    )


def _key_positions(padded: Padded, c: ChunkRewrite, like: Op) -> Value:
    """i64[B, past + S]: the position of each token in its text, -1 before the first."""
    if "standing" not in padded.memo:
        e, mask = OpEmitter(c.builder, like), padded.mask
        count = e.op("cumsum.default", [mask], "i64", mask.shape, {"dim": 1}, "standing")
        padded.memo["standing"] = e.op("sub.Tensor", [count], "i64", mask.shape, {"other": 1})
    return padded.memo["standing"]


def _queries(padded: Padded, c: ChunkRewrite, like: Op) -> Value:
    """i64[B, S]: the positions of the new tokens; -1 for padding before the first."""
    if "queries" not in padded.memo:
        standing, past = _key_positions(padded, c, like), symbol(PAST)
        attrs: dict[str, Attr] = {"dim": 1, "start": past, "end": standing.shape[1]}
        padded.memo["queries"] = OpEmitter(c.builder, like).op(
            "slice.Tensor", [standing], "i64", (c.batch, c.sequence), attrs, "queries"
        )
    return padded.memo["queries"]


def _flat_positions(padded: Padded, c: ChunkRewrite, like: Op) -> Value:
    """i64[B*S]: the position of each token; 0 for padding, which any table has."""
    queries, e = _queries(padded, c, like), OpEmitter(c.builder, like)
    positions = e.op("clamp.default", [queries], "i64", queries.shape, {"min": 0}, "places")
    return e.reshape(positions, (canonical(c.batch * c.sequence),))


def _visible(padded: Padded, c: ChunkRewrite, like: Op, a: Attention) -> Value:
    """bool[B, 1, S, past + S]: the tokens that each new token attends to."""
    limits = ("seen", a.window, a.chunk)
    if limits in padded.memo:
        return padded.memo[limits]
    e, standing = OpEmitter(c.builder, like), _key_positions(padded, c, like)
    key_shape: tuple[Dim, ...] = (c.batch, 1, 1, standing.shape[1])
    query_shape: tuple[Dim, ...] = (c.batch, 1, c.sequence, 1)
    shape = (*query_shape[:3], standing.shape[1])
    key = e.reshape(standing, key_shape)
    query = e.reshape(_queries(padded, c, like), query_shape)
    token = e.reshape(
        e.op("ne.Scalar", [padded.mask], "bool", standing.shape, {"other": 0}, "token"), key_shape
    )
    rules = [token, e.op("le.Tensor", [key, query], "bool", shape, {}, "before")]
    if a.window is not None:
        start = e.op("sub.Tensor", [query], "i64", query_shape, {"other": a.window})
        rules.append(e.op("gt.Tensor", [key, start], "bool", shape, {}, "near"))
    if a.chunk is not None:
        chunks = [
            e.op("floor_divide.Scalar", [value], "i64", value.shape, {"other": a.chunk})
            for value in (key, query)
        ]
        rules.append(e.op("eq.Tensor", chunks, "bool", shape, {}, "near"))
    mask, *others = rules
    for rule in others:
        mask = e.op("logical_and.default", [mask, rule], "bool", shape, {}, "seen")
    padded.memo[limits] = mask
    return mask


def _attention(padded: Padded, c: ChunkRewrite, op: Op) -> None:
    a = causal(c, op)
    layer = len(c.caches) // 2
    keys = _joined(c, op, a, "k", f"{layer}.key")
    values = _joined(c, op, a, "v", f"{layer}.value")
    attention = replace(
        a,
        q=c.new[a.q],
        k=keys,
        v=values,
        sinks=None if a.sinks is None else c.new[a.sinks],
        mask=_visible(padded, c, op, a),
        causal=False,
        window=None,
        chunk=None,
    ).with_tokens_first({*a.tokens_first} - {"k", "v"})
    outputs = c.builder.emit("nn.attention", attention.inputs, like=op, attrs=attention.attrs())
    c.new |= dict(zip(op.outputs, outputs, strict=True))


def _joined(c: ChunkRewrite, op: Op, a: Attention, operand: str, name: str) -> Value:
    value: Value = c.new[getattr(a, operand)]
    if operand in a.tokens_first:
        value = OpEmitter(c.builder, op).permute(value, SWAP)
    batch, heads, sequence, width = value.shape
    past = symbol(PAST)
    before = Value(
        c.builder.fresh(f"past_key_values.{name}"),
        TensorType(value.dtype, (batch, heads, past, width)),
    )
    (after,) = c.builder.emit(
        "aten.cat.default",
        [before, value],
        [TensorType(value.dtype, (batch, heads, canonical(sequence + past), width))],
        like=op,
        attrs={"tensors": (Ref(0), Ref(1)), "dim": 2},
        named=f"present.{name}",
    )
    c.caches.append((before, after))
    return after
