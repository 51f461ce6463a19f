"""Specs of products with weights that are known at compile time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from moec.codegen.backend import require
from moec.codegen.loops import scalars as sc
from moec.codegen.rules.experts import sorting_of
from moec.codegen.specs.products import LinearSpec
from moec.dtypes import VECTOR_DTYPES
from moec.ir.aten import named
from moec.ir.graph import Graph, Op, Value
from moec.ir.ops.experts.grouped import Grouped

S = TypeVar("S", bound=LinearSpec)


@dataclass(frozen=True)
class Dense:
    """y = x @ weight^T + bias, where the weight [N, K] is a param or a transposed param."""

    x: Value
    weight: Value
    flipped: bool  # the param is [K, N]
    bias: Value | None


def dense_of(op: Op, graph: Graph) -> Dense:
    """The dense product that an op is. Raises NoMatch if its weight is not known at compile time,
    or if no kernel supports its dtype."""
    arguments = named(op)
    x, weight, bias, straight = _operands(op, arguments)
    turned = not straight
    source = graph.producers.get(weight)
    while source is not None and source.name in _TURNS and len(weight.shape) == 2:
        axes = source.attrs.get("dims")
        require(axes not in ((0, 1), (0, -1)), "its weight is permuted back to the original layout")
        weight, turned = source.inputs[0], not turned
        source = graph.producers.get(weight)
    params = set(graph.params)
    require(weight in params, "its second operand is computed, not a weight of the model")
    require(len(weight.shape) == 2, f"its weight has {len(weight.shape)} axes, not 2")
    require(len(x.shape) >= 1, "its first operand has no axes")
    require(isinstance(x.shape[-1], int), "the length of its rows is not a number")
    require(x.dtype == weight.dtype, f"it multiplies {x.dtype} by {weight.dtype}")
    require(x.dtype in VECTOR_DTYPES, f"it computes in {x.dtype}")
    if bias is not None:
        require(bias in params, "its bias is computed, not a weight of the model")
        require(bias.shape == op.outputs[0].shape[-1:], "its bias is not one row")
    return Dense(x, weight, turned, bias)


DENSE = ("aten.linear.default", "aten.mm.default", "aten.addmm.default", "aten.matmul.default")
"""The ops that may be dense products."""

_TURNS = ("aten.t.default", "aten.transpose.int", "aten.permute.default")


def _operands(op: Op, arguments: Mapping[str, Any]) -> tuple[Value, Value, Value | None, bool]:
    """x, the weight, the bias, and whether the weight is [N, K]."""
    if op.name == "aten.linear.default":
        return arguments["input"], arguments["weight"], arguments["bias"], True
    if op.name == "aten.addmm.default":
        plain = arguments["alpha"] == 1 and arguments["beta"] == 1
        require(plain, "alpha or beta scale what it adds")
        return arguments["mat1"], arguments["mat2"], arguments["self"], False
    return arguments["self"], arguments.get("mat2", arguments.get("other")), None, False


def spec_of(
    make: Callable[..., S], /, op: Op, parts: Grouped[Any], dtype: str = "float32", **more: object
) -> S:
    """The spec of a product: its sizes, and the fields in `more`."""
    out = op.outputs[0]
    return make(
        out.shape[1],
        parts.x.shape[1],
        dtype,
        sc.STORED[out.dtype],
        groups=parts.ends.shape[0],
        gated=len(parts.matrices) == 2,
        bias=bool(parts.biases),
        **more,
    )


def only_owned_rows_read(
    rows: Value, graph: Graph, fits: Callable[[Op], bool], product: str = "grouped.linear"
) -> bool:
    """Whether all readers of these rows ignore rows after the last end: a combine, or another
    `product` whose kernel `fits`."""

    def leaves_out(op: Op) -> bool:
        if op.name == "moe.combine":
            return op.inputs[0] is rows and sorting_of(op.inputs[1], graph) is not None
        if op.name == product:
            return not op.attrs.get("gather") and fits(op)
        return False

    return rows not in graph.results and all(map(leaves_out, graph.readers.get(rows, ())))
