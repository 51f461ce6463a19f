"""A tile of a product by wgmma, loaded by TMA. For sm_90a only.

    warpgroup 0     one thread copies boxes of x and w into stages as they become free
    warpgroup 1, 2  multiply 64 of the 128 rows each, and free a stage when its products are done

    full[s]   one arrival and the bytes of both boxes: stage s may be read
    empty[s]  two arrivals, of both groups: stage s may be written

A wait is for the parity of a phase; the n-th use of stage s is its phase n. The first wait for an
empty stage is for the phase before the first, which counts as ended.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.instructions import (
    arrive,
    commit_products,
    copy_box,
    describe_matrix,
    expect_bytes,
    fence_products,
    init_barrier,
    multiply_group,
    publish_barriers,
    wait_barrier,
    wait_products,
)

ROWS, COLUMNS, DEPTH = 128, 128, 64
THREADS = 384
STAGES = 4
_PART = ROWS * DEPTH  # elements of x in a stage; w has as many
SHARED_MEMORY = STAGES * 2 * _PART * 2 + STAGES * 16
"""Bytes of shared memory: the stages of 16-bit elements, and the barriers."""


@dataclass(frozen=True)
class WgmmaTile:
    """Buffers of one block. `steps` is the number of stages that a tile takes."""

    dtype: str
    steps: int
    thread: Expr
    group: Expr
    stages: Buffer
    barriers: Buffer
    sums: Buffer
    descriptors: Buffer

    def full(self, stage: Expr | int) -> Expr:
        return self.barriers.ptr_to([stage])

    def empty(self, stage: Expr | int) -> Expr:
        return self.barriers.ptr_to([STAGES + stage])

    def start(self) -> None:
        """Initialises the barriers; a barrier of the block must follow."""
        with T.If(self.thread == 0), T.Then():
            for stage in range(STAGES):
                init_barrier(self.full(stage), 1)
                init_barrier(self.empty(stage), 2)
            publish_barriers()

    def load(self, x: Expr, w: Expr, x_row: Expr, w_row: Expr, done: Expr) -> None:
        """Loads the boxes of a tile by the maps x and w, after `done` stages of earlier tiles. One
        thread calls it."""
        with T.serial(0, self.steps) as step:
            stage, parity = _turn(done + step)
            wait_barrier(self.empty(stage), 1 - parity)
            expect_bytes(self.full(stage), 2 * _PART * 2)
            base = T.bind(stage * (2 * _PART))
            column = step * DEPTH
            copy_box(self.stages.ptr_to([base]), x, column, x_row, self.full(stage))
            copy_box(self.stages.ptr_to([base + _PART]), w, column, w_row, self.full(stage))

    def compute(self, done: Expr) -> None:
        """Computes sums = x @ w^T for the 64 rows of this warpgroup; the products of one step stay
        in flight."""
        with T.serial(0, self.steps) as step:
            stage, parity = _turn(done + step)
            wait_barrier(self.full(stage), parity)
            base = T.bind(stage * (2 * _PART))
            offset = T.bind((self.group - 1) * (64 * DEPTH))
            describe_matrix(self.descriptors[0], self.stages.ptr_to([base + offset]))
            describe_matrix(self.descriptors[1], self.stages.ptr_to([base + _PART]))
            fence_products()
            for k in range(DEPTH // 16):
                further = T.uint64(k * 2)  # 32 bytes, in units of 16
                multiply_group(
                    self.dtype,
                    [self.sums[i] for i in range(COLUMNS // 2)],
                    self.descriptors[0] + further,
                    self.descriptors[1] + further,
                    T.Or(step > 0, T.bool(k > 0)),
                    COLUMNS,
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


def wgmma_tile(dtype: str, depth: int, thread: Expr) -> WgmmaTile:
    """Allocates the buffers of a block that multiplies matrices of `depth` columns."""
    return WgmmaTile(
        dtype,
        -(-depth // DEPTH),
        thread,
        T.bind(thread // 128),
        T.alloc_buffer((STAGES * 2 * _PART,), dtype, scope="shared.dyn", align=1024),
        T.alloc_buffer((2 * STAGES,), "uint64", scope="shared", align=8),
        T.alloc_buffer((COLUMNS // 2,), "float32", scope="local"),
        T.alloc_buffer((2,), "uint64", scope="local"),
    )


def tensor_map(buffer: Buffer, rows: Expr, columns: int, dtype: str) -> Expr:
    """A CUtensorMap of buffer[rows, columns] with boxes of [ROWS, DEPTH] and the 128-byte swizzle,
    encoded by the host at every launch. The driver rejects a map without rows."""
    handle = T.Var("map", ty=T.handle("tensormap").ty)
    encoded = T.bind(T.tvm_stack_alloca("tensormap", 1), var=handle)
    sizes = (T.int64(columns), T.max(rows, T.int64(1)), T.int64(columns * 2), DEPTH, ROWS, 1, 1)
    options = {"descriptor_dtype": dtype, "rank": 2, "swizzle": 3, "l2_promotion": 2}
    T.evaluate(T.tensormap_encode_tiled(encoded, buffer.data, *sizes, **options))
    return encoded
