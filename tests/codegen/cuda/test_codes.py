"""Products with weights of few bits on the emulator against their meaning in torch.

The meaning is in float32 as the kernel is: sums of k products in another order.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from moec.codegen.cuda.activation import gated, silu
from moec.codegen.cuda.codes import pack, product_of_codes, round_rows
from moec.codegen.cuda.layout import interleave
from moec.codegen.specs.products import QuantisedSpec
from moec.errors import NoMatch
from moec.formats.integer import dequantise, parse, quantise
from moec.formats.integer import round_rows as rounded
from tests.cuda_emulator.bugs import Bug, check_found
from tests.cuda_emulator.emulate import (
    SCHEDULES,
    SM_80,
    Emulated,
    Schedule,
    emulated,
    needs_compiler,
)

pytestmark = needs_compiler

FORMATS = {
    "int8": (64, False),
    "int4:32": (64, True),
    "int4:64:asymmetric": (640, False),  # more than the lanes read at once
    "mxfp4": (96, True),
}
TORCH = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def spec_of(name: str, dtype: str = "float32") -> QuantisedSpec:
    k, is_gated = FORMATS[name]
    return QuantisedSpec(8, k, dtype, groups=3, gated=is_gated, bias=is_gated, format=parse(name))


@cache
def kernel(spec: QuantisedSpec, bug: Bug | None = None) -> Emulated:
    join = gated(silu) if spec.gated else None
    function = product_of_codes(spec, SM_80, epilogue=join, top_k=1, blocks=2)
    return emulated(function, change=bug.plant if bug else str)


def joined(stacks: list[Tensor]) -> Tensor:
    if len(stacks) == 1:
        return stacks[0]
    integers = {2: torch.int16, 4: torch.int32}
    size = stacks[0].element_size()
    words = [s.numpy() if size == 1 else s.view(integers[size]).numpy() for s in stacks]
    both = torch.from_numpy(interleave(*words))
    return both if size == 1 else both.view(stacks[0].dtype)


def right(run: Emulated, spec: QuantisedSpec, experts: list[int], schedule: Schedule) -> bool:
    generator = torch.Generator().manual_seed(len(experts))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    stacks = [quantise(spec.format, random(3, spec.n, spec.k)) for _ in range(1 + spec.gated)]
    dtype = TORCH[spec.dtype]
    biases = [random(3, spec.n).to(dtype) for _ in stacks]
    owners = torch.tensor([3 if e < 0 else e for e in experts], dtype=torch.int64)
    order = owners.sort(stable=True).indices
    ends = torch.bincount(owners, minlength=4)[:3].cumsum(0).int()
    x = random(len(experts), spec.k)
    expected = torch.full((len(experts), spec.n), torch.nan)
    for row in range(int(ends[-1])):
        e, sums = int(owners[order[row]]), []
        for stack, bias in zip(stacks, biases, strict=True):
            zeros = None if stack.zeros is None else stack.zeros[e]
            w = dequantise(spec.format.kind, stack.codes[e], stack.scales[e], zeros)
            sums.append(w @ x[order[row]] + (bias[e].float() if spec.bias else 0))
        expected[row] = torch.nn.functional.silu(sums[0]) * sums[1] if spec.gated else sums[0]
    y = torch.full(expected.shape, torch.nan, dtype=dtype)
    packed = [torch.from_numpy(pack(s.codes.numpy(), spec.format.bits)) for s in stacks]
    scales = [joined([s.scales for s in stacks])]
    if spec.format.asymmetric:
        scales.append(joined([s.zeros for s in stacks if s.zeros is not None]))
    bias = [joined(biases)] if spec.bias else []
    run(*scales, x, order.int(), ends, joined(packed), *bias, y, schedule=schedule)
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20
    near = (y.float() - expected).abs() <= unit * expected.abs() + 1e-4 * spec.k**0.5
    return torch.equal(y.isnan(), expected.isnan()) and bool((near | expected.isnan()).all())


@pytest.mark.parametrize("name", FORMATS)
def test_formats_equal_their_meaning(name: str) -> None:
    """An expert without rows, one with two tiles of them, rows of nobody; no row at all."""
    spec = spec_of(name)
    for schedule in SCHEDULES:
        assert right(kernel(spec), spec, [2, 0, 2, 2, -1, 2], schedule)
    assert right(kernel(spec), spec, [-1], SCHEDULES[0])


def test_results_of_16_bits() -> None:
    spec = spec_of("int8", "bfloat16")
    assert right(kernel(spec), spec, [0, 1, 1], SCHEDULES[1])


@pytest.mark.parametrize(("bits", "blocks"), [(8, 1), (8, 3), (16, 3)])
def test_rounded_rows_are_the_same_numbers(bits: int, blocks: int) -> None:
    x = torch.randn(5, 96).bfloat16()
    x[1] = 0
    x[2, 3], x[3, 40] = torch.inf, torch.nan
    y = torch.empty(5, 96)
    emulated(round_rows(96, blocks, bits, "bfloat16", SM_80))(x, y)
    torch.testing.assert_close(y, rounded(x, blocks, bits), rtol=0, atol=0, equal_nan=True)


BUGS = (
    Bug("two codes are swapped", r">> \(uint\)4\)", ">> (uint)8)"),
    Bug("lanes are left out", r"__shfl_xor_sync\(([^\n]*), 1\)", "0.0f"),
    Bug("the zero is one less", r"_ptr_(\d+)\[4\] = 0x1p\+3f[^;]*;", r"_ptr_\1[4] = 7.0f;"),
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_planted_bugs(bug: Bug) -> None:
    spec = spec_of("int4:32")
    run = kernel(spec, bug)
    check_found(bug, lambda schedule: right(run, spec, [2, 0, 2, 2, -1, 2], schedule))


def test_refusals() -> None:
    with pytest.raises(NoMatch, match="32 codes, which are read at once, would have two scales"):
        product_of_codes(QuantisedSpec(8, 48, "float32", format=parse("int4")), SM_80)
    with pytest.raises(NoMatch, match="its 3 columns cannot be stored as pairs"):
        product_of_codes(QuantisedSpec(3, 64, "float32", format=parse("int4")), SM_80)
    with pytest.raises(NoMatch, match="gate and up need an epilogue"):
        product_of_codes(QuantisedSpec(8, 64, "float32", gated=True, format=parse("int8")), SM_80)
