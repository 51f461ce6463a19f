"""Products with a weight that is known when compiling: packed, then streamed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from tvm import relax
from tvm.tirx import PrimFunc

from moec.codegen.cpu.gemm import pack
from moec.codegen.cpu.gemm.layout import Layout, LinearSpec
from moec.codegen.cpu.gemm.linear import linears
from moec.codegen.cpu.tuning import Tuning
from moec.codegen.loops import scalars as sc
from moec.codegen.module_builder import Lowering, Param
from moec.codegen.rules.table import VECTOR_DTYPES, kernel
from moec.codegen.tuning.tunable import tunable
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


def dense_of(op: Op, graph: Graph) -> Dense | None:
    """The dense product that an op is, if its weight is known when compiling."""
    given = named(op)
    if op.name == "aten.linear.default":
        x, weight, bias, straight = given["input"], given["weight"], given["bias"], True
    elif op.name == "aten.addmm.default":
        if given["alpha"] != 1 or given["beta"] != 1:
            return None
        x, weight, bias, straight = given["mat1"], given["mat2"], given["self"], False
    else:
        x, weight, bias, straight = (
            given["self"],
            given.get("mat2", given.get("other")),
            None,
            False,
        )
    turned = not straight
    source = graph.producers.get(weight)
    while source is not None and source.name in _TURNS and len(weight.shape) == 2:
        axes = source.attrs.get("dims")
        if axes in ((0, 1), (0, -1)):
            return None
        weight, turned = source.inputs[0], not turned
        source = graph.producers.get(weight)
    params = set(graph.params)
    fits = (
        weight in params
        and len(weight.shape) == 2
        and len(x.shape) >= 1
        and x.dtype == weight.dtype
        and x.dtype in VECTOR_DTYPES
        and (bias is None or (bias in params and bias.shape == op.outputs[0].shape[-1:]))
    )
    return Dense(x, weight, turned, bias) if fits else None


_TURNS = ("aten.t.default", "aten.transpose.int", "aten.permute.default")


_NAMES = ("aten.linear.default", "aten.mm.default", "aten.addmm.default", "aten.matmul.default")


@kernel(
    *_NAMES,
    takes=lambda op, graph: dense_of(op, graph) is not None,
)
def _linear(low: Lowering, op: Op) -> list[relax.Expr]:
    """With all that read the same rows: their results are then there when their turn comes."""
    together = _together(low, op)
    specs = tuple(_spec(low, one) for one in together)
    denses = [cast(Dense, dense_of(one, low.graph)) for one in together]
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

    def make(name: str, tuning: Tuning) -> PrimFunc:
        return linears(low.target, specs, name, tuning)

    layouts = tuple(Layout(spec, low.target) for spec in specs)
    function = low.tuned(tunable(name, specs, layouts, 1, make, dense_values(layouts)), name)
    made = low.call(function, arguments, types)
    for one, value, type in zip(together, made, types, strict=True):
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
    dense = cast(Dense, dense_of(op, low.graph))
    found = [op]
    for other in dict.fromkeys(low.graph.readers.get(dense.x, ())):
        if len(found) == MOST_TOGETHER or other in found or other.outputs[0] in low.values:
            continue
        if other.name in _NAMES and (same := dense_of(other, low.graph)) is not None:
            if same.x is dense.x:
                found.append(other)
    return found


def _spec(low: Lowering, op: Op) -> LinearSpec:
    dense = cast(Dense, dense_of(op, low.graph))
    n, k = op.outputs[0].shape[-1], dense.x.shape[-1]
    assert isinstance(n, int)
    assert isinstance(k, int)
    stored = sc.STORED[dense.x.dtype], sc.STORED[op.outputs[0].dtype]
    return LinearSpec(n, k, *stored, bias=dense.bias is not None)


def _as(low: Lowering, value: Value, type: TensorType) -> relax.Expr:
    found = low.value(value)
    return found if value.type == type else low.reshaped(found, type)


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
