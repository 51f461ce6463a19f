"""Writes out forced choices after the router's own choices.

    w', i' = moe.force(w, i, logits, forced) <k=2>
    ->
    missing = all(i != forced[:, None])
    i' = cat(i[:, :1], where(missing, forced, i[:, 1:]))
    w' = cat(w[:, :1], where(missing, gather(aten.softmax(logits), forced), w[:, 1:]))

All ops but the softmax are element-wise on T * k numbers, few compared with the T * D of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.ir.graph import Attr, Op, Program, Ref, TensorType, Value
from moec.ir.ops.routing.routing import Routing
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass


@dataclass(frozen=True)
class ExpandForced(Pass):
    """Write out the replacement of a token's last choice by a forced expert."""

    name: ClassVar[str] = "expand-forced"

    def run(self, program: Program, log: Log) -> Program:
        return Program(rewrite(program.graph, expand, log), program.weights)


def expand(op: Op, b: Builder) -> Sequence[Value] | None:
    if op.name != "moe.force":
        return None
    weights, experts, logits, forced = op.inputs
    tokens, k = experts.shape
    assert isinstance(k, int)
    column = b.cast(b.reshape(forced, (tokens, 1), like=op), "i64", like=op)
    other = TensorType("bool", experts.shape)
    (differs,) = b.emit("aten.ne.Tensor", [experts, column], [other], like=op)
    one = TensorType("bool", (tokens, 1))
    attrs: dict[str, Attr] = {"dim": 1, "keepdim": True}
    (missing,) = b.emit("aten.all.dim", [differs], [one], like=op, attrs=attrs)
    score = scores(Routing.of(op), logits, op, b)
    picked = TensorType(score.dtype, (tokens, 1))
    (weight,) = b.emit("aten.gather.default", [score, column], [picked], like=op, attrs={"dim": 1})
    weight = b.cast(weight, weights.dtype, like=op)
    return (
        last_replaced(weights, missing, weight, op, b),
        last_replaced(experts, missing, column, op, b),
    )


def scores(routing: Routing, logits: Value, op: Op, b: Builder) -> Value:
    """The scores f32 or f64[T, E] of all experts, from which the router takes its weights."""
    value = b.cast(logits, "f64" if logits.dtype == "f64" else "f32", like=op)
    if routing.score == "softmax":
        attrs: dict[str, Attr] = {"dim": 1}
        (value,) = b.emit("aten.softmax.int", [value], [value.type], like=op, attrs=attrs)
    elif routing.score == "sigmoid":
        (value,) = b.emit("aten.sigmoid.default", [value], [value.type], like=op)
    if routing.scale != 1.0:
        scale: dict[str, Attr] = {"other": routing.scale}
        (value,) = b.emit("aten.mul.Tensor", [value], [value.type], like=op, attrs=scale)
    return value


def last_replaced(value: Value, missing: Value, column: Value, op: Op, b: Builder) -> Value:
    """value[T, k] with its last column replaced by `column` [T, 1] if `missing` [T, 1] is set."""
    tokens, k = value.shape
    assert isinstance(k, int)
    one = TensorType(value.dtype, (tokens, 1))
    attrs: dict[str, Attr] = {"dim": 1, "start": k - 1, "end": k}
    (last,) = b.emit("aten.slice.Tensor", [value], [one], like=op, attrs=attrs)
    (last,) = b.emit("aten.where.self", [missing, column, last], [one], like=op)
    if k == 1:
        return last
    attrs = {"dim": 1, "start": 0, "end": k - 1}
    first = TensorType(value.dtype, (tokens, k - 1))
    (rest,) = b.emit("aten.slice.Tensor", [value], [first], like=op, attrs=attrs)
    attrs = {"tensors": (Ref(0), Ref(1)), "dim": 1}
    return b.emit("aten.cat.default", [rest, last], [value.type], like=op, attrs=attrs)[0]
