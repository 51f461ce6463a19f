"""Sizes: ints, or expressions over named sizes (T, 2*T, B*S), as sympy expressions.

Sympy does the algebra. This file defines which expressions are allowed, how they are printed, and
how they are parsed without calling eval on untrusted text.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import sympy

from moec.errors import IRError
from moec.ir.sizes.exact import function_of
from moec.ir.sizes.floats import ceil, f64, floor, rint, round_half_even, trunc
from moec.ir.sizes.functions import FUNCTIONS, pow2, power, sqrt

Dim: TypeAlias = int | sympy.Expr

_LONGEST = 1000  # characters of a size
_MOST_TERMS = 1000  # of an expanded size; expanding an untrusted expression could take forever
_FUNCTIONS = {
    "floor": sympy.floor,
    "ceiling": sympy.ceiling,
    "Mod": sympy.Mod,
    "Max": sympy.Max,
    "Min": sympy.Min,
    "Abs": sympy.Abs,
    "f64": f64,
    "rint": rint,
    **FUNCTIONS,
}


def _natural_power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    """An integer to the power of an integer that is not negative."""
    if exponent.is_number:
        return base**exponent
    if not base.is_Integer or base <= 0 or int(base) & (int(base) - 1):
        raise IRError(f"{base} to the power of a size is no expression of sizes")
    return pow2(exponent * (int(base).bit_length() - 1))


_ALGEBRA = frozenset("Add Mul floor ceiling Abs".split())
"""By name: torch has its own classes for some of them."""
_TORCH_FUNCTIONS = {
    "FloorDiv": lambda a, b: sympy.floor(a / b),
    "CeilDiv": lambda a, b: sympy.ceiling(a / b),
    "CleanDiv": lambda a, b: a / b,
    "IntTrueDiv": lambda a, b: f64(a / b),
    "FloatTrueDiv": lambda a, b: f64(a / b),
    "Min": sympy.Min,
    "PythonMod": sympy.Mod,
    "Mod": sympy.Mod,
    "TruncToInt": trunc,
    "FloorToInt": floor,
    "CeilToInt": ceil,
    "RoundToInt": round_half_even,
    "ToFloat": f64,
    "FloatPow": power,
    "PowByNatural": _natural_power,
    "Pow": _natural_power,
    "OpaqueUnaryFn_sqrt": sqrt,
}


@dataclass(frozen=True)
class Bounds:
    """The least and greatest value of a named size, or of an expression of sizes. `high` is None
    where there is no bound. `line` is the user's line of code that is its cause, for messages only.
    """

    low: int = 0
    high: int | None = None
    line: str = field(default="", compare=False, repr=False)

    def intersect(self, other: Bounds) -> Bounds:
        """The intersection."""
        highs = [high for high in (self.high, other.high) if high is not None]
        return Bounds(max(self.low, other.low), min(highs, default=None), self.line or other.line)

    def contains(self, size: int) -> bool:
        return size >= self.low and (self.high is None or size <= self.high)


def symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, nonnegative=True)


def canonical(dim: Any) -> Dim:
    """The canonical form of a size: an int if it is a number, else an expanded expression."""
    if isinstance(dim, int):
        return dim
    if not isinstance(dim, sympy.Expr):
        raise IRError(f"{dim!r} is not a size")
    return int(dim) if dim.is_Integer else dim


def product(dims: tuple[Dim, ...]) -> Dim:
    return canonical(sympy.Mul(*dims)) if dims else 1


def broadcasts(shape: Sequence[Dim], target: Sequence[Dim]) -> bool:
    """Whether `shape` has the rank of `target`, and each axis is 1 or that of `target`."""
    return len(shape) == len(target) and all(
        size in (1, full) for size, full in zip(shape, target, strict=True)
    )


def from_torch(
    size: Any,
    rename: Mapping[str, str] | None = None,
    computed: Mapping[sympy.Expr, sympy.Expr] | None = None,
) -> Dim:
    """A torch.SymInt or sympy expression of torch.export as a size of the IR.

    `rename` maps torch's symbols (s0, u0) to the names of the IR, `computed` maps torch's float
    subexpressions to exact ones. Raises IRError for any other float: sympy multiplies the constants
    of T*0.3*0.7, so its expression does not show where Python rounded.
    """
    if isinstance(size, int):
        return size
    expr, substitutions = _expression(size), computed or {}
    floats = set(_floats(expr, substitutions))
    if floats:
        raise IRError(f"it is made of {min(floats)}, and in which order is not known")
    # Expanded, since torch also writes B*(P + Q) as B*P + B*Q, and the two do not compare equal.
    return canonical(sympy.expand_mul(_convert(expr, rename or {}, substitutions)))


def nearly_from_torch(size: Any, rename: Mapping[str, str]) -> sympy.Expr:
    """As `from_torch`, but a product of floats that sympy multiplied is rounded once. It may differ
    in the last bit of a double: too inexact for a size, good enough to choose sizes to try."""
    return _convert(_expression(size), rename, {})


def _floats(expr: sympy.Basic, computed: Mapping[sympy.Expr, sympy.Expr]) -> Iterator[sympy.Float]:
    """The floats of an expression, but for those in a part that was `computed`."""
    if isinstance(expr, sympy.Float):
        yield expr
    elif expr not in computed:
        for argument in expr.args:
            yield from _floats(argument, computed)


def _expression(size: Any) -> sympy.Expr:
    node = getattr(size, "node", size)
    return getattr(node, "expr", node)


def _convert(
    expr: sympy.Expr, rename: Mapping[str, str], computed: Mapping[sympy.Expr, sympy.Expr]
) -> sympy.Expr:
    if expr in computed:
        return computed[expr]
    if isinstance(expr, sympy.Symbol):
        return symbol(rename.get(expr.name, expr.name))
    if expr.is_Float:
        return sympy.Rational(*float(expr).as_integer_ratio())
    if expr.is_number:
        return expr
    arguments = [_convert(a, rename, computed) for a in expr.args]
    name = type(expr).__name__
    if name == "Max":
        return _greatest(arguments)
    function = _TORCH_FUNCTIONS.get(name)
    if function is None and name not in _ALGEBRA:
        raise IRError(f"{name.removeprefix('BitwiseFn_')} of a size is no expression of sizes")
    if function is None and any(a.is_Float for a in expr.args):
        return f64(expr.func(*arguments))
    return function(*arguments) if function else expr.func(*arguments)


def _greatest(sizes: Sequence[sympy.Expr]) -> sympy.Expr:
    """The greatest size, without 0 where another is never less: lengths of slices have it."""
    if any(size != 0 and _is_not_negative(size) for size in sizes):
        sizes = [size for size in sizes if size != 0]
    return sympy.Max(*sizes)


def _is_not_negative(size: sympy.Expr) -> bool:
    """Whether a size is never negative; sympy does not know it of a quotient rounded up."""
    if isinstance(size, sympy.Add | sympy.Mul | sympy.ceiling):
        return all(map(_is_not_negative, size.args))
    return bool(size.is_nonnegative)


def symbols(dim: Dim) -> set[str]:
    return set() if isinstance(dim, int) else set(_names(dim))


@lru_cache(maxsize=1 << 14)
def _names(dim: sympy.Expr) -> tuple[str, ...]:
    return tuple(sorted(symbol.name for symbol in dim.free_symbols))


def evaluate_dim(dim: Dim, env: Mapping[str, int]) -> int:
    """The value of a size once its names are bound.

    Raises IRError for an unbound name, and for a value that is not an integer.
    """
    if isinstance(dim, int):
        return dim
    names = _names(dim)
    missing = [name for name in names if name not in env]
    if missing:
        raise IRError(f"size {dim} needs {missing}, which nothing has bound")
    value: Any
    try:
        value = function_of(dim)(env)
    except (IRError, ZeroDivisionError):  # a function of torch's, or of sympy's infinities
        value = dim.subs({symbol(name): env[name] for name in names})
    if not isinstance(value, int | sympy.Integer):
        raise IRError(f"size {dim} is {value}, not a whole number")
    return int(value)


def bind_shape(shape: tuple[Dim, ...], actual: tuple[int, ...], env: dict[str, int]) -> None:
    """Bind the names in `shape` to the sizes of a tensor, adding them to `env`.

    A name is bound where it is the entire size of an axis. Raises IRError where a size differs
    from the value that the bound names give it.
    """
    if len(shape) != len(actual):
        raise IRError(f"rank {len(actual)}, expected {len(shape)}")
    for axis, (dim, size) in enumerate(zip(shape, actual, strict=True)):
        if isinstance(dim, int):
            expected = dim
        elif isinstance(dim, sympy.Symbol):
            expected = env.setdefault(dim.name, size)
        elif all(name in env for name in _names(dim)):
            expected = evaluate_dim(dim, env)
        else:
            continue
        if expected != size:
            raise IRError(f"axis {axis} is {size}, expected {dim} = {expected}")


def show_dim(dim: Dim) -> str:
    return str(dim) if isinstance(dim, int) else _text(dim)


@lru_cache(maxsize=1 << 14)
def _text(dim: sympy.Expr) -> str:
    return str(dim)


def parse_dim(text: str) -> Dim:
    """Parse the output of `show_dim`: names, integers, + - * / ** and a few functions.

    Raises IRError for anything else: the text may come from an untrusted artifact.
    """
    if len(text) > _LONGEST:
        raise IRError(f"{text[:40]!r}... is not a size: it has {len(text)} characters")
    try:
        tree = ast.parse(text, mode="eval").body
        if _terms(tree) > _MOST_TERMS:
            raise IRError(f"{text!r} is not a valid size: it has too many terms")
        size = _build(tree, text)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise IRError(f"{text[:80]!r} is not a size") from error
    return canonical(size)


def _terms(node: ast.expr) -> float:
    """An upper bound on the number of terms of a size once it is expanded."""
    match node:
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub(), right=right):
            return _terms(left) + _terms(right)
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int(power))):
            return float(max(2, _terms(left))) ** max(0, min(power, 1000))
        case ast.BinOp(left=left, right=right):
            return _terms(left) * _terms(right)
        case ast.UnaryOp(operand=operand):
            return _terms(operand)
        case ast.Call(args=arguments):
            return max([1, *map(_terms, arguments)])
    return 1


def _build(node: ast.expr, text: str) -> sympy.Expr:
    match node:
        case ast.Constant(value=int(value)):
            return sympy.Integer(value)
        case ast.Name(id=name):
            return symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_build(operand, text)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _build(left, text), _build(right, text)
            match op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div() if b != 0:
                    return a / b
                case ast.Pow() if b.is_Integer and 0 <= b <= 8:
                    return a**b
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_build(a, text) for a in args))
    raise IRError(f"{text!r} is not a size")


def show_bounds(bounds: Bounds) -> str:
    return f"[{bounds.low}, {'inf' if bounds.high is None else bounds.high}]"
