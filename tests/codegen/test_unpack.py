"""What packed weights hold, by the inverse of each layout: every fault of a packer is found."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from moec.codegen.backends.cuda import unpack as cuda
from moec.codegen.cpu import unpack
from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.gemm.pack import pack, pack_bias
from moec.codegen.cpu.quantised.layout import QuantisedLayout, mark_nan, pack_codes, pack_scales
from moec.codegen.cuda.gemm.product import interleave
from moec.codegen.cuda.quantised import codes as cuda_codes
from moec.codegen.specs.products import LinearSpec, QuantisedSpec
from moec.ir.formats.notation import parse
from moec.target.cpu import TARGETS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = [(64, 32), (70, 33), (5, 7), (33, 64), (130, 1)]
FORMATS = ["int2:64", "int3:64", "int4:32", "int5:32", "int6:64", "int8", "fp8", "mxfp4"]


def agree(parts) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in parts)


def flip(array: np.ndarray) -> np.ndarray:
    """Copies of the array, in each of which one byte is another one."""
    content = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    for index in {0, len(content) - 1, len(content) // 2, len(content) // 3}:
        changed = content.copy()
        changed[index] ^= 1
        yield torch.from_numpy(changed.view(array.dtype).reshape(array.shape))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_weights_and_biases(target, dtype, gated):
    for (n, k), flipped in itertools.product(SHAPES, (False, True)):
        spec = LinearSpec(n, k, dtype, groups=3, gated=gated)
        layout = Layout(spec, TARGETS[target])
        shape = (3, k, n) if flipped else (3, n, k)
        weights = [torch.randn(shape).to(DTYPES[dtype]) for _ in range(1 + gated)]
        packed = pack(layout, *(w.mT if flipped else w for w in weights))
        assert agree(unpack.weights(layout, flipped, torch.from_numpy(packed), *weights))
        for array in flip(packed):
            assert not agree(unpack.weights(layout, flipped, array, *weights))
        biases = [torch.randn(3, n).to(DTYPES[dtype]) for _ in range(1 + gated)]
        packed = pack_bias(layout, *biases)
        assert agree(unpack.biases(layout, (), torch.from_numpy(packed), *biases))
        for array in flip(packed):
            assert not agree(unpack.biases(layout, (), array, *biases))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("gated", [False, True])
def test_codes_and_scales(target, name, gated):
    format = parse(name)
    for dtype, (n, k) in itertools.product(DTYPES, [(40, 128), (5, 192)]):
        spec = QuantisedSpec(n, k, dtype, groups=2, gated=gated, format=format)
        layout = QuantisedLayout(spec, TARGETS[target])
        codes = [torch.randint(2**format.bits, (2, n, k)).byte() for _ in range(1 + gated)]
        packed = pack_codes(layout, *codes)
        assert agree(unpack.codes(layout, torch.from_numpy(packed), *codes))
        for array in flip(packed):
            assert not agree(unpack.codes(layout, array, *codes))
        scales = [torch.randn(2, n, format.blocks(k)) for _ in range(1 + gated)]
        packed = pack_scales(layout, *map(mark_nan, scales, codes))
        marked = [(*scales, *codes), (*map(mark_nan, scales, codes),)]
        for parts, values in zip((True, False), marked, strict=True):
            held = list(unpack.scales(layout, parts, torch.from_numpy(packed), *values))
            assert agree((a.view(torch.int32), b.contiguous().view(torch.int32)) for a, b in held)
        for array in flip(pack_scales(layout, *scales)):
            assert not agree(unpack.scales(layout, False, array, *scales))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("gated", [False, True])
def test_codes_for_gpus(bits, gated):
    codes = [torch.randint(2**bits, (2, 24, 64)).byte() for _ in range(1 + gated)]
    arrays = [cuda_codes.pack(c.numpy(), bits) for c in codes]
    packed = interleave(*arrays) if gated else arrays[0]
    assert agree(cuda.codes(bits, torch.from_numpy(packed), *codes))
    for array in flip(packed):
        assert not agree(cuda.codes(bits, array, *codes))
    if gated:
        assert agree(
            cuda.interleaved(torch.from_numpy(interleave(*(c.numpy() for c in codes))), *codes)
        )
