"""The ONNX graph under construction: nodes, constants, weights, and the name of each value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Protocol

import numpy as np
import sympy
import torch

from moec.dtypes import LONG_NAMES
from moec.errors import NoMatch
from moec.ir.graph import Graph, Value
from moec.ir.sizes.dims import Dim, symbols
from moec.ir.sizes.floats import f64, has_wide_numbers, is_float, operation
from moec.ir.sizes.functions import DoubleFunction, IntegerFunction, sqrt

_DOUBLE, _INT64 = 11, 7
"""ONNX's codes for the types."""


class SizeWriter(Protocol):
    """What adds the nodes; `sizes` are the names of named sizes in the file."""

    sizes: dict[str, str]

    def __call__(self, kind: str, *inputs: str, **attrs: Any) -> str: ...

    def constant(self, value: Any, dtype: str = "i64") -> str: ...


def size_value(w: SizeWriter, dim: Any) -> str:
    """A size as i64[1].

    Raises NoMatch for a size that no input has, or a function that is not supported.
    """
    if isinstance(dim, int) or dim.is_Integer:
        return w.constant([int(dim)])
    if isinstance(dim, IntegerFunction):
        return _integer_function(w, type(dim).__name__, dim.args[0])
    if is_float(dim) and type(dim).__name__ in ("floor", "ceiling", "rint"):
        kind = {"floor": "Floor", "ceiling": "Ceil", "rint": "Round"}[type(dim).__name__]
        return w("Cast", w(kind, _double(w, dim.args[0])), to=_INT64)
    if has_wide_numbers(dim):
        raise NoMatch(f"size {dim} cannot be written: its numbers take more than 64 bits")
    match dim:
        case sympy.Symbol():
            if dim.name not in w.sizes:
                raise NoMatch(f"size {dim.name} is not an axis of any input by itself")
            return w.sizes[dim.name]
        case sympy.floor():
            return _quotient(w, dim.args[0])
        case sympy.ceiling():
            top, bottom = sympy.fraction(sympy.together(dim.args[0]))
            return _quotient(w, (top + bottom - 1) / bottom)
        case sympy.Mod():
            return w("Mod", *(size_value(w, a) for a in dim.args))
        case sympy.Max() | sympy.Min():
            return w(type(dim).__name__, *(size_value(w, a) for a in dim.args))
        case sympy.Add():
            return _folded(w, "Add", dim.args)
        case sympy.Pow() if dim.exp.is_Integer and dim.exp > 0:
            return _folded(w, "Mul", [dim.base] * int(dim.exp))
        case sympy.Mul():
            top, bottom = sympy.fraction(dim)
            return _folded(w, "Mul", dim.args) if bottom == 1 else _quotient(w, dim)
    raise NoMatch(f"size {dim} cannot be written")


def _integer_function(w: SizeWriter, name: str, of: Any) -> str:
    number = size_value(w, of)
    if name == "isqrt":
        return w("Cast", w("Floor", w("Sqrt", w("Cast", number, to=_DOUBLE))), to=_INT64)
    powers = w.constant([1 << n for n in range(63)])
    if name == "pow2":
        return w("Gather", powers, number)
    reached = w("GreaterOrEqual", w("Abs", number), powers)
    return w("ReduceSum", w("Cast", reached, to=_INT64), w.constant([0]), keepdims=1)


def _double(w: SizeWriter, x: Any) -> str:
    """An operand of `floats.operation` as f64[1]: an f64, or an exact integer."""
    if x.is_Rational:
        return w.constant([float(x)], "f64")
    sign, rest = x.as_coeff_Mul()
    if isinstance(rest, sqrt):  # the only one that IEEE 754 defines to the last bit
        root = w("Sqrt", _double(w, rest.args[0]))
        return root if sign == 1 else w("Mul", root, _double(w, sign))
    if isinstance(rest, DoubleFunction):
        raise NoMatch(f"size {rest} cannot be written: ONNX may round it differently from Python")
    if isinstance(rest, f64):
        try:
            operator, *operands = operation(rest.args[0])
        except ValueError as error:
            raise NoMatch(f"size {rest} cannot be written: {error}") from None
        kind = {"add": "Add", "mul": "Mul", "div": "Div"}[operator]
        result = w(kind, *(_double(w, operand) for operand in operands))
        return result if sign == 1 else w("Mul", result, _double(w, sign))
    top, bottom = sympy.fraction(sympy.together(x))
    result = w("Cast", size_value(w, top), to=_DOUBLE)
    return result if bottom == 1 else w("Div", result, _double(w, bottom))


