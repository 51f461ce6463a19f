"""Loops over the codewords of ternary weights (ternary.py), compiled by numba, which keeps the
machine code on disk. In a file of their own, because importing numba takes long and few models have
such weights."""

from __future__ import annotations

from typing import Any

import numba

from moec.ir.formats.jit import compiled, compiled_parallel
from moec.ir.formats.ternary_code import ROOT


def _match(row: Any, at: int, children: Any) -> tuple[int, int]:
    """The longest codeword from weight `at` on, and its end."""
    width, node, word = len(row), ROOT, -1
    while at < width:
        second = row[at + 1] if at + 1 < width else 0
        node = children[node, 3 * row[at] + second]
        if node < 0:
            break
        word = node
        at += 2
    return word, at


_longest = compiled(_match)


def _count_rows(rows: Any, children: Any, counts: Any) -> None:
    for r in numba.prange(len(rows)):
        at, count = 0, 0
        while at < rows.shape[1]:
            _, at = _longest(rows[r], at, children)
            count += 1
        counts[r] = count


def _write_rows(rows: Any, children: Any, starts: Any, stream: Any) -> None:
    for r in numba.prange(len(rows)):
        at, position = 0, starts[r]
        while at < rows.shape[1]:
            word, at = _longest(rows[r], at, children)
            stream[position] = word
            position += 1


def _read_rows(stream: Any, starts: Any, entries: Any, codes: Any, complete: Any) -> None:
    width = codes.shape[1]
    for r in numba.prange(len(codes)):
        at = 0
        for position in range(starts[r], starts[r + 1]):
            word = stream[position]
            weights = 2 * (entries[word, 0] & 15)
            for i in range(min(weights, width - at)):
                codes[r, at + i] = entries[word, i // 14] >> (4 + 2 * (i % 14)) & 3
            at += weights
        complete[r] = at == width + width % 2


count = compiled_parallel(_count_rows)
write = compiled_parallel(_write_rows)
read = compiled_parallel(_read_rows)
