"""MoE ops in plain loops: capacities, counts, and products that no fast kernel supports."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.loops import scalars as sc
from moec.codegen.loops.elements.arithmetic import plus, times
from moec.codegen.loops.emission import Emission, Point
from moec.codegen.loops.index import Index, Position, const, loop
from moec.codegen.loops.moves.lookup import looked_up
from moec.codegen.loops.rules import kernel, point
from moec.codegen.loops.scalars import Scalar
from moec.dtypes import HALVES
from moec.ir.graph import Op, Value
from moec.ir.opdef import integer
from moec.ir.ops.experts.grouped import GroupedLinear


@kernel("moe.capacity")
def capacity(e: Emission, op: Op) -> None:
    """Counts choices in order, by token or by slot; choices beyond the capacity become E."""
    experts, out = op.inputs[0], op.outputs[0]
    tokens, k = experts.shape
    count = integer(op, "num_experts")
    limit = e.sizes.expr(op.attrs["capacity"])

    def visit(at: Position, counts: Buffer) -> None:
        expert = e.bind_expr(e.read(experts, at).expr)
        valid = tirx.And(expert >= 0, expert < count)
        bucket = e.bind_expr(T.Select(valid, expert, tirx.const(count, "int64")))
        before = e.bind_expr(counts[bucket])
        T.buffer_store(counts, before + 1, [bucket])
        choice = T.Select(before < limit, bucket, tirx.const(count, "int64"))
        e.store(out, at, Scalar("i64", choice))

    with e.run_once():
        counts = e.scratch((count + 1,), "int64")
        with T.serial(0, count + 1) as i:
            T.buffer_store(counts, tirx.const(0, "int64"), [i])
        if op.attrs.get("order", "slot") == "slot":
            e.serially((k, tokens), lambda at: visit((at[1], at[0]), counts), "choice")
        else:
            e.serially((tokens, k), lambda at: visit(at, counts), "choice")


@point("moe.even_ends", cost=0, exact=True, same_position=False)
def even_ends(p: Point) -> Scalar:
    """Each expert owns equally many rows: the end of expert e is (e + 1) * each."""
    each = p.emission.sizes.expr(p.op.attrs["each"])
    return sc.cast(Scalar("i64", (p.at[0].expr + 1) * each), p.dtype)


@kernel("grouped.expert_of")
def expert_of(e: Emission, op: Op) -> None:
    """The number of experts that end at or before a row, at most E - 1 (also for rows without an
    expert)."""
    ends, out = op.inputs[0], op.outputs[0]
    count = ends.shape[0]
    assert isinstance(count, int)

    def row(at: Position) -> None:
        counter = e.cell(sc.constant(0, "i64"))
        with T.serial(0, tirx.const(count, "int64")) as i, e.scope():
            end = sc.cast(e.read(ends, (loop(i, "expert", count),)), "i64")
            passed = T.Select(
                end.expr <= at[0].expr, tirx.const(1, "int64"), tirx.const(0, "int64")
            )
            counter.set(Scalar("i64", counter.get().expr + passed))
        last = tirx.min(counter.get().expr, tirx.const(count - 1, "int64"))
        e.store(out, at, Scalar("i64", last))

    e.rows(out.shape, row, count)


@kernel("grouped.linear")
def grouped_linear(e: Emission, op: Op) -> None:
    """One element at a time: for computed stacks, and for dtypes and bodies without a kernel."""
    parts, out = GroupedLinear.of(op), op.outputs[0]
    experts = parts.matrices[0].shape[0]
    top_k = integer(op, "gather") if op.attrs.get("gather") else 0
    assert isinstance(experts, int)
    kind = "f64" if parts.x.dtype == "f64" else "f32"

    def element(at: Position) -> None:
        row, column = at
        owner = _owner(e, parts.ends, row, experts)
        source = row
        choice: Index | None = None
        if parts.order is not None:
            tokens = parts.x.shape[0]
            choice = looked_up(e, parts.order, (row,), parts.order.shape[0])
            token = e.bind_expr(tirx.truncdiv(choice.expr, tirx.const(top_k, "int64")))
            last = tirx.max(e.sizes.expr(tokens) - 1, tirx.const(0, "int64"))
            source = Index(tirx.min(token, last), ("token", row.key))
        sums = [_dot(e, parts, j, source, owner, column, kind) for j in range(len(parts.matrices))]
        if parts.scale is not None and choice is not None:
            slot = Index(tirx.truncmod(choice.expr, tirx.const(top_k, "int64")), ("slot", row.key))
            scale = sc.cast(e.read(parts.scale, (source, slot)), kind)
            sums = [e.bind(times(s, scale)) for s in sums]
        for j, bias in enumerate(parts.biases):
            sums[j] = plus(sums[j], sc.cast(e.read(bias, (owner, column)), kind))
        y = _through_body(e, op, sums, at)
        owned = row.expr < _end(e, parts.ends, experts)
        empty = sc.constant(0, out.dtype)
        expr = T.Select(owned, sc.cast(y, out.dtype).expr, empty.expr)
        e.store(out, at, Scalar(out.dtype, expr))

    e.elements(out.shape, element, weight=64)


def _end(e: Emission, ends: Value, experts: int) -> object:
    return sc.cast(e.read(ends, (const(experts - 1),)), "i64").expr


def _owner(e: Emission, ends: Value, row: Index, experts: int) -> Index:
    counter = e.cell(sc.constant(0, "i64"))
    with T.serial(0, tirx.const(experts, "int64")) as i, e.scope():
        end = sc.cast(e.read(ends, (loop(i, "expert", experts),)), "i64")
        one, zero = tirx.const(1, "int64"), tirx.const(0, "int64")
        passed = T.Select(end.expr <= row.expr, one, zero)
        counter.set(Scalar("i64", counter.get().expr + passed))
    last = e.bind_expr(tirx.min(counter.get().expr, tirx.const(experts - 1, "int64")))
    return Index(last, ("owner", row.key), 0, experts - 1)


def _dot(
    e: Emission,
    parts: GroupedLinear,
    which: int,
    source: Index,
    owner: Index,
    column: Index,
    kind: str,
) -> Scalar:
    total = e.cell(sc.constant(0, kind))
    depth = parts.x.shape[1]
    with T.serial(0, e.sizes.expr(depth)) as k, e.scope():
        inner = loop(k, "inner", depth)
        x = sc.cast(e.read(parts.x, (source, inner)), kind)
        w = sc.cast(e.read(parts.matrices[which], (owner, column, inner)), kind)
        product = e.bind(times(x, w))
        total.set(Scalar(kind, sc.add_in_any_order(total.get().expr, product.expr)))
    return e.bind(total.get())


def _through_body(e: Emission, op: Op, sums: list[Scalar], at: Position) -> Scalar:
    if op.body is None:
        return sums[0]
    body = op.body
    producers = {value: inner for inner in body.ops for value in inner.outputs}
    inside = Emission({}, {}, producers, e.sizes, e.target)
    keys = tuple(i.key for i in at)
    for value, x in zip(body.inputs, sums, strict=True):
        same_dtype = x.dtype in HALVES or x.dtype == value.dtype
        inside.memos[-1][(value, keys)] = x if same_dtype else Scalar(value.dtype, x.expr)
    return inside.read(body.outputs[0], at)
