"""Builds Relax functions: their values, their kernels, their weight arguments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import torch
import tvm_ffi
from tvm import relax, tirx
from tvm.tirx import PrimFunc

from moec.codegen.destinations import reshape
from moec.codegen.fusion import FusionGroup
from moec.codegen.loop_kernel import LoopKernel, describe
from moec.codegen.loops import scalars as sc
from moec.codegen.loops.emit import EMIT
from moec.codegen.loops.index import Sizes
from moec.ir.graph import Graph, Op, TensorType, Value
from moec.runtime.dtypes import Array
from moec.runtime.package import KernelCall

Maker: TypeAlias = Callable[[Any, Any, str], PrimFunc]
"""(spec, target, name) -> the kernel that computes what `spec` describes."""
LoopMaker: TypeAlias = Callable[[FusionGroup, str, Any], LoopKernel]
"""(group, name, target) -> the kernel of a group of ops."""


@dataclass(frozen=True)
class Param:
    """A weight argument of `main`: what `pack` computes from values of the graph (None: the
    value), and from those `beside` them, which it does not store. From the array and the same
    tensors, `unpack` gives, part by part, what the array holds and what it should."""

    name: str
    type: TensorType
    values: tuple[Value, ...]
    pack: Callable[..., Any] | None = None
    beside: tuple[Value, ...] = ()
    unpack: Callable[..., Iterator[tuple[torch.Tensor, torch.Tensor]]] | None = None


def as_array(tensor: torch.Tensor) -> Array:
    """The same memory as a numpy array, if the tensor is contiguous."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(tensor.resolve_conj().numpy())


