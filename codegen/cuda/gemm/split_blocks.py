"""Products whose k is split over blocks, where whole tiles would leave SMs idle.

    block          a tile of rows and columns, and a part of the steps of k; its sums go to memory
    second launch  adds the parts of each tile in their order, and stores rows: the same bits in
                   every run

The number of parts depends on the number of rows alone, not on the routing. Where it is 1, there is
no second launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.gemm.layout import GROUP
from moec.codegen.cuda.gemm.mma_tile import MmaTile
from moec.codegen.cuda.gemm.product import Product, store_row, tiles_of
from moec.codegen.cuda.gemm.stages import halves
from moec.codegen.cuda.gemm.tiles import ExpertRows, TileShape
from moec.codegen.cuda.instructions import WARP, barrier
from moec.codegen.specs.products import LinearSpec
from moec.target.cuda import CudaTarget

_LEAST = 4  # steps of a part, so that its stages are filled
_WARPS = 8  # of a block that adds parts


def can_split(spec: LinearSpec, target: CudaTarget, shape: TileShape) -> bool:
    """Whether k is split for some number of rows: more than one per expert, on average."""
    least = spec.groups * _across(spec, shape)
    return target.sms >= 2 * least and _steps(spec, shape) >= 2 * _LEAST


def memory_of(
    spec: LinearSpec, target: CudaTarget, shapes: Sequence[TileShape]
) -> tuple[int, int] | None:
    """The shape of the memory of parts: a tile for each SM. None if no tile is split."""
    sizes = [shape.rows * shape.columns for shape in shapes if can_split(spec, target, shape)]
    return (target.sms, max(sizes)) if sizes else None


@dataclass(frozen=True)
class SplitTiles:
    """The tiles of a product in `count` parts of k each (int32, at least 1)."""

    p: Product
    shape: TileShape
    memory: Buffer
    count: Expr

    @property
    def across(self) -> int:
        return _across(self.p.spec, self.shape)

    def launch(
        self, compute: Callable[[Expr, ExpertRows, Expr, tuple[Expr, Expr], Expr], None]
    ) -> None:
        """Launches a block per part of a tile, which runs compute(thread, rows, first packed
        column, steps of k, slot of the memory)."""
        most = tiles_bound(self.p, self.shape.rows) * self.across * self.count
        grid = T.launch_thread("blockIdx.x", T.max(most, 1))
        with grid as slot, T.launch_thread("threadIdx.x", self.shape.threads) as thread:
            tiles = tiles_of(self.p, self.shape.rows, self.shape.threads, thread)
            with T.If(slot < tiles.total * self.across * self.count), T.Then():
                steps = _steps(self.p.spec, self.shape)
                share = T.truncdiv(steps + self.count - 1, self.count)
                index = T.bind(T.truncdiv(slot, self.count))
                owned = tiles.find(index // self.across)
                first = T.bind((slot - index * self.count) * share)
                span = (first, T.bind(T.min(first + share, steps)))
                column = T.bind(index % self.across * self.shape.columns)
                compute(thread, owned, column, span, slot)

    def store(self, tile: MmaTile, slot: Expr) -> None:
        """Stores the sums of a part."""
        for t in range(tile.row_fragments):
            for half in range(2):
                row = T.bind(tile.first_row + t * 16 + half * 8 + tile.lane // 4)
                for u in range(tile.column_fragments):
                    column = T.bind(tile.first_column + u * 8 + tile.lane % 4 * 2)
                    at = tile.sum_index(t, u, half)
                    for i in range(2):
                        to = [slot, row * self.shape.columns + column + i]
                        T.buffer_store(self.memory, tile.sums[at + i], to)

    def launch_sum(self) -> None:
        """Adds the parts of each tile, and stores its rows. A warp adds every eighth part of 32
        pairs of columns, of gate and up alike; then the sums of the warps are added."""
        size = self.shape.rows * self.shape.columns // self._width
        blocks = size // WARP  # of a tile
        count = T.max(tiles_bound(self.p, self.shape.rows) * self.across * blocks, 1)
        grid = T.launch_thread("blockIdx.x", count)
        with grid as block, T.launch_thread("threadIdx.x", _WARPS * WARP) as thread:
            tiles = tiles_of(self.p, self.shape.rows, _WARPS * WARP, thread)
            index = T.bind(block // blocks)
            with T.If(index < tiles.total * self.across), T.Then():
                owned = tiles.find(index // self.across)
                column = T.bind(index % self.across * self.shape.columns)
                pair = T.bind(block % blocks * WARP + thread % WARP)
                self._add(owned, column, T.bind(index * self.count), pair, thread)

    @property
    def _width(self) -> int:
        """Packed columns of a pair of columns."""
        return 4 if self.p.spec.gated else 2

    def _add(self, owned: ExpertRows, column: Expr, slot: Expr, pair: Expr, thread: Expr) -> None:
        width, columns = self._width, self.shape.columns
        lane, warp = T.bind(thread % WARP), T.bind(thread // WARP)
        row, within = T.bind(pair // (columns // width)), pair % (columns // width) * 2
        if self.p.spec.gated:
            within = within // GROUP * (2 * GROUP) + within % GROUP
        within = T.bind(within)
        sums = T.alloc_buffer((width,), "float32", scope="local")
        shared = T.alloc_buffer((_WARPS, WARP, width), "float32", scope="shared")
        for i in range(width):
            T.buffer_store(sums, T.float32(0), [i])
        turns = T.truncdiv(self.count - warp + (_WARPS - 1), _WARPS)
        with T.serial(0, turns) as turn:
            for i in range(width):
                at = row * columns + within + i // 2 * GROUP + i % 2
                value = self.memory[slot + warp + turn * _WARPS, at]
                T.buffer_store(sums, sums[i] + value, [i])
        for i in range(width):
            T.buffer_store(shared, sums[i], [warp, lane, i])
        barrier()
        word = T.alloc_buffer((1,), "uint32", scope="local")
        with T.If(warp == 0), T.Then():
            totals = []
            for i in range(width):
                total = shared[0, lane, i]
                for other in range(1, _WARPS):
                    total = total + shared[other, lane, i]
                totals.append(T.bind(total))
            fragments = list(zip(totals[::2], totals[1::2], strict=True))
            store_row(self.p, columns, owned, owned.first + row, column + within, fragments, word)


def parts_of(p: Product, target: CudaTarget, shape: TileShape) -> SplitTiles | None:
    """None if k is never split."""
    if p.memory is None or not can_split(p.spec, target, shape):
        return None
    tiles = T.max(tiles_bound(p, shape.rows) * _across(p.spec, shape), 1)
    most = _steps(p.spec, shape) // _LEAST
    count = T.bind(T.max(T.min(T.truncdiv(target.sms, tiles), most), 1))
    return SplitTiles(p, shape, p.memory, count)


def tiles_bound(p: Product, rows: int) -> Expr:
    """The most tiles of `rows` rows, over all routings."""
    return T.min(p.rows, (p.rows + (rows - 1)) // rows + (p.spec.groups - 1))


def _across(spec: LinearSpec, shape: TileShape) -> int:
    return -(-spec.n * (2 if spec.gated else 1) // shape.columns)


def _steps(spec: LinearSpec, shape: TileShape) -> int:
    return -(-halves(spec.dtype, spec.k) // shape.depth)
