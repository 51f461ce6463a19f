"""Sums stay in registers: a loop that stores one in memory is bound by memory latency."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from moec.codegen.build import assembly
from moec.codegen.cpu.gemm.linear import gathered_linear, grouped_linear
from moec.codegen.cpu.vector import Vector
from moec.codegen.specs.products import LinearSpec
from moec.target.cpu import TARGETS

ADDS = re.compile(r"\t(?:vfmadd|vdpbf16ps|fmla\t|bfdot)")
KEPT = re.compile(r"\tvmov[au]p[sd]\t%[yz]mm\d+, -?\d*\(%rsp\)|\tst[rp]\tq\d+.*\[sp")


def innermost(assembly: str) -> Iterator[str]:
    """Blocks that jump to their own start."""
    for block in re.split(r"\n(?=\.LBB\w+:)", assembly):
        label = re.match(r"(\.LBB\w+):", block)
        jump = label and re.search(rf"\t(?:j|b|cb|tb)\S+\t.*{label[1]}$", block, re.MULTILINE)
        if jump:
            yield block[: jump.end()]


@pytest.mark.parametrize("name", ["avx2", "avx512", "avx512-bf16", "neon-dotprod"])
@pytest.mark.parametrize(
    ("dtype", "gated"),
    [("float32", False), ("bfloat16", False), ("bfloat16", True), ("float16", False)],
)
def test_no_innermost_loop_stores_a_sum(name, dtype, gated):
    target = TARGETS[name]
    v, spec = Vector(target), LinearSpec(512, 1024, dtype, groups=32, gated=gated)
    if gated:
        kernel = gathered_linear(target, spec, 8, lambda g, u: v.silu(g) * u)
    else:
        kernel = grouped_linear(target, spec)
    code = assembly(kernel, target)
    loops = [loop for loop in innermost(code) if len(ADDS.findall(loop)) >= 4]
    assert loops
    assert not [loop for loop in loops if KEPT.search(loop)]
