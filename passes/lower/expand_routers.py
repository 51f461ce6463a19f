"""Writes out routers of float64, whose kernels compute in float32.

    w, i = moe.route(logits: f64[T, E]) <k=2, renormalize>
    ->
    scores = aten.softmax(logits)
    _, order = aten.sort(scores)
    i = order[:, :2]
    w = gather(scores, i); w = w / sum(w)

Two logits that differ by less than 1e-7 would tie in float32, and other experts be chosen. The sort
is stable, so that of equal scores the lower id wins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.dtypes import HALVES
from moec.ir.graph import Attr, Op, Program, Ref, TensorType, Value
from moec.ir.opdef import inputs_of
from moec.ir.ops.routing.routing import Routing
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass


@dataclass(frozen=True)
class ExpandRouters(Pass):
    """Write out routers whose logits or correction are float64."""

    name: ClassVar[str] = "expand-routers"

    def run(self, program: Program, log: Log) -> Program:
        return Program(rewrite(program.graph, expand, log), program.weights)


def expand(op: Op, b: Builder) -> Sequence[Value] | None:
    if op.name != "moe.route":
        return None
    logits, correction = inputs_of(op).values()
    if "f64" not in {value.dtype for value in op.inputs}:
        return None
    routing, emit = Routing.of(op), _Emit(op, b)
    wide = b.cast(logits, "f64" if logits.dtype == "f64" else "f32", like=op)
    if routing.score == "sparsemixer":
        weights, experts = _sparsemixer(emit, routing, wide)
        return b.cast(weights, routing.dtype, like=op), experts
    scores = emit.rounded(emit.score(routing.score, wide), routing.score_dtype)
    choice = scores
    if correction is not None:
        choice = emit("add.Tensor", b.cast(scores, "f64", like=op), emit.cast(correction))
    choice = emit.rounded(choice, routing.choice_dtype)
    if routing.groups > 1:
        choice = _of_best_groups(emit, routing, choice)
    experts = emit.best(choice, routing.k)[1]
    weights = emit("gather.default", scores, experts, like=experts, dim=1)
    weights = emit.score(routing.after, weights)
    if routing.renormalize:
        total = emit.reduce("sum.dim_IntList", weights)
        if routing.epsilon:
            total = emit("add.Tensor", total, other=routing.epsilon)
        weights = emit("div.Tensor", weights, total)
    if routing.scale != 1.0:
        weights = emit("mul.Tensor", weights, other=routing.scale)
    return b.cast(weights, routing.dtype, like=op), experts


@dataclass(frozen=True)
class _Emit:
    """Emits ATen ops in place of `op`, whose result has the type of the first input, with the shape
    of `like`."""

    op: Op
    b: Builder

    def __call__(
        self, name: str, *inputs: Value, like: Value | None = None, dtype: str = "", **attrs: Attr
    ) -> Value:
        first = inputs[0]
        type_ = TensorType(dtype or first.dtype, (like or first).shape)
        return self.b.emit(f"aten.{name}", inputs, [type_], like=self.op, attrs=attrs)[0]

    def cast(self, x: Value) -> Value:
        return self.b.cast(x, "f64", like=self.op)

    def rounded(self, x: Value, dtype: str) -> Value:
        """x rounded to `dtype` if that has 16 bits, in its own dtype."""
        if dtype not in HALVES:
            return x
        return self.b.cast(self.b.cast(x, dtype, like=self.op), x.dtype, like=self.op)

    def score(self, score: str, x: Value) -> Value:
        if score == "softmax":
            return self("softmax.int", x, dim=1)
        return self("sigmoid.default", x) if score == "sigmoid" else x

    def best(self, x: Value, count: int) -> tuple[Value, Value]:
        """The `count` greatest of the last axis of x, and their indices, of equals the first."""
        axis = len(x.shape) - 1
        types = [x.type, TensorType("i64", x.shape)]
        attrs: dict[str, Attr] = {"stable": True, "dim": axis, "descending": True}
        values, ids = self.b.emit("aten.sort.stable", [x], types, like=self.op, attrs=attrs)
        few = (*x.shape[:-1], count)
        cut: dict[str, Attr] = {"dim": axis, "start": 0, "end": count}
        first, second = (
            self.b.emit(
                "aten.slice.Tensor", [v], [TensorType(v.dtype, few)], like=self.op, attrs=cut
            )[0]
            for v in (values, ids)
        )
        return first, second

    def reduce(self, name: str, x: Value, keepdim: bool = True) -> Value:
        """x without its last axis, or with 1 for it."""
        axis = len(x.shape) - 1
        shape = (*x.shape[:-1], 1) if keepdim else x.shape[:-1]
        dim: Attr = axis if name.endswith(".dim") else (axis,)
        attrs: dict[str, Attr] = {"dim": dim, "keepdim": keepdim}
        target = TensorType(x.dtype, shape)
        return self.b.emit(f"aten.{name}", [x], [target], like=self.op, attrs=attrs)[0]

    def chosen(self, ids: Value, count: int) -> Value:
        """ids[T, k] below `count` -> bool[T, count]: which of them are among a token's ids."""
        tokens, k = ids.shape
        line = TensorType("i64", (count,))
        (every,) = self.b.emit(
            "aten.arange.default", [], [line], like=self.op, attrs={"end": count}
        )
        each = self.b.reshape(ids, (tokens, 1, k), like=self.op)
        column = self.b.reshape(every, (count, 1), like=self.op)
        full = TensorType("bool", (tokens, count, k))
        (same,) = self.b.emit("aten.eq.Tensor", [each, column], [full], like=self.op)
        return self.reduce("any.dim", same, keepdim=False)


