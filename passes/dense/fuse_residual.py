"""The addition of a residual is fused into the norm that reads the sum.

    a = aten.mul(x) <other=scale>           (or x as it is)
    h = aten.add(a, residual)
    y = nn.rms_norm(h, weight)              ->   h, y = nn.add_norm(x, residual, weight)

This saves one kernel per residual, two with a scale (Granite), and one read of [T, D]: the norm
reads the sum from the L1 cache. h is still written, for other layers. It is rounded before it is
normalised, as in eager, so no bit changes. layer_norm is fused in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.dtypes import VECTOR_DTYPES
from moec.errors import NoMatch
from moec.ir.aten import arguments
from moec.ir.graph import Attr, Graph, Op, Program, Stage, Value
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass


@dataclass(frozen=True)
class FuseResidual(Pass):
    """Add the residual inside the norm that reads the sum."""

    name: ClassVar[str] = "fuse-residual"
    gives: ClassVar[Stage] = Stage.ATEN

    def run(self, program: Program, log: Log) -> Program:
        return Program(rewrite(program.graph, fuse_residual, log), program.weights)


def fuse_residual(op: Op, b: Builder) -> Sequence[Value] | None:
    """The rule: a sum becomes nn.add_norm, and the norm that follows becomes its second result."""
    if op.name == "aten.add.Tensor":
        return _match_sum(op, b)
    if op.name in _NORMS:
        joined = b.producers.get(op.inputs[0])
        if joined is not None and joined.name == "nn.add_norm":
            norm = _norm(op, b.graph)
            attrs = {k: v for k, v in joined.attrs.items() if k != "scale"}
            if op.inputs[0] is joined.outputs[0] and norm == _Norm(joined.inputs[2:], attrs):
                return [joined.outputs[1]]
    return None


@dataclass(frozen=True)
class _Norm:
    weights: tuple[Value, ...]
    attrs: dict[str, Attr]


def _match_sum(op: Op, b: Builder) -> Sequence[Value] | None:
    readers = b.graph.readers.get(op.outputs[0], ())
    reader = next((r for r in readers if r.name in _NORMS and r.inputs[0] is op.outputs[0]), None)
    if reader is None or len(op.inputs) != 2:
        return None
    norm, (total,) = _norm(reader, b.graph), op.outputs
    if op.attrs.get("alpha", 1) != 1:
        raise NoMatch(f"{op.inputs[1].name} is added {op.attrs['alpha']} times, and not once")
    for value in op.inputs:
        if value.type != total.type:
            raise NoMatch(f"{value.name} is {value.type}, and the sum that is normalised {total}")
    for x, residual in (op.inputs, op.inputs[::-1]):
        scaled = _match_scale(b.producers.get(x))
        if scaled is not None:
            source, scale = scaled
            return _emit_add_norm(op, b, (source, residual), norm, {"scale": scale})
    return _emit_add_norm(op, b, op.inputs, norm, {})


def _emit_add_norm(
    op: Op, b: Builder, added: Sequence[Value], norm: _Norm, attrs: dict[str, Attr]
) -> Sequence[Value]:
    names = [op.outputs[0].name, f"{op.outputs[0].name}_normalised"]
    outputs = b.emit(
        "nn.add_norm", [*added, *norm.weights], like=op, attrs=norm.attrs | attrs, named=names
    )
    return outputs[:1]


def _match_scale(op: Op | None) -> tuple[Value, float] | None:
    """x and the number of x * number."""
    if op is None or op.name != "aten.mul.Tensor" or len(op.inputs) != 1:
        return None
    number, (x,) = op.attrs.get("other"), op.inputs
    same = x.type == op.outputs[0].type
    return (x, number) if same and isinstance(number, float) else None


def _norm(op: Op, graph: Graph) -> _Norm:
    """The norm's weights and attributes. Raises NoMatch if no kernel adds and normalises so."""
    x, *weights = op.inputs
    if x.dtype not in VECTOR_DTYPES or not isinstance(x.shape[-1], int):
        raise NoMatch(f"norms of {x.type} have no kernel with an addition")
    for weight in weights:
        if weight not in graph.params:
            raise NoMatch(f"the norm's weight {weight.name} is computed, and not a parameter")
    return _Norm(tuple(weights), _NORMS[op.name](op))


def _rms_norm(op: Op) -> dict[str, Attr]:
    return {"kind": "rms", **op.attrs}


def _layer_norm(op: Op) -> dict[str, Attr]:
    shape = op.attrs["normalized_shape"]
    if not isinstance(shape, tuple) or len(shape) != 1:
        raise NoMatch(f"the norm is over the axes {shape}, and not the last one")
    (x, _, weight, bias, epsilon, *_), _ = arguments(op, op.inputs, {})
    if weight is None and bias is not None:
        raise NoMatch("the norm has a bias and no weight")
    if op.outputs[0].type != x.type:
        raise NoMatch(f"the norm of {x.type} gives {op.outputs[0].type}")
    return {"kind": "layer", "epsilon": epsilon}


_NORMS: dict[str, Callable[[Op], dict[str, Attr]]] = {
    "nn.rms_norm": _rms_norm,
    "aten.layer_norm.default": _layer_norm,
}
