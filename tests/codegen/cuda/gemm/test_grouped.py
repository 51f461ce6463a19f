"""Grouped products on the emulator against torch: routings, shapes, tails, dtypes, schedules.

Results are rounded once from float32 sums: half a unit in the last place of the result's dtype,
plus the error of summing k products of |x w| in another order, between 2^-24 * log2(k) at best and
2^-24 * k at worst.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moec.codegen.cuda.activation import Epilogue, gated, silu
from moec.codegen.cuda.gemm.grouped import grouped_linear
from moec.codegen.cuda.gemm.product import interleave
from moec.codegen.cuda.gemm.tiles import LARGE, TileShape, row_and_column
from moec.codegen.specs.products import LinearSpec
from moec.errors import NoMatch
from moec.target.cuda import TARGETS
from tests.codegen.cuda.gemm.test_gemv import packed, right
from tests.cuda_emulator.bugs import WHERE_LATE, Bug, check_found
from tests.cuda_emulator.emulate import (
    SCHEDULES,
    SM_80,
    Emulated,
    Schedule,
    each_schedule,
    emulated,
)
from tests.cuda_emulator.products import TORCH, UNIT
from tests.cuda_emulator.routings import Routed, routed

TINY = TileShape(32, 32, 64, warp_rows=1, warp_columns=2, stages=3)
FLAT = TileShape(32, 32, 32, warp_rows=2, warp_columns=1, stages=4)

EAGER: dict[str, Callable[..., Tensor]] = {"silu": lambda g, u: torch.nn.functional.silu(g) * u}
JOIN: dict[str, Epilogue] = {"silu": gated(silu)}


@cache
def kernel(spec: LinearSpec, join: str = "", top_k: int = 0, shape: TileShape = TINY) -> Emulated:
    epilogue = JOIN[join] if join else None
    return emulated(
        grouped_linear(spec, SM_80, epilogue=epilogue, top_k=top_k, shape=shape, blocks=3)
    )


def weights(spec: LinearSpec) -> list[Tensor]:
    """The stacks of a spec: w, or gate and up; small, so that products stay near 1."""
    shape = (spec.groups, spec.n, spec.k)
    scale = spec.k**-0.5
    return [(torch.randn(shape) * scale).to(TORCH[spec.dtype]) for _ in range(1 + spec.gated)]


def ends_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).int()


def check(
    spec: LinearSpec, counts: list[int], schedule: Schedule, join: str = "", shape: TileShape = TINY
) -> None:
    stacks = weights(spec)
    biases = [torch.randn(spec.groups, spec.n).to(TORCH[spec.dtype]) for _ in stacks]
    ends = ends_of(counts)
    rows = int(ends[-1])
    x = torch.randn(rows + 3, spec.k).to(TORCH[spec.dtype])  # the last ones belong to nobody
    y = torch.full((rows + 3, spec.n), torch.nan, dtype=TORCH[spec.y_dtype])
    bias = [packed(biases)] if spec.bias else []
    kernel(spec, join, 0, shape)(x, ends, packed(stacks), *bias, y, schedule=schedule)
    exact = torch.full(y.shape, torch.nan, dtype=torch.float64)
    first = 0
    for e, end in enumerate(ends.tolist()):
        sums = [x[first:end].double() @ stack[e].double().T for stack in stacks]
        if spec.bias:
            sums = [total + part[e].double() for total, part in zip(sums, biases, strict=True)]
        exact[first:end] = EAGER[join](*sums) if join else sums[0]
        first = end
    compare(y, exact, spec.k)


def compare(y: Tensor, exact: Tensor, k: int) -> None:
    assert torch.equal(y.isnan(), exact.isnan()), "rows are missing, or were written by mistake"
    allowed = UNIT[y.dtype] * exact.abs() + k * 2.0**-24 * 8
    assert (((y.double() - exact).abs() <= allowed) | exact.isnan()).all()


@each_schedule
@pytest.mark.parametrize("shape", [TINY, FLAT], ids=["deep", "flat"])
def test_schedules(schedule: Schedule, shape: TileShape) -> None:
    check(LinearSpec(64, 192, "bfloat16", groups=5), [40, 0, 1, 33, 0], schedule, shape=shape)


def test_groups_of_tiles() -> None:
    """More tiles of rows than a group has, and fewer in the last; several tiles of columns."""
    check(LinearSpec(72, 64, "bfloat16", groups=3), [290, 5, 33], SCHEDULES[0])


def test_the_order_of_tiles() -> None:
    """Of 10 tiles of rows by 3 of columns: rows first, within 8 of them."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("order")
            T.func_attr({"global_symbol": "order", "tir.noalias": True})
            order = T.match_buffer(T.arg("order", T.handle()), (30, 2), "int32")
            with T.launch_thread("blockIdx.x", 30) as tile, T.launch_thread("threadIdx.x", 1):
                for i, index in enumerate(row_and_column(tile, T.int32(10), 3)):
                    T.buffer_store(order, index, [tile, i])
    emulated(builder.get())(result := torch.zeros(30, 2, dtype=torch.int32))
    groups = ((range(8), range(3)), (range(8, 10), range(3)))
    assert result.tolist() == [[r, c] for rows, columns in groups for c in columns for r in rows]