def _of_best_groups(emit: _Emit, routing: Routing, choice: Value) -> Value:
    """The scores that choose, with -infinity for the experts of all but the best groups."""
    tokens, count = choice.shape
    assert isinstance(count, int)
    size = count // routing.groups
    grouped = emit.b.reshape(choice, (tokens, routing.groups, size), like=emit.op)
    best = emit.best(grouped, 1 if routing.group_score == "max" else min(2, size))[0]
    sums = emit.rounded(emit.reduce("sum.dim_IntList", best, keepdim=False), routing.choice_dtype)
    groups = emit.best(sums, routing.top_groups)[1]
    mask = emit.chosen(groups, routing.groups)
    dropped = emit("logical_not.default", mask)
    column = emit.b.reshape(dropped, (tokens, routing.groups, 1), like=emit.op)
    grouped = emit("masked_fill.Scalar", grouped, column, value=-math.inf)
    return emit.b.reshape(grouped, choice.shape, like=emit.op)


def _sparsemixer(emit: _Emit, routing: Routing, logits: Value) -> tuple[Value, Value]:
    """Each choice is the greatest remaining logit; its weight is a softmax over the logits within
    2*jitter (relative) of it."""
    count = logits.shape[1]
    assert isinstance(count, int)
    left, weights, experts = logits, [], []
    size = emit("abs.default", logits)
    for _ in range(routing.k):
        greatest, chosen = emit.best(left, 1)
        factor = emit("maximum.default", size, greatest)
        distance = emit("div.Tensor", emit("sub.Tensor", greatest, logits, like=logits), factor)
        far = emit("gt.Scalar", distance, dtype="bool", other=2 * routing.jitter)
        near = emit("softmax.int", emit("masked_fill.Scalar", left, far, value=-math.inf), dim=1)
        weights.append(emit("gather.default", near, chosen, like=chosen, dim=1))
        experts.append(chosen)
        column = emit.chosen(chosen, count)
        left = emit("masked_fill.Scalar", left, column, value=-math.inf)
    return _joined(emit, weights), _joined(emit, experts)


def _joined(emit: _Emit, columns: Sequence[Value]) -> Value:
    if len(columns) == 1:
        return columns[0]
    many = TensorType(columns[0].dtype, (columns[0].shape[0], len(columns)))
    attrs: dict[str, Attr] = {"tensors": tuple(map(Ref, range(len(columns)))), "dim": 1}
    return emit.b.emit("aten.cat.default", columns, [many], like=emit.op, attrs=attrs)[0]
