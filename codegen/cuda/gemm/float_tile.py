"""A tile of a float32 product, by fused multiply-adds: tensor cores do not keep all 24 bits.

Stages, warps and the assignment of sums to threads are those of mma_tile.py: a thread has the rows
lane / 4 + 8i of its warp, and pairs of columns. It loads 16 bytes of a row or a column at once; the
eight rows and the four columns that a warp loads at once are in different banks.
"""

from __future__ import annotations

import itertools

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.gemm.mma_tile import MmaTile
from moec.codegen.cuda.gemm.stages import PIECE, Part
from moec.codegen.cuda.instructions import fma, load_shared

_FLOATS = 4
"""Float32 elements in a piece of 16 bytes."""


def multiply_floats(tile: MmaTile, x: Part, w: Part) -> None:
    """Computes tile.sums = x @ w^T. No thread reads the stages after it returns."""
    rows = [(t, half) for t in range(tile.row_fragments) for half in range(2)]
    x_floats = T.alloc_buffer((len(rows) * _FLOATS,), "float32", scope="local")
    w_floats = T.alloc_buffer((_FLOATS,), "float32", scope="local")

    def read(target: Buffer, first: int, base: Expr, row: Expr, piece: int) -> None:
        at = base + tile.stages.offset(T.bind(row), T.int32(piece), tile.shape.depth)
        load_shared([target[first + i] for i in range(_FLOATS)], tile.stages.pointer(at))

    def multiply(base: Expr, step: Expr) -> None:
        columns = base + tile.shape.rows * tile.shape.depth
        for piece in range(tile.shape.depth // PIECE):
            for number, (t, half) in enumerate(rows):
                row = tile.first_row + t * 16 + half * 8 + tile.lane // 4
                read(x_floats, number * _FLOATS, base, row, piece)
            for u, i in itertools.product(range(tile.column_fragments), range(2)):
                read(w_floats, 0, columns, tile.first_column + u * 8 + tile.lane % 4 * 2 + i, piece)
                for (number, (t, half)), k in itertools.product(enumerate(rows), range(_FLOATS)):
                    at = tile.sum_index(t, u, half) + i
                    total = fma(x_floats[number * _FLOATS + k], w_floats[k], tile.sums[at])
                    T.buffer_store(tile.sums, total, [at])

    tile.clear(tile.sums)
    tile.stages.run([x, w], multiply)
