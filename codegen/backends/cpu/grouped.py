"""Products of experts with uncompressed, packed weights."""

from __future__ import annotations

from functools import partial

from tvm import relax
from tvm.tirx import PrimFunc

from moec.codegen.backend import Rule
from moec.codegen.backends.cpu.dense import packed
from moec.codegen.backends.cpu.sorted_rows import check_products, product
from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.gemm.linear import gathered_linear, grouped_linear
from moec.codegen.cpu.gemm.tile import Epilogue
from moec.codegen.loops import scalars as sc
from moec.codegen.module_builder import Lowering
from moec.codegen.rules.products import only_owned_rows_read, spec_of
from moec.codegen.specs.products import LinearSpec
from moec.errors import NoMatch
from moec.ir.graph import Graph, Op
from moec.ir.ops.experts.grouped import GroupedLinear


def check_linears(op: Op, graph: Graph) -> None:
    """Raises NoMatch unless the stacks have one shape and the rows' dtype."""
    parts = GroupedLinear.of(op)
    first = parts.matrices[0]
    if any((m.shape, m.dtype) != (first.shape, parts.x.dtype) for m in parts.matrices):
        raise NoMatch("its stacks differ in shape, or from the rows in dtype")
    check_products(op, graph, parts, parts.matrices)


def _fits(graph: Graph, op: Op) -> bool:
    try:
        check_linears(op, graph)
    except NoMatch:
        return False
    return True


def _grouped(low: Lowering, op: Op) -> list[relax.Expr]:
    parts = GroupedLinear.of(op)
    spec = spec_of(LinearSpec, op, parts, sc.STORED[parts.x.dtype])
    layout = Layout(spec, low.target)
    zero_unowned_rows = not only_owned_rows_read(
        op.outputs[0], low.graph, partial(_fits, low.graph)
    )

    def make(
        top_k: int, epilogue: Epilogue | None, scale: str | None, name: str, **form: bool
    ) -> PrimFunc:
        if top_k:
            return gathered_linear(
                low.target, spec, top_k, epilogue, scale, name, zero_unowned_rows, **form
            )
        return grouped_linear(low.target, spec, epilogue, name, zero_unowned_rows, **form)

    rows = [low.value(parts.x)]
    weights = [packed(layout, parts.matrices)]
    return product(low, op, parts, "", layout, make, rows, weights, zero_unowned_rows)


RULES = (Rule("grouped", ("grouped.linear",), check_linears, _grouped),)
