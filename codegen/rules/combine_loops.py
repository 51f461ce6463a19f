"""moe.combine by generic loops, for dtypes that its kernel does not have."""

from __future__ import annotations

from typing import cast

from tvm import relax

from moec.codegen.fusion import FusionGroup
from moec.codegen.module_builder import Lowering
from moec.ir.graph import Attr, DType, Op, TensorType, Value
from moec.ir.opdef import inputs_of
from moec.ir.sizes.dims import Dim, product


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
