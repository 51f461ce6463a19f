"""How codes of 2 to 6 and of 8 bits fill words of 32 bits: packing and kernels read one table.

A quad is four codes that follow each other along K: one for each byte of a word, at the same bits.
Three words hold 32 codes of three bits: each byte has two of them, and its last two bits hold the
quads that remain.

    bits of a byte      0 1 2   3 4 5   6 7
    word 0              quad 0  quad 1  quad 6, bits 0 and 1
    word 1              quad 2  quad 3  quad 7, bits 0 and 1
    word 2              quad 4  quad 5  quad 6, bit 2; quad 7, bit 2

So six of eight quads take a shift and a mask, as widths that divide 8 do; bit planes would take two
of each, and an `or`, for every quad. Codes of five and six bits likewise: a complete quad for each
word, and the quads that remain in the last bits of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from moec.codegen.cpu.quantised import integers
from moec.codegen.cpu.vector import Vector


class Bits(NamedTuple):
    """`size` bits of codes, from bit `low` on, at bit `at` of the bytes of word `word`."""

    word: int
    at: int
    low: int
    size: int


_QUADS = {
    bits: tuple((Bits(0, at, 0, bits),) for at in range(0, 8, bits)) for bits in (2, 4, 8)
} | {
    3: (
        *((Bits(quad // 2, quad % 2 * 3, 0, 3),) for quad in range(6)),
        (Bits(0, 6, 0, 2), Bits(2, 6, 2, 1)),
        (Bits(1, 6, 0, 2), Bits(2, 7, 2, 1)),
    ),
    5: (
        *((Bits(word, 0, 0, 5),) for word in range(5)),
        (Bits(0, 5, 0, 3), Bits(1, 5, 3, 2)),
        (Bits(2, 5, 0, 3), Bits(3, 5, 3, 2)),
        (Bits(4, 5, 0, 3), Bits(1, 7, 3, 1), Bits(3, 7, 4, 1)),
    ),
    6: (
        *((Bits(word, 0, 0, 6),) for word in range(3)),
        tuple(Bits(word, 6, 2 * word, 2) for word in range(3)),
    ),
}
"""The bits of each quad of a unit, the fewest words that complete quads fill."""


def quads_of(bits: int) -> int:
    """The quads of a unit."""
    return len(_QUADS[bits])


def words_of(bits: int) -> int:
    """The words of a unit."""
    return bits * quads_of(bits) // 8


def packed(codes: Tensor, bits: int) -> Tensor:
    """codes u8[N, K], K a multiple of the codes of a unit -> words i32[N, K * bits / 32]."""
    quads = codes.view(len(codes), -1, quads_of(bits), 4)
    words = torch.zeros((*quads.shape[:2], words_of(bits), 4), dtype=torch.uint8)
    for quad, parts in zip(quads.unbind(2), _QUADS[bits], strict=True):
        for part in parts:
            words[:, :, part.word] |= (quad >> part.low & 2**part.size - 1) << part.at
    return words.view(len(codes), -1).view(torch.int32)


def codes(words: Tensor, bits: int) -> Tensor:
    """Words i32[N, K * bits / 32] -> codes u8[N, K], by the table."""
    units = words.contiguous().view(torch.uint8).view(len(words), -1, words_of(bits), 4)
    quads = torch.zeros((*units.shape[:2], quads_of(bits), 4), dtype=torch.uint8)
    for number, parts in enumerate(_QUADS[bits]):
        for part in parts:
            quads[:, :, number] |= (
                units[:, :, part.word] >> part.at & 2**part.size - 1
            ) << part.low
    return quads.view(len(words), -1)


def unpacked(v: Vector, words: Sequence[Expr], bits: int) -> list[Expr]:
    """The quads of a unit as bytes of lanes, from its words."""
    if bits == 8:
        return list(words)
    quads = []
    for first, *rest in _QUADS[bits]:
        codes = _moved(v, words, first)
        for part in rest:
            codes = T.bind(T.bitwise_or(codes, _moved(v, words, part)))
        quads.append(codes)
    return quads


def _moved(v: Vector, words: Sequence[Expr], part: Bits) -> Expr:
    """The bits of `part` where they are in their codes, and 0."""
    mask = (2**part.size - 1) << part.low
    return integers.masked_bytes(v, words[part.word], part.at - part.low, mask)
