"""Routers: logits, or what makes them, into choices."""

from __future__ import annotations

from typing import cast

from tvm import relax

from moec.codegen.cpu.routing.gate import GateSpec, gate
from moec.codegen.cpu.routing.route import RouteSpec, route
from moec.codegen.module_builder import Lowering
from moec.codegen.rules.table import kernel
from moec.ir.graph import DType, Op
from moec.ops.routing import Routing


@kernel("moe.route")
def _route(low: Lowering, op: Op) -> list[relax.Expr]:
    logits, *correction = op.inputs
    count = logits.shape[1]
    assert isinstance(count, int)
    spec = RouteSpec(
        Routing.of(op), count, logits.dtype, correction[0].dtype if correction else None
    )
    function = low.function(spec, "route", lambda name: route(spec, low.target, name))
    low.note(op, "route")
    return low.call(function, [low.value(v) for v in op.inputs], [v.type for v in op.outputs])


@kernel("moe.gate")
def _gate(low: Lowering, op: Op) -> list[relax.Expr]:
    x, weight, *rest = op.inputs
    bias = rest.pop(0).dtype if op.attrs.get("biased") else None
    correction = rest.pop(0).dtype if op.attrs.get("corrected") else None
    count, width = weight.shape
    assert isinstance(count, int)
    assert isinstance(width, int)
    logits = cast(DType, op.attrs["logits"]).name
    routing = RouteSpec(Routing.of(op), count, logits, correction)
    spec = GateSpec(routing, width, x.dtype, weight.dtype, bias)
    function = low.function(spec, "gate", lambda name: gate(spec, low.target, name))
    low.note(op, "gate")
    return low.call(function, [low.value(v) for v in op.inputs], [v.type for v in op.outputs])
