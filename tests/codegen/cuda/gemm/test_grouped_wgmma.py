"""Products by wgmma on the emulator, of sorted and gathered rows: schedules, routings, tails, gate
and up, bugs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from moec.codegen.specs.products import LinearSpec
from moec.errors import NoMatch
from moec.target.cuda import TARGETS
from tests.codegen.cuda.gemm.test_gemv import packed
from tests.codegen.cuda.gemm.test_grouped import EAGER, JOIN, compare, ends_of, weights
from tests.codegen.cuda.launches import grouped_linear_wgmma
from tests.cuda_emulator.bugs import WHERE_LATE, Bug, check_found
from tests.cuda_emulator.emulate import (
    SCHEDULES,
    SM_80,
    Emulated,
    Schedule,
    each_schedule,
    emulated,
)
from tests.cuda_emulator.products import TORCH
from tests.cuda_emulator.routings import Routed, routed

H100 = TARGETS["cuda:sm_90a"]
PLAIN = LinearSpec(160, 320, "bfloat16", groups=3)
TOP_K = 2  # of gathered rows


@cache
def kernel(
    spec: LinearSpec, join: str = "", bug: Bug | None = None, gathers: bool = False
) -> Emulated:
    epilogue, top_k = JOIN[join] if join else None, TOP_K * gathers
    function = grouped_linear_wgmma(spec, H100, epilogue=epilogue, top_k=top_k, blocks=2)
    return emulated(function, H100, change=bug.plant if bug else str)


def problem(spec: LinearSpec, counts: list[int]) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """x, ends, stacks and biases, y full of NaN; the last rows have no expert."""
    ends = ends_of(counts)
    rows = int(ends[-1]) + 3
    stacks = weights(spec)
    if spec.bias:
        stacks += [torch.randn(spec.groups, spec.n).to(TORCH[spec.dtype]) for _ in stacks]
    y = torch.full((rows, spec.n), torch.nan, dtype=TORCH[spec.y_dtype])
    return torch.randn(rows, spec.k).to(TORCH[spec.dtype]), ends, stacks, y


def run(
    spec: LinearSpec,
    counts: list[int],
    schedule: Schedule,
    join: str = "",
    bug: Bug | None = None,
    nan: int | None = None,
    gathers: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, its expected value in float64). The row `nan` of x holds NaN. If it `gathers`, the kernel
    gets other rows, and which of them each row is."""
    x, ends, stacks, y = problem(spec, counts)
    if nan is not None:
        x[nan, 3] = torch.nan
    parts = 1 + spec.gated
    arguments = [packed(stacks[:parts]), *([packed(stacks[parts:])] if spec.bias else [])]
    rows = [x]
    if gathers:
        order = torch.randperm(TOP_K * len(x), dtype=torch.int32)[: len(x)]
        rows, x = [x, order], x[order.long() // TOP_K]
    kernel(spec, join, bug, gathers)(*rows, ends, *arguments, y, schedule=schedule)
    exact = torch.full(y.shape, torch.nan, dtype=torch.float64)
    first = 0
    for e, end in enumerate(ends.tolist()):
        sums = [x[first:end].double() @ w[e].double().T for w in stacks[:parts]]
        if spec.bias:
            sums = [s + b[e].double() for s, b in zip(sums, stacks[parts:], strict=True)]
        exact[first:end] = EAGER[join](*sums) if join else sums[0]
        first = end
    return y, exact


@each_schedule
@pytest.mark.parametrize("gathers", [False, True])
def test_schedules_and_tails(schedule: Schedule, gathers: bool) -> None:
    compare(*run(PLAIN, [130, 0, 7], schedule, gathers=gathers), PLAIN.k)


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 0, 1], [129, 1, 128]])
@pytest.mark.parametrize("gathers", [False, True])
def test_counts(counts: list[int], gathers: bool) -> None:
    compare(*run(PLAIN, counts, SCHEDULES[1], gathers=gathers), PLAIN.k)


@pytest.mark.parametrize("k", [8, 64, 72, 128])
def test_few_steps_of_gathered_rows(k: int) -> None:
    """Fewer steps than stages, and than copies that are in flight; tails of k."""
    spec = replace(PLAIN, n=16, k=k, groups=1)
    for counts, schedule in zip(([3], [140], [260]), SCHEDULES, strict=False):
        compare(*run(spec, counts, schedule, gathers=True), k)


