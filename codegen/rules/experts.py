"""Choices sorted by expert, each expert's products, and rows brought back to their tokens."""

from __future__ import annotations

from typing import cast

from tvm import relax
from tvm.tirx import PrimFunc

from moec.codegen.cpu.gemm.grouped import gathered_linear, grouped_linear
from moec.codegen.cpu.gemm.layout import Layout, LinearSpec
from moec.codegen.cpu.gemm.tile import Epilogue
from moec.codegen.cpu.routing.combine import combine
from moec.codegen.cpu.routing.dispatch import dispatch
from moec.codegen.cpu.tuning import Tuning
from moec.codegen.fusion import Group
from moec.codegen.loops import scalars as sc
from moec.codegen.module_builder import Lowering
from moec.codegen.rules.dense import packed
from moec.codegen.rules.sorted_rows import fits, product, spec_of
from moec.codegen.rules.table import kernel
from moec.ir.dims import Dim
from moec.ir.graph import DType, Graph, Op, TensorType, Value
from moec.ops.grouped import GroupedLinear


@kernel("moe.sort")
def _sort(low: Lowering, op: Op) -> list[relax.Expr]:
    return _sorted(low, op, op.inputs[0])


def _sorted(low: Lowering, op: Op, experts: Value) -> list[relax.Expr]:
    """order, slots, ends of the choices; the same for all that ask about these experts."""
    count, k = op.attrs["num_experts"], experts.shape[1]
    key = (experts, count)
    if key not in low.sorted:
        assert isinstance(count, int)
        assert isinstance(k, int)
        function = low.function(
            ("dispatch", count, k), "dispatch", lambda name: dispatch(count, k, name)
        )
        tokens = experts.shape[0]
        types = [
            TensorType("i32", (k * tokens,)),
            TensorType("i32", (tokens, k)),
            TensorType("i32", (count,)),
        ]
        low.sorted[key] = low.call(function, [low.value(experts)], types)
        low.note(op, "dispatch")
    return low.sorted[key]


def linears_fit(op: Op, graph: Graph) -> bool:
    """Whether a kernel can do it, with stacks of one shape and of the rows' dtype."""
    parts = GroupedLinear.of(op)
    alike = {(m.shape, m.dtype) for m in parts.matrices} == {
        (parts.matrices[0].shape, parts.x.dtype)
    }
    return alike and fits(op, graph, parts, parts.matrices)


def only_owned_rows_read(rows: Value, graph: Graph) -> bool:
    """Whether all who read these rows leave out those behind the last end."""

    def leaves_out(op: Op) -> bool:
        if op.name == "moe.combine":
            return op.inputs[0] is rows and _sorting(op.inputs[1], graph) is not None
        if op.name == "grouped.linear":
            return not op.attrs.get("gather") and linears_fit(op, graph)
        return False

    return rows not in graph.results and all(map(leaves_out, graph.readers.get(rows, ())))


@kernel("grouped.linear", takes=linears_fit)
def _grouped(low: Lowering, op: Op) -> list[relax.Expr]:
    parts = GroupedLinear.of(op)
    spec = spec_of(LinearSpec, op, parts, sc.STORED[parts.x.dtype])
    layout = Layout(spec, low.target)
    cleared = not only_owned_rows_read(op.outputs[0], low.graph)

    def make(
        top_k: int, epilogue: Epilogue | None, scale: str | None, name: str, tuning: Tuning
    ) -> PrimFunc:
        if top_k:
            return gathered_linear(low.target, spec, top_k, epilogue, scale, name, cleared, tuning)
        return grouped_linear(low.target, spec, epilogue, name, cleared, tuning)

    rows = [low.value(parts.x)]
    weights = [low.param(*packed(layout, parts.matrices))]
    return product(low, op, parts, "", layout, make, rows, weights, cleared, values=layout.tuned)


def _sorting(places: Value, graph: Graph) -> Op | None:
    """The op that ordered the choices by expert, through a reshape of its places."""
    source = graph.producers.get(places)
    if source is not None and source.name == "aten.reshape.default":
        source = graph.producers.get(source.inputs[0])
    if source is None or source.name not in ("moe.sort", "moe.dispatch"):
        return None
    return source


@kernel(
    "moe.combine",
    takes=lambda op, graph: _sorting(op.inputs[1], graph) is not None,
)
def _combine(low: Lowering, op: Op) -> list[relax.Expr]:
    rows, places, *rest = op.inputs
    out = op.outputs[0]
    source = cast(Op, _sorting(places, low.graph))
    experts = source.inputs[1 if source.name == "moe.dispatch" else 0]
    _, slots, ends = _sorted(low, source, experts)
    weights = rest.pop(0) if op.attrs.get("weighted") else None
    addend = rest.pop(0) if op.attrs.get("added") else None
    count, k, width = cast(int, source.attrs["num_experts"]), cast(int, op.attrs["k"]), out.shape[1]
    assert isinstance(width, int)
    if len(places.shape) == 2:
        slots = low.value(places)
    else:  # k need not be the sort's: each choice may be a token of its own
        slots = low.reshaped(slots, TensorType("i32", (cast(Dim, op.attrs["tokens"]), k)))
    kinds = [None if v is None else sc.STORED[v.dtype] for v in (weights, addend)]
    key = ("combine", count, k, width, out.dtype, rows.dtype, *kinds)
    function = low.function(
        key,
        "combine",
        lambda name: combine(
            low.target,
            count,
            k,
            width,
            sc.STORED[out.dtype],
            sc.STORED[rows.dtype],
            kinds[0],
            kinds[1],
            name,
        ),
    )
    more = [low.value(v) for v in (weights, addend) if v is not None]
    low.note(op, "combine")
    return low.call(function, [low.value(rows), slots, ends, *more], [out.type])


@kernel("moe.dispatch")
def _dispatch(low: Lowering, op: Op) -> list[relax.Expr]:
    """The sort, then rows gathered (and scaled) by generic ops."""
    x, experts, *weights = op.inputs
    rows, order, _ends = op.outputs
    sorted_ = _sorted(low, op, experts)
    low.values[order] = sorted_[0]
    k = experts.shape[1]
    many = rows.shape[0]
    token = Value(f"{rows.name}_token", TensorType("i32", (many,)))
    ops = [Op("aten.floor_divide.default", (order,), (token,), {"other": k})]
    picked = rows if not weights else Value(f"{rows.name}_picked", rows.type)
    ops.append(Op("aten.index_select.default", (x, token), (picked,), {"dim": 0}))
    inputs = [order, x]
    if weights:
        flat = Value(f"{rows.name}_weights", TensorType(weights[0].dtype, (many,)))
        low.values[flat] = low.reshaped(low.value(weights[0]), flat.type)
        scale = Value(f"{rows.name}_scale", flat.type)
        wide = Value(f"{rows.name}_wide", TensorType(flat.dtype, (many, 1)))
        same = Value(f"{rows.name}_same", TensorType(rows.dtype, (many, 1)))
        ops += [
            Op("aten.index_select.default", (flat, order), (scale,), {"dim": 0}),
            Op("aten.unsqueeze.default", (scale,), (wide,), {"dim": 1}),
            Op("aten._to_copy.default", (wide,), (same,), {"dtype": DType(rows.dtype)}),
            Op("aten.mul.Tensor", (picked, same), (rows,)),
        ]
        inputs.append(flat)
    made = low.group(Group(ops[-1], ops, tuple(inputs)))
    return [made[0], sorted_[0], sorted_[2]]
