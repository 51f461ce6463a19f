"""Nodes that compute a size from named sizes, as i64[1]."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, Protocol

import sympy

from moec.errors import NoMatch
from moec.ir.sizes.floats import f64, has_wide_numbers, is_float, operation
from moec.ir.sizes.functions import DoubleFunction, IntegerFunction, sqrt

_DOUBLE, _INT64 = 11, 7
"""ONNX's codes for the types."""


class SizeWriter(Protocol):
    """What adds the nodes; `sizes` are the names of named sizes in the file."""

    sizes: dict[str, str]

    def __call__(self, kind: str, *inputs: str, **attrs: Any) -> str: ...

    def constant(self, value: Any, dtype: str = "i64") -> str: ...


def size_value(w: SizeWriter, dim: Any) -> str:
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


def _integer_function(w: SizeWriter, name: str, of: Any) -> str:
    number = size_value(w, of)
    if name == "isqrt":
        return w("Cast", w("Floor", w("Sqrt", w("Cast", number, to=_DOUBLE))), to=_INT64)
    powers = w.constant([1 << n for n in range(63)])
    if name == "pow2":
        return w("Gather", powers, number)
    reached = w("GreaterOrEqual", w("Abs", number), powers)
    return w("ReduceSum", w("Cast", reached, to=_INT64), w.constant([0]), keepdims=1)


def _double(w: SizeWriter, x: Any) -> str:
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


def _folded(w: SizeWriter, kind: str, parts: Sequence[Any]) -> str:
    return reduce(lambda a, b: w(kind, a, b), (size_value(w, part) for part in parts))


def _quotient(w: SizeWriter, ratio: Any) -> str:
    """The quotient rounded down. Div rounds towards 0, and Mod has the sign of the divisor."""
    top, bottom = sympy.fraction(sympy.together(ratio))
    top, bottom = sympy.expand(top), sympy.expand(bottom)
    a = size_value(w, top)
    if bottom == 1:
        return a
    b = size_value(w, bottom)
    return w("Div", a if top.is_nonnegative else w("Sub", a, w("Mod", a, b)), b)
