"""Lines of the user's code, found in its source: where a forward reads an attribute, and where it
reads a clock, the environment, an id or a generator of random numbers."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch

from moec.capture.state.reach import cells_of, function_of, is_users, names_of, users_packages
from moec.capture.user_code.sources import text_of

_CLOCKS = re.compile(
    r"(time|uuid|secrets|random|numpy\.random)\.\w|(datetime\.)+(datetime|date)\.(now|utcnow|today)$"
    r"|os\.(environ|getenv|urandom|getpid)$"
)
_STORING = frozenset(
    "append appendleft extend insert add update clear remove debug info warning error log".split()
)
"""Methods whose argument or object is stored or printed, and not computed with."""


def reads(module: torch.nn.Module, names: Collection[str]) -> list[str]:
    """The lines, as file.py:12: `text`, at which the forward of a module and what it calls read
    attributes, globals or cells of these names (`.count` for an attribute), other than to change
    or print them."""
    return [
        source.line(node)
        for source in _sources(module)
        for node in _reading(source.tree, frozenset(names))
    ]


def clocks(module: torch.nn.Module) -> list[str]:
    """The lines at which they read what differs between calls without an attribute."""
    lines = (
        source.line(node)
        for source in _sources(module)
        for node in ast.walk(source.tree)
        if source.reads_clock(node)
    )
    return list(dict.fromkeys(lines))


@dataclass(frozen=True)
class _Source:
    """The source of a function, which begins after `offset` lines of its file."""

    function: FunctionType
    tree: ast.AST
    offset: int

    def line(self, node: Any) -> str:
        file, line = self.function.__code__.co_filename, self.offset + node.lineno
        return f"{Path(file).name}:{line}: `{text_of(file, line)}`"

    def reads_clock(self, node: ast.AST) -> bool:
        match node:
            case ast.Call(func=ast.Name("id" | "hash" as builtin)):
                return builtin not in self.function.__globals__
            case ast.Call(func=ast.Name("next"), args=[ast.Attribute(), *_]):
                return True
            case ast.Name() | ast.Attribute():
                root, dot, rest = ast.unparse(node).partition(".")
                value = self.function.__globals__.get(root)
                module = getattr(value, "__module__", "")
                name = value.__name__ if isinstance(value, ModuleType) else f"{module}.{root}"
                return _CLOCKS.match(name + dot + rest) is not None
        return False


def _reading(node: ast.AST, names: frozenset[str]) -> Iterator[ast.AST]:
    """The nodes that read `names`, but in statements that change the name which they read."""
    match node:
        case ast.Expr(ast.Call(ast.Name("print"))):
            return
        case ast.Expr(ast.Call(ast.Attribute(attr=name))) if name in _STORING:
            return
        case ast.Assign(targets=targets):
            names -= {_named(part) for target in targets for part in ast.walk(target)}
        case ast.AugAssign(target=target) | ast.AnnAssign(target=target):
            names -= {_named(part) for part in ast.walk(target)}
    if _named(node) in names and not isinstance(getattr(node, "ctx", None), ast.Store):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _reading(child, names)


def _named(node: ast.AST) -> str:
    """The name that a node means: .count for an attribute."""
    match node:
        case ast.Attribute(attr=name):
            return f".{name}"
        case ast.Name(id=name):
            return name
        case ast.Call(ast.Name("hasattr" | "getattr"), [_, ast.Constant(str(name)), *_]):
            return f".{name}"
    return ""


def _sources(module: torch.nn.Module) -> Iterator[_Source]:
    """The user's functions that the forwards of a module and its parts name, and these name."""
    packages = users_packages(module)
    pending: list[tuple[Any, Any]] = [(part, type(part).forward) for part in module.modules()][::-1]
    visited = set[tuple[Any, type]]()
    while pending:
        part, value = pending.pop()
        function = function_of(value)
        if not isinstance(function, FunctionType):
            continue
        code = function.__code__
        if (code, type(part)) in visited or not is_users(code.co_filename, packages):
            continue
        try:
            lines, first = inspect.getsourcelines(function)
            if all(code is not other for other, _ in visited):
                yield _Source(function, ast.parse(textwrap.dedent("".join(lines))), first - 1)
        except (OSError, SyntaxError):  # the source is not there, or a part of an expression
            pass
        visited.add((code, type(part)))
        for name in names_of(code):
            pending.append((part, inspect.getattr_static(part, name, None)))
            pending.append((part, function.__globals__.get(name)))
        pending += [(part, cell.cell_contents) for _, cell in cells_of(function)]
