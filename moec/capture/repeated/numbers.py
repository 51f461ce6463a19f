"""Whether code may decide by the number of a layer: `if self.layer_idx >= 28 and tokens > 4096`.

A call of the example takes one side of such a condition, so that only the code shows it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from typing import TypeGuard

from torch import nn

_DECIDES = (ast.Compare, ast.BinOp, ast.BoolOp, ast.IfExp)


def number_decides(owner: nn.Module, layers: Sequence[nn.Module]) -> bool:
    """Whether the methods of layers compute with an attribute that has a layer's number, or the
    forward of their owner with the index of a loop. True where there is no source to read."""
    last = len(layers) - 1
    pairs = [*zip(layers[0].modules(), layers[last].modules(), strict=False)]
    names = {
        name
        for one, other in pairs
        for name, value in vars(one).items()
        if (value, vars(other).get(name)) == (0, last)
    }
    parts = {type(part) for part, _ in pairs}
    return any(_uses(cls, names, (*_DECIDES, ast.Subscript)) for cls in parts if names) or _uses(
        type(owner), None, _DECIDES
    )


def _uses(cls: type, names: set[str] | None, kinds: tuple[type[ast.AST], ...]) -> bool:
    """Whether nodes of these kinds have one of the attributes `names`, or the index of a loop."""
    try:
        methods = [*_methods(cls)]
    except (OSError, TypeError, SyntaxError):
        return True
    for method in methods:
        indices = set() if names is not None else set(_indices(method))
        if names is None and method.name != "forward":
            continue
        for node in ast.walk(method):
            direct = [*node.args, *(k.value for k in node.keywords)] if _is_call(node) else []
            if any(isinstance(part, ast.Name) and part.id in indices for part in direct):
                return True
            if isinstance(node, kinds) and any(
                (isinstance(part, ast.Attribute) and part.attr in (names or ()))
                or (isinstance(part, ast.Name) and part.id in indices)
                for part in ast.walk(node)
            ):
                return True
    return False


def _is_call(node: ast.AST) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call)


def _methods(cls: type) -> Iterator[ast.FunctionDef]:
    for base in cls.__mro__:
        if base is object or str(base.__module__).startswith("torch."):
            continue
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                yield node


def _indices(method: ast.FunctionDef) -> Iterator[str]:
    """The numbers that loops of `enumerate` and `range` count."""
    for loop in ast.walk(method):
        if isinstance(loop, ast.For | ast.comprehension) and isinstance(loop.iter, ast.Call):
            if ast.unparse(loop.iter.func) in ("enumerate", "range"):
                yield from (n.id for n in ast.walk(loop.target) if isinstance(n, ast.Name))