@pytest.mark.parametrize("k", [64, 128, 192, 256, 320])
def test_depths_around_the_number_of_stages(k: int) -> None:
    for schedule in SCHEDULES:
        check(LinearSpec(32, k, "bfloat16", groups=3), [35, 5, 33], schedule)


@pytest.mark.parametrize("bias", [False, True])
def test_gate_and_up(bias: bool) -> None:
    spec = LinearSpec(32, 64, "bfloat16", groups=3, gated=True, bias=bias)
    check(spec, [3, 0, 34], SCHEDULES[1], "silu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("out_dtype", ["", "float32"])
def test_tails_of_columns_and_depth(dtype: str, out_dtype: str) -> None:
    spec = LinearSpec(42, 72, dtype, out_dtype, groups=2, bias=True)
    check(spec, [5, 31], SCHEDULES[0])


def test_an_odd_number_of_columns() -> None:
    check(LinearSpec(33, 72, "bfloat16", groups=2, bias=True), [5, 17], SCHEDULES[0])


def test_tail_of_gated_columns() -> None:
    check(LinearSpec(40, 64, "float16", groups=2, gated=True), [2, 7], SCHEDULES[2], "silu")


@pytest.mark.parametrize("is_gated", [False, True])
def test_float32(is_gated: bool) -> None:
    """By multiply-adds, with tails of depth and of columns, and more steps than stages."""
    spec = LinearSpec(40, 140, "float32", groups=3, gated=is_gated, bias=True)
    for schedule in SCHEDULES:
        check(spec, [35, 0, 3], schedule, "silu" if is_gated else "", FLAT)


@pytest.mark.parametrize(
    "bug",
    [
        Bug("the wait is one group too late", "wait_group_2", "wait_group_3", WHERE_LATE),
        Bug("a column is read twice", r"tvm_builtin_ptx_ld_vec_shared[^;]*;", ";", last=True),
    ],
    ids=lambda bug: bug.name.replace(" ", "-"),
)
def test_planted_bugs_of_float32(bug: Bug) -> None:
    spec = LinearSpec(32, 140, "float32", groups=1)
    run = emulated(grouped_linear(spec, SM_80, shape=FLAT, blocks=1), change=bug.plant)
    [w], x = weights(spec), torch.randn(35, spec.k)

    def right(schedule: Schedule) -> bool:
        y = torch.empty(35, 32)
        run(x, ends_of([35]), w, y, schedule=schedule)
        return torch.allclose(y, x @ w[0].T, atol=1e-4)

    check_found(bug, right)


TF32 = replace(SM_80, name=f"{SM_80.name}+tf32", tf32=True)


def tf32_is_right(run: Emulated, schedule: Schedule) -> bool:
    """Against the product of factors rounded to 11 bits: the sums are exact to float32."""
    [w], x = weights(LinearSpec(40, 140, "float32", groups=2)), torch.randn(35, 140)
    y = torch.empty(35, 40)
    run(x, ends_of([32, 3]), w, y, schedule=schedule)
    exact, rounded = (
        torch.cat([rows[:32] @ stack[0].T, rows[32:] @ stack[1].T])
        for rows, stack in ((x, w), (to_tf32(x), to_tf32(w)))
    )
    return torch.allclose(y, rounded, atol=1e-5) and not torch.allclose(y, exact, atol=1e-5)


def to_tf32(tensor: Tensor) -> Tensor:
    """To nearest, ties away from zero: PTX ISA, cvt.rna.tf32.f32."""
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def tf32_product(change: Callable[[str], str] = str) -> Emulated:
    spec = LinearSpec(40, 140, "float32", groups=2)
    return emulated(grouped_linear(spec, TF32, shape=FLAT, blocks=3), change=change)


def test_tf32() -> None:
    assert all(tf32_is_right(tf32_product(), schedule) for schedule in SCHEDULES)


@pytest.mark.parametrize(
    "bug",
    [
        Bug("the wait is one group too late", "wait_group_2", "wait_group_3", WHERE_LATE),
        Bug("a factor is not rounded", r"tvm_builtin_ptx_cvt_tf32[^;]*;", ";", last=True),
        Bug(
            "fragments of a column are swapped",
            r"(_ptr_7\[2\]), (_ptr_7\[3\]), (_ptr_5\[4\])",
            r"\2, \1, \3",
        ),
    ],
    ids=lambda bug: bug.name.replace(" ", "-"),
)
def test_planted_bugs_of_tf32(bug: Bug) -> None:
    run = tf32_product(bug.plant)
    check_found(bug, lambda schedule: tf32_is_right(run, schedule))


@cache
def gathered(dtype: str) -> tuple[LinearSpec, Emulated]:
    """A product by tiles of gathered rows; its depth and its columns have tails."""
    target = TF32 if dtype == "tf32" else SM_80
    spec = LinearSpec(40, 72, "float32" if dtype == "tf32" else dtype, groups=3)
    return spec, emulated(grouped_linear(spec, target, top_k=1, shape=FLAT, blocks=3))


@settings(max_examples=15)
@given(case=routed(3, 70))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "tf32"])
def test_any_routing(dtype: str, case: Routed) -> None:
    spec, run = gathered(dtype)
    rounded = to_tf32 if dtype == "tf32" else torch.clone
    assert right(run, spec, case.experts, case.schedule, case.nan, rounded)


