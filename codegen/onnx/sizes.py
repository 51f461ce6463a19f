"""Shapes as tensors: short reshapes, and guards for the limits of named sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

from moec.codegen.onnx.writer import NodeWriter
from moec.errors import NoMatch, UnsupportedError
from moec.ir.graph import Graph, Value
from moec.ir.sizes.dims import Bounds, Dim, parse_dim, symbols

_INVALID = -2
"""An axis that Reshape rejects; -1 is inferred."""


def reshaped(w: NodeWriter, x: str, have: Sequence[Dim], want: Sequence[Dim]) -> str:
    """`x` in another shape. Reshape infers one varying size (-1) and copies a size that keeps its
    axis (0). The shape is computed only if that is not enough."""
    have, want = [w.bound(d) for d in have], [w.bound(d) for d in want]
    if have == want:
        return x
    shape: list[int] = []
    for axis, dim in enumerate(want):
        if isinstance(dim, int):
            shape.append(dim)
        elif axis < len(have) and have[axis] == dim and not _may_be_zero(w, dim):
            shape.append(0)
        else:
            shape.append(-1)
    if shape.count(-1) <= 1 and 0 not in want:
        return w("Reshape", x, w.constant(shape))
    return w("Reshape", x, w.shape(want), allowzero=1)


def _may_be_zero(w: NodeWriter, dim: Any) -> bool:
    """Whether the size may be 0: then Reshape cannot infer -1 beside a copy of it."""
    return any(w.graph.bounds.get(name, Bounds()).low < 1 for name in symbols(dim))


def guard_sizes(w: NodeWriter) -> None:
    """Guards the inputs of `w.graph`, whose names are those of the file: what reads them later
    fails at sizes beyond the graph's bounds, and where axes differ that must be equal.

        S in [0, 99], and y has as many rows as x:

        ok        = And(LessOrEqual(S, 99), Equal(Shape(y)[0], S))
        guarded_x = Reshape(x, Where(ok, Shape(x), -2))

    ONNX has no operator that fails on a condition, and an index out of range is no error on every
    device. Shapes are read by the CPU on all of them, and none may have an axis of -2. The name of
    the Reshape is the rule, because runtimes name the node that fails.

    Raises UnsupportedError for bounds of a size that no input has as an axis.
    """
    for value in w.graph.inputs:
        w.learn(value)
    try:
        conditions = dict((*_in_bounds(w), *_equal_axes(w)))
    except NoMatch as reason:
        raise UnsupportedError(f"the model cannot be exported to ONNX: {reason}") from None
    if not conditions:
        return
    ok = reduce(lambda a, b: w("And", a, b), conditions.values())
    for value in _guarded(w.graph):
        w.where = f"{value.name}, where {' and '.join(conditions)}"
        shape = w("Where", ok, w("Shape", w.names[value]), w.constant([_INVALID]))
        w.names[value] = w("Reshape", w.names[value], shape)
    w.where = ""
    w.sizes.clear()


def _in_bounds(w: NodeWriter) -> Iterator[tuple[str, str]]:
    """The text of each bound of sizes that are axes of inputs, and the name of its bool[1]."""
    axes = {name for v in w.graph.inputs for dim in v.shape for name in symbols(dim)}
    for text, limits in w.graph.bounds.items():
        size = parse_dim(text)
        if limits == Bounds() or not symbols(size) <= axes:
            continue
        if limits.low > 0:
            yield (
                f"{text} >= {limits.low}",
                w("GreaterOrEqual", w.dim(size), w.constant([limits.low])),
            )
        if limits.high is not None:
            yield (
                f"{text} <= {limits.high}",
                w("LessOrEqual", w.dim(size), w.constant([limits.high])),
            )


def _equal_axes(w: NodeWriter) -> Iterator[tuple[str, str]]:
    """The same for axes whose size other axes determine. ONNX Runtime compares fixed axes alone."""
    shapes: dict[tuple[Dim, ...], list[Value]] = {}
    for value in w.graph.inputs:
        shapes.setdefault(value.shape, []).append(value)
    for shape, (first, *others) in shapes.items():
        if others and any(not isinstance(dim, int) for dim in shape):
            read = [w("Shape", w.names[value]) for value in (first, *others)]
            differences = w("Sub", w("Max", *read), w("Min", *read))
            total = w("ReduceSum", differences, w.constant([0]), keepdims=1)
            between = "and" if len(others) == 1 else "to"
            text = f"{first.name} {between} {others[-1].name} have one shape"
            yield text, w("Equal", total, w.constant([0]))
        for axis, dim in enumerate(shape):
            if isinstance(dim, int) or not symbols(dim) <= w.sizes.keys():
                continue
            actual = w("Shape", w.names[first], start=axis, end=axis + 1)
            if actual != w.dim(dim):
                yield f"axis {axis} of {first.name} == {dim}", w("Equal", actual, w.dim(dim))


def _guarded(graph: Graph) -> list[Value]:
    """Few inputs, such that every output that depends on sizes is computed from one of them."""
    candidates = [v for v in graph.inputs if v.shape]
    chosen: list[Value] = []
    for output in graph.outputs:
        sources = _sources(graph, output)
        if sources.isdisjoint(chosen):
            chosen += [v for v in candidates if v in sources][:1] or [
                v for v in candidates if v not in chosen
            ]
    return list(dict.fromkeys(chosen))


def _sources(graph: Graph, output: Value) -> set[Value]:
    """The inputs from which an output is computed."""
    left, reached = [output], {output}
    while left:
        op = graph.producers.get(left.pop())
        new = [] if op is None else [v for v in op.inputs if v not in reached]
        left += new
        reached.update(new)
    return reached & set(graph.inputs)
