"""The arguments and results of a grouped product, independent of the kernel that computes it.

y[r] = f(x[row of r] @ w[e]^T + bias[e])        for ends[e-1] <= r < ends[e]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.activation import Epilogue
from moec.codegen.cuda.gemm.tiles import ExpertRows, OneExpert, RowTiles, row_tiles
from moec.codegen.cuda.instructions import argument, round_pair
from moec.codegen.specs.products import LinearSpec
from moec.errors import NoMatch
from moec.target.cuda import CudaTarget

HALVES = ("bfloat16", "float16")

Pair: TypeAlias = tuple[Expr, Expr]
"""The float32 sums of two neighbouring columns, which one thread holds."""


@dataclass(frozen=True)
class Product:
    """The arguments of a kernel. `order` gathers the rows of x, None if they are sorted already.
    Without `ends`, the only expert owns all rows."""

    spec: LinearSpec
    epilogue: Epilogue | None
    ends: Buffer | None
    x: Buffer
    order: Buffer | None
    top_k: int
    w: Buffer
    bias: Buffer | None
    y: Buffer
    rows: Expr

    @property
    def columns(self) -> int:
        """The number of columns of the packed weights."""
        return self.spec.n * (2 if self.spec.gated else 1)


def check_product(
    spec: LinearSpec, target: CudaTarget, epilogue: Epilogue | None, shared_memory: int
) -> None:
    """Raises NoMatch if no tile with `shared_memory` bytes can compute the product."""
    if spec.dtype not in (*HALVES, "float32"):
        raise NoMatch(f"products of {spec.dtype} have no CUDA kernel; 16-bit products have one")
    if spec.y_dtype not in (spec.dtype, "float32"):
        raise NoMatch(f"its result is {spec.y_dtype}, not {spec.dtype} or float32")
    if spec.k % (4 if spec.dtype == "float32" else 8):
        raise NoMatch(f"its rows of {spec.k} elements are not a multiple of 16 bytes")
    if spec.gated and spec.n % GROUP:
        raise NoMatch(f"its {spec.n} columns of gate and up cannot be interleaved")
    if spec.gated and epilogue is None:
        raise NoMatch("gate and up need an epilogue that joins them")
    check_shared_memory(spec, target, shared_memory)


def check_shared_memory(spec: LinearSpec, target: CudaTarget, shared_memory: int) -> None:
    """Raises NoMatch if a block cannot have `shared_memory` bytes in addition to the counts of
    tiles."""
    if shared_memory + 8 * (spec.groups + 1) > target.shared_memory:
        raise NoMatch(
            f"its tile needs {shared_memory} bytes of shared memory, and a block of "
            f"{target.name} has {target.shared_memory}"
        )


def arguments(
    spec: LinearSpec,
    epilogue: Epilogue | None,
    top_k: int,
    *,
    x: tuple[str, int] | None = None,
    w: tuple[str, int] | None = None,
) -> Product:
    """x[R or T, k][, order i32[R]], ends i32[E], w packed[, bias packed], y[R, n].

    `x` and `w` are the dtype and the number of elements of a stored row; the default is k elements
    of the spec's dtype.
    """
    x_dtype, x_width = x or (spec.dtype, spec.k)
    w_dtype, w_width = w or (spec.dtype, spec.k)
    many, tokens = T.int32(), T.int32()
    columns = spec.n * (2 if spec.gated else 1)
    x_rows = tokens if top_k else many
    rows = argument("x", (x_rows, x_width), x_dtype)
    order = argument("order", (many,), "int32") if top_k else None
    ends = argument("ends", (spec.groups,), "int32")
    weights = argument("w", (spec.groups, columns, w_width), w_dtype)
    bias = argument("bias", (spec.groups, columns), spec.dtype) if spec.bias else None
    y = argument("y", (many, spec.n), spec.y_dtype)
    return Product(spec, epilogue, ends, rows, order, top_k, weights, bias, y, many)


def dense_arguments(spec: LinearSpec) -> Product:
    """x[R, k], w[n, k][, bias[n]], y[R, n]."""
    rows = T.int32()
    x = argument("x", (rows, spec.k), spec.dtype)
    w = argument("w", (spec.n, spec.k), spec.dtype)
    bias = argument("bias", (spec.n,), spec.dtype) if spec.bias else None
    y = argument("y", (rows, spec.n), spec.y_dtype)
    # Viewed as the stack of one expert.
    w = T.decl_buffer((1, spec.n, spec.k), spec.dtype, data=w.data)
    if bias is not None:
        bias = T.decl_buffer((1, spec.n), spec.dtype, data=bias.data)
    return Product(spec, None, None, x, None, 0, w, bias, y, rows)


def tiles_of(p: Product, rows: int, threads: int, thread: Expr) -> RowTiles | OneExpert:
    """The tiles of `rows` rows, counted by the block; all threads may read the counts
    afterwards."""
    if p.ends is None:
        return OneExpert(rows, p.rows)
    return row_tiles(p.ends, p.spec.groups, rows, threads, thread)


def store_row(
    p: Product,
    tile_columns: int,
    owned: ExpertRows,
    row: Expr,
    column: Expr,
    fragments: Sequence[Pair],
    word: Buffer,
) -> None:
    """Stores this thread's part of a row, if the expert owns the row: pairs 8 packed columns apart,
    from `column` on. word: uint32[1], scratch space."""
    step = 2 if p.spec.gated else 1  # fragments that one result is made of
    with T.If(row < owned.end), T.Then():
        for u in range(0, len(fragments), step):
            at = T.bind(column + u * GROUP)
            if p.columns % tile_columns:
                with T.If(at < p.columns), T.Then():
                    _store_pair(p, owned, row, at, fragments[u : u + step], word)
            else:
                _store_pair(p, owned, row, at, fragments[u : u + step], word)


def _store_pair(
    p: Product, owned: ExpertRows, row: Expr, column: Expr, parts: Sequence[Pair], word: Buffer
) -> None:
    """Stores two neighbouring elements of y, from one pair or from the pairs of gate and up."""
    results = []
    for i in range(2):
        values = []
        for part, pair in enumerate(parts):
            value = pair[i]
            if p.bias is not None:
                at = column + part * GROUP + i
                at = T.min(at, p.columns - 1) if p.spec.n % 2 else at
                value = value + T.cast(p.bias[owned.expert, at], "float32")
            values.append(T.bind(value))
        results.append(T.bind(p.epilogue(*values)) if p.epilogue else values[0])
    to = T.bind(column // (2 * GROUP) * GROUP + column % GROUP if p.spec.gated else column)
    wide = T.cast(row, "int64")  # rows * n may exceed 32 bits
    if p.spec.n % 2:  # the last pair is half, and pairs of odd rows are not aligned
        for i, result in enumerate(results):
            with T.If(to + i < p.spec.n), T.Then():
                T.buffer_store(p.y, T.cast(result, p.spec.y_dtype), [wide, to + i])
        return
    if p.spec.y_dtype == "float32":
        for i, result in enumerate(results):
            T.buffer_store(p.y, result, [wide, to + i])
        return
    round_pair(p.spec.dtype, word[0], *results)
    words = T.decl_buffer((p.rows, p.spec.n // 2), "uint32", data=p.y.data)
    T.buffer_store(words, word[0], [wide, to // 2])


GROUP = 8  # rows of gate, then of up


def interleave(gate: NDArray[np.generic], up: NDArray[np.generic]) -> NDArray[np.generic]:
    """[E, n, ...] twice -> [E, 2n, ...], for matrices or biases.

    Raises NoMatch if n is not a multiple of 8.
    """
    experts, n, *rest = gate.shape
    if n % GROUP:
        raise NoMatch(f"gate and up of {n} columns cannot be interleaved by {GROUP}")
    both = [part.reshape(experts, n // GROUP, 1, GROUP, *rest) for part in (gate, up)]
    return np.ascontiguousarray(np.concatenate(both, 2).reshape(experts, 2 * n, *rest))
