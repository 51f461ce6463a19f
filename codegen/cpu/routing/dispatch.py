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

from moec.codegen.cpu.frame import argument, kernel


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
