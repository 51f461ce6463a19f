"""What a program stores and computes, by counting."""

from __future__ import annotations

from collections.abc import Mapping

from moec.ir.dims import Dim, evaluate_dim, product, symbols
from moec.ir.graph import Graph, Op, Program
from moec.report.report import describe_graph


def stored_bytes(program: Program) -> int:
    """Bytes of the weights that the graph reads; tensors that share memory count once."""
    sizes: dict[str, int] = describe_graph(program.graph, program.weights)["bytes_by_dtype"]
    return sum(sizes.values())


def product_flops(graph: Graph, sizes: Mapping[str, int]) -> int:
    """FLOPs of all products of matrices, two for each multiplication and addition; attention's
    own are left out. `sizes` gives the named sizes. Experts count for the rows they are sent, of
    which `share` is a measured part where other choices take no row.
    """
    total = 0
    for op in graph.ops:
        if op.name == "moe.experts" and op.body is not None:
            rows = evaluate_dim(op.inputs[0].shape[0], sizes)
            own = dict.fromkeys(symbols(op.body.inputs[0].shape[0]), rows)
            share = op.attrs.get("share", 1.0)
            assert isinstance(share, float)
            total += round(share * product_flops(op.body, {**sizes, **own}))
        elif (inner := _inner(op)) is not None:
            total += 2 * evaluate_dim(product((*op.outputs[0].shape, inner)), sizes)
    return total


def _inner(op: Op) -> Dim | None:
    """The axis over which a product of matrices sums."""
    match op.name:
        case "aten.linear.default" | "aten.mm.default" | "aten.bmm.default" | "aten.matmul.default":
            return op.inputs[0].shape[-1]
        case "aten.addmm.default" | "aten.baddbmm.default":
            return op.inputs[1].shape[-1]
    return None