def test_beyond_the_end_of_k_there_are_zeros() -> None:
    """An infinity beside it would make NaN of them."""
    spec = replace(PLAIN, k=72, groups=1)
    x, w = torch.ones(3, 72).bfloat16(), torch.ones(1, spec.n, 72).bfloat16()
    x[:, -1] = torch.inf
    y = torch.zeros(3, spec.n).bfloat16()
    order = 2 * torch.arange(3, dtype=torch.int32)
    kernel(spec, gathers=True)(x, order, ends_of([3]), w, y)
    assert torch.isposinf(y).all()


def test_gate_and_up_with_biases() -> None:
    spec = LinearSpec(72, 72, "float16", groups=2, gated=True, bias=True)
    for gathers in (False, True):
        compare(*run(spec, [3, 9], SCHEDULES[0], "silu", gathers=gathers), spec.k)


@settings(max_examples=8)
@given(case=routed(3, 140))
@pytest.mark.parametrize(("dtype", "gathers"), [("bfloat16", False), ("float16", True)])
def test_any_routing(dtype: str, gathers: bool, case: Routed) -> None:
    spec = LinearSpec(40, 72, dtype, groups=3)
    counts = [case.experts.count(e) for e in range(3)]
    nan = case.nan if case.nan is None or case.nan < sum(counts) else None
    compare(*run(spec, counts, case.schedule, nan=nan, gathers=gathers), spec.k)


BUGS = (
    Bug(
        "the last products are not waited for",
        r"tvm_builtin_ptx_wgmma_wait_group_wait_group_sync_aligned_0\(\);",
        "",
        WHERE_LATE,
    ),
    Bug(
        "the stride of a descriptor is wrong",
        r"(ptx_wgmma_encode_matrix_descriptor\([^;]*), 64, 3\)",
        r"\1, 32, 3)",
    ),
    Bug("the parity of every wait is wrong", r"(mbarrier_wait\([^;]*), \(", r"\1, 1 - ("),
    Bug(
        "the parity of the first wait is wrong",
        r"(mbarrier_wait[^;]*), \(1 - \(",
        r"\1, (0 + (",
        words="threads wait for each other for ever",
    ),
    Bug("a box is not counted", r"(expect_tx_shared_b64\([^;]*)\(uint\)49152", r"\1(uint)16384"),
    Bug(
        "a stage is freed by one group alone", r"(init_shared_b64\([^;]*)\(uint\)2\)", r"\1(uint)1)"
    ),
)


GATHERED = (
    Bug(
        "copies are waited for a step too late",
        "async_wait_group_2",
        "async_wait_group_3",
        WHERE_LATE,
    ),
    Bug(
        "the last copies are not waited for",
        r"tvm_builtin_ptx_cp_async_wait_group_async_wait_group_0\(\);",
        "",
        WHERE_LATE,
    ),
    Bug(
        "copies are not published",
        r"tvm_builtin_ptx_fence_proxy_proxy_async_shared__cta\(\);",
        "",
        words="copies are handed to wgmma without fence.proxy.async",
    ),
    Bug(
        "rows are not swizzled",
        r"& 7\) \^ \(\(\(\(int\)threadIdx\.x\) & 63\) >> 3\)",
        "& 7)",
    ),
    Bug(
        "an arrival is for another stage", r"(arrive_shared_b64[^;]*) \+ 2\) & 3\)", r"\1 + 1) & 3)"
    ),
)


@pytest.mark.parametrize("bug", [*BUGS, *GATHERED], ids=lambda bug: bug.name.replace(" ", "-"))
def test_planted_bugs(bug: Bug) -> None:
    def is_right(schedule: Schedule) -> bool:
        y, exact = run(PLAIN, [130, 0, 7], schedule, bug=bug, gathers=bug in GATHERED)
        return torch.allclose(y.double(), exact, rtol=2.0**-7, atol=1e-2, equal_nan=True)

    check_found(bug, is_right)


def test_other_gpus_refuse() -> None:
    with pytest.raises(NoMatch, match="cuda:sm_80 has no wgmma: only sm_90a has it"):
        grouped_linear_wgmma(PLAIN, SM_80)


def test_float32_is_refused() -> None:
    with pytest.raises(NoMatch, match="wgmma would round float32"):
        grouped_linear_wgmma(replace(PLAIN, dtype="float32"), TARGETS["cuda:sm_90a"])
