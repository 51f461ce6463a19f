"""Attention, as torch's op and as moec's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from tvm import relax

from moec.codegen.backend import Rule, require
from moec.codegen.fusion import FusionGroup
from moec.codegen.module_builder import Lowering
from moec.codegen.specs.attention import AttentionSpec, MaskSpec
from moec.dtypes import VECTOR_DTYPES
from moec.ir.aten import named
from moec.ir.graph import Graph, Op, TensorType, Value
from moec.ir.ops.dense.attention import Attention
from moec.ir.sizes.dims import Dim


def attention_inputs(op: Op) -> Attention:
    """An attention of either op. Raises NoMatch if the kernel does not support it."""
    if op.name == "nn.attention":
        attention = Attention.of(op)
    else:
        arguments = named(op)
        q, k, v = arguments["query"], arguments["key"], arguments["value"]
        require(len(q.shape) == 4, f"its queries have {len(q.shape)} axes, not 4")
        require(not arguments["dropout_p"], "it drops probabilities")
        grouped = arguments["enable_gqa"] or q.shape[1] == k.shape[1]
        require(grouped, "its keys have other heads than its queries")
        scale = arguments["scale"] if arguments["scale"] is not None else q.shape[3] ** -0.5
        attention = Attention(
            q, k, v, arguments["attn_mask"], None, float(scale), arguments["is_causal"], None, None
        )
    q, k, v = (attention.shape(name) for name in "qkv")
    sizes = [d for shape in (q, k, v) for d in (shape[1], shape[3])]
    require(
        all(isinstance(d, int) for d in sizes),
        "the number or the width of its heads is not constant",
    )
    dtypes = {attention.q.dtype, attention.k.dtype, attention.v.dtype}
    require(dtypes <= set(VECTOR_DTYPES), f"it computes in {', '.join(sorted(dtypes))}")
    require(len(dtypes) == 1, "queries, keys and values differ in dtype")
    mask = attention.mask
    masked = mask is None or mask.dtype in ("bool", *VECTOR_DTYPES)
    require(masked, f"its mask is {mask.dtype if mask else None}")
    require(q[0] == k[0] == v[0] and k[1:3] == v[1:3], "keys and values differ in shape")
    return attention


def _check(op: Op, graph: Graph) -> None:
    attention_inputs(op)


def spec_of(a: Attention) -> AttentionSpec:
    """The spec of a kernel that computes window and chunk itself."""
    mask = None
    if a.mask is not None:
        full = tuple(d != 1 for d in _four_axes(a.mask))
        mask = MaskSpec(a.mask.dtype, cast(Any, full))
    return AttentionSpec(
        a.q.dtype,
        cast(int, a.shape("q")[1]),
        cast(int, a.shape("k")[1]),
        cast(int, a.shape("q")[3]),
        cast(int, a.v.shape[3]),
        a.scale,
        a.causal,
        mask,
        a.sinks is not None,
        window=a.window,
        chunk=a.chunk,
        placed=a.first is not None,
        tokens_first=a.tokens_first,
    )


def _four_axes(mask: Value) -> tuple[Dim, ...]:
    return (*(1,) * (4 - len(mask.shape)), *mask.shape)


def _attention(low: Lowering, op: Op) -> list[relax.Expr]:
    a = attention_inputs(op)
    # With a cache, a mask would be as long as the cache.
    if a.first is None and (a.window is not None or a.chunk is not None):
        mask = visible_mask(low, op, a)
        a = replace(a, mask=mask, causal=False, window=None, chunk=None)
    return call_attention(low, op, a, low.kernel(spec_of(a), "attention"), "attention")


def call_attention(
    low: Lowering, op: Op, a: Attention, function: Any, kernel: str
) -> list[relax.Expr]:
    """Calls the kernel (q, k, v, mask?, sinks?, first?, out)."""
    arguments = [low.value(v) for v in (a.q, a.k, a.v)]
    if a.mask is not None:
        arguments.append(low.shaped(a.mask, TensorType(a.mask.dtype, _four_axes(a.mask))))
    if a.sinks is not None:
        arguments.append(low.value(a.sinks))
    if a.first is not None:
        arguments.append(low.value(a.first))
    low.note(op, kernel)
    return low.call(function, arguments, [op.outputs[0].type])


def visible_mask(low: Lowering, op: Op, a: Attention) -> Value:
    """The mask of window, chunk and causality, bool [S, L], combined with the op's own mask (bool:
    and; float: added, -inf where it is False). Cached in `low.masks`."""
    queries, keys = a.shape("q")[2], a.shape("k")[2]
    key = (queries, keys, a.causal, a.window, a.chunk, a.mask)
    if key in low.masks:
        return low.masks[key]
    square: tuple[Dim, ...] = (queries, keys)
    ops: list[Op] = []

    def emit(name: str, inputs: Sequence[Value], type: TensorType, **attrs: Any) -> Value:
        value = Value(f"{op.outputs[0].name}_visible{len(ops)}", type)
        ops.append(Op(f"aten.{name}", tuple(inputs), (value,), attrs))
        return value

    def count(size: Dim, shape: tuple[Dim, ...]) -> Value:
        line = emit("arange.default", (), TensorType("i64", (size,)), end=size)
        return emit("view.default", (line,), TensorType("i64", shape), size=shape)

    query, position = count(queries, (queries, 1)), count(keys, (1, keys))
    limits = []
    if a.causal:
        limits.append(emit("le.Tensor", (position, query), TensorType("bool", square)))
    if a.window is not None:
        edge = emit("sub.Scalar", (query,), query.type, other=a.window)
        limits.append(emit("gt.Tensor", (position, edge), TensorType("bool", square)))
    if a.chunk is not None:
        parts = [
            emit("floor_divide.Scalar", (v,), v.type, other=a.chunk) for v in (position, query)
        ]
        limits.append(emit("eq.Tensor", parts, TensorType("bool", square)))
    visible = limits[0]
    for limit in limits[1:]:
        visible = emit("logical_and.default", (visible, limit), visible.type)
    inputs: tuple[Value, ...] = ()
    if a.mask is not None:
        shape = broadcast(a.mask.shape, square)
        type = TensorType(a.mask.dtype, shape)
        inputs = (a.mask,)
        if a.mask.dtype == "bool":
            visible = emit("logical_and.default", (a.mask, visible), type)
        else:
            visible = emit("where.ScalarOther", (visible, a.mask), type, other=-math.inf)
    low.values[visible] = low.group(FusionGroup(ops[-1], ops, inputs))[0]
    low.masks[key] = visible
    return visible


def broadcast(a: Sequence[Dim], b: Sequence[Dim]) -> tuple[Dim, ...]:
    rank = max(len(a), len(b))
    pairs = zip((*(1,) * (rank - len(a)), *a), (*(1,) * (rank - len(b)), *b), strict=True)
    return tuple(y if x == 1 else x for x, y in pairs)


OPS = ("nn.attention", "aten.scaled_dot_product_attention.default")
RULES = (Rule("attention", OPS, _check, _attention),)
