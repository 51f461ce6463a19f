"""Products with weights of few bits on the emulator against their reference in torch.

Reference and kernel use float32; their sums of k products have different orders.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from moec.codegen.cuda.activation import gated, silu
from moec.codegen.cuda.gemm.product import interleave
from moec.codegen.cuda.gemm.tiles import TileShape
from moec.codegen.cuda.quantised.codes import pack, piece_of, place
from moec.codegen.cuda.quantised.grouped_codes import check_grouped_codes, gemv_codes, grouped_codes
from moec.codegen.cuda.quantised.round_rows import round_rows
from moec.codegen.specs.products import QuantisedSpec
from moec.errors import NoMatch
from moec.ir.formats.integer import TINY, dequantise, most_of, quantise
from moec.ir.formats.integer import round_rows as rounded
from moec.ir.formats.notation import Format, parse
from moec.target.cuda import TARGETS
from tests.cuda_emulator.bugs import WHERE_LATE, Bug, check_found
from tests.cuda_emulator.emulate import SCHEDULES, SM_80, Emulated, Schedule, emulated
from tests.cuda_emulator.products import TORCH
from tests.cuda_emulator.routings import Routed, routed

TINY_TILE = TileShape(32, 32, 64, warp_rows=2, warp_columns=1, stages=3)
# k, whether gate and up are joined. Tails of k, of columns, blocks of less than a stage and more.
FORMATS = {
    "int8": (80, False),
    "int8:128:asymmetric:rows16": (256, False),
    "int4:32": (64, True),
    "int4:64:asymmetric": (640, False),  # more than the lanes of few rows read at once
    "int4:asymmetric": (96, True),
    "fp8:64": (192, False),
    "mxfp4": (96, True),
}
EXPERTS = [2, 0, 2, 2, -1, 2]
MANY = [2] * 37 + [0, -1, 2]


def spec_of(name: str, dtype: str = "float32") -> QuantisedSpec:
    k, is_gated = FORMATS[name]
    return QuantisedSpec(24, k, dtype, groups=3, gated=is_gated, bias=is_gated, format=parse(name))


@cache
def kernel(spec: QuantisedSpec, bug: Bug | None = None, *, tiles: bool = False) -> Emulated:
    join = gated(silu) if spec.gated else None
    if tiles:
        function = grouped_codes(spec, SM_80, epilogue=join, top_k=1, shape=TINY_TILE, blocks=2)
    else:
        function = gemv_codes(spec, SM_80, epilogue=join, top_k=1, blocks=2)
    return emulated(function, change=bug.plant if bug else str)


def joined(stacks: list[Tensor]) -> Tensor:
    if len(stacks) == 1:
        return stacks[0]
    integers = {2: torch.int16, 4: torch.int32}
    size = stacks[0].element_size()
    words = [s.numpy() if size == 1 else s.view(integers[size]).numpy() for s in stacks]
    both = torch.from_numpy(interleave(*words))
    return both if size == 1 else both.view(stacks[0].dtype)


def codes_of(x: Tensor, blocks: int, bits: int) -> tuple[Tensor, Tensor]:
    """Scales f32[R, blocks] and codes f16[R, planes * k], as kernels take them."""
    by_block = x.unflatten(1, (blocks, x.shape[1] // blocks))
    greatest = by_block.abs().amax(-1, keepdim=True)
    code = (by_block * (most_of(bits) / greatest)).round().flatten(1)
    high = (code / 256).round() * 256
    planes = [code] if bits == 8 else [high, code - high]
    return (greatest * torch.tensor(1 / most_of(bits)))[..., 0], torch.cat(planes, 1).half()


def right(
    run: Emulated,
    spec: QuantisedSpec,
    experts: list[int],
    schedule: Schedule,
    nan: int | None = None,
) -> bool:
    """Whether the products of rows with these experts are right; the row `nan` holds NaN."""
    generator = torch.Generator().manual_seed(len(experts))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    stacks = [quantise(spec.format, random(3, spec.n, spec.k)) for _ in range(1 + spec.gated)]
    dtype = TORCH[spec.dtype]
    biases = [random(3, spec.n).to(dtype) for _ in stacks]
    owners = torch.tensor([3 if e < 0 else e for e in experts], dtype=torch.int64)
    order = owners.sort(stable=True).indices
    ends = torch.bincount(owners, minlength=4)[:3].cumsum(0).int()
    blocks, bits = spec.format.blocks(spec.k), spec.format.row_bits
    row_scales, codes = codes_of(random(len(experts), spec.k), blocks, bits)
    if nan is not None:
        row_scales[nan], codes[nan, 5] = torch.nan, torch.nan
    planes = codes.shape[1] // spec.k
    total = codes.float().unflatten(1, (planes, blocks, spec.k // blocks)).sum(1)
    x = (total * row_scales[..., None]).flatten(1)
    expected = torch.full((len(experts), spec.n), torch.nan)
    start = 0
    for e, end in enumerate(ends.tolist()):
        rows, sums = x[order[start:end]], []
        for stack, bias in zip(stacks, biases, strict=True):
            zeros = None if stack.zeros is None else stack.zeros[e]
            w = dequantise(spec.format.kind, stack.codes[e], stack.scales[e], zeros)
            sums.append(rows @ w.T + (bias[e].float() if spec.bias else 0))
        expected[start:end] = torch.nn.functional.silu(sums[0]) * sums[1] if spec.gated else sums[0]
        start = end
    y = torch.full(expected.shape, torch.nan, dtype=dtype)
    packed = [torch.from_numpy(pack(s.codes.numpy(), spec.format.bits)) for s in stacks]
    scales = [joined([s.scales for s in stacks])]
    if spec.format.asymmetric:
        scales.append(joined([s.zeros for s in stacks if s.zeros is not None]))
    bias = [joined(biases)] if spec.bias else []
    arguments = (*scales, row_scales, codes, order.int(), ends, joined(packed), *bias)
    run(*arguments, y, schedule=schedule)
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20
    near = (y.float() - expected).abs() <= unit * expected.abs() + 1e-4 * spec.k**0.5
    return torch.equal(y.isnan(), expected.isnan()) and bool((near | expected.isnan()).all())


@pytest.mark.parametrize("name", FORMATS)
def test_few_rows_equal_their_meaning(name: str) -> None:
    """An expert without rows, one with two tiles, rows without an expert; no rows at all."""
    spec = spec_of(name)
    for schedule in SCHEDULES:
        assert right(kernel(spec), spec, EXPERTS, schedule)
    assert right(kernel(spec), spec, [-1], SCHEDULES[0])


@pytest.mark.parametrize("name", FORMATS)
def test_tiles_equal_their_meaning(name: str) -> None:
    """Two tiles of rows, the second nearly empty, and of columns."""
    spec = spec_of(name)
    for schedule in SCHEDULES:
        assert right(kernel(spec, tiles=True), spec, MANY, schedule)
    assert right(kernel(spec, tiles=True), spec, [-1], SCHEDULES[0])


@settings(max_examples=8)
@given(case=routed(3, 40))
@pytest.mark.parametrize("tiles", [False, True], ids=["few-rows", "tiles"])
@pytest.mark.parametrize("name", FORMATS)
def test_any_routing(name: str, tiles: bool, case: Routed) -> None:
    spec = spec_of(name)
    experts = case.experts if tiles else case.experts[:9]
    nan = case.nan if case.nan is None or case.nan < len(experts) else None
    assert right(kernel(spec, tiles=tiles), spec, experts, case.schedule, nan)


def test_the_number_of_rows_chooses_the_path() -> None:
    """Three launches of one kernel: few rows, small tiles, large ones."""
    spec = spec_of("int4:32", "bfloat16")
    run = emulated(grouped_codes(spec, SM_80, epilogue=gated(silu), top_k=1))
    for rows in (3, 20, 100):
        assert right(run, spec, [row % 3 for row in range(rows)], SCHEDULES[0])


@pytest.mark.parametrize("tiles", [False, True])
def test_fp8_codes_are_widened_exactly(tiles: bool) -> None:
    """Rows that are 1 at one place show every weight."""
    spec = spec_of("fp8:64")
    codes = torch.arange(3 * spec.n * spec.k).reshape(3, spec.n, spec.k).byte()
    codes[codes % 128 == 127] = 0  # NaN
    scales = torch.rand(3, spec.n, 3).bfloat16()
    order, ends = torch.arange(spec.k, dtype=torch.int32), torch.tensor([0, spec.k, spec.k]).int()
    y = torch.empty(spec.k, spec.n)
    packed = torch.from_numpy(pack(codes.numpy(), 8))
    arguments = (scales, torch.ones(spec.k, 3), torch.eye(spec.k).half(), order, ends, packed)
    kernel(spec, tiles=tiles)(*arguments, y)
    assert torch.equal(y.T, dequantise("fp8", codes[1], scales[1]))


@pytest.mark.parametrize("tiles", [False, True])
def test_nan_stays_in_its_row(tiles: bool) -> None:
    spec = spec_of("int8")
    weights = quantise(spec.format, torch.randn(3, spec.n, spec.k))
    scales, codes = torch.ones(3, 1), torch.ones(3, spec.k, dtype=torch.float16)
    scales[1], codes[1, 5] = torch.nan, torch.nan
    ends, order = torch.tensor([3, 3, 3], dtype=torch.int32), torch.arange(3, dtype=torch.int32)
    y = torch.zeros(3, spec.n)
    packed = torch.from_numpy(pack(weights.codes.numpy(), 8))
    kernel(spec, tiles=tiles)(weights.scales, scales, codes, order, ends, packed, y)
    assert y.isnan().all(1).tolist() == y.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_codes_lie_where_lanes_read_them(bits: int) -> None:
    piece = piece_of(bits)
    codes = np.arange(2 * piece, dtype=np.uint8)[None] & (1 << bits) - 1
    words = pack(codes, bits).view(np.uint32).reshape(2, 4)
    for k in range(2 * piece):
        step, half, q, second = k % piece // 16, k % 16 // 8, k % 8 // 2, k % 2
        at = bits * place(bits, step, half, second)
        assert words[k // piece, q] >> at & (1 << bits) - 1 == codes[0, k]


@pytest.mark.parametrize(("bits", "blocks"), [(8, 1), (8, 3), (16, 3)])
def test_rounded_rows_are_the_same_numbers(bits: int, blocks: int) -> None:
    x = torch.randn(5, 96).bfloat16()
    x[1] = 0
    x[2, 3], x[3, 40], x[4] = torch.inf, torch.nan, TINY / 2
    scales, codes = torch.empty(5, blocks), torch.empty(5, 96 * bits // 8, dtype=torch.float16)
    emulated(round_rows(96, blocks, bits, "bfloat16", SM_80))(x, scales, codes)
    total = codes.float().reshape(5, -1, blocks, 96 // blocks).sum(1)
    y = (total * scales[..., None]).flatten(1)
    torch.testing.assert_close(y, rounded(x, blocks, bits), rtol=0, atol=0, equal_nan=True)


_ZEROS = 0xE408_E408  # pairs of float16: -1032
BUGS = (
    Bug("codes are reversed", r">> \(\(uint\)(\(v_\d+ \* 4\))\)", r">> (12 - \1)"),
    Bug("lanes are left out", r"__shfl_xor_sync\(([^\n]*), 1\)", "0.0f"),
    Bug("the zero is one less", str(_ZEROS), str(_ZEROS - 0x0001_0001)),
)
BUGS_OF_TILES = (
    Bug("two codes are swapped", r">> \(uint\)4\)", ">> (uint)8)"),
    BUGS[2],
    Bug("the wait is one group too late", "wait_group_1", "wait_group_2", WHERE_LATE),
    Bug("sums of a block go into the next", r"_ptr_\d+\[0\] = 0x0p\+0f[^;]*;", ";", last=True),
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_planted_bugs(bug: Bug) -> None:
    spec = spec_of("int4:32")
    run = kernel(spec, bug)
    check_found(bug, lambda schedule: right(run, spec, EXPERTS, schedule))


def test_fp8_without_signs_is_found() -> None:
    bug, spec = Bug("signs are lost", str(0x0080_0080), "0"), spec_of("fp8:64")
    run = kernel(spec, bug, tiles=True)
    check_found(bug, lambda schedule: right(run, spec, MANY, schedule))


@pytest.mark.parametrize("bug", BUGS_OF_TILES, ids=lambda bug: bug.name.replace(" ", "-"))
def test_planted_bugs_of_tiles(bug: Bug) -> None:
    spec = replace(spec_of("int4:32"), k=256)  # more steps than stages
    run = kernel(spec, bug, tiles=True)
    check_found(bug, lambda schedule: right(run, spec, MANY, schedule))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            QuantisedSpec(8, 48, "float32", format=parse("int4")),
            "32 codes, which are loaded together, would have two scales",
        ),
        (
            QuantisedSpec(8, 512, "float32", format=replace(parse("int8"), block=256)),
            "its blocks of 256 weights are neither 32, 64 or 128 nor a row",
        ),
        (
            QuantisedSpec(8, 64, "float32", format=parse("int3:32")),
            "its weights have 3 bits, and kernels for GPUs need 4 or 8",
        ),
        (
            QuantisedSpec(8, 64, "float32", format=parse("int6:32")),
            "its weights have 6 bits, and kernels for GPUs need 4 or 8",
        ),
        (
            QuantisedSpec(
                8, 64, "float32", format=Format("int4", 32, asymmetric=True, float_zeros=True)
            ),
            "its zeros are floats, and those of kernels for GPUs are codes",
        ),
        (
            QuantisedSpec(3, 64, "float32", format=parse("int4")),
            "its 3 columns cannot be stored as pairs",
        ),
        (
            QuantisedSpec(8, 64, "float32", gated=True, format=parse("int8")),
            "gate and up need an epilogue",
        ),
        (
            QuantisedSpec(8, 64, "float32", groups=5000, format=parse("int8:rows16")),
            "bytes of shared memory, and a block of cuda:sm_89 has 101376",
        ),
    ],
)
def test_refusals(spec: QuantisedSpec, words: str) -> None:
    with pytest.raises(NoMatch, match=words):
        check_grouped_codes(spec, TARGETS["cuda:sm_89"], None)
