"""Experts of several formats: the same bits as a stack of each format alone."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.codegen.cpu.gemm.pack import pack_bias
from moec.codegen.cpu.quantised.grouped import quantised_linear
from moec.codegen.cpu.quantised.layout import QuantisedLayout, pack_codes, pack_scales
from moec.codegen.cpu.quantised.mixed import MixedLayout, mixed_linear
from moec.codegen.cpu.quantised.round_rows import round_rows
from moec.codegen.cpu.vector import Vector
from moec.codegen.specs.products import MixedSpec
from moec.ir.formats.integer import quantise
from moec.ir.formats.notation import parse
from moec.target.cpu import TARGETS, missing
from tests.codegen.cpu.emulated_tiles import EMULATED, emulated
from tests.codegen.cpu.gemm.test_grouped import routing
from tests.codegen.cpu.quantised.test_grouped import BEST, tensor

FORMATS = ("int8", "int2:32:asymmetric")
OWNERS = (1, 0, 0, 1, 1)  # the number of each expert's format
N, K, TOP_K = 37, 128, 2
AMX = EMULATED if missing(TARGETS["amx"]) else TARGETS["amx"]


class Mixed:
    """The kernel of experts with several formats, and one for each format with all experts."""

    def __init__(self, build, target, owners=OWNERS, texts=FORMATS):
        torch.manual_seed(0)
        self.build, self.target, self.owners = build, target, torch.tensor(owners)
        formats, experts = [parse(text) for text in texts], len(owners)
        weights = [torch.randn(experts, N, K) * 0.1 for _ in range(2)]
        biases = [torch.randn(experts, N) for _ in range(2)]
        counts = tuple(owners.count(number) for number in range(len(formats)))
        sizes = {"groups": experts, "gated": True, "bias": True}
        self.spec = MixedSpec(
            N, K, "float32", "float32", **sizes, formats=tuple(formats), counts=counts
        )
        self.layout = MixedLayout(self.spec, target)
        v = Vector(target)
        how = {"top_k": TOP_K, "epilogue": lambda g, u: v.silu(g) * u, "scale_dtype": "float32"}
        self.kernel = build(target, mixed_linear(target, self.spec, **how))
        table, self.packed, self.alone = torch.zeros(experts, 3, dtype=torch.int32), [], []
        for number, (format, part) in enumerate(zip(formats, self.layout.parts, strict=True)):
            numbers = [e for e, owner in enumerate(owners) if owner == number]
            table[numbers, :2] = torch.tensor(
                [[number, slot] for slot in range(len(numbers))]
            ).int()
            self.packed += self._stored(
                part,
                format,
                [(w[numbers], b[numbers]) for w, b in zip(weights, biases, strict=True)],
            )
            spec = MixedSpec(
                N, K, "float32", "float32", **sizes, formats=(format,), counts=(experts,)
            ).parts[0]
            stored = self._stored(
                QuantisedLayout(spec, target), format, list(zip(weights, biases, strict=True))
            )
            self.alone.append((build(target, quantised_linear(target, spec, **how)), stored))
        table[:, 2] = self.owners.argsort(stable=True)
        self.packed.append(table)
        self.rounding = {
            form: build(target, round_rows(target, K, form[0], "float32", form=form[1]))
            for form in self.layout.forms
        }

    def _stored(self, layout, format, parts):
        codes = [quantise(format, weight) for weight, _ in parts]
        packed = [pack_codes(layout, *(q.codes for q in codes))]
        packed += [pack_scales(layout, *(q.scales for q in codes))]
        if format.asymmetric:
            packed += [pack_scales(layout, *(q.zeros for q in codes))]
        return [*map(tensor, packed), tensor(pack_bias(layout, *(bias for _, bias in parts)))]

    def _rows(self, x, form):
        blocks, codes = form
        result = [
            torch.zeros(len(x), codes.words(K), dtype=torch.int32),
            torch.zeros(len(x), blocks),
            torch.zeros(len(x), blocks, dtype=torch.int32),
        ]
        self.rounding[form](x, *result)
        return result

    def compare(self, chosen):
        """Rows of no expert are zero; each other row is that of the stack of its format."""
        order, ends = routing(chosen, len(self.owners))
        x, scale = torch.randn(len(chosen), K), torch.rand(len(chosen), TOP_K)
        rows = {form: self._rows(x, form) for form in self.layout.forms}
        y = torch.full((len(order), N), torch.nan)
        every = [tensor for form in rows.values() for tensor in form]
        self.kernel(*every, order, ends, *self.packed, scale, y)
        starts = torch.tensor([0, *ends[:-1].tolist()])
        expected = torch.zeros_like(y)
        for number, (kernel, stored) in enumerate(self.alone):
            part, alone = self.layout.parts[number], torch.full_like(y, torch.nan)
            kernel(*rows[part.blocks, part.row_codes], order, ends, *stored, scale, alone)
            for e in (self.owners == number).nonzero().flatten().tolist():
                expected[starts[e] : ends[e]] = alone[starts[e] : ends[e]]
        assert torch.equal(y, expected)


@cache
def mixed(build):
    return Mixed(build, BEST)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), tokens=st.integers(0, 20))
def test_any_routing(build, data, tokens):
    """Empty experts, all rows on one, none with an expert (id 5)."""
    ids = data.draw(st.sampled_from([st.integers(0, 5), st.just(2), st.just(5)]))
    flat = data.draw(st.lists(ids, min_size=tokens * TOP_K, max_size=tokens * TOP_K))
    mixed(build).compare(torch.tensor(flat, dtype=torch.int64).reshape(tokens, TOP_K))


@pytest.mark.skipif(bool(missing(TARGETS["avx2"])), reason="this CPU has no AVX2")
def test_other_tiles(build):
    """Of other sizes, and with pairs of products in 16 bits for small codes."""
    Mixed(build, TARGETS["avx2"], (0, 1, 0), ("int3:32", "int4")).compare(
        torch.randint(0, 3, (9, TOP_K))
    )


def test_many_rows_on_tile_registers(build):
    with emulated() if AMX is EMULATED else nullcontext():
        both = Mixed(build, AMX, (0, 1, 0), ("int3:64", "int8"))
    assert all(part.amx for part in both.layout.parts)
    both.compare(torch.randint(0, 3, (60, TOP_K)))
