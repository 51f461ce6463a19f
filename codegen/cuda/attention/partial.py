"""Partial results of attention, each over a part of the keys, and how they are combined.

    part p of a row    the greatest score, the sum of weights, and the sums of weighted values
    the result         sum over p of exp2(top[p] - top) * sums[p] / the same of the weights

Parts are added in their order, so the result has the same bits in every run (Dao et al.,
Flash-Decoding, 2023).
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.attention.arguments import LOWEST, Arguments, store_pair
from moec.codegen.cuda.attention.softmax import divisor_of
from moec.codegen.cuda.instructions import WARP, barrier, exp2, warp_greatest
from moec.codegen.cuda.scan import each
from moec.codegen.specs.attention import AttentionSpec
from moec.target.cuda import CudaTarget

MOST_PARTS = 128
_ROWS = 16  # of a tile of queries
_BLOCKS = 2  # per SM
_THREADS = 128


def slots(target: CudaTarget) -> int:
    """Parts of rows in memory, at most: those of two blocks per SM."""
    return _BLOCKS * target.sms * _ROWS


def slot_width(spec: AttentionSpec) -> int:
    """float32 elements of a part of a row: the sums, the greatest score, the sum of weights."""
    return spec.value_dim + 2


def count_parts(a: Arguments, target: CudaTarget, least: int) -> Expr:
    """int32: the number of parts of the keys with which each SM has two blocks, of at least `least`
    keys each."""
    tiles = (a.queries * a.spec.group + (_ROWS - 1)) // _ROWS
    blocks = T.max(a.batch * a.spec.kv_heads * tiles, T.int64(1))
    count = T.min(T.int64(_BLOCKS * target.sms) // blocks, a.keys // least)
    return T.cast(T.max(T.min(count, T.int64(MOST_PARTS)), T.int64(1)), "int32")


def limit_of(top: Expr) -> Expr:
    """What weights are relative to: the greatest score, or 0 if no key is visible."""
    return T.bind(T.if_then_else(top == T.float32(LOWEST), T.float32(0), top))


def launch_combination(a: Arguments, parts: Expr) -> None:
    """Writes out from the memory, [slots, slot_width]: the parts of a row one after the other, rows
    by text, key head, query and head. One block per row."""
    spec, width, memory = a.spec, a.spec.value_dim, a.memory
    assert memory is not None
    rows = a.batch * spec.q_heads * a.queries
    grid = T.launch_thread("blockIdx.x", T.cast(T.max(rows, T.int64(1)), "int32"))
    with grid as block, T.launch_thread("threadIdx.x", _THREADS) as thread:
        scales = T.alloc_buffer((MOST_PARTS,), "float32", scope="shared")
        totals = T.alloc_buffer((MOST_PARTS,), "float32", scope="shared")
        row = T.bind(T.cast(block, "int64"))
        with T.If(row < rows), T.Then():
            first = T.bind(block * parts)
            _weigh(memory, width, (first, parts, thread), scales, totals)
            total = T.alloc_buffer((1,), "float32", scope="local")
            T.buffer_store(total, T.float32(0), [0])
            with T.serial(0, parts) as p:
                T.buffer_store(total, total[0] + totals[p], [0])
            divisor = divisor_of(total[0])
            b, head, query = _row(a, row)

            def store(pair: Expr) -> None:
                sums = T.alloc_buffer((2,), "float32", scope="local")
                for i in range(2):
                    T.buffer_store(sums, T.float32(0), [i])
                with T.serial(0, parts) as p:
                    for i in range(2):
                        value = memory[first + p, pair * 2 + i]
                        T.buffer_store(sums, sums[i] + scales[p] * value, [i])
                store_pair(a, b, head, query, pair, (sums[0] / divisor, sums[1] / divisor))

            each(width // 2, _THREADS, thread, store)


def _weigh(
    memory: Buffer,
    width: int,
    position: tuple[Expr, Expr, Expr],
    scales: Buffer,
    totals: Buffer,
) -> None:
    """The factor of each part and its sum of weights times that, a part per thread. `position` is
    the first slot of the row, the number of parts and the thread."""
    first, parts, thread = position
    best = T.alloc_buffer((1,), "float32", scope="local")
    T.buffer_store(best, T.float32(LOWEST), [0])
    # Each warp finds the greatest score by itself.
    with T.serial(0, MOST_PARTS // WARP) as turn:
        part = T.bind(turn * WARP + thread % WARP)
        with T.If(part < parts), T.Then():
            top = memory[first + part, width]
            T.buffer_store(best, T.call_extern("float32", "fmaxf", best[0], top), [0])
    limit = limit_of(warp_greatest(best[0]))
    with T.If(thread < parts), T.Then():
        scale = T.bind(exp2(memory[first + thread, width] - limit))
        T.buffer_store(scales, scale, [thread])
        T.buffer_store(totals, scale * memory[first + thread, width + 1], [thread])
    barrier()


def _row(a: Arguments, row: Expr) -> tuple[Expr, Expr, Expr]:
    """(text, head, query) of a row."""
    group, rows = a.spec.group, a.spec.group * a.queries
    above = T.bind(T.truncdiv(row, rows))
    within = T.bind(row - above * rows)
    b, query = T.bind(T.truncdiv(above, a.spec.kv_heads)), T.bind(T.truncdiv(within, group))
    head = T.bind((above - b * a.spec.kv_heads) * group + within - query * group)
    return b, head, query
