"""Sorting the choices of all tokens by expert: a stable counting sort.

    experts[T, k] -> order[r] = t * k + s       the choice at sorted row r
                     slots[t, s] = r            its inverse
                     ends[e]                    the rows of e are ends[e-1] .. ends[e]

Ids outside 0 .. E-1 (E means "no expert") sort last, after the rows of all experts. One thread
does it: two passes over R small integers cost less than waking other threads.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from moec.codegen.cpu import parallel
from moec.codegen.cpu.frame import argument, kernel
from moec.codegen.cpu.parallel import ELEMENT
from moec.codegen.cpu.vector import Vector
from moec.target.cpu import CpuTarget


def dispatch(num_experts: int, top_k: int, name: str = "dispatch") -> PrimFunc:
    """A kernel (experts i64[T, k], order i32[R], slots i32[T, k], ends i32[E]); R = T * k."""
    with kernel(name) as frame:
        t, r = T.int64(), T.int64()
        experts = argument("experts", (t, top_k), "int64")
        order = argument("order", (r,), "int32")
        slots = argument("slots", (t, top_k), "int32")
        ends = argument("ends", (num_experts,), "int32")
        # The position of the next row of each expert; the last entry is for rows without one.
        following = T.alloc_buffer((num_experts + 1,), "int32")

        def owner(token: Expr, s: Expr) -> Expr:
            e = T.bind(experts[token, s])
            valid = T.And(e >= T.int64(0), e < T.int64(num_experts))
            return T.bind(T.Select(valid, T.cast(e, "int32"), T.int32(num_experts)))

        with T.serial(0, num_experts + 1) as e:
            T.buffer_store(following, T.int32(0), [e])
        with T.serial(0, t) as i, T.serial(0, top_k) as s:
            e = owner(i, s)
            T.buffer_store(following, following[e] + 1, [e])
        total = T.alloc_buffer((1,), "int32")
        T.buffer_store(total, T.int32(0), [0])
        with T.serial(0, num_experts + 1) as e:
            count = T.bind(following[e])
            T.buffer_store(following, total[0], [e])
            T.buffer_store(total, total[0] + count, [0])
            with T.If(e < num_experts), T.Then():
                T.buffer_store(ends, total[0], [e])
        with T.serial(0, t) as i, T.serial(0, top_k) as s:
            e = owner(i, s)
            row = T.bind(following[e])
            T.buffer_store(following, row + 1, [e])
            T.buffer_store(order, T.cast(i * top_k + s, "int32"), [row])
            T.buffer_store(slots, row, [i, s])
    return frame.function


_VECTORS = 8  # vectors of sums in registers
_STRETCH = 512  # columns of one unit of work


def combine(
    target: CpuTarget,
    num_experts: int,
    top_k: int,
    width: int,
    out_dtype: str,
    y_dtype: str = "float32",
    weights_dtype: str | None = "float32",
    addend_dtype: str | None = None,
    name: str = "combine",
) -> PrimFunc:
    """A kernel (y[R, D], slots i32[T, k], ends i32[E][, weights[T, k]][, addend[T, D]], out[T, D]).

    Without weights (`weights_dtype` None) the rows are added as they are.
    """
    v = Vector(target)
    step = _VECTORS * v.lanes
    stretch = min(max(_STRETCH, step), -(-width // step) * step)
    stretches = -(-width // stretch)
    with kernel(name, target) as frame:
        t, r = T.int64(), T.int64()
        y = argument("y", (r, width), y_dtype)
        slots = argument("slots", (t, top_k), "int32")
        ends = argument("ends", (num_experts,), "int32")
        weights = addend = None
        if weights_dtype is not None:
            weights = argument("weights", (t, top_k), weights_dtype)
        if addend_dtype is not None:
            addend = argument("addend", (t, width), addend_dtype)
        out = argument("out", (t, width), out_dtype)

        def columns(token: Expr, first: Expr, count: int, tail: int) -> None:
            """`count` vectors from column `first`; with `tail`, one vector of only `tail` lanes."""

            def load(buffer: object, row: Expr, j: int) -> Expr:
                at = [row, first + j * v.lanes]
                return v.load_tail(buffer, at, tail) if tail else v.load(buffer, at)

            lanes = T.ramp(0, 1, v.lanes)
            acc = [T.alloc_buffer((v.lanes,), "float32") for _ in range(count)]
            for a in acc:
                T.buffer_store(a, v.splat(0.0), [lanes])
            with T.serial(0, top_k) as s:
                row = T.bind(slots[token, s])
                with T.If(row < ends[num_experts - 1]), T.Then():
                    row = T.cast(row, "int64")
                    weight = None
                    if weights is not None:
                        weight = T.bind(v.splat(v.scalar(weights, [token, s])))
                    for j, a in enumerate(acc):
                        part = load(y, row, j)
                        if weight is not None:
                            part = v.fma(weight, part, a[lanes])
                        else:
                            part = a[lanes] + part
                        T.buffer_store(a, part, [lanes])
            for j, a in enumerate(acc):
                value = a[lanes]
                if addend is not None:
                    value = value + load(addend, token, j)
                at = [token, first + j * v.lanes]
                if tail:
                    v.store_tail(out, at, value, tail)
                else:
                    v.store(out, at, value)

        work = t * (top_k * width * ELEMENT)
        with parallel.parallel_for(t * stretches, work) as unit:
            token = T.bind(T.truncdiv(unit, stretches))
            begin = T.bind(T.truncmod(unit, stretches) * stretch)
            end = T.bind(T.min(begin + stretch, width))
            steps = T.bind(T.truncdiv(end - begin, step))
            with T.serial(0, steps) as i:
                columns(token, begin + i * step, _VECTORS, 0)
            if width % step:
                with T.If(end == width), T.Then():
                    first = T.bind(begin + steps * step)
                    with T.serial(0, width % step // v.lanes) as i:
                        columns(token, first + i * v.lanes, 1, 0)
                    if width % v.lanes:
                        columns(token, T.int64(width - width % v.lanes), 1, width % v.lanes)
    return frame.function
