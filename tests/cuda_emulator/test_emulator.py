"""The emulator finds bugs that would fail on a GPU, inserted into the CUDA C of real kernels."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from moec.codegen.cuda.gemm.grouped import grouped_linear
from moec.codegen.cuda.gemm.tiles import TileShape
from moec.codegen.cuda.routing.dispatch import combine, dispatch
from moec.codegen.specs.products import LinearSpec
from moec.codegen.specs.routing import CombineSpec, DispatchSpec
from tests.cuda_emulator.bugs import EARLY, WHERE_LATE, WHERE_SKEWED, Bug, check_found
from tests.cuda_emulator.emulate import (
    SCHEDULES,
    SM_80,
    Emulated,
    EmulationError,
    Schedule,
    emulated,
)

SHAPE = TileShape(32, 32, 64, warp_rows=1, warp_columns=2, stages=3)
SPEC = LinearSpec(64, 256, "bfloat16", groups=3)
WAIT = "tvm_builtin_ptx_cp_async_wait_group_async_wait_group_{}();"


ONE, TWO, NONE = (re.escape(WAIT.format(n)) for n in (1, 2, 0))
COMMIT = r"tvm_builtin_ptx_cp_async_commit_group_async_commit_group\(\);"
PRODUCT_BUGS = (
    Bug("the wait is one group too late", ONE, WAIT.format(2), WHERE_LATE),
    Bug("nobody waits for a stage", ONE, "", WHERE_LATE),
    Bug("a group is not committed", COMMIT, "", WHERE_LATE, last=True),
    Bug("no barrier after the wait", rf"({ONE})\s*__syncthreads\(\);", r"\1"),
    Bug("no barrier between tiles", rf"({NONE})\s*__syncthreads\(\);", r"\1", WHERE_SKEWED),
    Bug("the stage being read is loaded", r"\((v_\d+) \+ 2\) % 3", r"(\1 % 3)"),
    Bug("the swizzle is on one side only", r"\^ \(\(\(int\)threadIdx\.x\) & 7\)", "^ 0"),
    Bug(
        "rows behind the end are stored",
        r"if \([^\n]*& 31\) >> 2\) \+ v_\d+\)[^\n]*< v_\d+\) \{",
        "if (true) {",
    ),
    Bug(
        "rows behind the end are read",
        r"(_ptr_\d+\[\d\] = min\(.*), \(v_\d+ - 1\)\);",
        r"\1, 1 << 20);",
        words="an access outside of all tensors and shared memory",
    ),
    Bug(
        "a thread leaves early",
        r"for \(int v_7 =",
        "if (((int)threadIdx.x) == 3) return;\n  for (int v_7 =",
        words="barrier",
    ),
    Bug(
        "a warp parts before a matrix instruction",
        r"(for \(int v_\d+ = 0; v_\d+ < 4; \+\+v_\d+\) \{)",
        r"\1\n if (((int)threadIdx.x) & 1) __syncwarp();",
    ),
)
SORT_BUGS = (
    Bug("the next stretch clears rows that are read", r"__syncthreads\(\);", "", last=True),
    Bug(
        "counts are summed before all have counted",
        r"(atomicAdd[^}]*\}\s*\}\s*)__syncthreads\(\);",
        r"\1",
    ),
)


def product(bug: Bug | None = None) -> Emulated:
    kernel = grouped_linear(SPEC, SM_80, shape=SHAPE, blocks=2)
    return emulated(kernel, change=bug.plant if bug else str)


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, ends, w, exact product: rows without an expert at the end, and an expert without rows."""
    generator = torch.Generator().manual_seed(1)
    ends = torch.tensor([40, 40, 77], dtype=torch.int32)
    x = torch.randn(80, SPEC.k, generator=generator).bfloat16()
    w = torch.randn(3, SPEC.n, SPEC.k, generator=generator).bfloat16()
    exact = torch.full((80, SPEC.n), torch.nan)
    exact[:40], exact[40:77] = x[:40].float() @ w[0].float().T, x[40:77].float() @ w[2].float().T
    return x, ends, w, exact


def right(run: Emulated, schedule: Schedule) -> bool:
    x, ends, w, exact = problem()
    y = torch.full(exact.shape, torch.nan, dtype=torch.bfloat16)
    run(x, ends, w, y, schedule=schedule)
    return torch.allclose(y.float(), exact, rtol=2.0**-7, atol=1e-2, equal_nan=True)


def test_the_kernels_themselves_are_right() -> None:
    assert all(right(product(), schedule) for schedule in SCHEDULES)
    assert all(sorts(sorter(), schedule) for schedule in SCHEDULES)


@pytest.mark.parametrize("bug", PRODUCT_BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_bugs_of_a_product(bug: Bug) -> None:
    run = product(bug)
    check_found(bug, lambda schedule: right(run, schedule))


@pytest.mark.parametrize("bug", SORT_BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_bugs_of_a_sort(bug: Bug) -> None:
    run = sorter(bug)
    check_found(bug, lambda schedule: sorts(run, schedule))


def sorter(bug: Bug | None = None) -> Emulated:
    return emulated(dispatch(DispatchSpec(4, 2), SM_80), change=bug.plant if bug else str)


def sorts(run: Emulated, schedule: Schedule) -> bool:
    generator = torch.Generator().manual_seed(2)
    experts = torch.randint(0, 4, (700, 2), generator=generator)
    order, ends = torch.empty(1400, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    run(experts, order, torch.empty(700, 2, dtype=torch.int32), ends, schedule=schedule)
    return torch.equal(order.long(), experts.flatten().sort(stable=True).indices)


def test_an_unknown_instruction_does_not_compile() -> None:
    def change(source: str) -> str:
        return source.replace("ldmatrix_sync_aligned_m8n8_x4", "ldmatrix_sync_aligned_m8n8_x2")

    words = "tvm_builtin_ptx_ldmatrix_sync_aligned_m8n8_x2_shared_b16.* not declared"
    with pytest.raises(EmulationError, match=words):
        emulated(grouped_linear(SPEC, SM_80, shape=SHAPE, blocks=2), change=change)


def test_after_a_failure_the_next_launch_is_right() -> None:
    bug = next(bug for bug in PRODUCT_BUGS if bug.name == "rows behind the end are read")
    run = product(bug)
    with pytest.raises(EmulationError, match=bug.words):
        right(run, EARLY)
    assert right(product(), EARLY)


def test_16_bit_floats_round_as_torch_does() -> None:
    """Every float16, and the midpoints between neighbours, through two kernels' conversions."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    halves = bits.view(torch.float16).float()
    between = torch.cat([halves, halves.nextafter(torch.tensor(torch.inf)), halves * 1.00048828125])
    for dtype, name in ((torch.float16, "float16"), (torch.bfloat16, "bfloat16")):
        run = copier(name)
        out = torch.empty(len(between) // 512, 512, dtype=dtype)
        slots = torch.arange(len(out), dtype=torch.int32).reshape(-1, 1)
        ends = torch.tensor([len(out)], dtype=torch.int32)
        run(between.reshape(-1, 512), slots, ends, out)
        assert torch.equal(out.flatten().nan_to_num(7), between.to(dtype).nan_to_num(7))


def copier(dtype: str) -> Emulated:
    """float32 rows -> rows of dtype: a combine of one choice without weights."""
    return emulated(combine(CombineSpec(1, 1, 512, dtype, "float32"), SM_80))