@settings(max_examples=25)
@given(
    counts=st.lists(st.integers(0, 70), min_size=4, max_size=4),
    schedule=st.sampled_from(SCHEDULES),
)
def test_any_counts(counts: list[int], schedule: Schedule) -> None:
    check(LinearSpec(32, 64, "bfloat16", groups=4), counts, schedule)


@settings(max_examples=15)
@given(tokens=st.integers(0, 9), top_k=st.sampled_from([1, 3]), data=st.data())
def test_rows_are_gathered_by_the_sort(tokens: int, top_k: int, data: st.DataObject) -> None:
    spec = LinearSpec(32, 64, "bfloat16", groups=3)
    choices = data.draw(
        st.lists(st.integers(0, 2), min_size=tokens * top_k, max_size=tokens * top_k)
    )
    experts = torch.tensor(choices, dtype=torch.int64)
    order = experts.sort(stable=True).indices.int()
    ends = ends_of([choices.count(e) for e in range(3)])
    [w] = weights(spec)
    x = torch.randn(tokens, spec.k).bfloat16()
    y = torch.full((tokens * top_k, spec.n), torch.nan, dtype=torch.bfloat16)
    kernel(spec, top_k=top_k)(x, order, ends, w, y)
    chosen = order.long()
    exact = torch.einsum("rk,rnk->rn", x.double()[chosen // top_k], w.double()[experts[chosen]])
    compare(y, exact, spec.k)


def test_nan_stays_in_its_row() -> None:
    spec = LinearSpec(32, 64, "bfloat16", groups=2)
    x = torch.randn(6, 64).bfloat16()
    x[2, 5] = torch.nan
    y = torch.zeros(6, 32, dtype=torch.bfloat16)
    kernel(spec)(x, ends_of([4, 2]), *weights(spec), y)
    assert torch.equal(y.isnan().all(1), torch.arange(6) == 2)
    assert torch.equal(y.isnan().any(1), torch.arange(6) == 2)


def test_one_product_with_an_activation() -> None:
    spec = LinearSpec(32, 64, "bfloat16", groups=1)
    run = emulated(grouped_linear(spec, SM_80, epilogue=silu, shape=TINY, blocks=1))
    [w] = weights(spec)
    x, y = torch.randn(4, 64).bfloat16(), torch.empty(4, 32, dtype=torch.bfloat16)
    run(x, ends_of([4]), w, y)
    compare(y, torch.nn.functional.silu(x.double() @ w[0].double().T), 64)


def test_layout_holds_eight_of_gate_then_eight_of_up() -> None:
    gate, up = np.arange(16).reshape(1, 16), 100 + np.arange(16).reshape(1, 16)
    rows = interleave(gate, up)[0].tolist()
    assert rows == [*range(8), *range(100, 108), *range(8, 16), *range(108, 116)]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (LinearSpec(32, 64, "float64"), "products of float64 have no CUDA kernel"),
        (LinearSpec(32, 60, "bfloat16"), "its rows of 60 elements are not a multiple of 16 bytes"),
        (LinearSpec(34, 64, "bfloat16", gated=True), "its 34 columns of gate and up cannot be"),
        (LinearSpec(32, 64, "bfloat16", "float16"), "its result is float16, not bfloat16"),
        (LinearSpec(32, 64, "bfloat16", gated=True), "gate and up need an epilogue"),
    ],
)
def test_refusals(spec: LinearSpec, words: str) -> None:
    with pytest.raises(NoMatch, match=words):
        grouped_linear(spec, SM_80)


