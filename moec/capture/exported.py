"""torch.export program -> Graph in stage ATEN.

Sizes are folded away: a node that computes a SymInt becomes an expression over named sizes,
and never an op. Guards and assertions of the export are dropped; what they allow is kept in
the bounds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import sympy
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    OutputKind,
    TensorArgument,
)

from moec.capture.arithmetic import float_of, whole_of
from moec.capture.scans import OWN
from moec.capture.sources import named, user_line
from moec.capture.states import as_buffers
from moec.errors import CaptureError, IRError
from moec.interpret.outputs import SLOT, Structure, of_leaves
from moec.ir.aten import IR_DTYPES
from moec.ir.dims import Bounds, Dim, from_torch, normal
from moec.ir.float_sizes import check as check_float
from moec.ir.graph import Attr, DType, Graph, Op, Program, Ref, State, TensorType, Value

KEPT = frozenset(
    {
        "aten.linear.default",
        "aten.scaled_dot_product_attention.default",
        "aten.silu.default",
        "aten.gelu.default",
        "aten.layer_norm.default",
        "aten.softmax.int",
        "aten.log_softmax.int",
        "aten.matmul.default",
    }
)
"""Composite operators that have kernels of their own: left whole."""

_DROPPED = ("_assert", "sym_constrain", "sym_size", "sym_numel", "sym_stride", "_guard")
_IGNORED_ARGUMENTS = {"layout", "device", "pin_memory", "memory_format", "non_blocking"}
_VIEWS = ("aten.view.default", "aten._unsafe_view.default")
_INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def decompositions() -> dict[Any, Callable[..., Any]]:
    """To core ATen, with the operators in `KEPT` left whole."""
    composite = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
    return dict(_decompositions(len(composite)))


@cache
def _decompositions(composite: int) -> Mapping[Any, Callable[..., Any]]:
    """torch's table takes long to fill, and has more where more such operators are registered."""
    table: dict[Any, Callable[..., Any]] = torch.export.default_decompositions()
    return {op: table[op] for op in list(table) if str(op) not in KEPT}


def decompose(program: ExportedProgram) -> ExportedProgram:
    """Core ATen, with the operators in `KEPT` left whole. Raises CaptureError."""
    try:
        decomposed: ExportedProgram = as_buffers(program).run_decompositions(decompositions())
    except Exception as error:
        raise CaptureError(f"torch cannot decompose the export: {error}") from error
    return decomposed


@dataclass(frozen=True)
class _Unknown:
    """A float that depends on sizes or data. `value` is it where it is made of sizes alone."""

    where: str
    expr: str
    value: sympy.Expr | None = None


