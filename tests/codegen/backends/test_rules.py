"""Which kernel an op gets, and the reason if it gets none."""

from __future__ import annotations

import pytest

from moec.codegen.backends.cpu.backend import CPU
from moec.ir.text import parse

REFUSED = {
    "a weight that is computed": (
        """graph main(x: f32[T, 8], w: f32[4, 8]) {
          y: f32[T, 4] = aten.linear.default(x, w) @ model.head
          return y
        }""",
        "linear: its second operand is computed, not a weight of the model",
    ),
    "double precision": (
        """graph main(x: f64[T, 8]; w: f64[4, 8]) {
          y: f64[T, 4] = aten.linear.default(x, w)
          return y
        }""",
        "linear: it computes in f64",
    ),
    "a scaled product": (
        """graph main(x: f32[T, 8]; w: f32[8, 4], b: f32[4]) {
          y: f32[T, 4] = aten.addmm.default(b, x, w) <beta=2>
          return y
        }""",
        "linear: alpha or beta scale what it adds",
    ),
    "two axes normalised": (
        """graph main(x: f32[T, 3, 8]; w: f32[3, 8], b: f32[3, 8]) {
          y: f32[T, 3, 8] = aten.layer_norm.default(x, w, b) <normalized_shape=(3, 8), eps=1e-05>
          return y
        }""",
        "layer_norm: it normalises over 2 axes at once",
    ),
    "a norm in double precision": (
        """graph main(x: f64[T, 8]; w: f64[8]) {
          y: f64[T, 8] = nn.rms_norm(x, w) <epsilon=1e-05>
          return y
        }""",
        "rms_norm: it reads f64",
    ),
    "attention of three axes": (
        """graph main(q: f32[T, 5, 8], k: f32[T, 5, 8], v: f32[T, 5, 8]) {
          y: f32[T, 5, 8] = aten.scaled_dot_product_attention.default(q, k, v)
          return y
        }""",
        "attention: its queries have 3 axes, not 4",
    ),
    "a varying number of heads": (
        """graph main(q: f32[2, H, 5, 8], k: f32[2, H, 5, 8], v: f32[2, H, 5, 8]) {
          y: f32[2, H, 5, 8] = aten.scaled_dot_product_attention.default(q, k, v)
          return y
        }""",
        "attention: the number or the width of its heads is not constant",
    ),
    "stacks that are computed": (
        """graph main(x: f32[R, 8], w: f32[3, 4, 8], ends: i32[3]) {
          y: f32[R, 4] = grouped.linear(x, ends, w) <matrices=1>
          return y
        }""",
        "grouped: a stack of its weights is computed, not a weight of the model",
    ),
    "ends that are computed": (
        """graph main(x: f32[T, 8], i: i64[T, 2]; w: f32[3, 4, 8]) {
          order: i32[2*T], slots: i32[T, 2], ends: i32[3] = moe.sort(i) <num_experts=3>
          far: i32[3] = aten.mul.Tensor(ends) <other=100000>
          y: f32[2*T, 4] = grouped.linear(x, far, w, order) <matrices=1, gather=2>
          return y
        }""",
        "grouped: the ends of its experts do not come from a sort of the choices",
    ),
    "an order that is computed": (
        """graph main(x: f32[T, 8], i: i64[T, 2]; w: f32[3, 4, 8]) {
          order: i32[2*T], slots: i32[T, 2], ends: i32[3] = moe.sort(i) <num_experts=3>
          far: i32[2*T] = aten.add.Tensor(order) <other=500000000>
          y: f32[2*T, 4] = grouped.linear(x, ends, w, far) <matrices=1, gather=2>
          return y
        }""",
        "grouped: its order is not from the sort that computes its ends",
    ),
    "rows of other tokens": (
        """graph main(x: f32[4, 8], i: i64[T, 2]; w: f32[3, 4, 8]) {
          order: i32[2*T], slots: i32[T, 2], ends: i32[3] = moe.sort(i) <num_experts=3>
          y: f32[2*T, 4] = grouped.linear(x, ends, w, order) <matrices=1, gather=2>
          return y
        }""",
        "grouped: its rows are not the tokens whose choices were sorted",
    ),
    "too few rows": (
        """graph main(x: f32[T, 8], i: i64[T, 2]; w: f32[3, 4, 8]) {
          order: i32[2*T], slots: i32[T, 2], ends: i32[3] = moe.sort(i) <num_experts=3>
          y: f32[T, 4] = grouped.linear(x, ends, w) <matrices=1>
          return y
        }""",
        "grouped: its number of rows is not the number of sorted choices",
    ),
    "slots of no sort": (
        """graph main(y: f32[R, 8], slots: i32[T, 2], w: f32[T, 2]) {
          out: f32[T, 8] = moe.combine(y, slots, w) <k=2, tokens={T}, weighted=true>
          return out
        }""",
        "combine: its slots do not come from a sort of the choices",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_why_an_op_has_no_kernel(name: str) -> None:
    text, reason = REFUSED[name]
    selection = CPU.select(parse(text))
    (refusal,) = selection.refusals
    assert refusal.reason == reason
    assert {op.name for op in selection.rules} <= {"moe.sort"}


def test_ops_that_no_rule_is_for_are_no_refusals() -> None:
    selection = CPU.select(
        parse("""graph main(x: f32[T, 8]) {
          y: f32[T, 8] = aten.silu.default(x)
          return y
        }""")
    )
    assert (selection.rules, selection.refusals) == ({}, ())


def test_the_origin_is_named() -> None:
    text, _ = REFUSED["a weight that is computed"]
    (refusal,) = CPU.select(parse(text)).refusals
    assert (refusal.origin, refusal.op) == ("model.head", "aten.linear.default")
