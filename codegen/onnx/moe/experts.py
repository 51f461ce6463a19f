"""Experts as sorted rows, with one MatMul per expert and projection.

    ids [T, k] -> order [R] -> rows [R, D] = x[order // k] -> Split by expert, E pieces
    piece_e @ W_e.T for each e -> Concat -> (activation over all rows) -> the next projection,
    with gate and up side by side in one W_e
    y [T, D] = weights [T, 1, k] @ rows[slots] [T, k, D]

Each expert multiplies only the rows that chose it; a MatMul of no rows costs only the call. The
number of nodes depends on the experts, not on the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moec.codegen.onnx.aten.matrix import of_experts
from moec.codegen.onnx.rules import BUILD, Call, build
from moec.codegen.onnx.sizes import reshaped
from moec.codegen.onnx.writer import NodeWriter
from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Value
from moec.ir.opdef import inputs_of
from moec.ir.ops.experts.grouped import GroupedLinear
from moec.ir.ops.experts.quantised import GroupedQuantised
from moec.ir.sizes.dims import Dim

_ROUTERS = ("moe.gate", "moe.route")
_PASS_ON = ("aten.reshape.default", "aten.alias.default", "aten.clone.default")


def sorted_choices(w: NodeWriter, ids: Value, count: int) -> tuple[str, str]:
    """order[R] and the number of rows of each expert, i64[E], or i64[E+1] if some rows have no
    expert.

    TopK is a stable sort: of equal elements, the lower position comes first.
    """
    flat = w("Reshape", w.cast(w.read(ids), ids.dtype, "i64"), w.constant([-1]))
    every = all_chosen(w.graph, ids, count)
    if not every:
        flat = w("Min", flat, w.constant(count))
    rows = w("Shape", flat)
    order = w.many("TopK", [flat, rows], 2, axis=0, largest=0)[1]
    parts = count if every else count + 1
    ones = w("Expand", w.constant([1]), rows)
    counts = w("ScatterElements", w.constant([0] * parts), flat, ones, axis=0, reduction="add")
    return order, counts


def all_chosen(graph: Graph, ids: Value, count: int) -> bool:
    """Whether every id is an expert: the ids come unchanged from a router over `count` experts."""
    op = graph.producers.get(_before_views(graph, ids))
    return op is not None and op.name in _ROUTERS and columns(op) == count


def _before_views(graph: Graph, value: Value) -> Value:
    op = graph.producers.get(value)
    return _before_views(graph, op.inputs[0]) if op and op.name in _PASS_ON else value


def columns(router: Op) -> Dim:
    """The number of experts that a router chooses among, including those without a network."""
    return router.inputs[1].shape[0] if router.name == "moe.gate" else router.inputs[0].shape[1]


def _positions(w: NodeWriter, values: Sequence[Value], names: Sequence[str]) -> list[str]:
    """Positions are i32 in the IR and i64 in ONNX. The ops of this file read the i64 form; casts
    are dropped unless another op reads them."""
    for value, name in zip(values, names, strict=True):
        w.memo["i64", value] = name
    return [w.cast(name, "i64", value.dtype) for value, name in zip(values, names, strict=True)]


def _read(w: NodeWriter, value: Value) -> str:
    cached = w.memo.get(("i64", value))
    return cached if cached is not None else w.cast(w.read(value), value.dtype, "i64")


def _ends(w: NodeWriter, ends: Value, counts: str, count: int) -> str:
    """ends[E], computed from the counts, which are recorded for `_counts`."""
    w.memo["counts", ends] = counts
    return w("CumSum", w("Slice", counts, w.constant([0]), w.constant([count])), w.constant(0))


def _record_rows(w: NodeWriter, permutations: Sequence[Value], ends: str) -> None:
    """Records the number of rows with an expert, i64[1], for ops that read a permutation."""
    count = w("Slice", ends, w.constant([-1]), w.constant([2**31]))
    for value in permutations:
        w.memo["rows", value] = count


def _inverse(w: NodeWriter, order: str) -> str:
    """The row of each choice: slots[order[r]] = r."""
    rows = w("Squeeze", w("Shape", order), w.constant([0]))
    return w(
        "ScatterElements",
        order,
        order,
        w("Range", w.constant(0), rows, w.constant(1)),
        axis=0,
    )


@build("moe.sort")
def sort(c: Call) -> Sequence[str]:
    (ids,), count = c.op.inputs, _count(c.op)
    order, counts = sorted_choices(c.w, ids, count)
    slots = reshaped(c.w, _inverse(c.w, order), c.op.outputs[0].shape, ids.shape)
    ends = _ends(c.w, c.op.outputs[2], counts, count)
    if not all_chosen(c.w.graph, ids, count):
        _record_rows(c.w, c.op.outputs[:2], ends)
    return _positions(c.w, c.op.outputs, [order, slots, ends])


@build("moe.dispatch")
def dispatch(c: Call) -> Sequence[str]:
    w, (x, ids, *weights), count = c.w, c.op.inputs, _count(c.op)
    order, counts = sorted_choices(w, ids, count)
    token = w("Div", order, w.constant(ids.shape[1]))
    rows = w("Gather", w.read(x), token, axis=0)
    if weights:
        rows = _weight_rows(w, rows, weights[0], order, x.dtype)
    ends = _ends(w, c.op.outputs[2], counts, count)
    if not all_chosen(w.graph, ids, count):
        _record_rows(w, c.op.outputs[1:2], ends)
    return rows, *_positions(w, c.op.outputs[1:], [order, ends])


@build("moe.even_ends")
def even_ends(c: Call) -> str:
    w, count = c.w, _count(c.op)
    each = w("Reshape", w.dim(c.op.attrs["each"]), w.constant([1]))
    counts = w("Expand", each, w.constant([count]))
    return _positions(w, c.op.outputs, [_ends(w, c.out, counts, count)])[0]


def _count(op: Op) -> int:
    count = op.attrs["num_experts"]
    assert isinstance(count, int)
    return count


def _weight_rows(w: NodeWriter, rows: str, weights: Value, order: str, dtype: str) -> str:
    """Each row times the routing weight of its choice."""
    flat = w("Reshape", w.read(weights), w.constant([-1]))
    row_weights = w.cast(w("Gather", flat, order, axis=0), weights.dtype, dtype)
    return w("Mul", rows, w("Unsqueeze", row_weights, w.constant([1])))


@build("grouped.linear")
def grouped_linear(c: Call) -> str:
    w, parts = c.w, GroupedLinear.of(c.op)
    matrices = of_experts(w, parts.matrices)
    biases = of_experts(w, parts.biases) if parts.biases else ()

    def product(expert: int, rows: str) -> str:
        if biases:
            return w("Gemm", rows, matrices[expert], biases[expert])
        return w("MatMul", rows, matrices[expert])

    widths = [int(str(matrix.shape[1])) for matrix in parts.matrices]
    return by_expert(c, parts, sorted_rows(c, parts), parts.x.dtype, widths, product)


def by_expert(
    c: Call,
    parts: GroupedLinear | GroupedQuantised,
    rows: str,
    dtype: str,
    widths: Sequence[int],
    product: Callable[[int, str], str],
) -> str:
    """`rows`, cast to `dtype`, through `product` of each row's expert and through the body. The
    body's inputs, of `widths`, are adjacent columns of a product."""
    w, op, out = c.w, c.op, c.out
    sums = _projected(w, parts.ends, rows, dtype, widths, product)
    if op.body is None:
        return w.cast(sums[0], dtype, out.dtype)
    output = inlined(w, op.body, sums, dtype, out)
    return w.cast(output, op.body.outputs[0].dtype, out.dtype)


