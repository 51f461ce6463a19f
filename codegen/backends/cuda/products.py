"""Products of experts, and dense products as those of one expert: 16 bits on tensor cores, and
float32."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from tvm import relax
from tvm.tirx import PrimFunc

from moec.codegen.backend import Rule, require
from moec.codegen.backends.cuda import unpack
from moec.codegen.backends.cuda.bodies import epilogue
from moec.codegen.backends.cuda.experts import check_experts, of_owned_rows
from moec.codegen.cpu.epilogue import body_text
from moec.codegen.cuda.activation import Epilogue
from moec.codegen.cuda.gemm.gemv import check_few_rows
from moec.codegen.cuda.gemm.grouped import grouped_linear, shapes_of
from moec.codegen.cuda.gemm.grouped import linear as dense_linear
from moec.codegen.cuda.gemm.product import check_product, interleave
from moec.codegen.loops import scalars as sc
from moec.codegen.module_builder import Lowering, Param, as_array
from moec.codegen.rules.products import DENSE, dense_of, spec_of
from moec.codegen.specs.products import LinearSpec
from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, TensorType, Value
from moec.ir.ops.experts.grouped import GroupedLinear
from moec.ir.sizes.dims import product
from moec.target.cuda import TARGETS

LEAST = min(TARGETS.values(), key=lambda target: target.shared_memory)
"""The target with the least shared memory: tiles that fit into it fit into that of every target."""


def _parts(op: Op, graph: Graph) -> GroupedLinear:
    """The parts of a product that the kernel supports. Raises NoMatch for others."""
    parts = GroupedLinear.of(op)
    first = parts.matrices[0]
    check_experts(op, parts, parts.matrices, graph)
    same = all((m.shape, m.dtype) == (first.shape, parts.x.dtype) for m in parts.matrices)
    require(same, "its stacks differ in shape, or from the rows in dtype")
    biases = all(bias.dtype == parts.x.dtype for bias in parts.biases)
    require(biases, "its biases differ from the rows in dtype")
    spec = spec_of(LinearSpec, op, parts, sc.STORED[parts.x.dtype])
    join = None if op.body is None else epilogue(op.body)
    _check_spec(spec, join)
    return parts


def _check_spec(spec: LinearSpec, join: Epilogue | None) -> None:
    check_few_rows(spec, join)
    for shape in shapes_of(spec.dtype):
        check_product(spec, LEAST, join, shape.shared_memory)


def _grouped(low: Lowering, op: Op) -> list[relax.Expr]:
    parts = _parts(op, low.graph)
    spec = spec_of(LinearSpec, op, parts, sc.STORED[parts.x.dtype])
    top_k = cast(int, op.attrs.get("gather", 0))
    join = None if op.body is None else epilogue(op.body)

    def make(name: str) -> PrimFunc:
        return grouped_linear(spec, low.target, epilogue=join, top_k=top_k, name=name)

    key = ("grouped", spec, top_k, None if op.body is None else body_text(op.body))
    name = "gathered" if top_k else "grouped"
    arguments = [low.value(parts.x)]
    if parts.order is not None:
        arguments.append(low.value(parts.order))
    arguments += [low.value(parts.ends), stack(low, parts.matrices)]
    if parts.biases:
        arguments.append(stack(low, parts.biases))
    low.note(op, name)
    return low.call(low.function(key, name, make), arguments, [op.outputs[0].type])


def stack(low: Lowering, values: tuple[Value, ...]) -> relax.Expr:
    """A weight [E, n, ...] unchanged, or gate and up interleaved."""
    if len(values) == 1:
        return low.value(values[0])
    experts, n, *rest = values[0].shape
    name = "+".join(v.name for v in values) + ".interleaved"
    assert isinstance(n, int)
    type = TensorType(values[0].dtype, (experts, 2 * n, *rest))
    param = Param(name, type, values, _interleaved, unpack=unpack.interleaved)
    return low.param(("interleaved", values), param)


def _interleaved(*tensors: torch.Tensor) -> np.ndarray[Any, Any]:
    gate, up = (as_array(tensor) for tensor in tensors)
    return interleave(gate, up)


def _check_dense(op: Op, graph: Graph) -> None:
    dense = dense_of(op, graph)
    if dense.bias is not None:
        require(dense.bias.dtype == dense.x.dtype, "its bias differs from the rows in dtype")
    _check_spec(_dense_spec(op, graph), None)


def _dense_spec(op: Op, graph: Graph) -> LinearSpec:
    dense = dense_of(op, graph)
    n, k = op.outputs[0].shape[-1], dense.x.shape[-1]
    require(isinstance(n, int) and isinstance(k, int), "the width of its weight is not constant")
    stored = sc.STORED[dense.x.dtype], sc.STORED[op.outputs[0].dtype]
    return LinearSpec(cast(int, n), cast(int, k), *stored, bias=dense.bias is not None)


def _dense(low: Lowering, op: Op) -> list[relax.Expr]:
    dense, spec, out = dense_of(op, low.graph), _dense_spec(op, low.graph), op.outputs[0]
    rows = product(dense.x.shape[:-1])

    def make(name: str) -> PrimFunc:
        return dense_linear(spec, low.target, name=name)

    arguments = [low.shaped(dense.x, TensorType(dense.x.dtype, (rows, spec.k)))]
    if dense.flipped:
        name, type = f"{dense.weight.name}.transposed", TensorType(dense.x.dtype, (spec.n, spec.k))
        key = ("transposed", dense.weight)
        param = Param(name, type, (dense.weight,), _transposed, unpack=unpack.transposed)
        arguments.append(low.param(key, param))
    else:
        arguments.append(low.value(dense.weight))
    if dense.bias is not None:
        arguments.append(low.value(dense.bias))
    low.note(op, "linear")
    type = TensorType(out.dtype, (rows, spec.n))
    function = low.function(("dense", spec), "linear", make)
    result = low.call(function, arguments, [type])[0]
    return [result if out.type == type else low.reshaped(result, out.type)]


def logits_spec(linear: Op) -> LinearSpec | None:
    """The spec of a gate's linear layer, whose weight is [E, D]; None if no kernel supports it."""
    x, weight, *bias = linear.inputs
    n, k = weight.shape
    if not (isinstance(n, int) and isinstance(k, int)):
        return None
    spec = LinearSpec(n, k, sc.STORED[x.dtype], bias=bool(bias))
    try:
        _check_spec(spec, None)
    except NoMatch:
        return None
    return spec


def logits(low: Lowering, linear: Op, spec: LinearSpec) -> relax.Expr:
    """x[T, D] -> [T, E] by the product that the spec describes."""

    def make(name: str) -> PrimFunc:
        return dense_linear(spec, low.target, name=name)

    function = low.function(("dense", spec), "linear", make)
    arguments = [low.value(value) for value in linear.inputs]
    return low.call(function, arguments, [linear.outputs[0].type])[0]


def _transposed(weight: torch.Tensor) -> np.ndarray[Any, Any]:
    return as_array(weight.mT)


RULES = (
    Rule("grouped", ("grouped.linear",), of_owned_rows(_parts), _grouped),
    Rule("linear", DENSE, _check_dense, _dense),
)
