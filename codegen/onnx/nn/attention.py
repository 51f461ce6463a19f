"""nn.attention: ONNX's Attention if it has the same meaning, otherwise separate ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moec.codegen.onnx.profiles import FUSED
from moec.codegen.onnx.rules import Call, build
from moec.codegen.onnx.sizes import reshaped
from moec.codegen.onnx.writer import NodeWriter
from moec.errors import NoMatch
from moec.ir.aten import TORCH_DTYPES
from moec.ir.ops.dense.attention import SWAP, Attention
from moec.ir.sizes.dims import Dim


@build("nn.attention")
def attention(c: Call) -> str:
    a = Attention.of(c.op)
    if a.first is not None:
        raise NoMatch("queries with their own start position (a KV cache) have no ONNX form")
    square = a.causal and a.shape("q")[2] == a.shape("k")[2]
    plain = a.sinks is None and a.window is None and a.chunk is None
    output = _of_heads(c, a, square, plain)
    return c.w("Transpose", output, perm=SWAP) if "out" in a.tokens_first else output


def _of_heads(c: Call, a: Attention, square: bool, plain: bool) -> str:
    """The result [B, Hq, S, Dv], before any permutation."""
    if c.w.opset >= FUSED and plain and a.q.dtype != "f64" and (square or not a.causal):
        if a.mask is None:
            return _fused(c, a, "", square)
        visibility = _visibility(c.w, a)
        output = _fused(c, a, visibility.added, False)
        return c.w("Where", visibility.any, output, c.w.constant(0, a.q.dtype))
    return _written_out(c, a)


def _fused(c: Call, a: Attention, mask: str, causal: bool) -> str:
    inputs = [_operand(c, a, name) for name in "qkv"] + ([mask] if mask else [])
    return c.w("Attention", *inputs, scale=a.scale, is_causal=int(causal))


def _operand(c: Call, a: Attention, name: str, dtype: str | None = None) -> str:
    """q, k or v with the axis of heads before that of tokens, as ONNX requires."""
    read = c.read(getattr(a, name), dtype)
    return c.w("Transpose", read, perm=SWAP) if name in a.tokens_first else read


@dataclass(frozen=True)
class _Visibility:
    """The keys that a query sees. `added` is added to the scores: minus infinity for a hidden key.
    `any` says whether the query sees any key ([.., S, 1], bool); it is empty if every query
    does."""

    added: str
    any: str


def _visibility(w: NodeWriter, a: Attention) -> _Visibility:
    """All limits of attention combined, broadcastable to [B, Hq, S, L]. The writer shares equal
    nodes, so layers with the same limits share one mask."""
    dtype = a.q.dtype
    low, zero = w.constant(float("-inf"), dtype), w.constant(0, dtype)
    rule = _rule(w, a)
    if a.mask is None:
        certain = a.shape("q")[2] == a.shape("k")[2] or (a.causal and not (a.window or a.chunk))
        added = w("Where", rule, zero, low)
        return _Visibility(added, "" if certain else _any(w, rule))
    name = w.read(a.mask)
    if a.mask.dtype == "bool":
        allowed = w("And", name, rule) if rule else name
        return _Visibility(w("Where", allowed, zero, low), _any(w, allowed))
    added = _not_lowest(w, w.cast(name, a.mask.dtype, dtype), dtype)
    if rule:
        added = w("Where", rule, added, low)
    return _Visibility(added, _any(w, w("Greater", added, low)))


def _not_lowest(w: NodeWriter, added: str, dtype: str) -> str:
    """`added` with 7/8 of the least float in its place: a query whose keys all have the least float
    sees all alike, and ONNX Runtime takes it for one that sees none."""
    if dtype == "bf16":
        return added
    lowest = torch.finfo(TORCH_DTYPES[dtype]).min
    least = w("Equal", added, w.constant(lowest, dtype))
    return w("Where", least, w.constant(lowest * 0.875, dtype), added)


def _rule(w: NodeWriter, a: Attention) -> str:
    """The keys that causal, window and chunk allow, bool [S, L]; empty if none of these is set."""
    zero, one = w.constant(0), w.constant(1)
    queries, keys = a.shape("q")[2], a.shape("k")[2]
    query = w("Unsqueeze", w("Range", zero, w.scalar(queries), one), w.constant([1]))
    key = w("Range", zero, w.scalar(keys), one)
    rules = []
    if a.causal:
        rules.append(w("LessOrEqual", key, query))
    if a.window is not None:
        rules.append(w("Greater", key, w("Sub", query, w.constant(a.window))))
    if a.chunk is not None:
        size = w.constant(a.chunk)
        rules.append(w("Equal", w("Div", key, size), w("Div", query, size)))
    if not rules:
        return ""
    allowed = rules[0]
    for other in rules[1:]:
        allowed = w("And", allowed, other)
    return allowed


def _any(w: NodeWriter, allowed: str) -> str:
    count = w("ReduceMax", w.cast(allowed, "bool", "i32"), w.constant([-1]), keepdims=1)
    return w.cast(count, "i32", "bool")


def _written_out(c: Call, a: Attention) -> str:
    """softmax(q k.T scale + mask) v, with the query heads grouped by their key head:
    q [B, Hkv, G, S, Dk] by k [B, Hkv, 1, Dk, L], so that no key is copied."""
    w, dtype = c.w, a.q.dtype
    full = "f64" if dtype == "f64" else "f32"
    batch, heads, queries, width = a.shape("q")
    _, shared, keys, _ = a.shape("k")
    group = heads // shared if isinstance(heads, int) and isinstance(shared, int) else 1
    limited = a.mask is not None or a.causal or a.window is not None or a.chunk is not None
    q, k, v = (_operand(c, a, name, full) for name in "qkv")
    scores_shape: tuple[Dim, ...] = (batch, heads, queries, keys)
    if group > 1:
        q = reshaped(w, q, a.shape("q"), (batch, shared, group, queries, width))
        k, v = (w("Unsqueeze", name, w.constant([2])) for name in (k, v))
    turned = [0, 1, 2, 4, 3] if group > 1 else [0, 1, 3, 2]
    scaled = w("Mul", q, w.constant(a.scale, full))
    scores = w("MatMul", scaled, w("Transpose", k, perm=turned))
    if group > 1:
        scores = reshaped(w, scores, (batch, shared, group, queries, keys), scores_shape)
    visibility = _Visibility("", "")
    if limited:
        visibility = _visibility(w, a)
        scores = w("Add", scores, w.cast(visibility.added, dtype, full))
    if a.sinks is None:
        shares = w("Softmax", scores, axis=-1)
    else:
        sinks = reshaped(w, c.read(a.sinks, full), a.sinks.shape, (1, heads, 1, 1))
        column = w("Expand", sinks, w.shape((batch, 1, queries, 1)))
        both = w("Softmax", w("Concat", scores, column, axis=-1), axis=-1)
        shares = w("Slice", both, w.constant([0]), w.dim(keys), w.constant([-1]))
    if a.sinks is None and visibility.any:
        shares = w("Where", visibility.any, shares, w.constant(0, full))
    if group > 1:
        shares = reshaped(w, shares, scores_shape, (batch, shared, group, queries, keys))
    output = w("MatMul", shares, v)
    if group > 1:
        width = a.v.shape[3]
        grouped = (batch, shared, group, queries, width)
        output = reshaped(w, output, grouped, (batch, heads, queries, width))
    return w.cast(output, full, dtype)
