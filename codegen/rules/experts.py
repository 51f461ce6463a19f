"""Rules for moe.sort, moe.dispatch and moe.combine."""

from __future__ import annotations

from typing import cast

from tvm import relax

from moec.codegen.backend import Rule, always
from moec.codegen.fusion import FusionGroup
from moec.codegen.loops import scalars as sc
from moec.codegen.module_builder import Lowering
from moec.codegen.specs.routing import CombineSpec, DispatchSpec
from moec.errors import NoMatch
from moec.ir.graph import Attr, DType, Graph, Op, TensorType, Value
from moec.ir.opdef import inputs_of
from moec.ir.ops.experts.dispatch import SORTS
from moec.ir.sizes.dims import Dim, product


def _sort(low: Lowering, op: Op) -> list[relax.Expr]:
    return _sorted(low, op, op.inputs[0])


def _sorted(low: Lowering, op: Op, experts: Value) -> list[relax.Expr]:
    """order, slots and ends of the choices; one sort for all ops that read the same experts."""
    count, k = op.attrs["num_experts"], experts.shape[1]
    key = (experts, count)
    if key not in low.sorted:
        assert isinstance(count, int)
        assert isinstance(k, int)
        function = low.kernel(DispatchSpec(count, k), "dispatch")
        tokens = experts.shape[0]
        types = [
            TensorType("i32", (k * tokens,)),
            TensorType("i32", (tokens, k)),
            TensorType("i32", (count,)),
        ]
        low.note(op, "dispatch")
        low.sorted[key] = low.call(function, [low.value(experts)], types)
    return low.sorted[key]


_COLUMNS = ("aten.reshape.default", "aten.slice.Tensor", "aten.cat.default")


def sorting_of(permutation: Value, graph: Graph) -> Op | None:
    """The moe.sort or moe.dispatch that computes `permutation`, or values of which it is a reshape
    or some columns."""
    roots = sorted_values(permutation, graph)
    sources = {graph.producers.get(value) for value in roots}
    source = sources.pop() if len(sources) == 1 else None
    if source is None or source.name not in SORTS:
        return None
    return source


def sorted_values(permutation: Value, graph: Graph) -> set[Value]:
    """The values before reshapes, slices and concatenations."""
    op = graph.producers.get(permutation)
    if op is None or op.name not in _COLUMNS:
        return {permutation}
    return {root for value in op.inputs for root in sorted_values(value, graph)}


def _combine(low: Lowering, op: Op) -> list[relax.Expr]:
    rows, permutation, weights, addend = inputs_of(op).values()
    out = op.outputs[0]
    source = cast(Op, sorting_of(permutation, low.graph))
    experts = choices_of(source)
    _, slots, ends = _sorted(low, source, experts)
    count, k, width = cast(int, source.attrs["num_experts"]), cast(int, op.attrs["k"]), out.shape[1]
    assert isinstance(width, int)
    if len(permutation.shape) == 2:
        slots = low.value(permutation)
    else:  # k may differ from the sort's: each choice may count as a token
        slots = low.reshaped(slots, TensorType("i32", (cast(Dim, op.attrs["tokens"]), k)))
    if any(v is not None and v.dtype == "f64" for v in (rows, weights, addend, out)):
        return [combine_by_loops(low, op, slots, ends, count)]
    kinds = [None if v is None else sc.STORED[v.dtype] for v in (weights, addend)]
    spec = CombineSpec(
        count, k, width, sc.STORED[out.dtype], sc.STORED[rows.dtype], kinds[0], kinds[1]
    )
    function = low.kernel(spec, "combine")
    more = [low.value(v) for v in (weights, addend) if v is not None]
    low.note(op, "combine")
    return low.call(function, [low.value(rows), slots, ends, *more], [out.type])


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
    results = low.group(FusionGroup(ops[-1], ops, tuple(inputs)))
    return [results[0], sorted_[0], sorted_[2]]


def _check_combine(op: Op, graph: Graph) -> None:
    """Raises NoMatch unless the slots come from a sort of as many choices as there are rows: the
    kernel does not check that they index rows."""
    rows, permutation = op.inputs[:2]
    source = sorting_of(permutation, graph)
    if source is None:
        raise NoMatch("its slots do not come from a sort of the choices")
    choices = choices_of(source)
    if rows.shape[0] != product(choices.shape):
        raise NoMatch("its number of rows is not the number of sorted choices")
    (*others, root) = sorted_values(permutation, graph)
    columns = source.name == "moe.sort" and root is source.outputs[1] and not others
    every = root is not source.outputs[2] and product(permutation.shape) == product(choices.shape)
    if not columns and (others or not every):
        raise NoMatch("its slots are not the output of that sort")


