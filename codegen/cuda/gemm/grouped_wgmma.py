"""Products of experts on sm_90a: like grouped.py, by TMA and wgmma.

    y[r] = f(x[row of r] @ w[e]^T + bias[e])        for ends[e-1] <= r < ends[e]

Boxes may extend beyond an expert's rows or weights: results there are not stored. TMA fills
elements outside the tensors with zeros. TMA copies neighbours: rows that are gathered are copied by
cp.async.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.activation import Epilogue
from moec.codegen.cuda.gemm.gemv import row_of_x
from moec.codegen.cuda.gemm.product import (
    HALVES,
    Product,
    check_product,
    store_row,
    tiles_of,
)
from moec.codegen.cuda.gemm.tiles import ExpertRows, OneExpert, RowTiles, row_and_column
from moec.codegen.cuda.instructions import (
    arrive,
    commit_copies,
    commit_products,
    copy_async,
    copy_box,
    describe_matrix,
    expect_bytes,
    fence_products,
    give_registers,
    init_barrier,
    multiply_group,
    publish_barriers,
    publish_copies,
    take_registers,
    wait_barrier,
    wait_copies,
    wait_products,
)
from moec.codegen.specs.products import LinearSpec
from moec.errors import NoMatch
from moec.target.cuda import CudaTarget

# A tile of a product by wgmma, loaded by TMA. For sm_90a only.
#
#     warpgroup 0     one thread copies boxes of x and w into stages as they become free; rows of x
#                     that are gathered are copied by all of its threads, by cp.async
#     warpgroup 1, 2  multiply 64 of the 128 rows each, and free a stage when its products are done
#
#     full[s]   one arrival and the bytes of the boxes, and one arrival of each thread that copied
#               gathered rows: stage s may be read
#     empty[s]  two arrivals, of both groups: stage s may be written
#
# A wait is for the parity of a phase; the n-th use of stage s is its phase n. The first wait for an
# empty stage is for the phase before the first, which counts as ended.
#
# A thread that copies rows arrives for a step _BEHIND steps later, so that its copies of that many
# steps are in flight. The products of one step are in flight when the stage of the step before it
# is freed: before the copies of step s there must be arrivals for step s - STAGES + 1.

ROWS, DEPTH = 128, 64
COLUMNS = (128, 256)
THREADS = 384
STAGES = 4
_LOADERS = 128  # threads
_BEHIND = STAGES - 2
_PIECE = 8  # elements of a copy, 16 bytes
COPIES = ROWS * DEPTH // _PIECE // _LOADERS
"""Of each thread that copies gathered rows, for a stage."""
_PART = ROWS * DEPTH  # elements of x in a stage, before those of w


def columns_of(columns: int) -> int:
    """The columns of a tile, for a product of so many: the more, the fewer elements are read for
    each product; but no more tiles with a tail."""
    narrow, wide = COLUMNS
    return wide if columns % wide == 0 or columns % wide > narrow else narrow


def shared_memory(columns: int) -> int:
    """Bytes of shared memory: the stages of 16-bit elements, and the barriers."""
    return STAGES * (ROWS + columns) * DEPTH * 2 + STAGES * 16


@dataclass(frozen=True)
class WgmmaTile:
    """Buffers of one block. `depth` is the length of a row, `steps` the number of stages that a
    tile takes. `gathers`: rows of x are not neighbours."""

    dtype: str
    columns: int
    depth: int
    steps: int
    gathers: bool
    thread: Expr
    group: Expr
    stages: Buffer
    barriers: Buffer
    sums: Buffer
    descriptors: Buffer

    @property
    def stage(self) -> int:
        """Elements in a stage."""
        return (ROWS + self.columns) * DEPTH

    def full(self, stage: Expr | int) -> Expr:
        return self.barriers.ptr_to([stage])

    def empty(self, stage: Expr | int) -> Expr:
        return self.barriers.ptr_to([STAGES + stage])

    def start(self) -> None:
        """Initialises the barriers; a barrier of the block must follow."""
        with T.If(self.thread == 0), T.Then():
            for stage in range(STAGES):
                init_barrier(self.full(stage), 1 + _LOADERS * self.gathers)
                init_barrier(self.empty(stage), 2)
            publish_barriers()

    def load(self, x: Expr, w: Expr, x_row: Expr, w_row: Expr, done: Expr) -> None:
        """Loads the boxes of a tile by the maps x and w, after `done` stages of earlier tiles. One
        thread calls it."""
        with T.serial(0, self.steps) as step:
            stage, parity = _turn(done + step)
            wait_barrier(self.empty(stage), 1 - parity)
            expect_bytes(self.full(stage), self.stage * 2)
            base = T.bind(stage * self.stage)
            column = step * DEPTH
            copy_box(self.stages.ptr_to([base]), x, column, x_row, self.full(stage))
            copy_box(self.stages.ptr_to([base + _PART]), w, column, w_row, self.full(stage))

    def row(self, copy: int) -> Expr:
        """The row of the tile of a copy of this thread, which copies the same piece of each."""
        return self.thread // _PIECE + copy * (_LOADERS // _PIECE)

    def gather(self, x: Callable[[int, Expr], Expr], w: Expr, w_row: Expr, done: Expr) -> None:
        """Loads gathered rows, and boxes by the map w. x(copy, column) is an element's address. All
        threads of the group call it, and `finish` after the last tile."""
        piece = T.bind(self.thread % _PIECE)
        swizzled = T.bitwise_xor(piece, self.row(0) % 8) * _PIECE  # rows of copies are equal mod 8
        offset = T.bind(self.row(0) * DEPTH + swizzled)
        with T.serial(0, self.steps) as step:
            stage, parity = _turn(done + step)
            wait_barrier(self.empty(stage), 1 - parity)
            base = T.bind(stage * self.stage)
            with T.If(self.thread == 0), T.Then():
                expect_bytes(self.full(stage), (self.stage - _PART) * 2)
                to = self.stages.ptr_to([base + _PART])
                copy_box(to, w, step * DEPTH, w_row, self.full(stage))
            column = T.bind(step * DEPTH + piece * _PIECE)
            for copy in range(COPIES):
                to = self.stages.ptr_to([base + offset + (self.row(copy) - self.row(0)) * DEPTH])
                if self.depth % DEPTH:
                    size = T.if_then_else(column < self.depth, T.uint32(16), T.uint32(0))
                    copy_async(to, x(copy, T.min(column, self.depth - _PIECE)), size)
                else:
                    copy_async(to, x(copy, column))
            commit_copies()
            with T.If(done + step >= _BEHIND), T.Then():
                wait_copies(_BEHIND)
                publish_copies()
                arrive(self.full((done + step - _BEHIND) % STAGES))

    def finish(self, done: Expr) -> None:
        """Arrives for the last of `done` steps."""
        wait_copies(0)
        publish_copies()
        for behind in range(_BEHIND, 0, -1):
            with T.If(done >= behind), T.Then():
                arrive(self.full((done - behind) % STAGES))

    def compute(self, done: Expr) -> None:
        """Computes sums = x @ w^T for the 64 rows of this warpgroup; the products of one step stay
        in flight."""
        with T.serial(0, self.steps) as step:
            stage, parity = _turn(done + step)
            wait_barrier(self.full(stage), parity)
            base = T.bind(stage * self.stage)
            offset = T.bind((self.group - 1) * (64 * DEPTH))
            describe_matrix(self.descriptors[0], self.stages.ptr_to([base + offset]))
            describe_matrix(self.descriptors[1], self.stages.ptr_to([base + _PART]))
            fence_products()
            for k in range(DEPTH // 16):
                further = T.uint64(k * 2)  # 32 bytes, in units of 16
                multiply_group(
                    self.dtype,
                    [self.sums[i] for i in range(self.columns // 2)],
                    self.descriptors[0] + further,
                    self.descriptors[1] + further,
                    T.Or(step > 0, T.bool(k > 0)),
                    self.columns,
                )
            commit_products()
            wait_products(1)
            with T.If(step > 0), T.Then():
                self._free(_turn(done + step - 1)[0])
        wait_products(0)
        self._free(_turn(done + (self.steps - 1))[0])

    def _free(self, stage: Expr) -> None:
        with T.If(self.thread % 128 == 0), T.Then():
            arrive(self.empty(stage))


def _turn(done: Expr) -> tuple[Expr, Expr]:
    """The stage of a step, and the parity of its round."""
    return T.bind(done % STAGES), T.bind(done // STAGES % 2)


def wgmma_tile(spec: LinearSpec, columns: int, thread: Expr, *, gathers: bool) -> WgmmaTile:
    """Allocates the buffers of a block; `columns` of a tile."""
    size = STAGES * (ROWS + columns) * DEPTH
    return WgmmaTile(
        spec.dtype,
        columns,
        spec.k,
        -(-spec.k // DEPTH),
        gathers,
        thread,
        T.bind(thread // 128),
        T.alloc_buffer((size,), spec.dtype, scope="shared.dyn", align=1024),
        T.alloc_buffer((2 * STAGES,), "uint64", scope="shared", align=8),
        T.alloc_buffer((columns // 2,), "float32", scope="local"),
        T.alloc_buffer((2,), "uint64", scope="local"),
    )


def tensor_map(buffer: Buffer, rows: Expr, spec: LinearSpec, box: int) -> Expr:
    """A CUtensorMap of buffer[rows, k] with boxes of [box, DEPTH] and the 128-byte swizzle, encoded
    by the host at every launch. The driver rejects a map without rows."""
    handle = T.Var("map", ty=T.handle("tensormap").ty)
    encoded = T.bind(T.tvm_stack_alloca("tensormap", 1), var=handle)
    sizes = (T.int64(spec.k), T.max(rows, T.int64(1)), T.int64(spec.k * 2), DEPTH, box, 1, 1)
    options = {"descriptor_dtype": spec.dtype, "rank": 2, "swizzle": 3, "l2_promotion": 2}
    T.evaluate(T.tensormap_encode_tiled(encoded, buffer.data, *sizes, **options))
    return encoded


_LOADING, _MULTIPLYING = 56, 224  # registers per thread; the launch allots 168 to all


def check_wgmma(spec: LinearSpec, target: CudaTarget, epilogue: Epilogue | None) -> None:
    """Raises NoMatch for products that the tile does not support."""
    if "wgmma" not in target.tensor_cores:
        raise NoMatch(f"{target.name} has no wgmma: only sm_90a has it")
    check_product(spec, target, epilogue, shared_memory(COLUMNS[-1]))
    if spec.dtype not in HALVES:
        raise NoMatch(f"wgmma would round {spec.dtype}")


def launch_wgmma(p: Product, target: CudaTarget, blocks: int = 0) -> None:
    """Launches a product by persistent blocks, one per SM unless `blocks` says how many."""
    spec, count, gathers = p.spec, blocks or target.sms, p.order is not None
    columns = columns_of(p.columns)
    x = None if gathers else tensor_map(p.x, T.cast(p.rows, "int64"), spec, ROWS)
    w = tensor_map(p.w, T.int64(spec.groups * p.columns), spec, columns)
    grid = T.launch_thread("blockIdx.x", count)
    with grid as block, T.launch_thread("threadIdx.x", THREADS) as thread:
        tile = wgmma_tile(spec, columns, thread, gathers=gathers)
        tile.start()
        tiles = tiles_of(p, ROWS, THREADS, thread)
        with T.If(tile.group == 0):
            with T.Then():
                give_registers(_LOADING)
                if x is None:
                    done = _each_tile(p, tile, tiles, count, block, _gatherer(p, tile, w))
                    tile.finish(done)
                else:
                    with T.If(thread == 0), T.Then():
                        _each_tile(p, tile, tiles, count, block, _loader(p, tile, x, w))
            with T.Else():
                take_registers(_MULTIPLYING)
                _each_tile(p, tile, tiles, count, block, _multiplier(p, tile))


def _each_tile(
    p: Product,
    tile: WgmmaTile,
    tiles: RowTiles | OneExpert,
    blocks: int,
    block: Expr,
    body: Callable[[ExpertRows, Expr, Expr], None],
) -> Expr:
    """Runs body(rows, first column, stages before it) for each tile of this block, in order.
    Returns the stages of all tiles."""
    across = -(-p.columns // tile.columns)
    turns = T.bind((tiles.total * across - block + (blocks - 1)) // blocks)
    with T.serial(0, turns) as turn:
        row, column = row_and_column(T.bind(block + turn * blocks), tiles.total, across)
        body(tiles.find(row), T.bind(column * tile.columns), T.bind(turn * tile.steps))
    return T.bind(turns * tile.steps)


def _loader(
    p: Product, tile: WgmmaTile, x: Expr, w: Expr
) -> Callable[[ExpertRows, Expr, Expr], None]:
    def load(owned: ExpertRows, column: Expr, done: Expr) -> None:
        tile.load(x, w, owned.first, owned.expert * p.columns + column, done)

    return load


def _gatherer(p: Product, tile: WgmmaTile, w: Expr) -> Callable[[ExpertRows, Expr, Expr], None]:
    rows = T.alloc_buffer((COPIES,), "int32", scope="local")

    def load(owned: ExpertRows, column: Expr, done: Expr) -> None:
        for copy in range(COPIES):
            T.buffer_store(rows, row_of_x(p, owned, tile.row(copy)), [copy])

        def address(copy: int, k: Expr) -> Expr:
            return p.x.ptr_to([T.cast(rows[copy], "int64"), k])  # rows * k may exceed 32 bits

        tile.gather(address, w, owned.expert * p.columns + column, done)

    return load


def _multiplier(p: Product, tile: WgmmaTile) -> Callable[[ExpertRows, Expr, Expr], None]:
    word = T.alloc_buffer((1,), "uint32", scope="local")
    lane, warp = tile.thread % 32, tile.thread % 128 // 32

    def compute(owned: ExpertRows, column: Expr, done: Expr) -> None:
        tile.compute(done)
        first = T.bind(column + lane % 4 * 2)
        for half in range(2):
            above = owned.first + (tile.group - 1) * 64
            row = T.bind(above + warp * 16 + half * 8 + lane // 4)
            at = [u * 4 + half * 2 for u in range(tile.columns // 8)]
            fragments = [(tile.sums[i], tile.sums[i + 1]) for i in at]
            store_row(p, tile.columns, owned, row, first, fragments, word)

    return compute
