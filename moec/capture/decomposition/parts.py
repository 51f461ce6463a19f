"""Traces one operator on fake operands into its parts, once for each kind of operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, cast
from unittest import mock

import torch
from torch import fx

from moec import torch_private
from moec.capture.decomposition.composite import composite_count, decompositions
from moec.capture.decomposition.functional import Retrace, is_function
from moec.torch_private import (
    MissingTorchName,
    enable_python_dispatcher,
    free_unbacked_symbols,
    lazy_graph_modules,
    make_fx,
    place,
)


@dataclass(frozen=True)
class Parts:
    """Traces operators down to core ATen by torch's rules. `traced` caches the traces."""

    rules: Mapping[Any, Callable[..., Any]]
    traced: dict[Any, fx.Graph] = field(default_factory=dict)

    def of(self, node: fx.Node, target: Callable[..., Any]) -> fx.Graph:
        """The graph of `target` called with the arguments of `node`, as a function of its operands.
        Raises Retrace where the parts write, create sizes from data, or cannot be traced alone."""
        operands = operands_of(node)
        values = [operand.meta["val"] for operand in operands]
        key = target, _arguments(node, operands), tuple(map(_kind, values))
        if key not in self.traced:
            graph = self.trace(_call_of(node, target, operands), values)
            if not all(map(is_function, graph.nodes)) or _reads_data(graph, values):
                raise Retrace(f"the parts of {target} write, or make sizes of data")
            self.traced[key] = graph
        return self.traced[key]

    def trace(self, function: Callable[..., Any], operands: Sequence[Any]) -> fx.Graph:
        """The graph of `function` on fake operands. Raises Retrace where torch cannot trace it."""
        rules = cast(Any, self.rules)
        try:
            traced: fx.GraphModule = make_fx(function, decomposition_table=rules)(*operands)
            return traced.graph
        except Exception as error:
            raise Retrace(f"{function} cannot be traced alone") from error


@cache
def _split(registrations: int) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """(composite, others): the rules of `decompositions` for composite operators that the
    dispatcher would not apply by itself, and those for other operators. Cached, because torch walks
    all of its operators to split them."""
    composite, rules = torch_private.split_decompositions(decompositions())
    return {op: rule for op, rule in composite.items() if not _is_kernel_of(op, rule)}, rules


def _is_kernel_of(operator: Any, rule: Any) -> bool:
    """Whether a rule only calls the composite kernel, as the dispatcher does anyway. Installing and
    removing the five hundred rules of this kind would take longer than tracing a layer."""
    return isinstance(rule, partial) and rule.keywords == {"kernel": operator}


@contextmanager
def parts_in(source: fx.GraphModule) -> Iterator[Parts]:
    """While open, operators of `source` can be traced. Raises Retrace where torch lacks the private
    functions that this needs, and where no tensor is fake."""
    try:
        detect, override = torch_private.fake_mode_of, torch_private.override_composite
        composite, rules = _split(composite_count())
        only_graphs = _only_graphs(place("extract_tensor_metadata"), place("new_patcher"))
    except MissingTorchName as error:
        raise Retrace(str(error)) from None
    mode = detect(source)
    if mode is None:
        raise Retrace("no tensor of the program is fake")
    with torch.no_grad(), mode, enable_python_dispatcher(), override(composite), only_graphs:
        yield Parts(rules)


@contextmanager
def _only_graphs(metadata: tuple[Any, str], patcher: tuple[Any, str]) -> Iterator[None]:
    """While open, a trace of an operator does only what its graph needs. torch would look for the
    memory format of each tensor (`metadata`), replace the methods of all modules for a function
    that calls none (`patcher`), and write and compile the code of the graph."""
    with (
        mock.patch.object(*metadata, lambda tensor: None),
        mock.patch.object(*patcher, partial(nullcontext, _NoPatches())),
        lazy_graph_modules(True),
    ):
        yield


class _NoPatches:
    """In place of torch's patcher of modules."""

    def patch(self, *_: Any, **__: Any) -> None: ...

    def patch_method(self, *_: Any, **__: Any) -> None: ...

    def visit_once(self, names: object) -> bool:
        return False


def operands_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that `node` reads, each once."""
    return list(dict.fromkeys(node.all_input_nodes))


def _call_of(
    node: fx.Node, target: Callable[..., Any], operands: Sequence[fx.Node]
) -> Callable[..., Any]:
    """`target` with the arguments of `node`, as a function of its operands' values."""

    def call(*values: Any) -> Any:
        named = dict(zip(operands, values, strict=True))
        arguments = fx.map_arg(node.args, named.__getitem__)
        return target(*arguments, **fx.map_arg(node.kwargs, named.__getitem__))

    return call


@dataclass(frozen=True)
class _Operand:
    """The properties of a tensor on which the parts of an operator can depend."""

    dtype: torch.dtype
    shape: str
    stride: str
    offset: str


def _arguments(node: fx.Node, operands: Sequence[fx.Node]) -> str:
    """The arguments of `node` as text, with operands as their positions."""
    positions = {operand: _Position(position) for position, operand in enumerate(operands)}
    return repr(fx.map_arg((node.args, node.kwargs), cast(Any, positions.__getitem__)))


@dataclass(frozen=True)
class _Position:
    index: int


def _kind(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _Operand(
            value.dtype, str(value.shape), str(value.stride()), str(value.storage_offset())
        )
    if isinstance(value, list | tuple):
        return tuple(map(_kind, value))
    return str(value)


def _reads_data(graph: fx.Graph, values: Sequence[Any]) -> bool:
    """Whether the parts create a size from data, whose symbol must be new at each use."""
    before = set().union(*(free_unbacked_symbols(v) for v in values if _has_sizes(v)))
    after = (node.meta.get("val") for node in graph.nodes)
    return any(free_unbacked_symbols(v) - before for v in after if _has_sizes(v))


def _has_sizes(value: Any) -> bool:
    return isinstance(value, torch.Tensor | torch.SymInt | list | tuple)
