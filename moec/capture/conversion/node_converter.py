"""Converts nodes of an export to ops: arguments become inputs and attributes, sizes expressions."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import sympy
import torch

from moec.capture.conversion.arithmetic import float_of, whole_of
from moec.capture.conversion.dropped_nodes import dropped, reads_number
from moec.capture.conversion.float_tensors import (
    VaryingCondition,
    VaryingFloat,
    emit_call,
    operand_for,
)
from moec.capture.decomposition.expand import COMPOSITE
from moec.capture.linear_attention.scans import OWN
from moec.capture.user_code.sources import named, user_code, user_line
from moec.errors import CaptureError, IRError
from moec.ir.aten import IR_DTYPES
from moec.ir.graph import Attr, DType, Op, Ref, Stage, TensorType, Value
from moec.ir.sizes.dims import Dim, canonical, from_torch, product
from moec.torch_private import HigherOrderOperator, schema_of


def view_shape(size: Sequence[Dim], source: Sequence[Dim], torch_shape: Sequence[Dim]) -> list[Dim]:
    """`size`, with an exact quotient in place of -1. `torch_shape` is torch's shape.

    torch infers floor(8*floor(B/2)/B) for view(2, B*S, -1) of [B, S, 8] exported at B = 4. It
    equals 4 only at even B; the quotient of all sizes by the other sizes is 4. torch's size is kept
    where the quotient is no polynomial with integer coefficients. torch also infers
    floor(B*S/floor(B*S/4)) for the 4 of view(-1, 4, 8), which no empty batch has, and 4*floor(S/4)
    for the S of view(B, S, 8), which is another number where B*S alone is a multiple of 4.
    """
    shape = [at if dim == -1 else dim for dim, at in zip(size, torch_shape, strict=True)]
    if list(size).count(-1) != 1:
        return shape
    others = product(tuple(dim for dim in size if dim != -1))
    if others == 0:
        return shape
    quotient = sympy.cancel(sympy.sympify(product(tuple(source))) / sympy.sympify(others))
    if not quotient.is_polynomial() or not all(c.is_Integer for c in _coefficients(quotient)):
        return shape
    return [canonical(quotient) if dim == -1 else at for dim, at in zip(size, shape, strict=True)]


def _coefficients(polynomial: sympy.Expr) -> list[sympy.Expr]:
    return list(polynomial.expand().as_coefficients_dict().values())


_IGNORED_ARGUMENTS = {"layout", "device", "pin_memory", "memory_format", "non_blocking"}
_VIEWS = ("aten.view.default", "aten._unsafe_view.default")
_INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


@dataclass
class Converter:
    """The state of one conversion: what each node of the export became. `line` is the user's line
    of the current node; `written` are the ops that were an index_add or an index_copy."""

    rename: Mapping[str, str]
    root: torch.nn.Module
    prefix: str = ""
    ops: list[Op] = field(default_factory=list)
    values: dict[torch.fx.Node, Any] = field(default_factory=dict)
    computed: dict[sympy.Expr, sympy.Expr] = field(default_factory=dict)
    floats: dict[torch.fx.Node, Value] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    written: dict[Op, str] = field(default_factory=dict)
    line: str = ""

    def where(self, node: torch.fx.Node) -> str:
        return relative_path(self.prefix, origin(node))

    def place(self, node: torch.fx.Node) -> str:
        """Where a node comes from, for messages: the user's line, else the module or the node."""
        return user_code(node) or self.where(node) or node.name

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
            self.values[node] = self.values[source][index]
        elif isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
            self.values[node] = self.integer(value, node)
            if reads_number(node):
                self.size(node, self.values[node])
        elif isinstance(value, torch.SymFloat | float):
            self.values[node] = self.number(value, node)
        elif isinstance(value, torch.SymBool) and value.node.expr not in (True, False):
            condition = named(value.node.expr, self.rename)
            self.values[node] = VaryingCondition(self.place(node), condition)
        elif value is None or isinstance(value, torch.SymBool | bool):
            self.values[node] = None
        else:
            self.call(node, value)

    def size(self, node: torch.fx.Node, dim: Dim) -> None:
        """A size read from data (`.item()`, `.tolist()`): emits a `moec.size` op that binds it."""
        if isinstance(dim, sympy.Symbol):
            source = self.values[cast(torch.fx.Node, node.args[0])]
            output = Value(self.fresh(node.name), source.type)
            self.ops.append(
                Op("moec.size", (source,), (output,), {"name": dim.name}, None, self.where(node))
            )

    def dim(self, size: torch.SymInt | int, where: str) -> Dim:
        """A size as an IR expression. Raises CaptureError where it was computed in floats in a way
        that cannot be repeated."""
        try:
            return from_torch(size, self.rename, self.computed)
        except IRError as error:
            shown = named(size.node.expr, self.rename) if isinstance(size, torch.SymInt) else size
            raise CaptureError(f"{where}: the size {shown} cannot be kept: {error}") from None

    def integer(self, value: torch.SymInt | int, node: torch.fx.Node) -> Dim:
        """A size. One that is computed of a float gets an expression that rounds like Python."""
        arguments = [self.argument(a) for a in node.args]
        floats = [a for a in arguments if isinstance(a, VaryingFloat)]
        if isinstance(value, int) or all(isinstance(a, VaryingCondition) for a in floats):
            return self.dim(value, self.place(node))
        result = whole_of(node.target, [value_of(a) for a in arguments])
        return canonical(self.remember(value.node.expr, result, node))

    def number(self, value: torch.SymFloat | float, node: torch.fx.Node) -> float | VaryingFloat:
        """A float. One that depends on sizes or data cannot be represented in a graph, but a size
        may be computed from it (math.ceil)."""
        if isinstance(value, float):
            return value
        expr = value.node.expr
        if expr.is_number:
            return float(expr)
        result = float_of(node.target, [value_of(self.argument(a)) for a in node.args])
        if result is not None:
            self.remember(expr, result, node)
        return VaryingFloat(self.place(node), named(expr, self.rename), result)

    def remember(
        self, expr: sympy.Expr, value: sympy.Expr | None, node: torch.fx.Node
    ) -> sympy.Expr:
        """Records `value` as the exact form of torch's `expr` and returns it.

        Raises CaptureError where there is no exact form, or where torch uses one `expr` for two
        values that round differently.
        """
        line, shown = user_line(node), named(expr, self.rename)
        if value is None:
            raise CaptureError(
                f"{line}: the size {shown} is made of floats with {_spelled(node.target)}, which "
                "moec cannot repeat exactly; compute it of whole numbers (//), or as a tensor"
            )
        if self.computed.setdefault(expr, value) != value:
            raise CaptureError(
                f"{line}: torch takes {shown} for a size that was computed in another order, "
                "and rounds differently; write both with the same operations, or with whole numbers"
            )
        return value

    def call(self, node: torch.fx.Node, value: Any) -> None:
        target, self.line = str(node.target), user_code(node)
        if any(name in target for name in _INLINED):
            self.inline(node)
            return
        if isinstance(node.target, HigherOrderOperator):
            raise CaptureError(
                f"{self.where(node) or node.name}: control flow ({target}) cannot be compiled; "
                "write it with torch.where, or fix the branch before the export"
            )
        if any(isinstance(self.values.get(n), VaryingFloat) for n in node.all_input_nodes):
            output = emit_call(self, node)
            if output is not None:
                self.values[node] = output
                return
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
        if target == "aten.reshape.default" and isinstance(attrs["shape"], tuple):
            (output,) = outputs
            shape = view_shape(
                cast("tuple[Dim, ...]", attrs["shape"]), inputs[0].shape, output.shape
            )
            outputs = (Value(output.name, TensorType(output.dtype, tuple(shape))),)
        if target in OWN:  # its inputs have the order of the op
            target = OWN[target]
            attrs = {name: attr for name, attr in attrs.items() if attr is True}
        if not target.startswith(Stage.MOE.value):
            raise CaptureError(
                f"{self.place(node)}: operator {target} is none of ATen's; write it in those, or "
                "run the part that contains it outside of the compiled module"
            )
        op = Op(target, tuple(inputs), outputs, attrs, None, where, self.line)
        self.ops.append(op)
        composite = str(node.meta.get(COMPOSITE)).removeprefix("aten.").split(".")[0].rstrip("_")
        if "index_put" in target and composite in ("index_add", "index_copy"):
            self.written[op] = composite
        self.values[node] = outputs if isinstance(value, tuple | list) else outputs[0]

    def attributes(self, node: torch.fx.Node, inputs: list[Value]) -> dict[str, Attr]:
        """The arguments that are not plain tensors; plain tensors are appended to `inputs`."""
        attrs: dict[str, Attr] = {}
        schema = schema_of(node.target).arguments
        for index, argument in enumerate(schema):
            if index < len(node.args) and not argument.kwarg_only:
                node_arg = node.args[index]
            elif argument.name in node.kwargs:
                node_arg = node.kwargs[argument.name]
            else:
                continue
            if argument.name in _IGNORED_ARGUMENTS:
                continue
            converted = self.argument(node_arg)
            if isinstance(converted, VaryingFloat) and str(argument.type) == "Tensor":
                converted = operand_for(self, cast(torch.fx.Node, node_arg), node) or converted
            if isinstance(converted, Value):
                inputs.append(converted)
            elif argument.has_default_value() and converted == argument.default_value:
                # None would end the list of plain tensors early, and later ones would lose their
                # position.
                if converted is None and "Tensor" in str(argument.type):
                    attrs[argument.name] = None
            else:
                attrs[argument.name] = self.attribute(
                    converted, inputs, self.where(node) or node.name
                )
        return attrs

    def argument(self, node_arg: Any) -> Any:
        if isinstance(node_arg, torch.fx.Node):
            return self.values[node_arg]
        if isinstance(node_arg, list | tuple):
            return tuple(self.argument(item) for item in node_arg)
        if isinstance(node_arg, torch.SymInt):
            return from_torch(node_arg, self.rename, self.computed)
        return node_arg

    def attribute(self, converted: Any, inputs: list[Value], where: str) -> Attr:
        if isinstance(converted, Value):
            inputs.append(converted)
            return Ref(len(inputs) - 1)
        if isinstance(converted, tuple):
            return tuple(self.attribute(item, inputs, where) for item in converted)
        if isinstance(converted, torch.dtype):
            return DType(self.dtype(converted, where))
        if converted is None or isinstance(converted, bool | int | float | str | sympy.Expr):
            return converted
        if isinstance(converted, VaryingFloat):
            raise CaptureError(
                f"{converted.where}: the number {converted.expr} depends on a size or on data, and "
                "is an argument that a graph stores as a constant; compute it as a tensor and "
                "multiply by that"
            )
        raise CaptureError(
            f"{where}: an argument of type {type(converted).__name__} cannot be in a graph"
        )

    def inline(self, node: torch.fx.Node) -> None:
        """Inlines a region under no_grad or without autocast: its ops replace the region."""
        position = next(
            i
            for i, a in enumerate(node.args)
            if isinstance(a, torch.fx.Node) and a.op == "get_attr"
        )
        module = self.root.get_submodule(str(cast(torch.fx.Node, node.args[position]).target))
        arguments = [self.argument(a) for a in node.args[position + 1 :]]
        graph = cast(torch.fx.GraphModule, module).graph
        holders = [n for n in graph.nodes if n.op == "placeholder"]
        self.values |= dict(zip(holders, arguments, strict=True))
        for inner in graph.nodes:
            if inner.op == "call_function" and not dropped(inner):
                self.node(inner)
            elif inner.op == "output":
                self.values[node] = self.argument(inner.args[0])


def value_of(argument: Any) -> Any:
    return argument.value if isinstance(argument, VaryingFloat) else argument


def _spelled(target: Any) -> str:
    return str(getattr(target, "__name__", target))


def relative_path(prefix: str, path: str) -> str:
    return path if not prefix else path.removeprefix(prefix).removeprefix(".")


def origin(node: torch.fx.Node) -> str:
    """The path of the module that the user wrote, such as "model.layers.0.mlp"."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if not path.startswith("_empty_nn")]
    return str(paths[-1]).replace("L__self___", "").strip(".") if paths else ""