def test_a_tile_larger_than_shared_memory_is_refused() -> None:
    large = TileShape(128, 256, 64, 2, 4, 3)
    grouped_linear(LinearSpec(256, 64, "bfloat16"), TARGETS["cuda:sm_90a"], shape=large)
    with pytest.raises(
        NoMatch, match="147456 bytes of shared memory, and a block of cuda:sm_89 has"
    ):
        grouped_linear(LinearSpec(256, 64, "bfloat16"), TARGETS["cuda:sm_89"], shape=large)


def test_gate_and_up_that_cannot_be_interleaved() -> None:
    with pytest.raises(NoMatch, match="gate and up of 12 columns cannot be interleaved by 8"):
        interleave(np.zeros((1, 12, 4)), np.zeros((1, 12, 4)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((32, 32, 48, 1, 2, 3), "48 deep: only 32 and 64"),
        ((24, 32, 64, 1, 2, 3), "whole 16x16 tiles"),
        ((16, 32, 32, 1, 2, 3), None),
        ((16, 64, 32, 1, 4, 3), "as many 16-byte pieces"),
        ((32, 32, 64, 1, 2, 1), "one stage is loaded while another is multiplied"),
    ],
)
def test_tile_shapes(values: tuple[int, int, int, int, int, int], words: str | None) -> None:
    if words is None:
        assert TileShape(*values).threads == 64
        return
    with pytest.raises(ValueError, match=words):
        TileShape(*values)


def test_the_large_tile() -> None:
    check(LinearSpec(128, 160, "bfloat16", groups=2), [130, 7], SCHEDULES[1], shape=LARGE)