def sorted_rows(c: Call, parts: GroupedLinear | GroupedQuantised) -> str:
    """The rows in the order of their experts, in the dtype of x."""
    w = c.w
    x, k = w.read(parts.x), c.op.attrs.get("gather", 0)
    if parts.order is None or not isinstance(k, int):
        return x
    order = _read(w, parts.order)
    rows = w("Gather", x, w("Div", order, w.constant(k)), axis=0)
    if parts.scale is not None:
        rows = _weight_rows(w, rows, parts.scale, order, parts.x.dtype)
    return rows


def _counts(w: NodeWriter, ends: Value) -> tuple[str, bool]:
    """The number of rows of each expert, and whether a last count is that of rows without an
    expert."""
    counts = w.memo.get(("counts", ends))
    if counts is None:
        raise NoMatch(
            f"the experts of the rows ({ends.name}) do not come from a sort of the choices"
        )
    producer = w.graph.producers[ends]
    if producer.name == "moe.even_ends":
        return counts, False
    ids = producer.inputs[0] if producer.name == "moe.sort" else producer.inputs[1]
    return counts, not all_chosen(w.graph, ids, int(str(ends.shape[0])))


def _projected(
    w: NodeWriter,
    ends: Value,
    rows: str,
    dtype: str,
    widths: Sequence[int],
    product: Callable[[int, str], str],
) -> list[str]:
    """The products of all rows with their experts' matrices, split into columns of `widths`."""
    counts, rest = _counts(w, ends)
    experts = int(str(ends.shape[0]))
    pieces = w.many("Split", [rows, counts], experts + rest, axis=0) if experts + rest > 1 else []
    pieces = pieces or [rows]
    products = [product(expert, piece) for expert, piece in enumerate(pieces[:experts])]
    if rest:
        left = w("Slice", counts, w.constant([experts]), w.constant([experts + 1]))
        shape = w("Concat", left, w.constant([sum(widths)]), axis=0)
        zero = w.cast(w.constant([0], "f32"), "f32", dtype)
        products.append(w("Expand", zero, shape))
    joined = w("Concat", *products, axis=0) if len(products) > 1 else products[0]
    if len(widths) == 1:
        return [joined]
    return w.many("Split", [joined, w.constant(widths)], len(widths), axis=1)