def has_nan(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and any(
        bool(part.isnan().any()) for part in torch.split(tensor.reshape(-1), 1 << 24)
    )


@dataclass
class ModuleBuilder:
    """The kernels of a module, each generated once for all functions that call it. `makers` and
    `loop` are those of a `moec.codegen.backend.Backend`."""

    builder: relax.BlockBuilder
    makers: Mapping[type, Maker]
    loop: LoopMaker
    functions: dict[object, Any] = field(default_factory=dict)
    name_counts: Counter[str] = field(default_factory=Counter)
    sites: list[tuple[str, str]] = field(default_factory=list)

    def unique(self, name: str) -> str:
        self.name_counts[name] += 1
        return name if self.name_counts[name] == 1 else f"{name}_{self.name_counts[name]}"


@dataclass
class Lowering:
    """One Relax function under construction; rules add calls of kernels to it."""

    graph: Graph
    target: Any  # of the kind that the backend and its rules support
    kernels: ModuleBuilder
    sizes: Sizes
    rules: Mapping[Op, object]
    values: dict[Value, relax.Expr] = field(default_factory=dict)
    params: dict[object, tuple[Param, relax.Var]] = field(default_factory=dict)
    sorted: dict[object, list[relax.Expr]] = field(default_factory=dict)
    rounded: dict[object, list[relax.Expr]] = field(default_factory=dict)
    masks: dict[object, Value] = field(default_factory=dict)
    slots: Any = None  # of the backend, where weights of experts are read from disk into slots
    calls: dict[str, KernelCall] = field(default_factory=dict)  # by the names of their results
    results: dict[str, relax.Var] = field(default_factory=dict)  # of the calls, by their names
    noted: list[Op] = field(default_factory=list)  # the ops of the next call
    root: Op | None = None  # of the group that is lowered
    bases: dict[relax.Expr, relax.Expr] = field(default_factory=dict)
    views: dict[tuple[relax.Expr, TensorType], relax.Expr] = field(default_factory=dict)

    @property
    def builder(self) -> relax.BlockBuilder:
        return self.kernels.builder

    def type(self, of: Value | TensorType) -> relax.TensorType:
        shape = [self.sizes.expr(d) for d in of.shape]
        if of.dtype == "c64":
            shape.append(tirx.const(2, "int64"))
        return relax.TensorType(shape, sc.STORED[of.dtype])

    def value(self, value: Value) -> relax.Expr:
        """The Relax expression of a graph value; a param becomes an argument when it is first
        read."""
        if value not in self.values:
            self.values[value] = self.param(value, Param(value.name, value.type, (value,)))
        return self.values[value]

    def param(self, key: object, param: Param) -> relax.Var:
        """The weight argument of that key, created once."""
        if key not in self.params:
            self.params[key] = (param, relax.Var(param.name, self.type(param.type)))
        return self.params[key][1]

    def rule(self, op: Op) -> object:
        """The rule that was selected for an op; None for an op in a loop."""
        return self.rules.get(op)

    def kernel(self, spec: Any, name: str) -> Any:
        """The backend's kernel for a spec, generated once."""
        maker = self.kernels.makers[type(spec)]
        return self.function(spec, name, lambda unique: maker(spec, self.target, unique))

    def note(self, op: Op, kernel: str) -> None:
        """Records which kernel computes an op: the one that is called next."""
        self.noted.append(op)
        self.kernels.sites.append((op.origin or op.outputs[0].name, kernel))

    def function(self, key: object, name: str, make: Callable[[str], PrimFunc]) -> Any:
        """The kernel of that key, generated once."""
        functions = self.kernels.functions
        if key not in functions:
            unique = self.kernels.unique(name)
            functions[key] = self.builder.add_func(make(unique), unique)
        return functions[key]

    def call(
        self, function: Any, arguments: Sequence[relax.Expr], outputs: Sequence[TensorType]
    ) -> list[relax.Expr]:
        """Calls one kernel and returns its outputs, taken from a tuple if there are several."""
        types = [self.type(t) for t in outputs]
        expression = relax.call_tir(
            function, list(arguments), types if len(types) > 1 else types[0]
        )
        result = self._called(expression)
        if len(types) == 1:
            return [result]
        return [self.builder.emit(relax.TupleGetItem(result, i)) for i in range(len(types))]

    def in_place(
        self, function: Any, arguments: Sequence[relax.Expr], output: TensorType
    ) -> relax.Expr:
        """The first argument after a kernel has written into it. No other op may read its old
        content."""
        expression = relax.op.call_tir_inplace(
            function, relax.Tuple(arguments), 0, self.type(output)
        )
        return self._called(expression)

    def _called(self, expression: relax.Expr) -> relax.Expr:
        result = self.builder.emit(expression)
        ops, self.noted = self.noted, []
        op = self.root if self.root in ops or not ops else ops[0]
        if op is not None:
            line, names = op.line.partition(": `")[0], tuple(o.outputs[0].name for o in ops)
            self.calls[result.name] = KernelCall(names, op.origin, line)
            self.results[result.name] = result
        return result

    def shaped(self, value: Value, to: TensorType) -> relax.Expr:
        """A value of the graph in another shape."""
        source = self.value(value)
        return source if value.type == to else self.reshaped(source, to)

    def reshaped(self, value: relax.Expr, to: TensorType) -> relax.Expr:
        """The same memory in another shape; a shape that the value had before is reused."""
        base = self.bases.get(value, value)
        key = (base, to)
        if key not in self.views:
            shape = relax.ShapeExpr(self.type(to).shape.values)
            view = base if _same_shape(base, shape) else self.builder.emit(reshape(base, shape))
            self.views[key] = view
            self.bases[view] = base
        return self.views[key]

    def group(self, group: FusionGroup) -> list[relax.Expr]:
        """The outputs of a group's root: a call of one kernel, or a view."""
        root = group.root
        rule = EMIT[root.name]
        if rule.view and len(group.ops) == 1:
            source, out = self.value(root.inputs[0]), root.outputs[0]
            same = root.inputs[0].shape == out.shape
            return [source if same else self.reshaped(source, out.type)]
        text, order = describe(group)
        written = self.kernels.functions.get(text)
        if written is None:
            name = self.kernels.unique(_name(group))
            kernel = self.kernels.loop(group, name, self.target)
            written = (self.builder.add_func(kernel.function, name), kernel.sizes, order)
            self.kernels.functions[text] = written
        function, free, first_order = written
        # The kernel may have been generated for sizes of other names.
        now = dict(zip(first_order, order, strict=True))
        arguments = [self.value(v) for v in group.inputs]
        arguments += [self.sizes.variables[now[size]] for size in free]
        self.noted = [*group.ops]
        return self.call(function, arguments, [v.type for v in root.outputs])


def _same_shape(value: relax.Expr, shape: relax.ShapeExpr) -> bool:
    return bool(tvm_ffi.structural_equal(value.ty.shape, shape))


def _name(group: FusionGroup) -> str:
    """A name for profiles: at most three different ops of the group."""
    words = dict.fromkeys(op.name.split(".")[1].strip("_") for op in group.ops)
    heavy = [w for w in words if EMIT.get(f"aten.{w}.default", EMIT[group.root.name]).cost] or list(
        words
    )
    return "fused_" + "_".join(heavy[-3:])
