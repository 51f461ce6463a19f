"""Sizes and shapes as tensors: expressions of named sizes, their limits, and short reshapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import sympy

from moec.errors import NoMatch, UnsupportedError
from moec.ir.sizes.dims import Bounds, Dim, parse_dim, symbols
from moec.ir.sizes.floats import f64, has_wide_numbers, is_float, operation
from moec.ir.sizes.functions import DoubleFunction, IntegerFunction, sqrt

if TYPE_CHECKING:
    from moec.codegen.onnx.writer import NodeWriter
    from moec.ir.graph import Graph, Value


_DOUBLE, _INT64 = 11, 7
"""ONNX's codes for the types."""
_INVALID = -2
"""An axis that Reshape rejects; -1 is inferred."""


def size_value(w: NodeWriter, dim: Any) -> str:
    """A size as i64[1].

    Raises NoMatch for a size that no input has, or a function that is not supported.
    """
    if isinstance(dim, int) or dim.is_Integer:
        return w.constant([int(dim)])
    if isinstance(dim, IntegerFunction):
        return _integer_function(w, type(dim).__name__, dim.args[0])
    if is_float(dim) and type(dim).__name__ in ("floor", "ceiling", "rint"):
        kind = {"floor": "Floor", "ceiling": "Ceil", "rint": "Round"}[type(dim).__name__]
        return w("Cast", w(kind, _double(w, dim.args[0])), to=_INT64)
    if has_wide_numbers(dim):
        raise NoMatch(f"size {dim} cannot be written: its numbers take more than 64 bits")
    match dim:
        case sympy.Symbol():
            if dim.name not in w.sizes:
                raise NoMatch(f"size {dim.name} is not an axis of any input by itself")
            return w.sizes[dim.name]
        case sympy.floor():
            return _quotient(w, dim.args[0])
        case sympy.ceiling():
            top, bottom = sympy.fraction(sympy.together(dim.args[0]))
            return _quotient(w, (top + bottom - 1) / bottom)
        case sympy.Mod():
            return w("Mod", *(size_value(w, a) for a in dim.args))
        case sympy.Max() | sympy.Min():
            return w(type(dim).__name__, *(size_value(w, a) for a in dim.args))
        case sympy.Add():
            return _folded(w, "Add", dim.args)
        case sympy.Pow() if dim.exp.is_Integer and dim.exp > 0:
            return _folded(w, "Mul", [dim.base] * int(dim.exp))
        case sympy.Mul():
            top, bottom = sympy.fraction(dim)
            return _folded(w, "Mul", dim.args) if bottom == 1 else _quotient(w, dim)
    raise NoMatch(f"size {dim} cannot be written")


def _integer_function(w: NodeWriter, name: str, of: Any) -> str:
    number = size_value(w, of)
    if name == "isqrt":
        return w("Cast", w("Floor", w("Sqrt", w("Cast", number, to=_DOUBLE))), to=_INT64)
    powers = w.constant([1 << n for n in range(63)])
    if name == "pow2":
        return w("Gather", powers, number)
    reached = w("GreaterOrEqual", w("Abs", number), powers)
    return w("ReduceSum", w("Cast", reached, to=_INT64), w.constant([0]), keepdims=1)


def _double(w: NodeWriter, x: Any) -> str:
    """An operand of `floats.operation` as f64[1]: an f64, or an exact integer."""
    if x.is_Rational:
        return w.constant([float(x)], "f64")
    sign, rest = x.as_coeff_Mul()
    if isinstance(rest, sqrt):  # the only one that IEEE 754 defines to the last bit
        root = w("Sqrt", _double(w, rest.args[0]))
        return root if sign == 1 else w("Mul", root, _double(w, sign))
    if isinstance(rest, DoubleFunction):
        raise NoMatch(f"size {rest} cannot be written: ONNX may round it differently from Python")
    if isinstance(rest, f64):
        try:
            operator, *operands = operation(rest.args[0])
        except ValueError as error:
            raise NoMatch(f"size {rest} cannot be written: {error}") from None
        kind = {"add": "Add", "mul": "Mul", "div": "Div"}[operator]
        result = w(kind, *(_double(w, operand) for operand in operands))
        return result if sign == 1 else w("Mul", result, _double(w, sign))
    top, bottom = sympy.fraction(sympy.together(x))
    result = w("Cast", size_value(w, top), to=_DOUBLE)
    return result if bottom == 1 else w("Div", result, _double(w, bottom))


def _folded(w: NodeWriter, kind: str, parts: Sequence[Any]) -> str:
    return reduce(lambda a, b: w(kind, a, b), (size_value(w, part) for part in parts))


def _quotient(w: NodeWriter, ratio: Any) -> str:
    """The quotient rounded down. Div rounds towards 0, and Mod has the sign of the divisor."""
    top, bottom = sympy.fraction(sympy.together(ratio))
    top, bottom = sympy.expand(top), sympy.expand(bottom)
    a = size_value(w, top)
    if bottom == 1:
        return a
    b = size_value(w, bottom)
    return w("Div", a if top.is_nonnegative else w("Sub", a, w("Mod", a, b)), b)


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
