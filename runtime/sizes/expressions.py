"""Sizes as text (T, 2*T, floor(B*S/4)) and their values, without sympy and without eval.

The grammar is that of `moec.ir.sizes.dims.parse_dim`, which wrote the text. Compiled code calls
`value_of_size` by the name NAME for sizes that kernels cannot compute.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache

from moec.errors import ArtifactError
from moec.runtime.package import Size
from moec.runtime.sizes.functions import DOUBLES, INTEGERS

NAME = "moec.value_of_size"
_FUNCTIONS: dict[str, tuple[range, Callable[..., Fraction | int]]] = {
    "floor": (range(1, 2), lambda a: Fraction(math.floor(a))),
    "ceiling": (range(1, 2), lambda a: Fraction(math.ceil(a))),
    "Abs": (range(1, 2), abs),
    "Mod": (range(2, 3), lambda a, b: a % b),
    "Max": (range(1, 17), max),
    "Min": (range(1, 17), min),
    "f64": (range(1, 2), lambda a: Fraction(a.numerator / a.denominator)),
    "rint": (range(1, 2), lambda a: Fraction(round(a))),
    **{name: (range(1, 2), function) for name, function in {**DOUBLES, **INTEGERS}.items()},
    "power": (range(2, 3), DOUBLES["power"]),
}
_LONGEST = 1000  # characters
_DEEPEST = 200  # nested terms: untrusted text must not overflow Python's stack
_LARGEST = 1 << 256  # of intermediate values: powers of powers would take all time and memory


@lru_cache(maxsize=4096)
def _parse(text: str) -> ast.expr:
    if len(text) > _LONGEST:
        raise ArtifactError(f"a size of {len(text)} characters is not a valid size")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ArtifactError(f"{text!r} is not a size") from error
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=bool()):
                pass  # Python counts True as an int
            case ast.Constant(value=int()) | ast.Name() | ast.operator() | ast.Load():
                continue
            case ast.UnaryOp(op=ast.USub()) | ast.USub():
                continue
            case ast.BinOp(op=ast.Pow(), right=ast.Constant(value=int(power))) if 0 <= power <= 8:
                continue
            case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div()):
                continue
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if (
                name in _FUNCTIONS and len(arguments) in _FUNCTIONS[name][0]
            ):
                continue
        raise ArtifactError(f"{text!r} is not a size")
    if _depth(tree) > _DEEPEST:
        raise ArtifactError(f"{text[:40]!r}... is nested too deeply")
    return tree


def _depth(tree: ast.expr) -> int:
    depth, level = 0, [tree]
    while level:
        depth += 1
        level = [
            node
            for parent in level
            for node in ast.iter_child_nodes(parent)
            if isinstance(node, ast.expr)
        ]
    return depth


@lru_cache(maxsize=4096)
def names(size: Size) -> frozenset[str]:
    """The named sizes that `size` depends on. Raises ArtifactError if it is not a size."""
    if isinstance(size, int):
        return frozenset()
    identifiers = {node.id for node in ast.walk(_parse(size)) if isinstance(node, ast.Name)}
    return frozenset(identifiers - _FUNCTIONS.keys())


def evaluate(size: Size, env: Mapping[str, int]) -> int | None:
    """The value of `size`; None if a name is not in `env`, or the value is not an integer or too
    large for a size."""
    if isinstance(size, int):
        return size
    if size in env:
        return env[size]
    try:
        value = _value(_parse(size), env)
    except (KeyError, ZeroDivisionError, OverflowError):
        return None
    return int(value) if value.denominator == 1 else None


@lru_cache(maxsize=4096)
def value_of_size(size: str, size_names: str, values: tuple[int, ...]) -> int:
    """The value of `size`, of which `size_names` names the `values`. Raises ValueError where it has
    none."""
    sizes = dict(zip(size_names.split(), values, strict=True))
    value = evaluate(size, sizes)
    if value is None:
        shown = ", ".join(f"{name} = {number}" for name, number in sizes.items())
        raise ValueError(f"the size {size} has no value where {shown}")
    return value


def solve(size: Size, value: int) -> tuple[str, int] | None:
    """(name, n) if `size` has the form a*name + b and equals `value` at n; else None."""
    size_names = names(size)
    if len(size_names) != 1:
        return None
    (name,) = size_names
    if name == size:
        return (name, value) if value >= 0 else None
    first, second = evaluate(size, {name: 0}), evaluate(size, {name: 1})
    if first is None or second is None or first == second:
        return None
    n = (value - first) // (second - first)
    return (name, n) if n >= 0 and evaluate(size, {name: n}) == value else None


@lru_cache(maxsize=4096)
def multiple_of(size: str) -> tuple[str, int] | None:
    """(S, 4) where `size` is the remainder Mod(S, 4); else None."""
    match _parse(size):
        case ast.Call(func=ast.Name(id="Mod"), args=[dividend, ast.Constant(value=int(number))]):
            return ast.unparse(dividend).replace(" * ", "*"), number
    return None


def _value(node: ast.expr, env: Mapping[str, int]) -> Fraction:
    value = _unbounded(node, env)
    if max(abs(value.numerator), value.denominator) > _LARGEST:
        raise OverflowError("a size larger than any memory")
    return value


def _unbounded(node: ast.expr, env: Mapping[str, int]) -> Fraction:
    match node:
        case ast.Constant(value=int(value)):
            return Fraction(value)
        case ast.Name(id=name):
            return Fraction(env[name])
        case ast.UnaryOp(operand=operand):
            return -_value(operand, env)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _value(left, env), _value(right, env)
            match op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div():
                    return a / b
            return Fraction(a ** int(b))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return Fraction(_FUNCTIONS[name][1](*(_value(a, env) for a in arguments)))
    raise ArtifactError(f"{ast.unparse(node)!r} is not a size")
