"""Reads the guards that a .pt2 file stores as Python text over the sizes of its inputs.

    math.trunc(((2.0*torch.sym_float(L['x'].size()[1])) / 8.0)) == 6

The text is parsed and never executed, because the file may come from an untrusted source.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch.export import ExportedProgram

from moec.capture.conversion.arithmetic import number
from moec.capture.sizes.guards import Guard
from moec.errors import CaptureError
from moec.ir.sizes.dims import Dim, from_torch
from moec.ir.sizes.floats import ceil, f64, floor, round_half_even, trunc

_ROUNDINGS: Mapping[str, Callable[[sympy.Expr], sympy.Expr]] = {
    "math.trunc": trunc,
    "math.floor": floor,
    "math.ceil": ceil,
    "round": round_half_even,
    "int": trunc,
}
_CHOICES = {"max": sympy.Max, "min": sympy.Min}
_RELATIONS: Mapping[type[ast.cmpop], type[sympy.Basic]] = {
    ast.Eq: sympy.Eq,
    ast.NotEq: sympy.Ne,
    ast.Lt: sympy.Lt,
    ast.LtE: sympy.Le,
    ast.Gt: sympy.Gt,
    ast.GtE: sympy.Ge,
}


@dataclass(frozen=True)
class _Number:
    """A number in the text. A float is rounded after every operation."""

    expr: sympy.Expr
    is_float: bool = False


def guards_in_text(exported: ExportedProgram, rename: Mapping[str, str]) -> tuple[Guard, ...]:
    """The guards of an exported program. `rename` maps torch's symbols to named sizes.

    Call it before torch decomposes or calls the program, which executes the text as Python. Raises
    CaptureError for a guard that cannot be read.
    """
    shapes = _shapes(exported, rename)
    texts: Sequence[str] = getattr(exported, "_guards_code", None) or ()
    conditions: dict[sympy.Basic, None] = {}
    for text in texts:
        try:
            condition = _condition(ast.parse(text, mode="eval").body, shapes)
        except (SyntaxError, ValueError, KeyError, IndexError, TypeError) as error:
            raise CaptureError(
                f"a guard of the exported program cannot be read: {text}\n"
                "  moec cannot tell which sizes it is right at; export it with sizes that "
                f"do not depend on it ({error})"
            ) from None
        if condition != sympy.true:
            conditions[condition] = None
    return tuple(Guard(condition) for condition in conditions)


def _shapes(exported: ExportedProgram, rename: Mapping[str, str]) -> dict[str, Sequence[Dim]]:
    """The shapes of the tensor inputs, in order, by the names of their placeholders."""
    input_names = exported.graph_signature.user_inputs
    holders = [n for n in exported.graph.nodes if n.op == "placeholder" and n.name in input_names]
    return {
        node.name: tuple(from_torch(size, rename) for size in node.meta["val"].shape)
        for node in holders
        if isinstance(node.meta.get("val"), torch.Tensor)
    }


def _condition(node: ast.expr, shapes: Mapping[str, Sequence[Dim]]) -> sympy.Basic:
    match node:
        case ast.BoolOp(op=op, values=values):
            join = sympy.And if isinstance(op, ast.And) else sympy.Or
            return join(*(_condition(value, shapes) for value in values))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return sympy.Not(_condition(operand, shapes))
        case ast.Compare(left=left, ops=ops, comparators=others):
            numbers = [_number(n, shapes).expr for n in (left, *others)]
            pairs = zip(ops, numbers, numbers[1:], strict=False)
            return sympy.And(*(_RELATIONS[type(op)](a, b) for op, a, b in pairs))
    raise ValueError("it is no condition")


def _number(node: ast.expr, shapes: Mapping[str, Sequence[Dim]]) -> _Number:
    match node:
        case ast.Constant(value=bool()):
            raise ValueError("a truth value is no number")
        case ast.Constant(value=int() | float() as value):
            return _Number(number(value), isinstance(value, float))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            part = _number(operand, shapes)
            return _Number(-part.expr, part.is_float)
        case ast.BinOp(left=left, op=op, right=right):
            return _arithmetic(op, _number(left, shapes), _number(right, shapes))
        case ast.Subscript(
            value=ast.Call(func=ast.Attribute(value=source, attr="size"), args=[]),
            slice=ast.Constant(value=int(axis)),
        ):
            return _Number(sympy.sympify(shapes[_input(source, list(shapes))][axis]))
        case ast.Call(func=function, args=args, keywords=[]):
            return _call(ast.unparse(function), [_number(a, shapes) for a in args])
    raise ValueError(f"{ast.unparse(node)} is not known")


def _arithmetic(op: ast.operator, a: _Number, b: _Number) -> _Number:
    is_float = a.is_float or b.is_float
    match op:
        case ast.Add():
            result = a.expr + b.expr
        case ast.Sub():
            result = a.expr - b.expr
        case ast.Mult():
            result = a.expr * b.expr
        case ast.Div():
            result, is_float = a.expr / b.expr, True
        case ast.FloorDiv() if not is_float:
            return _Number(sympy.floor(a.expr / b.expr))
        case ast.Mod() if not is_float:
            return _Number(sympy.Mod(a.expr, b.expr))
        case ast.Pow() if not is_float and b.expr.is_Integer and 0 <= b.expr <= 8:
            return _Number(a.expr**b.expr)
        case _:
            raise ValueError(f"{type(op).__name__} is not known")
    return _Number(f64(result) if is_float else result, is_float)


def _call(name: str, args: Sequence[_Number]) -> _Number:
    if name in _ROUNDINGS and len(args) == 1:
        return _Number(_ROUNDINGS[name](args[0].expr))
    if name in _CHOICES and args:
        is_float = any(a.is_float for a in args)
        return _Number(_CHOICES[name](*(a.expr for a in args)), is_float)
    if name == "torch.sym_float" and len(args) == 1:
        return _Number(f64(args[0].expr), True)
    raise ValueError(f"{name} is not known")


def _input(node: ast.expr, names: Sequence[str]) -> str:
    """The placeholder name for an input written as L['x'], L['d']['a'][0] or L['flat_args'][1]."""
    keys: list[str | int] = []
    while isinstance(node, ast.Subscript):
        if not isinstance(node.slice, ast.Constant):
            raise ValueError(f"{ast.unparse(node)} is not known")
        keys.insert(0, node.slice.value)  # type: ignore[arg-type]
        node = node.value
    if not isinstance(node, ast.Name) or node.id != "L" or not keys:
        raise ValueError(f"{ast.unparse(node)} is no input")
    if keys[0] == "flat_args" and isinstance(keys[1], int):
        return names[keys[1]]
    return "_".join(map(str, keys))