@dataclass
class Converter:
    """The state of one conversion: what each node of the export became."""

    rename: Mapping[str, str]
    root: torch.nn.Module
    prefix: str = ""
    ops: list[Op] = field(default_factory=list)
    made: dict[torch.fx.Node, Any] = field(default_factory=dict)
    computed: dict[sympy.Expr, sympy.Expr] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

    def where(self, node: torch.fx.Node) -> str:
        return without(self.prefix, origin(node))

    def fresh(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self.names:
            count += 1
            candidate = f"{name}_{count}"
        self.names.add(candidate)
        return candidate

    def dtype(self, dtype: torch.dtype, where: str) -> str:
        if dtype not in IR_DTYPES:
            raise CaptureError(
                f"{where}: moec has no dtype {dtype}; cast to one of "
                f"{', '.join(str(d) for d in IR_DTYPES)}"
            )
        return IR_DTYPES[dtype]

    def type(self, tensor: torch.Tensor, where: str) -> TensorType:
        shape = tuple(self.dim(size, where) for size in tensor.shape)
        return TensorType(self.dtype(tensor.dtype, where), shape)

    def node(self, node: torch.fx.Node) -> None:
        value = node.meta.get("val")
        if node.target is operator.getitem:
            source, index = cast(torch.fx.Node, node.args[0]), cast(int, node.args[1])
            self.made[node] = self.made[source][index]
        elif isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
            self.made[node] = self.whole(value, node)
            if "_local_scalar_dense" in str(node.target):
                self.size(node, self.made[node])
        elif isinstance(value, torch.SymFloat | float):
            self.made[node] = self.number(value, node)
        elif value is None or isinstance(value, torch.SymBool | bool):
            self.made[node] = None
        else:
            self.call(node, value)

    def size(self, node: torch.fx.Node, dim: Dim) -> None:
        """A size that is read from data (`.item()`, `.tolist()`): an op binds its name."""
        if isinstance(dim, sympy.Symbol):
            source = self.made[cast(torch.fx.Node, node.args[0])]
            output = Value(self.fresh(node.name), source.type)
            self.ops.append(
                Op("moec.size", (source,), (output,), {"name": dim.name}, None, self.where(node))
            )

    def dim(self, size: torch.SymInt | int, where: str) -> Dim:
        """Raises CaptureError for a size that was computed in floats, where it is not known how."""
        try:
            return from_torch(size, self.rename, self.computed)
        except IRError as error:
            raise CaptureError(f"{where}: the size {size} cannot be kept: {error}") from None

    def whole(self, value: torch.SymInt | int, node: torch.fx.Node) -> Dim:
        """A size. One that is made of a float is what Python makes of that float, at every size."""
        arguments = [self.argument(a) for a in node.args]
        if isinstance(value, int) or not any(isinstance(a, _Unknown) for a in arguments):
            return self.dim(value, self.where(node) or node.name)
        result = whole_of(node.target, [_value(a) for a in arguments])
        return normal(self.remember(value.node.expr, result, node))

    def number(self, value: torch.SymFloat | float, node: torch.fx.Node) -> float | _Unknown:
        """A float; one that depends on sizes or data cannot stand in a graph, though a size
        may be made from it (math.ceil)."""
        if isinstance(value, float):
            return value
        expr = value.node.expr
        if expr.is_number:
            return float(expr)
        result = float_of(node.target, [_value(self.argument(a)) for a in node.args])
        if result is not None:
            self.remember(expr, result, node)
        return _Unknown(self.where(node) or node.name, str(expr), result)

    def remember(
        self, expr: sympy.Expr, value: sympy.Expr | None, node: torch.fx.Node
    ) -> sympy.Expr:
        """`value` is what torch calls `expr`, of which two that round otherwise are one."""
        line, shown = user_line(node), named(expr, self.rename)
        if value is None:
            raise CaptureError(
                f"{line}: the size {shown} is made of floats with {_spelled(node.target)}, which "
                "moec cannot repeat exactly; compute it of whole numbers (//), or as a tensor"
            )
        try:
            check_float(value)
        except ValueError as error:
            raise CaptureError(
                f"{line}: the size {shown} is made of floats in a way that moec cannot repeat "
                f"exactly ({error}); compute it of whole numbers (//), or as a tensor"
            ) from None
        if self.computed.setdefault(expr, value) != value:
            raise CaptureError(
                f"{line}: torch takes {shown} for a size that was computed in another order, "
                "and rounds otherwise; write both with the same operations, or with whole numbers"
            )
        return value

    def call(self, node: torch.fx.Node, value: Any) -> None:
        target = str(node.target)
        if any(name in target for name in _INLINED):
            self.inline(node)
            return
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(
                f"{self.where(node) or node.name}: control flow ({target}) cannot be compiled; "
                "write it with torch.where, or fix the branch before the export"
            )
        inputs: list[Value] = []
        attrs = self.attributes(node, inputs)
        results = list(value) if isinstance(value, tuple | list) else [value]
        where = self.where(node)
        outputs = tuple(
            Value(self.fresh(node.name), self.type(result, where or node.name))
            for result in results
            if isinstance(result, torch.Tensor)
        )
        if target in _VIEWS:  # a graph has no strides: every view is a reshape
            target, attrs = "aten.reshape.default", {"shape": attrs["size"]}
        if target in OWN:  # its inputs stand in the order of the op's own
            target = OWN[target]
            attrs = {name: attr for name, attr in attrs.items() if attr is True}
        self.ops.append(Op(target, tuple(inputs), outputs, attrs, None, where))
        self.made[node] = outputs if isinstance(value, tuple | list) else outputs[0]

    def attributes(self, node: torch.fx.Node, inputs: list[Value]) -> dict[str, Attr]:
        """The arguments that are not plain tensors; plain tensors are added to `inputs`."""
        attrs: dict[str, Attr] = {}
        schema = cast(Any, node.target)._schema.arguments
        for index, argument in enumerate(schema):
            if index < len(node.args) and not argument.kwarg_only:
                given = node.args[index]
            elif argument.name in node.kwargs:
                given = node.kwargs[argument.name]
            else:
                continue
            if argument.name in _IGNORED_ARGUMENTS:
                continue
            made = self.argument(given)
            if isinstance(made, Value):
                inputs.append(made)
            elif argument.has_default_value() and made == argument.default_value:
                # None would end the row of plain tensors early: later ones need its place.
                if made is None and "Tensor" in str(argument.type):
                    attrs[argument.name] = None
            else:
                attrs[argument.name] = self.attribute(made, inputs, self.where(node) or node.name)
        return attrs

    def argument(self, given: Any) -> Any:
        if isinstance(given, torch.fx.Node):
            return self.made[given]
        if isinstance(given, list | tuple):
            return tuple(self.argument(item) for item in given)
        if isinstance(given, torch.SymInt):
            return from_torch(given, self.rename, self.computed)
        return given

    def attribute(self, made: Any, inputs: list[Value], where: str) -> Attr:
        if isinstance(made, Value):
            inputs.append(made)
            return Ref(len(inputs) - 1)
        if isinstance(made, tuple):
            return tuple(self.attribute(item, inputs, where) for item in made)
        if isinstance(made, torch.dtype):
            return DType(self.dtype(made, where))
        if made is None or isinstance(made, bool | int | float | str | sympy.Expr):
            return made
        if isinstance(made, _Unknown):
            raise CaptureError(
                f"{made.where}: the float {made.expr} depends on a size or on data; "
                "compute it as a tensor"
            )
        raise CaptureError(
            f"{where}: an argument of type {type(made).__name__} cannot stand in a graph"
        )

    def inline(self, node: torch.fx.Node) -> None:
        """A region under no_grad or without autocast: its ops stand where the region stood."""
        position = next(
            i
            for i, a in enumerate(node.args)
            if isinstance(a, torch.fx.Node) and a.op == "get_attr"
        )
        module = self.root.get_submodule(str(cast(torch.fx.Node, node.args[position]).target))
        arguments = [self.argument(a) for a in node.args[position + 1 :]]
        graph = cast(torch.fx.GraphModule, module).graph
        holders = [n for n in graph.nodes if n.op == "placeholder"]
        self.made |= dict(zip(holders, arguments, strict=True))
        for inner in graph.nodes:
            if inner.op == "call_function" and not dropped(inner):
                self.node(inner)
            elif inner.op == "output":
                self.made[node] = self.argument(inner.args[0])


def _value(argument: Any) -> Any:
    return argument.value if isinstance(argument, _Unknown) else argument


def _spelled(target: Any) -> str:
    return str(getattr(target, "__name__", target))


def dropped(node: torch.fx.Node) -> bool:
    return any(part in str(node.target) for part in _DROPPED) and not isinstance(
        node.meta.get("val"), torch.SymInt | int
    )


def without(prefix: str, path: str) -> str:
    return path if not prefix else path.removeprefix(prefix).removeprefix(".")


def origin(node: torch.fx.Node) -> str:
    """The path of the module that the user wrote, such as "model.layers.0.mlp"."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if not path.startswith("_empty_nn")]
    return str(paths[-1]).replace("L__self___", "").strip(".") if paths else ""


def to_program(
    exported: ExportedProgram,
    *,
    rename: Mapping[str, str] | None = None,
    bounds: Mapping[str, Bounds] | None = None,
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    prefix: str = "",
) -> Program:
    """The graph and weights of a decomposed export.

    `rename` maps torch's symbols to the names of the IR, `bounds` overrides what the export
    found. Weights keep their names and their memory; a path loses `prefix`. Raises
    CaptureError, naming the place, for what a graph cannot hold.
    """
    rename = rename or {}
    converter = Converter(rename, exported.graph_module, prefix)
    signature = exported.graph_signature
    holders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    mutated = dict(signature.buffers_to_mutate)
    inputs: list[Value] = []
    params: dict[str, Value] = {}
    states: dict[str, Value] = {}
    weights: dict[str, torch.Tensor] = {}
    shared: dict[tuple[Any, ...], Value] = {}
    for spec, node in zip(signature.input_specs, holders, strict=True):
        if not isinstance(spec.arg, TensorArgument):
            converter.made[node] = getattr(spec.arg, "value", None)
            if isinstance(node.meta.get("val"), torch.SymInt):
                raise CaptureError(
                    f"input {node.name} is a Python number that may vary; pass it as a tensor"
                )
            continue
        tensor = node.meta["val"]
        if spec.kind is InputKind.USER_INPUT:
            place = len(inputs)
            wish = input_names[place] if place < len(input_names) else node.name
            name = converter.fresh(wish)
            value = Value(name, converter.type(tensor, f"input {name}"))
            inputs.append(value)
        else:
            target = cast(str, spec.target)
            data = _weight(exported, spec.kind, target)
            name = without(prefix, target)
            value = Value(converter.fresh(name), converter.type(tensor, name))
            if spec.kind is InputKind.BUFFER and target in mutated.values():
                states[target] = value
                weights[value.name] = data
            else:
                key = (data.data_ptr(), data.shape, data.stride(), data.dtype)
                if data.numel() and key in shared:
                    value = shared[key]
                else:
                    shared[key] = params[target] = value
                    weights[value.name] = data
        converter.made[node] = value
    for node in exported.graph.nodes:
        if node.op == "call_function" and not dropped(node):
            converter.node(node)
    outputs, after = _outputs(exported, converter, output_names)
    ordered = tuple(State(states[name], after[name]) for name in states)
    used = {name for value in (*inputs, *states.values()) for name in _symbols(value)}
    found: dict[str, Bounds] = {}
    for symbol, limits in exported.range_constraints.items():
        name = rename.get(str(symbol), str(symbol))
        both = Bounds(_whole(limits.lower) or 0, _whole(limits.upper))
        found[name] = both.within(found.get(name, Bounds()))
    limits = {name: (bounds or {}).get(name, found.get(name, Bounds())) for name in sorted(used)}
    graph = Graph(
        (*inputs, *states.values()),
        tuple(params.values()),
        tuple(converter.ops),
        outputs,
        ordered,
        limits,
    )
    return Program(graph, weights)


def _symbols(value: Value) -> set[str]:
    from moec.ir.dims import symbols

    return {name for dim in value.shape for name in symbols(dim)}


def _whole(limit: Any) -> int | None:
    if not getattr(limit, "is_Integer", isinstance(limit, int)):
        return None
    return None if int(limit) >= 2**62 else int(limit)


def _weight(exported: ExportedProgram, kind: InputKind, target: str) -> torch.Tensor:
    stores: list[Mapping[str, Any]] = [exported.state_dict, exported.constants]
    for store in stores if kind is not InputKind.CONSTANT_TENSOR else reversed(stores):
        if target in store:
            return cast(torch.Tensor, store[target]).detach()
    raise CaptureError(f"the export names the weight {target} but does not hold it")


def structure_of(exported: ExportedProgram) -> Structure:
    """What the program returns: its tensors, and constants (None, numbers) where it has such.

    Raises CaptureError for a number that depends on sizes or data.
    """
    leaves: list[Any] = []
    for spec in exported.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            continue
        if isinstance(spec.arg, TensorArgument):
            leaves.append(SLOT)
        elif isinstance(spec.arg, ConstantArgument):
            leaves.append(spec.arg.value)
        else:
            raise CaptureError(
                f"output {spec.arg.name} is a Python number that may vary; return it as a tensor"
            )
    return of_leaves(exported.call_spec.out_spec, leaves)


def _outputs(
    exported: ExportedProgram, converter: Converter, names: Sequence[str]
) -> tuple[tuple[Value, ...], dict[str, Value]]:
    """The user's outputs and the new contents of each mutated buffer.

    Results that are not computed (an input or a weight returned as it is) pass through an
    alias, and so do outputs, so that each has the name that its reader knows.
    """
    (node,) = [n for n in exported.graph.nodes if n.op == "output"]
    results = converter.argument(node.args[0])
    outputs: list[Value] = []
    after: dict[str, Value] = {}
    for spec, result in zip(exported.graph_signature.output_specs, results, strict=True):
        if spec.kind is OutputKind.USER_INPUT_MUTATION:
            written = next(v for n, v in converter.made.items() if n.name == spec.target)
            raise CaptureError(
                f"the model writes into its input {written.name}; copy the input first, or make "
                "it a buffer"
            )
        if not isinstance(result, Value):
            continue  # a constant: it stands in the structure of the results
        if spec.kind is OutputKind.BUFFER_MUTATION:
            after[cast(str, spec.target)] = result
            continue
        index = len(outputs)
        stem = names[index] if index < len(names) else f"output_{index}"
        alias = Value(converter.fresh(stem), result.type)
        converter.ops.append(Op("aten.alias.default", (result,), (alias,)))
        outputs.append(alias)
    return tuple(outputs), after
