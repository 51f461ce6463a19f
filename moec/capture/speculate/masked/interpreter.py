"""Runs a decomposed export with each axis whose length depends on data at its full length."""

from __future__ import annotations

import operator
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import nn
from torch.export import ExportedProgram

from moec.capture.speculate.facts.symbols import reads_data
from moec.capture.speculate.masked.rules import RULES, Increment, names_of
from moec.capture.speculate.masked.values import (
    Count,
    Rows,
    Unmasked,
    count,
    full,
    is_leaf,
    leaves,
)
from moec.errors import CaptureError
from moec.torch_private import OpOverload, buffers_of, pytree, schema_of

_LINEAR = ("mm", "bmm", "matmul", "addmm", "dot", "mv", "sum")
_LOOKUPS = ("embedding", "gather", "index_select", "take", "take_along_dim")
_ROW_BY_ROW = ("select squeeze view alias clone slice reshape unsqueeze _to_copy detach").split()


class MaskedInterpreter(nn.Module):
    """A module that computes the first `outputs` outputs of a decomposed export. Its weights keep
    their names.

    Its forward takes the user's tensors and raises CaptureError for what a mask cannot express.
    """

    def __init__(self, exported: ExportedProgram, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        signature = exported.graph_signature
        if signature.buffers_to_mutate or signature.parameters_to_mutate:
            raise CaptureError("a module that writes into its buffers has no masked form")
        self.nodes = list(exported.graph.nodes)
        self.held: dict[torch.fx.Node, str] = {}
        holders = [node for node in self.nodes if node.op == "placeholder"]
        for spec, node in zip(signature.input_specs, holders, strict=True):
            if spec.target is not None:
                store = exported.state_dict
                store = store if spec.target in store else exported.constants
                _hold(self, spec.target, store[spec.target].detach())
                self.held[node] = spec.target

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        users = iter(tensors)
        values: dict[torch.fx.Node, Any] = {}
        with fx_traceback.preserve_node_meta():
            for node in self.nodes:
                if node.op == "placeholder":
                    path = self.held.get(node)
                    values[node] = next(users) if path is None else _at(self, path)
                elif node.op == "output":
                    return tuple(values[result] for result in node.args[0][: self.outputs])
                else:
                    with fx_traceback.set_current_meta(node):
                        values[node] = self._step(node, values)
        raise AssertionError("a graph ends with its output")

    def _step(self, node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> Any:
        try:
            return _result(node, values)
        except Unmasked as why:
            stack = (node.meta.get("stack_trace") or "").strip().splitlines()
            line = f" (at {' '.join(stack[-2].split())})" if len(stack) > 1 else ""
            raise CaptureError(f"{why}, which no mask expresses{line}") from None


def _result(node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> Any:
    args: Any = torch.fx.node.map_arg(node.args, values.__getitem__)
    kwargs: Any = torch.fx.node.map_arg(node.kwargs, values.__getitem__)
    name = names_of(node)
    if "_assert" in name or "constrain" in name:
        return None  # the proof replaces the assertion
    if node.target is operator.getitem:
        return args[0][args[1]]
    if name in ("_local_scalar_dense", "item"):
        return Count(args[0])
    operands = leaves((args, kwargs))
    rows = next((value for value in operands if isinstance(value, Rows)), None)
    if name == "sym_size" and rows is not None:
        length = rows.tensor.shape[args[1]]
        counts = args[1] == rows.axis
        return Count(rows.mask.sum(), length, rows.mask) if counts else length
    if not isinstance(node.target, OpOverload) or name.startswith("sym_"):
        if any(isinstance(value, Count) for value in operands):
            return count(node.target, *args)
        return node.target(*args)  # type: ignore[operator]
    rule = RULES.get(name)
    result = NotImplemented if rule is None else rule(node, *args, **kwargs)
    if isinstance(result, Increment):
        return result.of(values[result.more])
    return _row_by_row(node, args, kwargs, rows) if result is NotImplemented else result


def _row_by_row(node: torch.fx.Node, args: Any, kwargs: Any, rows: Rows | None) -> Any:
    """Apply an op that treats each row separately to all rows."""
    target: Any = node.target
    args, kwargs = _with_numbers(target, args, kwargs)
    if rows is None:
        return target(*full(args, None), **full(kwargs, None))
    length, shapes = rows.tensor.shape[rows.axis], node.meta["val"]
    single = isinstance(shapes, torch.Tensor)
    axes = [
        [axis for axis, size in enumerate(value.shape) if reads_data(size)]
        for value in ([shapes] if single else shapes)
    ]
    if not all(axes):
        if names_of(node) not in _LINEAR:
            raise Unmasked(f"{names_of(node)} joins rows that data choose")
        args = pytree.tree_map(
            lambda value: value.zeroed() if isinstance(value, Rows) else value,
            args,
            is_leaf=lambda value: isinstance(value, Rows),
        )
    if names_of(node) in _LOOKUPS:
        args = pytree.tree_map(_inside, args, is_leaf=is_leaf)
    result = target(*full(args, length), **full(kwargs, length))
    keeps = rows.identity and names_of(node) in _ROW_BY_ROW
    parts = [
        Rows(part, rows.mask, which[0], keeps) if which else part
        for part, which in zip([result] if single else result, axes, strict=True)
    ]
    return parts[0] if single else parts


def _inside(value: Any) -> Any:
    """Indices with 0 in the rows that are not set, whose indices eager does not use."""
    indices = isinstance(value, Rows) and value.tensor.dtype in (torch.int64, torch.int32)
    return replace(value, tensor=value.positions()) if indices else value


def _with_numbers(target: Any, args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of an op with numbers read from data as tensors, where the op takes tensors.
    Raises Unmasked where it takes a number."""
    schema = schema_of(target).arguments

    def argument(value: Any, kind: str) -> Any:
        if not isinstance(value, Count) or "int" in kind.lower():
            return value  # a size
        if kind != "Tensor":
            raise Unmasked(f"a number of rows that data choose is an argument of {target}")
        return value.tensor

    kinds = {parameter.name: str(parameter.type) for parameter in schema}
    positional = [argument(v, str(p.type)) for v, p in zip(args, schema, strict=False)]
    return positional, {name: argument(v, kinds.get(name, "")) for name, v in kwargs.items()}


def _hold(root: nn.Module, path: str, tensor: torch.Tensor) -> None:
    """Registers `tensor` as a buffer of `root` at a dotted path."""
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    if name not in buffers_of(root):
        root.register_buffer(name, tensor)


def _at(root: nn.Module, path: str) -> Any:
    return reduce(getattr, path.split("."), root)
