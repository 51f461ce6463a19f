"""Routers: from logits, or the inputs of a gate, to choices."""

from __future__ import annotations

from typing import cast

from tvm import relax

from moec.codegen.backend import Rule, always
from moec.codegen.module_builder import Lowering
from moec.codegen.specs.routing import GateSpec, RouteSpec
from moec.ir.graph import DType, Op, Value
from moec.ir.opdef import inputs_of
from moec.ir.ops.routing.routing import Routing


def route_spec(op: Op) -> RouteSpec:
    """The spec of a moe.route."""
    logits, correction = inputs_of(op).values()
    count = logits.shape[1]
    assert isinstance(count, int)
    return RouteSpec(Routing.of(op), count, logits.dtype, _dtype(correction))


def emit_route(low: Lowering, op: Op) -> list[relax.Expr]:
    """A call of the backend's router."""
    function = low.kernel(route_spec(op), "route")
    low.note(op, "route")
    return low.call(function, [low.value(v) for v in op.inputs], [v.type for v in op.outputs])


def _gate(low: Lowering, op: Op) -> list[relax.Expr]:
    x, weight, bias, correction = inputs_of(op).values()
    count, width = weight.shape
    assert isinstance(count, int)
    assert isinstance(width, int)
    logits = cast(DType, op.attrs["logits"]).name
    routing = RouteSpec(Routing.of(op), count, logits, _dtype(correction))
    spec = GateSpec(routing, width, x.dtype, weight.dtype, _dtype(bias))
    function = low.kernel(spec, "gate")
    low.note(op, "gate")
    return low.call(function, [low.value(v) for v in op.inputs], [v.type for v in op.outputs])


def _dtype(value: Value | None) -> str | None:
    return None if value is None else value.dtype


RULES = (
    Rule("route", ("moe.route",), always, emit_route),
    Rule("gate", ("moe.gate",), always, _gate),
)
