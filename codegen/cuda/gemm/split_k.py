"""Dense products of few rows: the warps of a block each multiply a part of k.

    block     16 rows, 8 to 32 columns; so narrow that every SM has a block
    warp s    the chunks s, s + slices, ... of 32 elements of k
    y         the warps' sums, added in the order of warps: the same result in every run

A lane loads 16 bytes of a row at once, from global memory to registers. Its 8 elements are those
that two instructions read: mma.m16n8k16 adds products over k in any order, so both factors may have
k permuted alike. Weights are read once per 16 rows, bypassing the L1 cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cuda.gemm.gemv import check_few_rows, row_of_x
from moec.codegen.cuda.gemm.product import HALVES, Product, dense_arguments, store_row
from moec.codegen.cuda.gemm.tiles import SMALL, ExpertRows
from moec.codegen.cuda.instructions import WARP, barrier, load_past_cache, multiply
from moec.codegen.cuda.scan import each
from moec.codegen.specs.products import LinearSpec

_ROWS = 16
_CHUNK = 32  # elements of k that a warp multiplies at once
_WORDS = 4  # of 32 bits in 16 bytes
_LEAST = 4  # chunks per warp


@dataclass(frozen=True)
class SplitK:
    """`fragments` * 8 columns of a block, and the number of its warps."""

    fragments: int
    slices: int

    @property
    def columns(self) -> int:
        return self.fragments * 8

    @property
    def threads(self) -> int:
        return self.slices * WARP

    @property
    def ahead(self) -> int:
        """Chunks that a warp loads before it multiplies them: as registers allow."""
        return 4 if self.fragments <= 2 else 2


def split_of(spec: LinearSpec, sms: int) -> SplitK | None:
    """How to split k so that `sms` SMs are busy; None if whole tiles of columns do that, or if k is
    too short."""
    tiles = -(-spec.n // SMALL.columns)
    if spec.dtype not in HALVES or spec.groups != 1 or spec.gated or 2 * tiles > sms:
        return None
    if spec.k < 2 * _LEAST * _CHUNK:
        return None
    wide = [c for c in (4, 2) if -(-spec.n // (8 * c)) * 4 >= sms * 3]
    fragments = wide[0] if wide else 1
    blocks = -(-spec.n // (8 * fragments))
    slices = 16 if 2 * blocks <= sms else 8
    while slices * _LEAST * _CHUNK > spec.k:
        slices //= 2
    return SplitK(fragments, slices)


def split_k(spec: LinearSpec, split: SplitK, name: str = "split_k") -> PrimFunc:
    """The kernel (x[R, k], w[n, k][, bias[n]], y[R, n]). Raises NoMatch for products that it does
    not support."""
    check_few_rows(spec, None)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tir.noalias": True})
            launch_split_k(dense_arguments(spec), split)
    return builder.get()


def launch_split_k(p: Product, split: SplitK) -> None:
    """Launches the product, for any number of rows."""
    tiles = (p.rows + (_ROWS - 1)) // _ROWS
    across = T.launch_thread("blockIdx.x", -(-p.columns // split.columns))
    with across as x, T.launch_thread("blockIdx.y", T.max(tiles, 1)) as y:
        with T.launch_thread("threadIdx.x", split.threads) as thread:
            with T.If(y < tiles), T.Then():
                owned = ExpertRows(T.int32(0), T.bind(y * _ROWS), p.rows)
                _multiply(p, split, owned, T.bind(x * split.columns), thread)


def _multiply(p: Product, split: SplitK, owned: ExpertRows, column: Expr, thread: Expr) -> None:
    lane, warp = T.bind(thread % WARP), T.bind(thread // WARP)
    fragments, ahead = split.fragments, split.ahead
    sums = T.alloc_buffer((fragments * 4,), "float32", scope="local")
    a = T.alloc_buffer((ahead * 2 * _WORDS,), "uint32", scope="local")
    b = T.alloc_buffer((ahead * fragments * _WORDS,), "uint32", scope="local")
    rows = [T.bind(T.cast(row_of_x(p, owned, lane // 4 + 8 * h), "int64")) for h in range(2)]
    columns = [T.bind(T.min(column + (c * 8 + lane // 4), p.columns - 1)) for c in range(fragments)]
    with T.unroll(fragments * 4) as i:
        T.buffer_store(sums, T.float32(0), [i])
    with T.serial(0, -(-p.spec.k // (split.slices * ahead * _CHUNK))) as turn:
        with T.unroll(ahead) as u:
            chunk = (turn * ahead + u) * split.slices + warp
            k = T.bind(chunk * _CHUNK + lane % 4 * 8)
            for h, row in enumerate(rows):
                _load(p.spec, a, (u * 2 + h) * _WORDS, p.x, (row,), k, split)
            for c, row in enumerate(columns):
                at = (u * fragments + c) * _WORDS
                _load(p.spec, b, at, p.w, (T.int64(0), T.cast(row, "int64")), k, split)
        with T.unroll(ahead) as u, T.unroll(fragments) as c, T.unroll(2) as half:
            first, second = u * 2 * _WORDS + half * 2, (u * fragments + c) * _WORDS + half * 2
            multiply(
                p.spec.dtype,
                [sums[c * 4 + i] for i in range(4)],
                [a[first + i] for i in (0, _WORDS, 1, _WORDS + 1)],
                [b[second + i] for i in range(2)],
            )
    _add(p, split, owned, column, (thread, warp, lane), sums)


def _load(
    spec: LinearSpec,
    words: Buffer,
    first: Expr,
    source: Buffer,
    row: tuple[Expr, ...],
    k: Expr,
    split: SplitK,
) -> None:
    """Loads 8 elements of a row; zeros beyond its end."""
    targets = [words[first + i] for i in range(_WORDS)]
    if spec.k % (split.slices * split.ahead * _CHUNK) == 0:
        load_past_cache(targets, source.ptr_to([*row, k]))
        return
    for i in range(_WORDS):
        T.buffer_store(words, T.uint32(0), [first + i])
    with T.If(k < spec.k), T.Then():
        load_past_cache(targets, source.ptr_to([*row, k]))


def _add(
    p: Product,
    split: SplitK,
    owned: ExpertRows,
    column: Expr,
    position: tuple[Expr, Expr, Expr],
    sums: Buffer,
) -> None:
    """Stores the sums over all warps, a pair of columns per thread."""
    thread, warp, lane = position
    parts = T.alloc_buffer((split.slices, _ROWS, split.columns), "float32", scope="shared")
    with T.unroll(split.fragments) as c, T.unroll(4) as i:
        row, at = lane // 4 + i // 2 * 8, c * 8 + lane % 4 * 2 + i % 2
        T.buffer_store(parts, sums[c * 4 + i], [warp, row, at])
    barrier()
    word = T.alloc_buffer((1,), "uint32", scope="local")

    def store(i: Expr) -> None:
        row, at = T.bind(i // (split.columns // 2)), T.bind(i % (split.columns // 2) * 2)
        pair = [parts[0, row, at], parts[0, row, at + 1]]
        for s in range(1, split.slices):
            pair = [pair[j] + parts[s, row, at + j] for j in range(2)]
        total = (T.bind(pair[0]), T.bind(pair[1]))
        store_row(p, split.columns, owned, owned.first + row, column + at, [total], word)

    each(_ROWS * split.columns // 2, split.threads, thread, store)
