"""In-place operators as functions: `x.add_(y)` becomes `add(x, y)`, read from there on as x.

This is valid where the memory of `x` is not read under another name afterwards: `x` is the result
of an operator that returns new memory, and no view of it is read later. A write into a part, `x[:,
:n] = y`, becomes a new `x` by the scatter operator that is the inverse of the view.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from moec.capture.decomposition.composite import is_implicit
from moec.torch_private import HigherOrderOperator, OpOverload, overload_name_of, schema_of

_aten = torch.ops.aten
SCATTERS: dict[Any, Any] = {
    _aten.slice.Tensor: _aten.slice_scatter.default,
    _aten.select.int: _aten.select_scatter.default,
}
"""View -> the operator that writes a part back: (tensor, part, arguments of the view)."""


class Retrace(Exception):
    """Raised where a node cannot be replaced alone, so that torch must retrace the program."""


@dataclass(frozen=True)
class Write:
    """The function for a node that writes, and the views through which it writes, outermost first:
    `x[0][:n].add_(y)` has a select and a slice."""

    function: Callable[..., Any]
    views: tuple[fx.Node, ...]


def writes(node: fx.Node) -> bool:
    """Whether `node` writes into an operand."""
    return isinstance(node.target, OpOverload) and schema_of(node.target).is_mutable


def is_function(node: fx.Node) -> bool:
    """Whether a node is a pure function of its operands."""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    return not isinstance(node.target, HigherOrderOperator) and not writes(node)


def write_of(node: fx.Node) -> Write:
    """`node`, which writes into its first operand, as a function. Raises Retrace where there is
    none, or where the memory is read under another name afterwards."""
    target: Any = node.target
    namespace, name = schema_of(target).name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    overload = getattr(packet, overload_name_of(target), None)
    if not name.endswith("_") or overload is None or not _is_same_call(target, overload):
        raise Retrace(f"{target} has no function of the same arguments")
    written, views = cast(fx.Node, node.args[0]), list[fx.Node]()
    while written.target in SCATTERS:
        views.insert(0, written)
        written = cast(fx.Node, written.args[0])
    if not _is_new(written, node) or (views and _is_written_again(node)):
        raise Retrace(f"{target} writes into memory that has other names")
    return Write(cast(Callable[..., Any], overload), tuple(views))


def _is_same_call(target: Any, overload: Any) -> bool:
    """Whether `overload` takes the same arguments, writes nothing, and returns new memory."""
    before, after = schema_of(target).arguments, schema_of(overload).arguments
    first, *others = (argument.alias_info for argument in before)
    return (
        [(a.name, str(a.type)) for a in before] == [(a.name, str(a.type)) for a in after]
        and first is not None
        and first.is_write
        and not any(alias is not None and alias.is_write for alias in others)
        and not any(a.alias_info for a in (*after, *schema_of(overload).returns))
    )


def _is_new(written: fx.Node, node: fx.Node) -> bool:
    """Whether `written` has its own memory, and no view of it from before `node` is read after."""
    source = written
    while writes(source):  # its result is its first operand
        source = source.args[0]  # type: ignore[assignment]
    if source.op != "call_function" or _may_alias(source):
        return False
    names = {source}
    order = {each: position for position, each in enumerate(node.graph.nodes)}
    stack = [source]
    while stack:
        for user in stack.pop().users:
            if user not in names and order[user] < order[node] and _may_alias(user):
                names.add(user)
                stack.append(user)
    in_place = {name for name in names if name is source or writes(name)}
    last = max(
        (order[u] for name in names - in_place for u in name.users if u is not node),
        default=-1,
    )
    return written in in_place and last < order[node]


def _is_written_again(node: fx.Node) -> bool:
    """Whether anything is written between `node`, whose result is a part of a tensor, and the last
    reader of its result."""
    between = node.next
    readers = set(node.users)
    while readers:
        readers.discard(between)
        if readers and writes(between):
            return True
        between = between.next
    return False


def _may_alias(node: fx.Node) -> bool:
    """Whether the result of `node` may share memory with an operand."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return _may_alias(node.args[0])
    if not isinstance(node.target, OpOverload) or is_implicit(node.target):
        return True
    return any(result.alias_info is not None for result in schema_of(node.target).returns)
