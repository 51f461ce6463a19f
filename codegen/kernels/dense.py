"""Products with a weight that is known when compiling: packed, then streamed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from tvm import relax

from moec.codegen.cpu import pack
from moec.codegen.cpu.layout import Layout, LinearSpec
from moec.codegen.cpu.linear import linear
from moec.codegen.generic import scalars as sc
from moec.codegen.generic.rules import named
from moec.codegen.kernels.table import VECTOR_DTYPES, kernel
from moec.codegen.lowering import Lowering, Param
from moec.ir import Graph, Op, TensorType, Value
from moec.sizes import product


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


@kernel(
    "aten.linear.default",
    "aten.mm.default",
    "aten.addmm.default",
    "aten.matmul.default",
    takes=lambda op, graph: dense_of(op, graph) is not None,
)
def _linear(low: Lowering, op: Op) -> list[relax.Expr]:
    dense = cast(Dense, dense_of(op, low.graph))
    out = op.outputs[0]
    n, k = out.shape[-1], dense.x.shape[-1]
    assert isinstance(n, int)
    assert isinstance(k, int)
    spec = LinearSpec(
        n,
        k,
        sc.STORED[dense.x.dtype],
        sc.STORED[out.dtype],
        bias=dense.bias is not None,
    )
    layout = Layout(spec, low.target)
    rows = product(dense.x.shape[:-1])
    x = low.shaped(dense.x, TensorType(dense.x.dtype, (rows, k)))
    weights = [low.param(*packed(layout, (dense.weight,), dense.flipped))]
    if dense.bias is not None:
        weights.append(low.param(*packed_bias(layout, (dense.bias,))))
    function = low.function(spec, "linear", lambda name: linear(low.target, spec, name=name))
    low.note(op, "linear")
    made = low.call(function, [x, *weights], [TensorType(out.dtype, (rows, n))])
    return [made[0] if out.shape == (rows, n) else low.reshaped(made[0], out.type)]


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
