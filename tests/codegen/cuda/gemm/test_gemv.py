"""Products for few rows on the emulator against torch: routings, dtypes, schedules, bugs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from moec.codegen.cuda.activation import gated, silu
from moec.codegen.cuda.gemm.grouped import grouped_linear
from moec.codegen.cuda.gemm.product import interleave
from moec.codegen.specs.products import LinearSpec
from moec.errors import NoMatch
from tests.codegen.cuda.launches import gemv
from tests.cuda_emulator.bugs import Bug, check_found
from tests.cuda_emulator.emulate import SCHEDULES, SM_80, Emulated, Schedule, emulated
from tests.cuda_emulator.products import TORCH, UNIT
from tests.cuda_emulator.routings import Routed, routed

GATED = LinearSpec(16, 328, "bfloat16", groups=3, gated=True, bias=True)  # a tail of 72 in k
PLAIN = {
    "float16": LinearSpec(10, 264, "float16", "float32", groups=3),
    "float32": LinearSpec(10, 132, "float32", groups=3),
}


@cache
def kernel(spec: LinearSpec, top_k: int = 0, bug: Bug | None = None) -> Emulated:
    join = gated(silu) if spec.gated else None
    code = gemv(spec, SM_80, epilogue=join, top_k=top_k, blocks=2)
    return emulated(code, change=bug.plant if bug else str)


def problem(
    spec: LinearSpec,
    experts: Tensor,
    nan: int | None = None,
    rounded: Callable[[Tensor], Tensor] = torch.clone,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """What the kernel takes but y, what y is to be, and the error that rounding allows.

    Rows are gathered by the sort of `experts` [R], -1 being nobody; the row `nan` holds NaN. The
    factors are `rounded`.
    """
    generator = torch.Generator().manual_seed(len(experts))
    dtype = TORCH[spec.dtype]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    stacks = [random(spec.groups, spec.n, spec.k) * spec.k**-0.5 for _ in range(1 + spec.gated)]
    stacks = [rounded(stack.to(dtype)) for stack in stacks]
    biases = [random(spec.groups, spec.n) for _ in stacks]
    x = rounded(random(len(experts), spec.k))
    if nan is not None:
        x[nan, 3] = torch.nan
    owners = torch.where(experts < 0, spec.groups, experts)
    order = owners.sort(stable=True).indices
    counts = torch.bincount(owners, minlength=spec.groups + 1)[: spec.groups]
    ends = counts.cumsum(0).int()
    exact = torch.full((len(experts), spec.n), torch.nan, dtype=torch.float64)
    for row in range(int(ends[-1]) if len(experts) else 0):
        e = int(owners[order[row]])
        sums = [stack[e].double() @ x[order[row]].double() for stack in stacks]
        if spec.bias:
            sums = [s + bias[e].double() for s, bias in zip(sums, biases, strict=True)]
        gate = sums[0]
        exact[row] = torch.nn.functional.silu(gate) * sums[1] if spec.gated else gate
    inputs = [x, order.int(), ends, packed(stacks)]
    allowed = UNIT[TORCH[spec.y_dtype]] * exact.abs() + spec.k * 2.0**-24 * 8
    return inputs + ([packed(biases)] if spec.bias else []), exact, allowed


def packed(stacks: list[Tensor]) -> Tensor:
    """As a kernel takes them."""
    if len(stacks) == 1:
        return stacks[0]
    integers = torch.int32 if stacks[0].dtype == torch.float32 else torch.int16
    words = [stack.view(integers).numpy() for stack in stacks]
    return torch.from_numpy(interleave(*words)).view(stacks[0].dtype)


def right(
    run: Callable[..., None],
    spec: LinearSpec,
    experts: list[int],
    schedule: Schedule,
    nan: int | None = None,
    rounded: Callable[[Tensor], Tensor] = torch.clone,
) -> bool:
    owners = torch.tensor(experts, dtype=torch.int64)
    inputs, exact, allowed = problem(spec, owners, nan, rounded)
    y = torch.full(exact.shape, torch.nan, dtype=TORCH[spec.y_dtype])
    run(*inputs, y, schedule=schedule)
    near = ((y.double() - exact).abs() <= allowed) | exact.isnan()
    return torch.equal(y.isnan(), exact.isnan()) and bool(near.all())


@pytest.mark.parametrize("spec", [GATED, *PLAIN.values()], ids=["gated", *PLAIN])
def test_schedules(spec: LinearSpec) -> None:
    """An expert without rows, one with two tiles, rows without an expert."""
    experts = [2, 0, 2, 2, -1, 2, 2, 0]
    assert all(right(kernel(spec, 1), spec, experts, schedule) for schedule in SCHEDULES)


@settings(max_examples=15)
@given(case=routed(3, 9))
@pytest.mark.parametrize("spec", [GATED, *PLAIN.values()], ids=["gated", *PLAIN])
def test_any_routing(spec: LinearSpec, case: Routed) -> None:
    assert right(kernel(spec, 1), spec, case.experts, case.schedule, case.nan)


def test_nan_stays_in_its_row() -> None:
    spec = PLAIN["float32"]
    [x, order, ends, w], exact, _ = problem(spec, torch.tensor([0, 0, 1]))
    x[1, 131] = torch.nan
    y = torch.zeros(3, spec.n)
    kernel(spec, 1)(x, order, ends, w, y)
    assert y.isnan().any(1).tolist() == [False, True, False]
    torch.testing.assert_close(y[::2].double(), exact[::2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [6, 7])
def test_a_dense_product_of_float32(n: int) -> None:
    spec = LinearSpec(n, 36, "float32", bias=True)
    run = emulated(gemv(spec, SM_80, dense=True))
    x, w, bias, y = torch.randn(7, 36), torch.randn(n, 36), torch.randn(n), torch.empty(7, n)
    run(x, w, bias, y)
    torch.testing.assert_close(y, x @ w.T + bias, rtol=1e-5, atol=1e-5)


def test_the_number_of_rows_decides() -> None:
    """At the launch: up to a row an expert by this product, then by tiles of tensor cores."""
    spec = LinearSpec(16, 64, "bfloat16", groups=5)
    run = emulated(grouped_linear(spec, SM_80))
    for experts in ([4, 0, 4, 1, 1], [4, 0, 4, 1, 1, 0], [3] * 161):
        (x, order, *rest), exact, allowed = problem(spec, torch.tensor(experts))
        y = torch.empty(exact.shape, dtype=torch.bfloat16)
        run(x[order.long()], *rest, y)
        assert ((y.double() - exact).abs() <= allowed).all()


BUGS = (
    Bug("half of the lanes are left out of the sum", r"__shfl_xor_sync\(([^\n]*), 16\)", "0.0f"),
    Bug(
        "rows behind the end are stored",
        r"if \(\(v_\d+ \+ v_\d+\) < v_\d+\) \{",
        "if (true) {",
        words="",
    ),
    Bug(
        "rows behind the end are read",
        r"min\(\((v_\d+) \+ 3\), \(v_\d+ - 1\)\)",
        r"(\1 + 512)",  # in the page without access behind the order
        words="an access outside of all tensors and shared memory",
    ),
    Bug("the tail of k is read", r"if \(\(\(v_\d+ \* 32\)[^\n]*\{", "if (true) {"),
    Bug("gate and up lie side by side", r"\+ \(int64_t\)2624\)", "+ (int64_t)656)"),
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_planted_bugs(bug: Bug) -> None:
    run, experts = kernel(GATED, 1, bug), [2, 0, 2, 2, -1, 2, 2, 0]
    check_found(bug, lambda schedule: right(run, GATED, experts, schedule))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (LinearSpec(32, 64, "int8"), "products of int8 have no CUDA kernel"),
        (LinearSpec(32, 60, "bfloat16"), "its rows of 60 elements are not a multiple of 16 bytes"),
        (LinearSpec(32, 62, "float32"), "its rows of 62 elements are not a multiple of 16 bytes"),
        (LinearSpec(34, 64, "float32", gated=True), "its 34 columns of gate and up cannot be"),
        (LinearSpec(32, 64, "float32", "bfloat16"), "its result is bfloat16, not float32"),
        (LinearSpec(32, 64, "float32", gated=True), "gate and up need an epilogue"),
    ],
)
def test_refusals(spec: LinearSpec, words: str) -> None:
    with pytest.raises(NoMatch, match=words):
        gemv(spec, SM_80)
