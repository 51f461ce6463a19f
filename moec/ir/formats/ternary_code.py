"""The dictionary of ternary weights: the 2^16 likeliest sequences of 1 to 14 pairs.

A weight is 0, 1 (the row's least) or 2 (its greatest). The source is modelled as independent
weights with P(0) = 0.885 and equal probabilities of 1 and 2. The 2^16 sequences of pairs are grown
from the empty one by always extending the likeliest, so that every prefix of a sequence is a
sequence too, and a longest match always ends on a codeword. (QMoE, arXiv 2310.16795, section 4.)

The entry of a codeword is two 32-bit words, one for seven pairs each: bits 0 to 3 hold the total
number of pairs, the other bits 14 weights of two bits.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cache
from itertools import count, product

import numpy as np
import numpy.typing as npt

CODEWORDS = 1 << 16
MOST_PAIRS = 14
WEIGHTS = 2 * MOST_PAIRS
"""The number of weights of the longest codeword."""
PAIRS = tuple(product(range(3), repeat=2))
"""A pair by its symbol, 0 to 8."""
ZEROS = 0.885
"""The share of zeros for which the global dictionary is computed."""
ROOT = CODEWORDS
"""The empty sequence, in `Dictionary.children`."""


@dataclass(frozen=True, eq=False)
class Dictionary:
    """`entries` u32[65536, 2] as above, likeliest first; `children` i32[65537, 9]: the codeword
    that extends codeword i (65536: the empty sequence) by a symbol, -1 without one; `likelihoods`
    f64[65536]."""

    entries: npt.NDArray[np.uint32]
    children: npt.NDArray[np.int32]
    likelihoods: npt.NDArray[np.float64]


@cache
def dictionary(zeros: float = ZEROS) -> Dictionary:
    """The dictionary for a source with that share of zeros. Codewords of equal likelihood are in
    the order in which they are generated, by symbols."""
    each = {0: zeros, 1: (1 - zeros) / 2, 2: (1 - zeros) / 2}
    symbols = [each[a] * each[b] for a, b in PAIRS]
    ticket = count()
    waiting: list[tuple[float, int, tuple[int, ...]]]
    waiting = [(-p, next(ticket), (s,)) for s, p in enumerate(symbols)]
    heapq.heapify(waiting)
    codewords: list[tuple[float, tuple[int, ...]]] = []
    while len(codewords) < CODEWORDS:
        least, _, sequence = heapq.heappop(waiting)
        codewords.append((-least, sequence))
        if len(sequence) < MOST_PAIRS:
            for s, p in enumerate(symbols):
                heapq.heappush(waiting, (least * p, next(ticket), (*sequence, s)))
    numbers = {sequence: number for number, (_, sequence) in enumerate(codewords)}
    entries = np.zeros((CODEWORDS, 2), np.uint32)
    children = np.full((CODEWORDS + 1, len(PAIRS)), -1, np.int32)
    for number, (_, sequence) in enumerate(codewords):
        parent = numbers.get(sequence[:-1], ROOT)
        children[parent, sequence[-1]] = number
        words = [len(sequence), len(sequence)]
        for i, s in enumerate(sequence):
            a, b = PAIRS[s]
            words[i // 7] |= (a | b << 2) << 4 + 4 * (i % 7)
        entries[number] = words
    return Dictionary(entries, children, np.array([p for p, _ in codewords]))


def masks(entries: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
    """Entries for kernels with masked adds: u64[65536]. Bits 0 to 27 mark the weights that are 1,
    bits 32 to 59 the weights that are 2; bits 60 to 63 are the number of pairs."""
    packed = (entries[:, 0].astype(np.uint64) & np.uint64(15)) << np.uint64(60)
    for i in range(WEIGHTS):
        code = entries[:, i // 14] >> np.uint32(4 + 2 * (i % 14)) & np.uint32(3)
        packed |= (code == 1).astype(np.uint64) << np.uint64(i)
        packed |= (code == 2).astype(np.uint64) << np.uint64(32 + i)
    return packed


SIGNED = 32
"""Bytes of an entry of signs: half a cache line, so that no entry crosses two lines."""


def signs(entries: npt.NDArray[np.uint32]) -> npt.NDArray[np.int8]:
    """Entries for kernels without an instruction that expands bits to lanes: i8[65536, 32]. -1 for
    a weight that is 1, 1 for a weight that is 2; the last element is the number of pairs."""
    lanes = np.zeros((CODEWORDS, SIGNED), np.int8)
    lanes[:, -1] = entries[:, 0] & np.uint32(15)
    for i in range(WEIGHTS):
        code = entries[:, i // 14] >> np.uint32(4 + 2 * (i % 14)) & np.uint32(3)
        lanes[:, i] = (code == 2).astype(np.int8) - (code == 1).astype(np.int8)
    return lanes