def _folded(w: SizeWriter, kind: str, parts: Sequence[Any]) -> str:
    return reduce(lambda a, b: w(kind, a, b), (size_value(w, part) for part in parts))


def _quotient(w: SizeWriter, ratio: Any) -> str:
    """The quotient rounded down. Div rounds towards 0, and Mod has the sign of the divisor."""
    top, bottom = sympy.fraction(sympy.together(ratio))
    top, bottom = sympy.expand(top), sympy.expand(bottom)
    a = size_value(w, top)
    if bottom == 1:
        return a
    b = size_value(w, bottom)
    return w("Div", a if top.is_nonnegative else w("Sub", a, w("Mod", a, b)), b)


NUMPY = {name: np.dtype(long) for name, long in LONG_NAMES.items() if name not in ("bf16", "c64")}


_ONNX_NAMES = {"f32": "FLOAT", "f64": "DOUBLE", "i4": "INT4", "u4": "UINT4"}


@dataclass
class Node:
    kind: str
    inputs: list[str]
    outputs: list[str]
    name: str
    attrs: Mapping[str, Any]
    domain: str = ""
    by: str = ""  # the IR op that it was written for


@dataclass(frozen=True)
class Weight:
    """An initializer, computed from params of the graph when the file is written.

    `make` maps the tensors of `params` to the content; 4-bit types (i4, u4) have two elements per
    byte.
    """

    params: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    make: Make


class Make(Protocol):
    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor: ...


