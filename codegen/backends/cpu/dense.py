"""Products with a weight that is known when compiling: packed, then streamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tvm import relax
from tvm.tirx import PrimFunc

from moec.codegen.backend import Rule, require
from moec.codegen.backends.cpu.tunable import tunable
from moec.codegen.cpu.gemm import pack
from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.gemm.linear import linears
from moec.codegen.cpu.tuning import tuning_of
from moec.codegen.loops import scalars as sc
from moec.codegen.module_builder import Lowering, Param
from moec.codegen.specs.products import LinearSpec
from moec.dtypes import VECTOR_DTYPES
from moec.ir.aten import named
from moec.ir.dims import product
from moec.ir.graph import Graph, Op, TensorType, Value


@dataclass(frozen=True)
class Dense:
    """y = x @ weight^T + bias: the weight [N, K] is a param, or one that was transposed."""

    x: Value
    weight: Value
    flipped: bool  # the param is [K, N]
    bias: Value | None


def dense_of(op: Op, graph: Graph) -> Dense:
    """The dense product that an op is. Raises NoMatch where its weight is not known when
    compiling, or no kernel computes in its dtype."""
    arguments = named(op)
    x, weight, bias, straight = _operands(op, arguments)
    turned = not straight
    source = graph.producers.get(weight)
    while source is not None and source.name in _TURNS and len(weight.shape) == 2:
        axes = source.attrs.get("dims")
        require(axes not in ((0, 1), (0, -1)), "its weight is permuted to what it was")
        weight, turned = source.inputs[0], not turned
        source = graph.producers.get(weight)
    params = set(graph.params)
    require(weight in params, "its second operand is computed: it is no weight of the model")
    require(len(weight.shape) == 2, f"its weight has {len(weight.shape)} axes, not 2")
    require(len(x.shape) >= 1, "its first operand has no axes")
    require(x.dtype == weight.dtype, f"it multiplies {x.dtype} by {weight.dtype}")
    require(x.dtype in VECTOR_DTYPES, f"it computes in {x.dtype}")
    if bias is not None:
        require(bias in params, "its bias is computed: it is no weight of the model")
        require(bias.shape == op.outputs[0].shape[-1:], "its bias is no row")
    return Dense(x, weight, turned, bias)


def _operands(op: Op, arguments: Mapping[str, Any]) -> tuple[Value, Value, Value | None, bool]:
    """x, the weight, the bias, and whether the weight is [N, K]."""
    if op.name == "aten.linear.default":
        return arguments["input"], arguments["weight"], arguments["bias"], True
    if op.name == "aten.addmm.default":
        plain = arguments["alpha"] == 1 and arguments["beta"] == 1
        require(plain, "alpha or beta scale what it adds")
        return arguments["mat1"], arguments["mat2"], arguments["self"], False
    return arguments["self"], arguments.get("mat2", arguments.get("other")), None, False


def _check(op: Op, graph: Graph) -> None:
    dense_of(op, graph)


_TURNS = ("aten.t.default", "aten.transpose.int", "aten.permute.default")


_NAMES = ("aten.linear.default", "aten.mm.default", "aten.addmm.default", "aten.matmul.default")


def _linear(low: Lowering, op: Op) -> list[relax.Expr]:
    """With all that read the same rows: their results are then there when their turn comes."""
    together = _together(low, op)
    specs = tuple(_spec(low, one) for one in together)
    denses = [dense_of(one, low.graph) for one in together]
    rows = product(denses[0].x.shape[:-1])
    arguments = [low.shaped(denses[0].x, TensorType(denses[0].x.dtype, (rows, specs[0].k)))]
    for one, spec, dense in zip(together, specs, denses, strict=True):
        layout = Layout(spec, low.target)
        arguments.append(low.param(*packed(layout, (dense.weight,), dense.flipped)))
        if dense.bias is not None:
            arguments.append(low.param(*packed_bias(layout, (dense.bias,))))
        low.note(one, "linear")
    types = [TensorType(one.outputs[0].dtype, (rows, one.outputs[0].shape[-1])) for one in together]
    name = "linears" if len(specs) > 1 else "linear"

    def make(name: str, values: Mapping[str, int]) -> PrimFunc:
        return linears(low.target, specs, name, tuning_of(values))

    layouts = tuple(Layout(spec, low.target) for spec in specs)
    function = low.tuned(tunable(name, specs, layouts, 1, make, dense_values(layouts)), name)
    results = low.call(function, arguments, types)
    for one, value, type in zip(together, results, types, strict=True):
        out = one.outputs[0]
        low.values[out] = value if out.type == type else low.reshaped(value, out.type)
    return [low.values[op.outputs[0]]]


def dense_values(layouts: Sequence[Layout]) -> tuple[str, ...]:
    """What of `Tuning` kernels of dense products read."""
    return tuple(name for name in layouts[0].tuned if name in ("fetched", "worth"))


MOST_TOGETHER = 4
"""Products in one kernel."""


def _together(low: Lowering, op: Op) -> list[Op]:
    """The op, and other dense products of the same rows that nothing has lowered yet."""
    dense = dense_of(op, low.graph)
    products = [op]
    for other in dict.fromkeys(low.graph.readers.get(dense.x, ())):
        if len(products) == MOST_TOGETHER or other in products or other.outputs[0] in low.values:
            continue
        if low.rule(other) is low.rule(op) and dense_of(other, low.graph).x is dense.x:
            products.append(other)
    return products


def _spec(low: Lowering, op: Op) -> LinearSpec:
    dense = dense_of(op, low.graph)
    n, k = op.outputs[0].shape[-1], dense.x.shape[-1]
    assert isinstance(n, int)
    assert isinstance(k, int)
    stored = sc.STORED[dense.x.dtype], sc.STORED[op.outputs[0].dtype]
    return LinearSpec(n, k, *stored, bias=dense.bias is not None)


def packed(
    layout: Layout, weights: tuple[Value, ...], flipped: bool = False
) -> tuple[object, Param]:
    def make(*tensors: torch.Tensor) -> np.ndarray[Any, Any]:
        parts = [t.mT if flipped else t for t in tensors]
        return pack.pack(layout, *parts)

    dtype = "i32" if layout.pairs else weights[0].dtype
    name = "+".join(w.name for w in weights) + ".packed"
    return (layout, weights, flipped), Param(name, TensorType(dtype, layout.shape), weights, make)


def packed_bias(layout: Layout, biases: tuple[Value, ...]) -> tuple[object, Param]:
    def make(*tensors: torch.Tensor) -> np.ndarray[Any, Any]:
        return pack.pack_bias(layout, *tensors)

    name = "+".join(b.name for b in biases) + ".packed"
    return (layout, biases, "bias"), Param(name, TensorType("f32", layout.bias_shape), biases, make)


RULES = (Rule("linear", _NAMES, _check, _linear),)
