"""Products with compressed weights on the emulator against their decompressed weights.

Reference and kernel use float32; their sums of k products have different orders.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from moec.codegen.cuda.activation import gated, silu
from moec.codegen.cuda.quantised.compressed import check_compressed, compressed_linear
from moec.codegen.specs.products import CompressedSpec
from moec.errors import NoMatch
from moec.formats.compressed import compress, decompress, grid_module
from moec.formats.ternary import bytes_of_counts
from moec.formats.ternary_code import dictionary, masks
from tests.codegen.cuda.quantised.test_codes import codes_of, joined
from tests.cuda_emulator.bugs import Bug, check_found
from tests.cuda_emulator.emulate import (
    SCHEDULES,
    SM_80,
    Emulated,
    Schedule,
    emulated,
    needs_compiler,
)
from tests.cuda_emulator.products import TORCH
from tests.cuda_emulator.routings import Routed, routed

pytestmark = needs_compiler

# Rows of more than 32 codewords, of more than 255 (whose counts have two bytes), and of odd length.
CASES = {
    "ternary": CompressedSpec(10, 931, "float32", groups=3),
    "ternary-gated": CompressedSpec(8, 300, "bfloat16", groups=3, gated=True, bias=True),
    "ternary-dense": CompressedSpec(2, 2000, "float32", groups=3),
    "2bit": CompressedSpec(10, 131, "float32", groups=3, kind="2bit"),
    "2bit-gated": CompressedSpec(8, 64, "bfloat16", groups=3, gated=True, bias=True, kind="2bit"),
}
EXPERTS = [2, 0, 2, 2, -1, 2]


class Stacks(NamedTuple):
    """The kernel's spec, its stored parts, its interleaved grid, its biases, and the weights."""

    spec: CompressedSpec
    parts: list[Tensor]
    grid: Tensor
    biases: list[Tensor]
    weights: list[Tensor]


@cache
def stacks(name: str) -> Stacks:
    spec, generator = CASES[name], torch.Generator().manual_seed(1)
    module, parts, grids, weights, counts = grid_module(spec.kind), [], [], [], []
    for _ in range(1 + spec.gated):
        weight = torch.randn(spec.groups, spec.n, spec.k, generator=generator)
        weight = weight.sin() if name == "ternary-dense" else weight  # few zeros: short codewords
        grid = module.grid_of(weight)
        *stored, grid = compress(spec.kind, module.codes_of(weight, grid), grid)
        parts += stored
        grids.append(grid)
        weights.append(decompress(spec.kind, [*stored, grid], spec.k))
        counts.append(bytes_of_counts(stored[1].shape) if spec.kind == "ternary" else 1)
    biases = [torch.randn(spec.groups, spec.n, generator=generator) for _ in weights]
    biases = [bias.to(TORCH[spec.dtype]) for bias in biases]
    table = [torch.from_numpy(masks(dictionary().entries).view("int64"))]
    parts = (table if spec.kind == "ternary" else []) + parts
    spec = replace(spec, bytes_of_counts=tuple(counts))
    return Stacks(spec, parts, joined(grids), biases, weights)


@cache
def kernel(name: str, bug: Bug | None = None) -> Emulated:
    spec = stacks(name).spec
    join = gated(silu) if spec.gated else None
    function = compressed_linear(spec, SM_80, epilogue=join, top_k=1, blocks=2)
    return emulated(function, change=bug.plant if bug else str)


def right(
    run: Emulated, name: str, experts: list[int], schedule: Schedule, nan: int | None = None
) -> bool:
    """Whether the products of rows with these experts are right; the row `nan` holds NaN."""
    spec, parts, grid, biases, weights = stacks(name)
    owners = torch.tensor([3 if e < 0 else e for e in experts], dtype=torch.int64)
    order = owners.sort(stable=True).indices
    ends = torch.bincount(owners, minlength=4)[:3].cumsum(0).int()
    generator = torch.Generator().manual_seed(len(experts))
    row_scales, codes = codes_of(torch.randn(len(experts), spec.k, generator=generator), 1, 16)
    if nan is not None:
        row_scales[nan] = torch.nan
    x = codes.float().unflatten(1, (2, spec.k)).sum(1) * row_scales
    expected = torch.full((len(experts), spec.n), torch.nan)
    start = 0
    for e, end in enumerate(ends.tolist()):
        sums = [x[order[start:end]] @ w[e].T for w in weights]
        if spec.bias:
            sums = [s + bias[e].float() for s, bias in zip(sums, biases, strict=True)]
        expected[start:end] = torch.nn.functional.silu(sums[0]) * sums[1] if spec.gated else sums[0]
        start = end
    y = torch.full(expected.shape, torch.nan, dtype=TORCH[spec.dtype])
    bias = [joined(biases)] if spec.bias else []
    run(*parts, row_scales, codes, order.int(), ends, grid, *bias, y, schedule=schedule)
    unit = 2.0**-8 if spec.dtype == "bfloat16" else 2.0**-20
    near = (y.float() - expected).abs() <= unit * expected.abs() + 1e-4 * spec.k**0.5
    return torch.equal(y.isnan(), expected.isnan()) and bool((near | expected.isnan()).all())


def test_counts_of_one_byte_and_of_two() -> None:
    assert stacks("ternary").spec.bytes_of_counts == (1,)
    assert stacks("ternary-dense").spec.bytes_of_counts == (2,)


@pytest.mark.parametrize("name", CASES)
def test_schedules(name: str) -> None:
    """An expert without rows, one with two tiles, rows without an expert."""
    assert all(right(kernel(name), name, EXPERTS, schedule) for schedule in SCHEDULES)


@settings(max_examples=8)
@given(case=routed(3, 6))
@pytest.mark.parametrize("name", ["ternary-gated", "2bit"])
def test_any_routing(name: str, case: Routed) -> None:
    assert right(kernel(name), name, case.experts, case.schedule, case.nan)


BUGS = (
    Bug("lanes are left out of the sum", r"__shfl_xor_sync\(([^\n]*), 1\)", "0"),
    Bug("the greatest weights are taken for the least", r"!= \(uint\)0\) \?", "!= (uint)77) ?"),
    Bug("codewords are one weight shorter", r"\* 2\)\);", "* 1));"),
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_planted_bugs(bug: Bug) -> None:
    run = kernel("ternary", bug)
    check_found(bug, lambda schedule: right(run, "ternary", EXPERTS, schedule))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (CompressedSpec(7, 64, "float32"), "its 7 columns cannot be stored as pairs"),
        (CompressedSpec(12, 64, "float32", gated=True), "its 12 columns cannot be stored as pairs"),
        (CompressedSpec(8, 64, "float32", gated=True), "gate and up need an epilogue"),
        (CompressedSpec(8, 64, "float64"), "its result is float64"),
    ],
)
def test_refusals(spec: CompressedSpec, words: str) -> None:
    with pytest.raises(NoMatch, match=words):
        check_compressed(spec, None)