@dataclass
class NodeWriter:
    """`names` maps values of the graph to ONNX names. Results of nodes are named after their
    module: "model.layers.0.mlp/MatMul"."""

    graph: Graph
    opset: int
    contrib: bool = False  # whether operators of ONNX Runtime are allowed
    nodes: list[Node] = field(default_factory=list)
    names: dict[Value, str] = field(default_factory=dict)
    constants: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    memo: dict[object, Any] = field(default_factory=dict)
    sizes: dict[str, str] = field(default_factory=dict)
    local: dict[str, Dim] = field(default_factory=dict)
    where: str = ""
    by: str = ""
    _taken: Counter[str] = field(default_factory=Counter)

    def reserve(self, name: str) -> str:
        """A name that is not used yet: `name` itself if it is free."""
        self._taken[name] += 1
        count = self._taken[name]
        return name if count == 1 else self.reserve(f"{name}_{count}")

    def __call__(self, kind: str, *inputs: str, domain: str = "", **attrs: Any) -> str:
        """Adds a node with one output, and returns its name."""
        return self.many(kind, inputs, 1, domain=domain, **attrs)[0]

    def many(
        self, kind: str, inputs: Sequence[str], count: int, domain: str = "", **attrs: Any
    ) -> list[str]:
        """Adds a node with `count` outputs. An equal node is not written again."""
        key = ("node", kind, tuple(inputs), count, domain, repr(sorted(attrs.items())))
        if key not in self.memo:
            name = self.reserve(f"{self.where}/{kind}" if self.where else kind)
            parts = [name] if count == 1 else [self.reserve(f"{name}.{i}") for i in range(count)]
            self.nodes.append(Node(kind, list(inputs), parts, name, attrs, domain, self.by))
            self.memo[key] = parts
        return list(self.memo[key])

    def constant(self, value: Any, dtype: str = "i64") -> str:
        """A small tensor; equal constants share one."""
        array: np.ndarray[Any, Any] = np.asarray(
            value, dtype=NUMPY[dtype] if dtype != "bf16" else np.float32
        )
        key = ("constant", dtype, array.shape, array.tobytes())
        if key not in self.memo:
            shown = str(array) if array.size == 1 else "x".join(map(str, array.shape))
            name = self.reserve(f"constant/{dtype}/{shown}")
            self.constants[name] = array
            if dtype == "bf16":
                name = self("Cast", name, to=onnx_type("bf16"))
            self.memo[key] = name
        return str(self.memo[key])

    def weight(self, name: str, weight: Weight) -> str:
        """The initializer of that name and those params, created once."""
        key = ("weight", name, weight.params)
        if key not in self.memo:
            self.memo[key] = self.reserve(name)
            self.weights[self.memo[key]] = weight
        return str(self.memo[key])

    def read(self, value: Value) -> str:
        """The name of a value; a param becomes an initializer when it is first read."""
        if value not in self.names:
            shape = tuple(int(d) for d in value.shape)
            weight = Weight((value.name,), value.dtype, shape, lambda *tensors: tensors[0])
            self.names[value] = self.weight(value.name, weight)
        return self.names[value]

    def is_param(self, value: Value) -> bool:
        return value in self._params

    @property
    def _params(self) -> frozenset[Value]:
        if "params" not in self.memo:
            self.memo["params"] = frozenset(self.graph.params)
        params: frozenset[Value] = self.memo["params"]
        return params

    def cast(self, name: str, have: str, want: str) -> str:
        return name if have == want else self("Cast", name, to=onnx_type(want))

    # ---- sizes -------------------------------------------------------------------------

    def learn(self, value: Value) -> None:
        """Sizes that are an entire axis of an input are read from its shape."""
        for axis, dim in enumerate(value.shape):
            name = getattr(dim, "name", "")
            if name and name not in self.sizes:
                read = self("Shape", self.names[value], start=axis, end=axis + 1)
                self.sizes[name] = read

    def dim(self, dim: Any) -> str:
        """A size as i64[1]."""
        return size_value(self, self.bound(dim))

    def bound(self, dim: Any) -> Any:
        """`dim` with the sizes of a body replaced by those of its call."""
        if isinstance(dim, int) or not symbols(dim) & self.local.keys():
            return dim
        return dim.subs({s: self.local[s.name] for s in dim.free_symbols if s.name in self.local})

    def scalar(self, dim: Any) -> str:
        """A size as i64[]."""
        if isinstance(self.bound(dim), int):
            return self.constant(int(self.bound(dim)))
        return self("Squeeze", self.dim(dim), self.constant([0]))

    def shape(self, dims: Sequence[Any]) -> str:
        """Sizes as i64[n]; consecutive known sizes are one constant."""
        dims = [self.bound(d) for d in dims]
        if all(isinstance(d, int) for d in dims):
            return self.constant(np.array(dims, dtype=np.int64))
        parts: list[str] = []
        constants: list[int] = []
        for dim in dims:
            if isinstance(dim, int):
                constants.append(dim)
                continue
            if constants:
                parts.append(self.constant(constants))
                constants = []
            parts.append(self.dim(dim))
        if constants:
            parts.append(self.constant(constants))
        return parts[0] if len(parts) == 1 else self("Concat", *parts, axis=0)

    # ---- the result ------------------------------------------------------------------------

    def live(self, outputs: Sequence[str]) -> list[Node]:
        """The nodes that `outputs` depend on, in order."""
        needed, nodes = set(outputs), []
        for node in reversed(self.nodes):
            if needed & set(node.outputs):
                nodes.append(node)
                needed.update(node.inputs)
        return nodes[::-1]


def onnx_type(dtype: str) -> int:
    """ONNX's code for a dtype of the IR."""
    from onnx import TensorProto

    return int(getattr(TensorProto, _ONNX_NAMES.get(dtype, LONG_NAMES.get(dtype, dtype).upper())))
