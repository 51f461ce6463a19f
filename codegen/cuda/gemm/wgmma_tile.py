"""A tile of a product by wgmma, loaded by TMA. For sm_90a only.

    warpgroup 0     one thread copies boxes of x and w into stages as they become free; rows of x
                    that are gathered are copied by all of its threads, by cp.async
    warpgroup 1, 2  multiply 64 of the 128 rows each, and free a stage when its products are done

    full[s]   one arrival and the bytes of the boxes, and one arrival of each thread that copied
              gathered rows: stage s may be read
    empty[s]  two arrivals, of both groups: stage s may be written

A wait is for the parity of a phase; the n-th use of stage s is its phase n. The first wait for an
empty stage is for the phase before the first, which counts as ended.

A thread that copies rows arrives for a step _BEHIND steps later, so that its copies of that many
steps are in flight. The products of one step are in flight when the stage of the step before it is
freed: before the copies of step s there must be arrivals for step s - STAGES + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.instructions import (
    arrive,
    commit_copies,
    commit_products,
    copy_async,
    copy_box,
    describe_matrix,
    expect_bytes,
    fence_products,
    init_barrier,
    multiply_group,
    publish_barriers,
    publish_copies,
    wait_barrier,
    wait_copies,
    wait_products,
)
from moec.codegen.specs.products import LinearSpec

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
