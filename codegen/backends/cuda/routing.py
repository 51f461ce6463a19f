"""Routers on GPUs: logits into choices. The linear layer of a gate comes first, as a product if a
kernel supports it, otherwise as a loop."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from tvm import relax

from moec.codegen.backend import Rule, require
from moec.codegen.backends.cuda import products, unpack
from moec.codegen.cuda.routing import route as kernels
from moec.codegen.fusion import FusionGroup
from moec.codegen.module_builder import Lowering, Param, as_array
from moec.codegen.rules.routing import emit_route, route_spec
from moec.ir.graph import DType, Graph, Op, TensorType, Value
from moec.ir.opdef import inputs_of
from moec.ir.ops.routing.routing import Routing
from moec.runtime.dtypes import NUMPY, Array

_LINEAR = "aten.linear.default"


def _check(op: Op, graph: Graph) -> None:
    logits = op.inputs[0]
    require(isinstance(logits.shape[1], int), "its number of experts is not constant")
    kernels.check(route_spec(op))


def _check_gate(op: Op, graph: Graph) -> None:
    route, _ = _split(op)
    _check(route, graph)


def _split(op: Op) -> tuple[Op, list[Op]]:
    """A gate as a moe.route and the ops that compute its logits."""
    x, weight, bias, correction = inputs_of(op).values()
    compute, dtype = (cast(DType, op.attrs[name]).name for name in ("compute", "logits"))
    name = op.outputs[0].name
    ops: list[Op] = []

    def cast_to(value: Value, dtype: str) -> Value:
        if value.dtype == dtype:
            return value
        copy = Value(f"{name}_{len(ops)}", TensorType(dtype, value.shape))
        ops.append(Op("aten._to_copy.default", (value,), (copy,), {"dtype": DType(dtype)}))
        return copy

    operands = [cast_to(v, compute) for v in (x, weight, bias) if v is not None]
    product = Value(f"{name}_product", TensorType(compute, (x.shape[0], weight.shape[0])))
    ops.append(Op(_LINEAR, tuple(operands), (product,)))
    logits = cast_to(product, dtype)
    inputs = (logits,) if correction is None else (logits, correction)
    attrs = Routing.of(op).attrs()
    return Op("moe.route", inputs, op.outputs, attrs, origin=op.origin), ops


def _gate(low: Lowering, op: Op) -> list[relax.Expr]:
    route, ops = _split(op)
    for one in ops:
        low.values[one.outputs[0]] = _computed(low, op, one)
    return emit_route(low, route)


def _computed(low: Lowering, gate: Op, one: Op) -> relax.Expr:
    """The result of `one`, an op before the choice. Weights are widened when they are packed."""
    (source, *_), (out,) = one.inputs, one.outputs
    if source in low.graph.params:
        name, cast = f"{source.name}.{out.dtype}", partial(_cast, out.dtype)
        param = Param(name, out.type, (source,), cast, unpack=unpack.widened)
        return low.param(("cast", source, out.dtype), param)
    spec = products.logits_spec(one) if one.name == _LINEAR else None
    if spec is None:
        return low.group(FusionGroup(one, [one], one.inputs))[0]
    low.note(gate, "linear")
    return products.logits(low, one, spec)


def _cast(dtype: str, weight: torch.Tensor) -> Array:
    return as_array(weight).astype(NUMPY[dtype])


RULES = (
    Rule("route", ("moe.route",), _check, emit_route),
    Rule("gate", ("moe.gate",), _check_gate, _gate),
)
