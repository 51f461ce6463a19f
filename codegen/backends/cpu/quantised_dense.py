"""Linear layers with weights of few bits; layers that read the same rows share one kernel."""

from __future__ import annotations

from functools import partial
from typing import cast

from tvm import relax

from moec.codegen.backend import Rule, require
from moec.codegen.backends.cpu.codes import packed_matrices, rows_for
from moec.codegen.backends.cpu.dense import MOST_TOGETHER, packed_bias
from moec.codegen.backends.cpu.quantised import check_format
from moec.codegen.cpu.quantised.grouped import quantised_linears
from moec.codegen.cpu.quantised.layout import QuantisedLayout
from moec.codegen.loops import scalars as sc
from moec.codegen.module_builder import Lowering
from moec.codegen.specs.products import QuantisedSpec
from moec.dtypes import VECTOR_DTYPES
from moec.ir.graph import Graph, Op, TensorType
from moec.ir.ops.experts.quantised_linear import QuantisedLinear
from moec.ir.sizes.dims import product


def _check(op: Op, graph: Graph) -> None:
    """Raises NoMatch unless weights and bias are params, and vectors support the rows' dtype."""
    parts, params = QuantisedLinear.of(op), set(graph.params)
    check_format(parts.format)
    weights = (*parts.matrix.values, *((parts.bias,) if parts.bias is not None else ()))
    require(
        all(v in params for v in weights),
        "its weight or bias is computed, not a weight of the model",
    )
    require(parts.x.dtype in VECTOR_DTYPES, f"its rows are {parts.x.dtype}")


def _linears(low: Lowering, op: Op) -> list[relax.Expr]:
    """Lowers all layers of the same rows in one kernel; the results of the others are stored until
    they are lowered."""
    together = _same_rows(low, op)
    every = [QuantisedLinear.of(one) for one in together]
    specs = tuple(_spec(parts) for parts in every)
    layouts = [QuantisedLayout(spec, low.target) for spec in specs]
    arguments = rows_for(low, every[0].x, layouts[0])
    for one, layout, parts in zip(together, layouts, every, strict=True):
        arguments += [low.param(*each) for each in packed_matrices(layout, (parts.matrix,))]
        if parts.bias is not None:
            arguments.append(low.param(*packed_bias(layout, (parts.bias,))))
        low.note(one, f"{parts.format.kind} linear")
    name = f"{every[0].format.kind}_linear{'s' if len(specs) > 1 else ''}"

    function = low.function((name, specs), name, partial(quantised_linears, low.target, specs))
    rows = product(every[0].x.shape[:-1])
    types = [
        TensorType(one.outputs[0].dtype, (rows, spec.n))
        for one, spec in zip(together, specs, strict=True)
    ]
    results = low.call(function, arguments, types)
    for one, value, type in zip(together, results, types, strict=True):
        out = one.outputs[0]
        low.values[out] = value if out.type == type else low.reshaped(value, out.type)
    return [low.values[op.outputs[0]]]


def _same_rows(low: Lowering, op: Op) -> list[Op]:
    """The op, and others of the same rows and the same rounding that are not lowered yet."""
    parts, products = QuantisedLinear.of(op), [op]
    for other in dict.fromkeys(low.graph.readers.get(parts.x, ())):
        if len(products) == MOST_TOGETHER or other in products or other.outputs[0] in low.values:
            continue
        if low.rule(other) is low.rule(op):
            format = QuantisedLinear.of(other).format
            if (format.block, format.row_bits) == (parts.format.block, parts.format.row_bits):
                products.append(other)
    return products


def _spec(parts: QuantisedLinear) -> QuantisedSpec:
    n, k = cast(tuple[int, int], parts.matrix.codes.shape)
    biased = parts.bias is not None
    stored = sc.STORED[parts.x.dtype]
    return QuantisedSpec(n, k, stored, bias=biased, format=parts.format)


RULES = (Rule("quantised linear", ("nn.quantised_linear",), _check, _linears),)
