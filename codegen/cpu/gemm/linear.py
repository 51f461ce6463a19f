"""Dense products: y[T, n] = f(x[T, k] @ w^T + bias), parallel over tiles of columns and of rows.

The threads share the (tile, chunk of rows) pairs, with tiles as the outer loop: consecutive pairs
use the same weights, which then stay in one core's cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cpu import parallel
from moec.codegen.cpu.frame import argument, kernel
from moec.codegen.cpu.gemm.amx_tile import AmxTile
from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.gemm.product import ProductOutput, TileProduct, W, X
from moec.codegen.cpu.gemm.row_blocks import ceil_of
from moec.codegen.cpu.gemm.sorted_rows import sorted_product
from moec.codegen.cpu.gemm.tile import Epilogue, Operands, RowRun, Tile
from moec.codegen.cpu.gemm.upconvert_tile import WidenedTile
from moec.codegen.specs.products import LinearSpec
from moec.target.cpu import CpuTarget

MANY = 32  # from this number of rows on, a thread computes some tiles of columns at once


def linear(
    target: CpuTarget, spec: LinearSpec, epilogue: Epilogue | None = None, name: str = "linear"
) -> PrimFunc:
    """A kernel (x[T, k], w packed[, bias packed], y[T, n]).

    `spec.groups` is 1. `epilogue` maps the float32 vector of sums (gated: the vectors of gate and
    of up) to the vector that is rounded to y; it is called as the kernel is built.
    """
    if spec.groups != 1:
        raise ValueError(f"{name}: a dense product has one group of weights, not {spec.groups}")
    if spec.gated and epilogue is None:
        raise ValueError(f"{name}: gate and up need an epilogue that joins them")
    return dense_products([plain_product(target, spec, epilogue)], name)


def linears(target: CpuTarget, specs: tuple[LinearSpec, ...], name: str = "linears") -> PrimFunc:
    """Several products of the same rows as one kernel: (x[T, k], (w packed[, bias packed]) of
    each, y[T, n] of each).

    One kernel keeps all threads busy from the end of one product to the start of the next, which
    matters for short products, such as queries, keys and values of one token.
    """
    if len({(spec.k, spec.dtype) for spec in specs}) != 1:
        raise ValueError(f"{name}: the products are of rows of other widths or dtypes")
    if any(spec.groups != 1 or spec.gated for spec in specs):
        raise ValueError(f"{name}: the products must be dense, each with one matrix")
    return dense_products([plain_product(target, spec) for spec in specs], name)


def plain_product(
    target: CpuTarget, spec: LinearSpec, epilogue: Epilogue | None = None
) -> TileProduct[Buffer, Buffer]:
    """A product of rows and weights that are not quantised."""
    layout = Layout(spec, target)
    kind = AmxTile if layout.amx else WidenedTile if layout.widened else Tile
    return TileProduct(
        layout,
        lambda rows: argument("x", (rows, spec.k), spec.dtype),
        lambda suffix, groups: argument(f"w{suffix}", (groups, *layout.shape[1:]), layout.dtype),
        lambda x, w, out: kind(layout, Operands(x, w, *out), epilogue),
    )


def dense_products(products: Sequence[TileProduct[X, W]], name: str) -> PrimFunc:
    """A kernel (rows of x, (weights[, bias packed]) of each product, y[T, n] of each)."""
    with kernel(name, products[0].layout.target) as frame:
        t = T.int64()
        x = products[0].rows(t)
        read = [(p.weights(str(i), 1), p.bias(str(i), 1)) for i, p in enumerate(products)]
        tiles = []
        for i, (product, (w, bias)) in enumerate(zip(products, read, strict=True)):
            spec = product.layout.spec
            y = argument(f"y{i}", (t, spec.n), spec.y_dtype)
            tiles.append(product.tile(x, w, ProductOutput(y, bias, lambda r: r, None, False)))
        shared_out(tiles, t)
    return frame.function


def shared_out(tiles: Sequence[Tile], rows: Expr) -> None:
    """A parallel loop over all tiles of columns of the products and all chunks of `rows` rows."""
    size, amx = tiles[0].row_chunk, tiles[0].layout.amx
    chunks = T.truncdiv(rows + (size - 1), T.int64(size))
    most = max(tile.dense_tiles for tile in tiles)
    at_once = 1 if most == 1 else T.bind(T.Select(rows < MANY, T.int64(1), T.int64(most)))
    pieces = [_ceildiv(tile.layout.tiles, at_once) for tile in tiles]
    count = sum(pieces[1:], pieces[0])
    sums = rows * sum(tile.layout.sums for tile in tiles)
    weights = sum(tile.layout.bytes for tile in tiles)
    with parallel.parallel_for(chunks * count, sums, weights) as unit:
        # AMX is so fast that the rows must stay in the cache, while weights are streamed.
        inner = T.int64(count) if amx else chunks
        outer, rest = T.bind(T.truncdiv(unit, inner)), T.bind(T.truncmod(unit, inner))
        piece = T.bind(T.cast(rest if amx else outer, "int32"))
        first = T.bind((outer if amx else rest) * size)
        height = T.bind(T.min(rows - first, T.int64(size)))
        last = T.bind(first + size >= rows)
        _dispatch(list(zip(tiles, pieces, strict=True)), piece, at_once, first, height, last)


def _dispatch(
    tiles: Sequence[tuple[Tile, Expr | int]],
    piece: Expr,
    at_once: Expr | int,
    first: Expr,
    rows: Expr,
    last: Expr,
) -> None:
    """Emits the product and tiles of piece number `piece` of all products. `last`: these are the
    last rows for the tiles."""
    (tile, pieces), *others = tiles

    def run() -> None:
        if isinstance(at_once, int):
            column, width = piece, at_once
        else:
            most = T.cast(at_once, "int32")
            column = T.bind(piece * most)
            width = T.bind(T.min(most, tile.layout.tiles - column))
        behind = T.bind(T.min(column + width, T.int32(tile.layout.tiles - 1)))
        following = (T.int32(0), T.bind(T.Select(last, behind, column)))
        tile.rows(RowRun(T.int32(0), column, first, rows, following, width))

    if not others:
        run()
        return
    with T.If(piece < pieces):
        with T.Then():
            run()
        with T.Else():
            rest = T.bind(piece - T.cast(pieces, "int32"))
            _dispatch(others, rest, at_once, first, rows, last)


def _ceildiv(count: int, by: Expr | int) -> Expr | int:
    if isinstance(by, int):
        return ceil_of(count, by)
    return T.bind(T.truncdiv(T.int64(count) + by - 1, by))


def grouped_linear(
    target: CpuTarget,
    spec: LinearSpec,
    epilogue: Epilogue | None = None,
    name: str = "grouped",
    zero_unowned_rows: bool = True,
    *,
    from_slots: bool = False,
) -> PrimFunc:
    """A kernel (x[R, k], ends i32[E][, key, plan], w packed[, bias packed], y[R, n]).

    `from_slots` is that of `sorted_product`.
    """
    return _grouped(target, spec, epilogue, name, 0, None, zero_unowned_rows, from_slots)


def gathered_linear(
    target: CpuTarget,
    spec: LinearSpec,
    top_k: int,
    epilogue: Epilogue | None = None,
    scale_dtype: str | None = None,
    name: str = "gathered",
    zero_unowned_rows: bool = True,
    *,
    from_slots: bool = False,
) -> PrimFunc:
    """A kernel (x[T, k], order i32[R], ends i32[E][, key, plan], w packed[, bias packed][, scale],
    y[R, n]).

    With `scale_dtype`, scale[T, top_k] multiplies the row of x of each choice (the product is
    scaled before the bias is added, which is equivalent). `from_slots` is that of `sorted_product`.
    """
    return _grouped(target, spec, epilogue, name, top_k, scale_dtype, zero_unowned_rows, from_slots)


def _grouped(
    target: CpuTarget,
    spec: LinearSpec,
    epilogue: Epilogue | None,
    name: str,
    top_k: int,
    scale_dtype: str | None,
    zero_unowned_rows: bool,
    from_slots: bool,
) -> PrimFunc:
    if spec.gated and epilogue is None:
        raise ValueError(f"{name}: gate and up need an epilogue that joins them")
    product = plain_product(target, spec, epilogue)
    return sorted_product(
        product, name, top_k, scale_dtype, zero_unowned_rows, from_slots=from_slots
    )