def inlined(w: NodeWriter, body: Graph, inputs: Sequence[str], dtype: str, out: Value) -> str:
    """The ops of a body over all rows: the body's size R becomes the number of rows."""
    for value, name in zip(body.inputs, inputs, strict=True):
        w.names[value] = w.cast(name, dtype, value.dtype)
    before = w.local
    size = getattr(body.inputs[0].shape[0], "name", "")
    w.local = {**before, size: out.shape[0]} if size else before
    for op in body.ops:
        builder = BUILD.get(op.name)
        if builder is None:
            raise NoMatch(f"operator {op.name} in the body of experts has no ONNX form")
        results = builder(Call(w, op))
        names = [results] if isinstance(results, str) else results
        w.names |= dict(zip(op.outputs, names, strict=True))
    w.local = before
    return w.read(body.outputs[0])


@build("grouped.expert_of")
def expert_of(c: Call) -> str:
    """The number of experts that end at or before a row, at most E - 1."""
    w, (ends,) = c.w, c.op.inputs
    rows: Dim = c.out.shape[0]
    every = w("Range", w.constant(0), w.scalar(rows), w.constant(1))
    column = w("Unsqueeze", every, w.constant([1]))
    passed = w.cast(w("LessOrEqual", _read(w, ends), column), "bool", "i64")
    owners = w("ReduceSum", passed, w.constant([1]), keepdims=0)
    return w("Min", owners, w.constant(int(str(ends.shape[0])) - 1))


@build("moe.combine")
def combine(c: Call) -> str:
    w, op = c.w, c.op
    rows, permutation, weights, addend = inputs_of(op).values()
    k, tokens = op.attrs["k"], c.out.shape[0]
    assert isinstance(k, int)
    full = "f64" if rows.dtype == "f64" else "f32"
    slots = _read(w, permutation)
    if len(permutation.shape) == 1:
        slots = reshaped(w, _inverse(w, slots), permutation.shape, (tokens, k))
    picked = w("Gather", w.cast(w.read(rows), rows.dtype, full), slots, axis=0)
    if weights is not None:
        factors = w.cast(w.read(weights), weights.dtype, full)
        count = w.memo.get(("rows", _before_views(w.graph, permutation)))
        if count is not None:  # a row without an expert adds nothing, although its weight is NaN
            zero = w.cast(w.constant([0], "f32"), "f32", full)
            factors = w("Where", w("Less", slots, count), factors, zero)
        row = w("Unsqueeze", factors, w.constant([1]))
        total = w("Squeeze", w("MatMul", row, picked), w.constant([1]))
    else:
        total = w("ReduceSum", picked, w.constant([1]), keepdims=0)
    if addend is not None:
        total = w("Add", total, w.cast(w.read(addend), addend.dtype, full))
    return w.cast(total, full, c.out.dtype)
