"""Packing: the position of every weight, padding, and views that must be read without a copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.gemm.pack import pack, pack_bias
from moec.codegen.specs.products import LinearSpec
from moec.target.cpu import TARGETS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = [(64, 32), (70, 33), (5, 7), (33, 64), (130, 1)]


def layout(n=33, k=10, dtype="float32", target="avx2", **spec):
    return Layout(LinearSpec(n, k, dtype, **spec), TARGETS[target])


def test_a_weight_lies_where_the_kernel_reads_it():
    lay = layout(n=40, k=6, groups=2)  # two vectors of 8: tiles of 16 columns
    weight = torch.randn(2, 40, 6)
    packed = pack(lay, weight)
    assert packed.shape == (2, 3, 6, 16)
    assert packed[1, 2, 4, 3] == weight[1, 35, 4]
    assert not packed[:, 2, :, 8:].any()


def test_bf16_lies_in_pairs_and_an_odd_end_beside_0():
    lay = layout(n=8, k=3, dtype="bfloat16")
    weight = torch.randn(1, 8, 3).bfloat16()
    pairs = torch.from_numpy(pack(lay, weight)).view(torch.bfloat16).view(2, 8, 2)
    assert torch.equal(pairs[0], weight[0, :, :2])
    assert torch.equal(pairs[1, :, 0], weight[0, :, 2])
    assert not pairs[1, :, 1].any()


def test_gate_is_left_and_up_right():
    lay = layout(n=16, k=2, gated=True)  # one vector of each
    gate, up = torch.randn(16, 2), torch.randn(16, 2)
    packed = torch.from_numpy(pack(lay, gate, up))
    assert torch.equal(packed[0, 1, :, :8], gate[8:].T)
    assert torch.equal(packed[0, 1, :, 8:], up[8:].T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_are_read_where_they_are(dtype):
    stored = torch.randn(3, 12, 66).to(DTYPES[dtype])  # [E, K, 2N]: transposed, interleaved
    lay = layout(n=33, k=12, dtype=dtype, groups=3, gated=True)
    gate, up = stored[..., ::2].transpose(1, 2), stored[..., 1::2].transpose(1, 2)
    expected = pack(lay, gate.contiguous(), up.contiguous())
    assert np.array_equal(pack(lay, gate, up), expected)

    odd = torch.randn(3, 33, 13).to(DTYPES[dtype])[..., 1:]  # pairs that straddle words
    lay = layout(n=33, k=12, dtype=dtype, groups=3)
    assert np.array_equal(pack(lay, odd), pack(lay, odd.contiguous()))


def test_numpy_arrays_are_taken():
    weight = torch.randn(1, 20, 6).bfloat16()
    lay = layout(n=20, k=6, dtype="bfloat16")
    bits = weight.view(torch.int16).numpy()
    assert np.array_equal(pack(lay, bits), pack(lay, weight))
    assert np.array_equal(pack(lay, bits.view(np.uint16)), pack(lay, weight))


def test_the_bias_lies_like_the_columns():
    lay = layout(n=12, k=4, gated=True, bias=True)  # tiles of 8 + 8 columns
    gate, up = torch.randn(12), torch.randn(12)
    packed = torch.from_numpy(pack_bias(lay, gate, up))
    assert torch.equal(packed[0, 0], torch.cat([gate[:8], up[:8]]))
    assert torch.equal(packed[0, 1, :4], gate[8:])
    assert not packed[0, 1, 4:8].any()


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([torch.zeros(1, 33, 11)], r"\[1, 33, 11\].*takes torch.float32 \[1, 33, 10\]"),
        ([torch.zeros(1, 33, 10).half()], "torch.float16"),
        ([torch.zeros(1, 33, 10)] * 2, "a gated layout takes gate and up"),
    ],
)
def test_wrong_weights_are_refused(weights, words):
    with pytest.raises(ValueError, match=words):
        pack(layout(), *weights)
