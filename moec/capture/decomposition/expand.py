"""Decomposes an export to core ATen, except for the operators in `WHOLE`.

torch would retrace the whole program, which takes longer than the export itself. Only some of the
operators are composite, and layers repeat. So each composite operator is traced alone, once for
each kind of operands, and the nodes of its trace replace it. Programs that write into memory with
other aliases, or whose nodes have subgraphs, are left to torch.
"""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, cast
from unittest import mock

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, TensorArgument

from moec import torch_private
from moec.capture.calls.states import as_buffers
from moec.capture.decomposition.composite import composite_count, decompositions, is_composite
from moec.capture.decomposition.functional import (
    SCATTERS,
    Retrace,
    is_function,
    write_of,
    writes,
)
from moec.capture.user_code.sources import user_code
from moec.errors import CaptureError
from moec.torch_private import (
    GuardOnDataDependentSymNode,
    MissingTorchName,
    dynamo_config,
    enable_python_dispatcher,
    free_unbacked_symbols,
    lazy_graph_modules,
    local_scalar_dense,
    make_fx,
    place,
    symbolic_config,
    update_program,
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


COMPOSITE = "original_aten"
"""The key of `meta` under which torch, too, has the operator that a node is a part of."""
_POSITIONS = (torch.ops.aten.nonzero_numpy.default, torch.ops.aten.where.default)
"""Composite operators whose result size depends on data; tracing them again would create a new
symbol for it."""


_BAGS = (torch.ops.aten.embedding_bag.padding_idx, torch.ops.aten.embedding_bag.default)


def decompose(program: ExportedProgram) -> ExportedProgram:
    """`program` in core ATen. Raises CaptureError where torch cannot decompose it."""
    _check_bags(program)
    # As in the export: else torch gives `x[:, -7:]` the length that it has in the example.
    symbolic = symbolic_config.patch(backed_size_oblivious=True)
    with warnings.catch_warnings(), dynamo_config.patch(fake_tensor_cache_enabled=False):
        warnings.simplefilter("ignore", FutureWarning)  # of torch about its own classes
        try:
            program = as_buffers(program)
            return expand(program) or symbolic(program.run_decompositions)(decompositions())
        except Exception as error:
            raise CaptureError(_refusal(program, error)) from error


def _check_bags(program: ExportedProgram) -> None:
    """Raises CaptureError for bags whose offsets are an input: torch defines what offsets do that
    ascend from 0, checks no others, and ends the process at some of them."""
    inputs = program.graph_signature.user_inputs
    for node in program.graph.nodes:
        if node.target in _BAGS and cast(fx.Node, node.args[2]).name in inputs:
            raise CaptureError(
                f"the offsets of an EmbeddingBag are an input ({user_code(node)}), and torch does "
                "not check that they ascend from 0 and stay within the ids: give ids [bags, ids of "
                "a bag] with padding_idx, or compute the offsets from lengths in the module"
            )


def _refusal(program: ExportedProgram, error: Exception) -> str:
    """What cannot be decomposed: the operator that torch's message names, and the user's line."""
    executed = re.search(r"While executing %(\w+)", str(error))
    name = executed[1] if executed else ""
    node = next((node for node in program.graph.nodes if node.name == name), None)
    if node is None:
        return f"torch cannot decompose the export: {error}"
    line = user_code(node)
    reason = " ".join(str(error).split("\n\n")[0].split())
    if isinstance(error, GuardOnDataDependentSymNode):
        reason = "how many rows it has depends on data, and its result depends on that"
    return f"{node.target} cannot be decomposed{f' ({line})' if line else ''}: {reason}"


def expand(program: ExportedProgram) -> ExportedProgram | None:
    """`program` with each composite operator replaced by its parts; None if only torch can do
    it."""
    source = program.graph_module
    table = decompositions()
    writer = _Writer(fx.Graph())
    try:
        functions = {node: write_of(node) for node in source.graph.nodes if writes(node)}
        with parts_in(source) as parts:
            for node in source.graph.nodes:
                if node in functions:
                    function, views = functions[node].function, functions[node].views
                    writer.write(node, views, writer.splice(node, parts.of(node, function)))
                elif node.target in _POSITIONS:
                    writer.copies[node] = writer.positions(node)
                elif is_composite(node, table):
                    writer.copies[node] = writer.splice(node, parts.of(node, node.target))
                elif is_function(node):
                    writer.copies[node] = writer.copy(node)
                else:
                    raise Retrace(f"{node.target} has regions of its own")
    except Retrace:
        return None
    writer.graph.eliminate_dead_code()
    module = fx.GraphModule(source, writer.graph)
    module.meta.update(source.meta)
    expanded: ExportedProgram = update_program(
        program, module, _named(program.graph_signature, writer.graph)
    )
    return expanded


def _named(signature: ExportGraphSignature, graph: fx.Graph) -> ExportGraphSignature:
    """`signature` with the outputs under their names in `graph`."""
    (results,) = (node.args[0] for node in graph.nodes if node.op == "output")
    outputs = [
        replace(spec, arg=TensorArgument(result.name))
        if isinstance(spec.arg, TensorArgument)
        else spec
        for spec, result in zip(signature.output_specs, results, strict=True)
    ]
    return replace(signature, output_specs=outputs)


@dataclass(frozen=True)
class _Writer:
    """The graph under construction, and for each node of the source its copy. A node that writes in
    place has no copy of its own: `tensors` maps it to the node of the tensor that it writes
    into."""

    graph: fx.Graph
    copies: dict[fx.Node, Any] = field(default_factory=dict)
    tensors: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def of(self, node: fx.Node) -> Any:
        return self.copies[self.tensors.get(node, node)]

    def copy(self, node: fx.Node) -> Any:
        """The copy of a node that is not decomposed."""
        if node.target is operator.getitem:
            source, index = cast(fx.Node, node.args[0]), cast(int, node.args[1])
            results = self.of(source)
            if isinstance(results, list | tuple):
                return results[index]
        copy = self.graph.node_copy(node, self.of)
        if node.op == "placeholder":
            copy.name = node.name  # the signature refers to it by name
        # its decomposition would create a new symbol for the number
        if node.target is torch.ops.aten.item.default:
            copy.target = local_scalar_dense
        return copy

    def splice(self, node: fx.Node, parts: fx.Graph) -> Any:
        """Copies `parts` instead of `node`, and returns the copied result."""
        sources = iter([self.of(operand) for operand in operands_of(node)])
        inner: dict[fx.Node, Any] = {}
        about = {name: value for name, value in node.meta.items() if name != "val"}
        for part in parts.nodes:
            if part.op == "placeholder":
                inner[part] = next(sources)
            elif part.op == "output":
                return fx.map_arg(part.args[0], inner.__getitem__)
            else:
                inner[part] = self.graph.node_copy(part, inner.__getitem__)
                inner[part].meta = {**about, "val": part.meta.get("val"), COMPOSITE: node.target}
        raise AssertionError("a graph without an output")

    def positions(self, node: fx.Node) -> list[fx.Node]:
        """`torch.where(x)` with the sizes that the export gave it, as columns of one nonzero.

        These are the parts of `nonzero(x).unbind(1)`, which is not traced: a loop over experts has
        a `where` for each, and tracing took longer than all else that this file does for it.
        """
        columns, source = node.meta["val"], cast(fx.Node, node.args[0])
        column = columns[0]

        def add(target: Any, arguments: tuple[Any, ...], val: Any, name: str | None) -> fx.Node:
            copy = self.graph.create_node("call_function", target, arguments, name=name)
            copy.meta = {**node.meta, "val": val}
            return copy

        aten = torch.ops.aten
        every = column.new_empty((*column.shape, len(columns)))
        rows = add(aten.nonzero.default, (self.of(source),), every, None)
        one = column.new_empty((*column.shape, 1))
        slices = [
            add(aten.slice.Tensor, (rows, 1, axis, axis + 1), one, f"slice_{axis + 1}")
            for axis in range(len(columns))
        ]
        return [
            add(aten.squeeze.dims, (part, [1]), value, f"squeeze_{axis}" if axis else "squeeze")
            for axis, (part, value) in enumerate(zip(slices, columns, strict=True))
        ]

    def write(self, node: fx.Node, views: Sequence[fx.Node], part: Any) -> None:
        """Makes later readers of the tensor that `node` writes, through `views`, read the updated
        value. Raises Retrace where `part`, the new value, has another dtype or shape."""
        tensor, full = cast(fx.Node, node.args[0]), part
        before, after = tensor.meta["val"], part.meta["val"]
        if before.dtype != after.dtype or str(before.shape) != str(after.shape):
            raise Retrace(f"{node.target} writes another dtype or shape")
        for view in reversed(views):
            tensor = cast(fx.Node, view.args[0])
            if str(view.meta["val"].shape) == str(tensor.meta["val"].shape):
                continue  # `x[:]` is all of x
            arguments: Any = fx.map_arg((view.args[1:], view.kwargs), self.of)
            operands = (self.of(tensor), full, *arguments[0])
            full = self.graph.call_function(SCATTERS[view.target], operands, arguments[1])
            full.meta = {**node.meta, "val": tensor.meta["val"]}
        root = self.tensors.get(tensor, tensor)
        self.copies[root] = full
        if full is part:
            self.tensors[node] = root
        else:
            self.copies[node] = part
