"""Attention, as torch spells it and as our own op."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from tvm import relax

from moec.codegen.cpu.attention.attention import AttentionSpec, MaskSpec, attention
from moec.codegen.fusion import Group
from moec.codegen.module_builder import Lowering
from moec.codegen.rules.table import VECTOR_DTYPES, kernel
from moec.ir.aten import named
from moec.ir.dims import Dim
from moec.ir.graph import Op, TensorType, Value
from moec.ops.attention import Attention


def _attention_inputs(op: Op) -> Attention | None:
    """An attention of either spelling; None where the kernel cannot do it."""
    if op.name == "nn.attention":
        found = Attention.of(op)
    else:
        given = named(op)
        q, k, v, mask = given["query"], given["key"], given["value"], given["attn_mask"]
        if len(q.shape) != 4 or given["dropout_p"]:
            return None
        if q.shape[1] != k.shape[1] and not given["enable_gqa"]:
            return None
        width = q.shape[3]
        scale = given["scale"] if given["scale"] is not None else width**-0.5
        found = Attention(q, k, v, mask, None, float(scale), given["is_causal"], None, None)
    q, k, v = (found.shape(name) for name in "qkv")
    fixed = (d for shape in (q, k, v) for d in (shape[1], shape[3]))
    if not all(isinstance(d, int) for d in fixed) or found.q.dtype not in VECTOR_DTYPES:
        return None
    if found.mask is not None and found.mask.dtype not in ("bool", *VECTOR_DTYPES):
        return None
    same = found.q.dtype == found.k.dtype == found.v.dtype and q[0] == k[0] == v[0]
    return found if same and k[1:3] == v[1:3] else None


@kernel(
    "nn.attention",
    "aten.scaled_dot_product_attention.default",
    takes=lambda op, graph: _attention_inputs(op) is not None,
)
def _attention(low: Lowering, op: Op) -> list[relax.Expr]:
    a = cast(Attention, _attention_inputs(op))
    _, heads, _, width = a.shape("q")
    mask, causal, window, chunk = a.mask, a.causal, a.window, a.chunk
    # Beside a cache, a mask would be as long as the cache.
    if a.first is None and (window is not None or chunk is not None):
        mask, causal, window, chunk = visible_mask(low, op, a), False, None, None
    shape = () if mask is None else (*(1,) * (4 - len(mask.shape)), *mask.shape)
    spec = AttentionSpec(
        a.q.dtype,
        cast(int, heads),
        cast(int, a.shape("k")[1]),
        cast(int, width),
        cast(int, a.v.shape[3]),
        a.scale,
        causal,
        None if mask is None else MaskSpec(mask.dtype, cast(Any, tuple(d != 1 for d in shape))),
        a.sinks is not None,
        window=window,
        chunk=chunk,
        placed=a.first is not None,
        tokens_first=a.tokens_first,
    )
    function = low.function(spec, "attention", lambda name: attention(spec, low.target, name))
    arguments = [low.value(v) for v in (a.q, a.k, a.v)]
    if mask is not None:
        arguments.append(low.shaped(mask, TensorType(mask.dtype, shape)))
    if a.sinks is not None:
        arguments.append(low.value(a.sinks))
    if a.first is not None:
        arguments.append(low.value(a.first))
    low.note(op, "attention")
    return low.call(function, arguments, [op.outputs[0].type])


def visible_mask(low: Lowering, op: Op, a: Attention) -> Value:
    """What window, chunk and causality let a query see, joined with the mask that is given."""
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

    query, place = count(queries, (queries, 1)), count(keys, (1, keys))
    limits = []
    if a.causal:
        limits.append(emit("le.Tensor", (place, query), TensorType("bool", square)))
    if a.window is not None:
        edge = emit("sub.Scalar", (query,), query.type, other=a.window)
        limits.append(emit("gt.Tensor", (place, edge), TensorType("bool", square)))
    if a.chunk is not None:
        parts = [emit("floor_divide.Scalar", (v,), v.type, other=a.chunk) for v in (place, query)]
        limits.append(emit("eq.Tensor", parts, TensorType("bool", square)))
    seen = limits[0]
    for limit in limits[1:]:
        seen = emit("logical_and.default", (seen, limit), seen.type)
    inputs: tuple[Value, ...] = ()
    if a.mask is not None:
        shape = broadcast(a.mask.shape, square)
        type = TensorType(a.mask.dtype, shape)
        inputs = (a.mask,)
        if a.mask.dtype == "bool":
            seen = emit("logical_and.default", (a.mask, seen), type)
        else:
            seen = emit("where.ScalarOther", (seen, a.mask), type, other=-math.inf)
    low.values[seen] = low.group(Group(ops[-1], ops, inputs))[0]
    low.masks[key] = seen
    return seen


def broadcast(a: Sequence[Dim], b: Sequence[Dim]) -> tuple[Dim, ...]:
    rank = max(len(a), len(b))
    pairs = zip((*(1,) * (rank - len(a)), *a), (*(1,) * (rank - len(b)), *b), strict=True)
    return tuple(y if x == 1 else x for x, y in pairs)
