"""Sizes and shapes as tensors: expressions of named sizes, and reshapes that need none."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import sympy

from moec.errors import NoMatch
from moec.ir.dims import Bounds, Dim, symbols
from moec.ir.float_sizes import f64, has_wide_numbers, is_float, operation
from moec.ir.size_functions import DoubleFunction, IntegerFunction, sqrt

if TYPE_CHECKING:
    from moec.codegen.onnx.writer import NodeWriter


_DOUBLE, _INT64 = 11, 7
"""ONNX's codes for the types."""


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
    """An operand of `float_sizes.operation` as f64[1]: an f64, or an exact integer."""
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
    """The quotient rounded down; sizes are not negative."""
    top, bottom = sympy.fraction(sympy.together(ratio))
    top, bottom = sympy.expand(top), sympy.expand(bottom)
    return (
        w("Div", size_value(w, top), size_value(w, bottom)) if bottom != 1 else size_value(w, top)
    )


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
