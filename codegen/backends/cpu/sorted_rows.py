"""What the kernels of products of sorted rows share, for every format of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from tvm import relax
from tvm.tirx import PrimFunc

from moec.codegen.backend import require
from moec.codegen.backends.cpu.dense import packed_bias
from moec.codegen.backends.cpu.slots import used_once
from moec.codegen.cpu.epilogue import vector_body
from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.loops import scalars as sc
from moec.codegen.module_builder import Lowering, Param
from moec.codegen.rules.experts import check_sorted
from moec.dtypes import VECTOR_DTYPES
from moec.ir.graph import Graph, Op, Value
from moec.ir.ops.experts.grouped import Grouped

Make = Callable[..., PrimFunc]
"""(top_k, epilogue, dtype of the scale, name) -> a kernel; with `from_slots=True`, of
experts in slots."""


def check_products(op: Op, graph: Graph, parts: Grouped[Any], stored: Iterable[Value]) -> None:
    """Raises NoMatch unless the values in `stored` are params, and vectors support every op of the
    body."""
    params = set(graph.params)
    count = len(parts.matrices)
    require(count <= 2, f"it multiplies the rows by {count} stacks, and kernels support two")
    weights = all(value in params for value in (*stored, *parts.biases))
    require(weights, "a stack of its weights is computed, not a weight of the model")
    require(parts.x.dtype in VECTOR_DTYPES, f"it computes in {parts.x.dtype}")
    top_k = cast(int, op.attrs.get("gather", 0))
    check_sorted(parts.ends, parts.order, parts.x, top_k, graph)
    if op.body is not None:
        vectors = vector_body(op.body) is not None
        require(vectors, "its body has an op that the epilogue of a product does not support")


def product(
    low: Lowering,
    op: Op,
    parts: Grouped[Any],
    kind: str,
    layout: Layout,
    make: Make,
    rows: Sequence[relax.Expr],
    weights: Sequence[tuple[object, Param]],
    *choices: object,
    in_slots: bool = True,
) -> list[relax.Expr]:
    """Calls the kernel that `make` generates, once for all products of this spec and `choices`.
    `rows` are its operands, and `weights` its params by their keys. `in_slots`: it has a form for
    experts in slots."""
    top_k = cast(int, op.attrs.get("gather", 0))
    scale = None if parts.scale is None else sc.STORED[parts.scale.dtype]
    body = None if op.body is None else vector_body(op.body)
    if parts.biases:
        weights = [*weights, packed_bias(layout, parts.biases)]
    in_slots = in_slots and low.slots is not None and used_once(low, weights)
    form = {"from_slots": True} if in_slots else {}
    name = "_".join(filter(None, (kind, "gathered" if top_k else "grouped")))

    def make_kernel(name: str) -> PrimFunc:
        epilogue = None if body is None else body.epilogue(low.target)
        return make(top_k, epilogue, scale, name, **form)

    key = (name, layout.spec, top_k, scale, None if body is None else body.text, *choices, *form)
    label = name if body is None else f"{name} with {body.name}"
    function = low.function(key, name if body is None else f"{name}_{body.name}", make_kernel)
    arguments = list(rows)
    if top_k and parts.order is not None:
        arguments.append(low.value(parts.order))
    arguments.append(low.value(parts.ends))
    if in_slots:
        arguments += low.slots.add(low, parts.ends, rows[0], weights, op.origin or label)
    else:
        arguments += [low.param(*each) for each in weights]
    if parts.scale is not None:
        arguments.append(low.value(parts.scale))
    low.note(op, label)
    return low.call(function, arguments, [op.outputs[0].type])
