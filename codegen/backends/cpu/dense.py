"""Products with a weight that is known at compile time, packed in the order of reading."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from tvm import relax

from moec.codegen.backend import Rule
from moec.codegen.cpu import unpack
from moec.codegen.cpu.gemm import pack
from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.gemm.linear import linears
from moec.codegen.loops import scalars as sc
from moec.codegen.module_builder import Lowering, Param
from moec.codegen.rules.products import DENSE, dense_of
from moec.codegen.specs.products import LinearSpec
from moec.ir.graph import Graph, Op, TensorType, Value
from moec.ir.sizes.dims import product


def _check(op: Op, graph: Graph) -> None:
    dense_of(op, graph)


def _linear(low: Lowering, op: Op) -> list[relax.Expr]:
    """Lowers all products of the same rows in one kernel; the results of the others are stored
    until they are lowered."""
    together = _same_rows(low, op)
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

    function = low.function((name, specs), name, partial(linears, low.target, specs))
    results = low.call(function, arguments, types)
    for one, value, type in zip(together, results, types, strict=True):
        out = one.outputs[0]
        low.values[out] = value if out.type == type else low.reshaped(value, out.type)
    return [low.values[op.outputs[0]]]


MOST_TOGETHER = 4
"""The most products in one kernel."""


def _same_rows(low: Lowering, op: Op) -> list[Op]:
    """The op, and other dense products of the same rows that are not lowered yet."""
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
        return pack.pack(layout, *(t.mT if flipped else t for t in tensors))

    dtype = "i32" if layout.pairs else weights[0].dtype
    name = "+".join(w.name for w in weights) + ".packed"
    held = partial(unpack.weights, layout, flipped)
    param = Param(name, TensorType(dtype, layout.shape), weights, make, unpack=held)
    return (layout, weights, flipped), param


def packed_bias(
    layout: Layout, biases: tuple[Value, ...], experts: tuple[int, ...] = ()
) -> tuple[object, Param]:
    """The packed biases of all experts, or of those in `experts`."""

    def make(*tensors: torch.Tensor) -> np.ndarray[Any, Any]:
        return pack.pack_bias(layout, *(t[list(experts)] if experts else t for t in tensors))

    name = "+".join(b.name for b in biases) + ".packed"
    name += f".{experts[0]}" if experts else ""  # the first expert of a part is in no other
    held = partial(unpack.biases, layout, experts)
    param = Param(name, TensorType("f32", layout.bias_shape), biases, make, unpack=held)
    return (layout, biases, "bias", experts), param


RULES = (Rule("linear", DENSE, _check, _linear),)
