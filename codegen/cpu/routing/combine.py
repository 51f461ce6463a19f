"""moe.combine on the CPU: the weighted sum of each token's rows.

    out[t] = sum over s of weights[t, s] * y[slots[t, s]]  (+ addend[t])

The sum is in the order of the slots, in float32, and is rounded once. Choices without an expert
(their rows are after the last end) add nothing, whatever their weight. Threads share the (token,
stretch of columns) pairs, so that one token keeps all of them busy.
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
