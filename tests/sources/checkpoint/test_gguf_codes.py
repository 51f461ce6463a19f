"""Blocks of GGUF's types as codes, scales and zeros, against the package gguf."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moec.errors import CaptureError
from moec.files.gguf import BLOCKS
from moec.ir.formats.integer import dequantise, encode
from moec.sources.checkpoint.gguf.codes import STORED, read

gguf = pytest.importorskip("gguf")

HALVES = {
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
    **{"Q4_1": (0, 2), "Q5_1": (0, 2), "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": ()},
}
"""Where the blocks of a type have numbers of float16; at 0 for other types."""


def blocks(kind: str, halves: float) -> np.ndarray:
    """Random blocks u8[6, 3, bytes] of a type, with numbers of float16 of about that size."""
    _, weights, size = BLOCKS[kind]
    generator = np.random.default_rng(7)
    data = generator.integers(0, 256, (6, 3, size), np.uint8)
    for at in HALVES.get(kind, (0,)):
        numbers = (generator.uniform(0.5, 1, (6, 3, 1)) * halves).astype(np.float16)
        data[..., at : at + 2] = numbers.view(np.uint8)
    if kind == "MXFP4":
        data[..., 0] = generator.integers(100, 130, (6, 3))
    if kind == "TQ2_0":  # four digits of base 3 a byte, two bits each
        digits = generator.integers(0, 3, (6, 3, weights // 4, 4))
        data[..., : weights // 4] = digits @ [1, 4, 16, 64]
    return data


@pytest.mark.parametrize("halves", [1e-2, -1.0, 2e-6])
@pytest.mark.parametrize("kind", STORED)
def test_the_values_of_a_type(kind, halves):
    """Exactly, but for products of two scales, which are rounded to float16: by 2^-11, and exactly
    where they are subnormal, as one factor is then too."""
    number, weights, _ = BLOCKS[kind]
    data = blocks(kind, halves)
    expected = torch.from_numpy(
        gguf.dequantize(data.reshape(6, -1), gguf.GGMLQuantizationType(number))
    ).unflatten(-1, (-1, weights))
    stored, format = read(kind, torch.from_numpy(data)), STORED[kind].format
    assert int(stored.codes.max()) < 2**format.bits
    values = dequantise(format.kind, stored.codes, stored.scales, stored.zeros)
    off = (values.unflatten(-1, (-1, weights)) - expected).abs().amax(-1)
    # The terms of a difference, code * scale - zero, may be twice as large as any weight.
    allowed = 2.0**-9 * expected.abs().amax(-1) if kind.endswith("_K") else 0.0
    assert (off <= allowed).all()
    assert values.shape == (6, 3 * weights)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q5_1", "Q2_K"])
def test_codes_of_values(kind):
    """Passes that round weights again find the codes of a checkpoint."""
    stored, format = read(kind, torch.from_numpy(blocks(kind, 1e-2))), STORED[kind].format
    values = dequantise(format.kind, stored.codes, stored.scales, stored.zeros)
    codes = encode(format, values, stored.scales, stored.zeros)
    block = format.block
    used = (stored.scales.float() != 0).repeat_interleave(block, -1)
    assert torch.equal(codes[used], stored.codes[used])


def test_a_scale_beyond_float16():
    with pytest.raises(CaptureError, match="a scale of the file is beyond float16"):
        read("Q4_K", torch.from_numpy(blocks("Q4_K", 60000.0)))
