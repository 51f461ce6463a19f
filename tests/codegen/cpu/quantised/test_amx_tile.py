"""Few bits on tile registers: the same bits as the register tile of dot products.

test_grouped.py compares the latter with the reference. Integers are exact, and floats are added in
the same order, so the results must be equal. On a CPU without tile registers, they are emulated.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from moec.codegen.build import assembly
from moec.codegen.cpu.quantised.grouped import quantised_linear, quantised_linears
from moec.codegen.cpu.quantised.layout import QuantisedLayout
from moec.codegen.specs.products import QuantisedSpec
from moec.ir.formats.notation import Format, parse
from moec.target.cpu import TARGETS, missing
from tests.codegen.cpu.emulated_tiles import EMULATED, emulated
from tests.codegen.cpu.gemm.test_grouped import routing
from tests.codegen.cpu.quantised.test_grouped import Linear

FORMATS = (
    "int8",
    "int8:64:asymmetric:rows16",
    "int4:64",
    "int4:asymmetric:rows16",
    "int3:64",
    "int2:128",
)

AMX, DOTS = TARGETS["amx"], TARGETS["avx512-bf16"]
runs = pytest.mark.skipif(bool(missing(DOTS)), reason="needs a CPU with AVX512-VNNI")


def both(build, *args, **how):
    """The same weights for both targets."""
    results = []
    for target in (EMULATED if missing(AMX) else AMX, DOTS):
        torch.manual_seed(0)
        with emulated() if target is EMULATED else nullcontext():
            results.append(Linear(build, target, *args, **how))
    assert results[0].layout.amx
    return results


def test_which_formats_go_this_way():
    def amx(k, text, target=AMX):
        return QuantisedLayout(QuantisedSpec(8, k, "float32", format=parse(text)), target).amx

    assert amx(64, "int8")
    assert amx(128, "int4:64")
    assert not amx(128, "int4:32")
    assert not amx(40, "int8")
    assert not amx(64, "int8", DOTS)


def test_float_zeros_are_subtracted_from_sums():
    format = Format("int8", 64, asymmetric=True, float_zeros=True)
    assert not QuantisedLayout(QuantisedSpec(32, 128, "float32", format=format), AMX).amx


def test_it_compiles_for_amx_everywhere():
    kernel = quantised_linear(AMX, QuantisedSpec(32, 64, "float32", format=parse("int4:64")))
    assert "tdpbs" in assembly(kernel, AMX)


@runs
@pytest.mark.parametrize("text", FORMATS)
def test_gathered_gate_and_up(build, text):
    """Few rows, one register, several, more than fit at once; no rows; rows without an expert."""
    experts, k = 3, 2
    one, other = both(
        build, text, 40, 128, experts, gated=True, bias=True, top_k=k, scale_dtype="float32"
    )
    for t in (0, 1, 3, 10, 50):
        owners = torch.randint(0, experts + 1, (t, k))
        owners[:, 0] = 1
        order, ends = routing(owners, experts)
        x, scale = torch.randn(t, 128), torch.rand(t, k)
        result, expected = (run(x, order, ends, scale)[: ends[-1]] for run in (one, other))
        assert torch.equal(result, expected)


@runs
@pytest.mark.parametrize("text", ["int4:64", "int8:rows16"])
def test_down_of_many_experts(build, text):
    """So many that four tiles are done at once, of which the last are fewer."""
    one, other = both(build, text, 330, 64, 64)
    experts = torch.cat([torch.randint(0, 64, (60, 1)), torch.full((33, 1), 5)])
    order, ends = routing(experts, 64)
    x = torch.randn(len(experts), 64)
    assert torch.equal(one(x, order, ends), other(x, order, ends))


def test_dense_products_say_what_they_use():
    specs = tuple(QuantisedSpec(n, 64, "float32", format=parse("int8")) for n in (40, 7))
    assert "tdpbs" in assembly(quantised_linears(AMX, specs), AMX)
