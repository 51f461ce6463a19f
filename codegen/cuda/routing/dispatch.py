"""Sorts the choices of all tokens by expert: a stable counting sort by one block.

    experts[T, k] -> order[r] = t * k + s       the choice at sorted row r
                     slots[t, s] = r            its inverse
                     ends[e]                    the rows of e are ends[e-1] .. ends[e]

Ids outside 0 .. E-1 sort last and have no expert. Choices are counted, and prefix sums of the
counts give each expert's first row. Then the choices are written in stretches of one per thread: an
equal id in a lower lane or a lower warp comes first. The order is the same as that of the CPU
kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cuda.instructions import (
    WARP,
    add_atomically,
    argument,
    barrier,
    count_bits,
    each,
    fma,
    kernel,
    match,
    running_sums,
)
from moec.codegen.specs.routing import CombineSpec, DispatchSpec
from moec.target.cuda import CudaTarget

_STATIC_SHARED = 48 * 1024  # bytes that a block has without opting in to more


@dataclass(frozen=True)
class _Sort:
    experts: int
    top_k: int
    warps: int
    thread: Expr
    chosen: Buffer
    following: Buffer  # shared [E+1]: the next free row of each expert
    rows: Buffer  # shared [warps * (E+1)]: the same for each warp of a stretch

    @property
    def threads(self) -> int:
        return self.warps * WARP

    @property
    def size(self) -> int:
        """The number of owners: the experts, and one for choices without an expert."""
        return self.experts + 1

    def owner(self, choice: Expr) -> Expr:
        """int32: the expert of a choice, or E if it has none."""
        e = T.bind(self.chosen[choice // self.top_k, choice % self.top_k])
        owned = T.And(e >= T.int64(0), e < T.int64(self.experts))
        return T.bind(T.Select(owned, T.cast(e, "int32"), T.int32(self.experts)))


def dispatch(spec: DispatchSpec, target: CudaTarget, name: str = "dispatch") -> PrimFunc:
    """A kernel (experts i64[T, k], order i32[R], slots i32[T, k], ends i32[E]); R = T * k."""
    size = spec.num_experts + 1
    warps = max(1, min(16, (_STATIC_SHARED // 4 - 3 * size) // size))
    with kernel(name) as builder:
        t, r = T.int32(), T.int32()
        experts = argument("experts", (t, spec.top_k), "int64")
        order = argument("order", (r,), "int32")
        slots = argument("slots", (t, spec.top_k), "int32")
        ends = argument("ends", (spec.num_experts,), "int32")
        grid = T.launch_thread("blockIdx.x", 1)
        with grid, T.launch_thread("threadIdx.x", warps * WARP) as thread:
            following = T.alloc_buffer((size,), "int32", scope="shared")
            rows = T.alloc_buffer((warps * size,), "int32", scope="shared")
            sort = _Sort(spec.num_experts, spec.top_k, warps, thread, experts, following, rows)
            choices = T.bind(t * spec.top_k)
            _starts(sort, choices, ends)
            _write(sort, choices, order, slots)
    return builder.get()


def _starts(sort: _Sort, choices: Expr, ends: Buffer) -> None:
    """Computes `ends`, and the first row of each owner."""
    sums = T.alloc_buffer((2 * sort.size,), "int32", scope="shared")
    each(sort.size, sort.threads, sort.thread, lambda e: T.buffer_store(sums, T.int32(0), [e]))
    barrier()
    with T.serial(0, (choices + (sort.threads - 1)) // sort.threads) as turn:
        choice = T.bind(turn * sort.threads + sort.thread)
        with T.If(choice < choices), T.Then():
            add_atomically(sums, sort.owner(choice), 1)
    barrier()
    base = running_sums(sums, sort.size, sort.threads, sort.thread)

    def store(e: Expr) -> None:
        start = T.if_then_else(e > 0, sums[base + T.max(e - 1, 0)], 0)
        T.buffer_store(sort.following, start, [e])
        with T.If(e < sort.experts), T.Then():
            T.buffer_store(ends, sums[base + e], [e])

    each(sort.size, sort.threads, sort.thread, store)


def _write(sort: _Sort, choices: Expr, order: Buffer, slots: Buffer) -> None:
    lane, warp = T.bind(sort.thread % WARP), T.bind(sort.thread // WARP)
    lower = T.bind(T.shift_left(T.uint32(1), T.cast(lane, "uint32")) - T.uint32(1))
    with T.serial(0, (choices + (sort.threads - 1)) // sort.threads) as turn:
        choice = T.bind(turn * sort.threads + sort.thread)
        owner = T.alloc_buffer((1,), "int32", scope="local")
        T.buffer_store(owner, T.int32(-1), [0])
        with T.If(choice < choices), T.Then():
            T.buffer_store(owner, sort.owner(choice), [0])

        def clear(i: Expr) -> None:
            T.buffer_store(sort.rows, T.int32(0), [i])

        each(sort.warps * sort.size, sort.threads, sort.thread, clear)
        barrier()
        equals = match(owner[0])
        before = count_bits(T.bitwise_and(equals, lower))
        total = count_bits(equals)
        with T.If(T.And(before == 0, choice < choices)), T.Then():
            T.buffer_store(sort.rows, total, [warp * sort.size + owner[0]])
        barrier()
        each(sort.size, sort.threads, sort.thread, lambda e: _first_rows(sort, e))
        barrier()
        with T.If(choice < choices), T.Then():
            row = T.bind(sort.rows[warp * sort.size + owner[0]] + before)
            T.buffer_store(order, choice, [row])
            T.buffer_store(slots, row, [choice // sort.top_k, choice % sort.top_k])
        barrier()  # slower warps may still read what the next stretch clears


def _first_rows(sort: _Sort, e: Expr) -> None:
    """Turns the counts of the warps into each warp's first row, and advances to the next
    stretch."""
    row = T.alloc_buffer((1,), "int32", scope="local")
    T.buffer_store(row, sort.following[e], [0])
    for warp in range(sort.warps):
        count = T.bind(sort.rows[warp * sort.size + e])
        T.buffer_store(sort.rows, row[0], [warp * sort.size + e])
        T.buffer_store(row, row[0] + count, [0])
    T.buffer_store(sort.following, row[0], [e])


_MOST_THREADS = 256


def combine(spec: CombineSpec, target: CudaTarget, name: str = "combine") -> PrimFunc:
    """A kernel (y[R, D], slots i32[T, k], ends i32[E][, weights[T, k]][, addend[T, D]], out[T, D]).

    Without weights, the rows are added unscaled.
    """
    threads = min(_MOST_THREADS, -(-spec.width // WARP) * WARP)
    with kernel(name) as builder:
        t, r = T.int32(), T.int32()
        y = argument("y", (r, spec.width), spec.rows)
        slots = argument("slots", (t, spec.top_k), "int32")
        ends = argument("ends", (spec.num_experts,), "int32")
        weights = addend = None
        if spec.weights is not None:
            weights = argument("weights", (t, spec.top_k), spec.weights)
        if spec.addend is not None:
            addend = argument("addend", (t, spec.width), spec.addend)
        out = argument("out", (t, spec.width), spec.out)
        grid = T.launch_thread("blockIdx.x", T.max(t, 1))  # a grid of 0 is an error
        with grid as block, T.launch_thread("threadIdx.x", threads) as thread:
            # rows * width may exceed 32 bits.
            token = T.bind(T.cast(block, "int64"))
            total = T.alloc_buffer((1,), "float32", scope="local")
            turns = -(-spec.width // threads)
            with T.If(block < t), T.Then(), T.serial(0, turns) as turn:
                column = T.bind(turn * threads + thread)
                with T.If(column < spec.width), T.Then():
                    T.buffer_store(total, T.float32(0), [0])
                    for s in range(spec.top_k):
                        row = T.bind(slots[token, s])
                        with T.If(row < ends[spec.num_experts - 1]), T.Then():
                            part = T.cast(y[T.cast(row, "int64"), column], "float32")
                            if weights is None:
                                value = total[0] + part
                            else:
                                weight = T.cast(weights[token, s], "float32")
                                value = fma(weight, part, total[0])
                            T.buffer_store(total, value, [0])
                    value = total[0]
                    if addend is not None:
                        value = value + T.cast(addend[token, column], "float32")
                    T.buffer_store(out, T.cast(value, spec.out), [token, column])
    return builder.get()
