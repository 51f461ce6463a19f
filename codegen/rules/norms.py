"""Normalisation of rows."""

from __future__ import annotations

from typing import Any, cast

from tvm import relax

from moec.codegen.backend import Rule, require
from moec.codegen.module_builder import Lowering
from moec.codegen.specs.norm import NormSpec
from moec.dtypes import VECTOR_DTYPES
from moec.ir.aten import named
from moec.ir.graph import Graph, Op, TensorType, Value
from moec.ir.sizes.dims import Dim, product


def _rms_norm(low: Lowering, op: Op) -> list[relax.Expr]:
    x, *weights = op.inputs
    spec = NormSpec(
        "rms",
        cast(int, x.shape[-1]),
        cast(float, op.attrs["epsilon"]),
        x.dtype,
        op.outputs[0].dtype,
        weights[0].dtype if weights else None,
        round_first=bool(op.attrs.get("round_first")),
    )
    return _normed(low, op, spec, [x], weights)


def _layer_norm(low: Lowering, op: Op) -> list[relax.Expr]:
    arguments = named(op)
    x, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    spec = NormSpec(
        "layer",
        x.shape[-1],
        float(arguments["eps"]),
        x.dtype,
        op.outputs[0].dtype,
        None if weight is None else weight.dtype,
        None if bias is None else bias.dtype,
    )
    return _normed(low, op, spec, [x], [v for v in (weight, bias) if v is not None])


def _add_norm(low: Lowering, op: Op) -> list[relax.Expr]:
    x, residual, *weights = op.inputs
    weight, bias = [*(v.dtype for v in weights), None, None][:2]
    spec = NormSpec(
        cast(Any, op.attrs["kind"]),
        cast(int, x.shape[-1]),
        cast(float, op.attrs["epsilon"]),
        x.dtype,
        x.dtype,
        weight,
        bias,
        residual=True,
        scale=cast("float | None", op.attrs.get("scale")),
        round_first=bool(op.attrs.get("round_first")),
    )
    return _normed(low, op, spec, [x, residual], weights)


def check_norm(op: Op, graph: Graph) -> None:
    """Raises NoMatch unless one axis of fixed width is normalised, in dtypes that vectors
    support."""
    if op.name == "aten.layer_norm.default":
        axes = len(cast(tuple[Dim, ...], named(op)["normalized_shape"]))
        require(axes == 1, f"it normalises over {axes} axes at once")
    require(isinstance(op.inputs[0].shape[-1], int), "the width of its rows is not constant")
    dtypes = sorted({value.dtype for value in op.inputs} - set(VECTOR_DTYPES))
    require(not dtypes, f"it reads {', '.join(dtypes)}")


def _normed(
    low: Lowering, op: Op, spec: NormSpec, added: list[Value], weights: list[Value]
) -> list[relax.Expr]:
    """`added` is one value, or two whose sum is a result too."""
    rows = (product(op.outputs[0].shape[:-1]), spec.width)
    name = f"add_{spec.kind}_norm" if spec.residual else f"{spec.kind}_norm"
    function = low.kernel(spec, name)
    low.note(op, name)
    arguments = [low.shaped(v, TensorType(v.dtype, rows)) for v in added]
    arguments += [low.value(v) for v in weights]
    results = low.call(function, arguments, [TensorType(out.dtype, rows) for out in op.outputs])
    return [
        value if out.shape == rows else low.reshaped(value, out.type)
        for value, out in zip(results, op.outputs, strict=True)
    ]


RULES = (
    Rule("rms_norm", ("nn.rms_norm",), check_norm, _rms_norm),
    Rule("layer_norm", ("aten.layer_norm.default",), check_norm, _layer_norm),
    Rule("add_norm", ("nn.add_norm",), check_norm, _add_norm),
)