def choices_of(source: Op) -> Value:
    """The experts [T, k] that a sort orders."""
    return source.inputs[1 if source.name == "moe.dispatch" else 0]


def check_sorted(ends: Value, order: Value | None, x: Value, top_k: int, graph: Graph) -> None:
    """Raises NoMatch unless `ends` and `order` come from a sort in the graph, or from even ends:
    they index x, and the kernel does not check their bounds."""
    source = graph.producers.get(ends)
    if source is not None and source.name == "moe.even_ends":
        if top_k or x.shape[0] != product((*ends.shape, cast(Dim, source.attrs["each"]))):
            raise NoMatch("its rows are not split evenly among the experts")
        return
    if source is None or source.name not in SORTS:
        raise NoMatch("the ends of its experts do not come from a sort of the choices")
    if ends is not source.outputs[2]:
        raise NoMatch("the ends of its experts are another result of the sort")
    tokens, k = choices_of(source).shape
    if not top_k:
        if x.shape[0] != product((tokens, k)):
            raise NoMatch("its number of rows is not the number of sorted choices")
        return
    if order is not None and order is not source.outputs[source.name == "moe.dispatch"]:
        raise NoMatch("its order is not from the sort that computes its ends")
    if top_k != k or x.shape[0] != tokens:
        raise NoMatch("its rows are not the tokens whose choices were sorted")


RULES = (
    Rule("sort", ("moe.sort",), always, _sort),
    Rule("combine", ("moe.combine",), _check_combine, _combine),
    Rule("dispatch", ("moe.dispatch",), always, _dispatch),
)


# ---- moe.combine by generic loops, for dtypes that its kernel does not have ----------


def combine_by_loops(
    low: Lowering, op: Op, slots: relax.Expr, ends: relax.Expr, experts: int
) -> relax.Expr:
    """y[t] = sum over s of weights[t, s] * rows[slots[t, s]] (+ addend[t]), in the dtype of the
    rows. `slots` are i32[T, k]. Rows after the last of `ends`, i32[E], belong to no expert and add
    nothing."""
    rows, _, weights, addend = inputs_of(op).values()
    out, k = op.outputs[0], cast(int, op.attrs["k"])
    tokens, width = out.shape

    def run(name: str, inputs: tuple[Value, ...], to: TensorType, **attrs: Attr) -> Value:
        result = Value(f"{out.name}_{len(low.values)}", to)
        step = Op(f"aten.{name}", inputs, (result,), attrs, None, op.origin)
        (low.values[result],) = low.group(FusionGroup(step, [step], inputs))
        return result

    def tensor(dtype: str, *shape: Dim) -> TensorType:
        return TensorType(dtype, shape)

    choices = Value(f"{out.name}_slots", tensor("i32", tokens, k))
    all_ends = Value(f"{out.name}_ends", tensor("i32", experts))
    low.values[choices], low.values[all_ends] = slots, ends
    count = product((tokens, k))
    flat = run("reshape.default", (choices,), tensor("i32", count), shape=(count,))
    picked = run("index_select.default", (rows, flat), tensor(rows.dtype, count, width), dim=0)
    cube = tensor(rows.dtype, tokens, k, width)
    terms = run("reshape.default", (picked,), cube, shape=cube.shape)
    if weights is not None:
        column = run("unsqueeze.default", (weights,), tensor(weights.dtype, tokens, k, 1), dim=2)
        if weights.dtype != rows.dtype:
            dtype = DType(rows.dtype)
            column = run(
                "_to_copy.default", (column,), tensor(rows.dtype, tokens, k, 1), dtype=dtype
            )
        terms = run("mul.Tensor", (terms, column), cube)
    last = run("select.int", (all_ends,), tensor("i32"), dim=0, index=experts - 1)
    valid = run("lt.Tensor", (choices, last), tensor("bool", tokens, k))
    mask = run("unsqueeze.default", (valid,), tensor("bool", tokens, k, 1), dim=2)
    terms = run("where.ScalarOther", (mask, terms), cube, other=0.0)
    total = run("sum.dim_IntList", (terms,), tensor(rows.dtype, tokens, width), dim=(1,))
    if addend is not None:
        total = run("add.Tensor", (total, addend), total.type)
    if total.dtype != out.dtype:
        total = run("_to_copy.default", (total,), out.type, dtype=DType(out.dtype))
    return low.values[total]
