"""Functions of symbolic floats that torch does not trace, as nodes of an export.

    math.log(x.shape[0])        a node with the target `log`, and the expression log(ToFloat(s0))

torch's verifier of exports allows no functions but its own, so it is told of these
(`size_nodes_allowed`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any
from unittest import mock

import sympy
import torch
from torch._export.verifier import Verifier
from torch.fx.experimental.proxy_tensor import get_proxy_mode, handle_sym_dispatch
from torch.fx.experimental.sym_node import SymNode


@contextmanager
def size_nodes_allowed() -> Iterator[None]:
    """While open, torch's verifier allows the functions of this file as targets of nodes, and xor,
    which is traced as well but then refused without a line."""
    plain, builtins = Verifier.allowed_op_types, Verifier.allowed_builtin_ops

    def allowed(self: Verifier) -> tuple[type, ...]:
        return (*plain(self), FunctionType)

    def allowed_builtins(self: Verifier) -> list[Any]:
        return [*builtins(self), operator.xor]

    with (
        mock.patch.object(Verifier, "allowed_op_types", allowed),
        mock.patch.object(Verifier, "allowed_builtin_ops", allowed_builtins),
    ):
        yield


def _function(name: str, of_numbers: Callable[..., float], ranges: str) -> Callable[..., Any]:
    """A function of torch's expressions; torch finds the range of a result by that of `ranges`."""

    def evaluate(cls: type, *numbers: sympy.Expr) -> sympy.Expr | None:
        if not all(isinstance(x, sympy.Integer | sympy.Float) for x in numbers):
            return None
        try:
            return sympy.Float(of_numbers(*map(float, numbers)))
        except (ValueError, ZeroDivisionError, OverflowError):
            return sympy.nan

    body = {"eval": classmethod(evaluate), "_torch_handler_name": ranges, "is_real": True}
    return type(name, (sympy.Function,), body)


_ANY, _ANY_OF_TWO, _NOT_NEGATIVE = "tan", "pow", "cosh"
_LOGARITHMS = {"log": math.log, "log2": math.log2, "log10": math.log10}
_OF_FLOATS = {name: _function(name, plain, _ANY) for name, plain in _LOGARITHMS.items()}
_OF_SIZES = {name: _function(name, plain, _NOT_NEGATIVE) for name, plain in _LOGARITHMS.items()}
_EXP = _function("exp", math.exp, _NOT_NEGATIVE)
_FLOOR_QUOTIENT = _function("floor_quotient", operator.floordiv, _ANY_OF_TWO)
_REMAINDER = _function("remainder", operator.mod, _ANY_OF_TWO)


def log(number: Any) -> Any:
    return _logarithm(log, number)


def log2(number: Any) -> Any:
    return _logarithm(log2, number)


def log10(number: Any) -> Any:
    return _logarithm(log10, number)


def exp(number: Any) -> Any:
    return _node(exp, math.exp, _EXP, number)


def floor_quotient(a: Any, b: Any) -> Any:
    """a // b of floats. torch rounds a / b before the floor: 1 // 0.1 is 9.0, and 1 / 0.1 is 10."""
    return _node(floor_quotient, operator.floordiv, _FLOOR_QUOTIENT, a, b)


def remainder(a: Any, b: Any) -> Any:
    """a % b of floats; torch looks for its range as for that of integers, and fails."""
    return _node(remainder, operator.mod, _REMAINDER, a, b)


def _logarithm(target: Callable[..., Any], number: Any) -> Any:
    """That of a size is not negative, because 0 has none."""
    expr = number.node.expr if isinstance(number, torch.SymFloat) else None
    table = _OF_SIZES if type(expr).__name__ == "ToFloat" else _OF_FLOATS
    name = target.__name__
    return _node(target, _LOGARITHMS[name], table[name], number)


def _node(
    target: Callable[..., Any], plain: Callable[..., float], function: Any, *numbers: Any
) -> Any:
    """The symbolic float `target(*numbers)`, recorded in the trace that is under way."""
    symbolic = [x.node for x in numbers if isinstance(x, torch.SymFloat)]
    if not symbolic:
        return plain(*numbers)
    if get_proxy_mode():
        return handle_sym_dispatch(target, numbers, {})
    env = symbolic[0].shape_env
    nodes = [getattr(x, "node", None) for x in numbers]
    exprs = [x if node is None else node.expr for x, node in zip(numbers, nodes, strict=True)]
    hints = [x if node is None else node.hint for x, node in zip(numbers, nodes, strict=True)]
    hint = None if None in hints else plain(*hints)
    parts = [x if node is None else node.fx_node for x, node in zip(numbers, nodes, strict=True)]
    fx_node, _ = env._create_fx_call_function(target, tuple(parts))
    result = SymNode(function(*exprs), env, float, hint, fx_node=fx_node)
    return torch.SymFloat(result)  # type: ignore[no-untyped-call]
