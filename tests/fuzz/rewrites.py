"""Rewrites of captured graphs into equal forms: what a compiler must take as well."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from moec.ir.graph import DType, Graph, Op, Ref, TensorType, Value
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log
from tests.fuzz.judge import Outcome, Verdict, judge
from tests.fuzz.layer import Layer

FEW = 8
"""Loops over so many rows, and one-hot vectors of so many classes, are written out."""

New: TypeAlias = Callable[..., Value]
"""Appends an op: its name without "aten.", inputs, the shape of its result, and attributes."""
Rewrite: TypeAlias = Callable[[New, Op], Value | None]


def _new(
    builder: Builder, like: Op, name: str, inputs: Sequence[Value], shape: Any, /, **attrs: Any
) -> Value:
    dtype = attrs.pop("of", inputs[0].dtype if inputs else "i64")
    of = TensorType(dtype, tuple(shape))
    return builder.emit(f"aten.{name}", inputs, [of], like=like, attrs=attrs)[0]


def _few(size: object) -> range:
    """The rows of an axis that is written out; none where it has one, or many."""
    return range(size if isinstance(size, int) and 1 < size <= FEW else 0)


def commuted(new: New, op: Op) -> Value | None:
    of, two = op.outputs[0], len(op.inputs) == 2 and not op.attrs
    return new(op.name[5:], op.inputs[::-1], of.shape, of=of.dtype) if two else None


def as_product(new: New, op: Op) -> Value:
    (x, weight, *bias), shape = op.inputs, op.outputs[0].shape
    matrix = new("permute.default", [weight], weight.shape[::-1], dims=(1, 0))
    y = new("matmul.default", [x, matrix], shape)
    return new("add.Tensor", [y, *bias], shape) if bias else y


def in_halves(new: New, op: Op) -> Value | None:
    (x, *weights), (*rows, count) = op.inputs, op.outputs[0].shape
    parts = []
    for start, end in ((0, count // 2), (count // 2, count)):
        if start == end:
            return None
        cut = [
            new("slice.Tensor", [w], (end - start, *w.shape[1:]), dim=0, start=start, end=end)
            for w in weights
        ]
        parts.append(new("linear.default", [x, *cut], (*rows, end - start)))
    return new("cat.default", parts, (*rows, count), tensors=(Ref(0), Ref(1)), dim=len(rows))


def through_one_axis(new: New, op: Op) -> Value:
    flat, shape = (math.prod(op.outputs[0].shape),), op.outputs[0].shape
    row = new("reshape.default", op.inputs, flat, shape=flat)
    return new("reshape.default", [row], shape, shape=shape)


def by_exponentials(new: New, op: Op) -> Value | None:
    (x,), of, axis = op.inputs, op.outputs[0], op.attrs["dim"]
    if x.type != of.type or not isinstance(axis, int):
        return None
    axis, over = axis % len(of.shape), {"dim": (axis,), "keepdim": True}
    ones = (*of.shape[:axis], 1, *of.shape[axis + 1 :])
    less = new("sub.Tensor", [x, new("amax.default", [x], ones, **over)], of.shape)
    powers = new("exp.default", [less], of.shape)
    return new("div.Tensor", [powers, new("sum.dim_IntList", [powers], ones, **over)], of.shape)


def sum_in_a_loop(new: New, op: Op) -> Value | None:
    (x,), of, axes = op.inputs, op.outputs[0], op.attrs.get("dim")
    if not isinstance(axes, tuple) or len(axes) != 1 or x.dtype != of.dtype:
        return None
    axis = int(axes[0]) % len(x.shape)
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    total: Value | None = None
    for index in _few(x.shape[axis]):
        row = new("select.int", [x], shape, dim=axis, index=index)
        total = row if total is None else new("add.Tensor", [total, row], shape)
    return total and new("reshape.default", [total], of.shape, shape=of.shape)


def products_in_a_loop(new: New, op: Op) -> Value | None:
    rows, (count, *shape) = [], op.outputs[0].shape
    for index in _few(count):
        a, b = (new("select.int", [x], x.shape[1:], dim=0, index=index) for x in op.inputs)
        product = new("matmul.default", [a, b], shape)
        rows.append(new("reshape.default", [product], (1, *shape), shape=(1, *shape)))
    refs = tuple(map(Ref, range(len(rows))))
    return new("cat.default", rows, (count, *shape), tensors=refs, dim=0) if rows else None


def by_one_hot(new: New, op: Op) -> Value | None:
    (x, ids), (*rows, count) = op.inputs, op.inputs[0].shape
    last = op.attrs["dim"] in (-1, len(rows)) and [*ids.shape[:-1]] == rows
    if not last or not _few(count) or x.dtype not in ("f64", "f32", "bf16", "f16"):
        return None
    shape, column, row = (*ids.shape, count), (*ids.shape, 1), (*rows, 1, count)
    every = new("arange.start_step", [], (count,), start=0, end=count, dtype=DType("i64"))
    hot = new("reshape.default", [ids], column, shape=column)
    hot = new("eq.Tensor", [hot, every], shape, of="bool")
    zero = new("scalar_tensor.default", [], (), of=x.dtype, s=0.0, dtype=DType(x.dtype))
    x = new("reshape.default", [x], row, shape=row)
    picked = new("where.self", [hot, x, zero], shape, of=x.dtype)
    return new("sum.dim_IntList", [picked], ids.shape, dim=(-1,))


REWRITES: dict[str, tuple[Rewrite, Sequence[str]]] = {
    "commuted": (commuted, ("mul.Tensor", "add.Tensor", "eq.Tensor")),
    "product with a transposed": (as_product, ("linear.default",)),
    "product in halves": (in_halves, ("linear.default",)),
    "reshape through one axis": (through_one_axis, ("reshape.default",)),
    "softmax by exponentials": (by_exponentials, ("softmax.int",)),
    "loop for a sum": (sum_in_a_loop, ("sum.dim_IntList",)),
    "loop for a stack": (products_in_a_loop, ("bmm.default",)),
    "one-hot for gather": (by_one_hot, ("gather.default",)),
}


def rewritten(names: list[str], choose: random.Random, graph: Graph) -> Graph:
    """The graph after one to three rewrites that apply to it, with their names."""
    most = choose.randint(1, 3)
    names.clear()
    for name in choose.sample(list(REWRITES), len(REWRITES)):
        form, ops = REWRITES[name]
        targets = [op.outputs for op in graph.ops if op.name.removeprefix("aten.") in ops]
        if targets and len(names) < most:
            chosen = targets if choose.random() < 0.5 else [choose.choice(targets)]
            log = Log()
            graph = rewrite(graph, partial(_at, chosen, form), log)
            names += [name] if log.rewrites else []
    return graph


def _at(targets: Sequence[object], form: Rewrite, op: Op, builder: Builder) -> list[Value] | None:
    result = form(partial(_new, builder, op), op) if op.outputs in targets else None
    return None if result is None else [result]


def rewritten_layer(layer: Layer, name: str, folder: Path) -> tuple[Outcome, Verdict]:
    """The outcome of a layer's graph as it is, and that of a form of it, with its rewrites."""
    before, names = judge(layer, name, folder, form=lambda graph: graph), list[str]()
    form = partial(rewritten, names, random.Random(name))
    after = judge(layer, f"{name}_form", folder, form=form)
    return before.outcome, replace(after, words=f"{', '.join(names)}: {after.words}")
