"""Combines the experts' rows per token.

    out[t] = sum over s of weights[t, s] * y[slots[t, s]]  (+ addend[t])

The sum is in slot order, in float32, and rounded once. It uses no atomics, so the bits are the same
in every run. Choices without an expert (their rows come after the last end) add nothing, even if
their weight is not finite. One block per token; consecutive threads read consecutive columns.
"""

from __future__ import annotations

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from moec.codegen.cuda.instructions import WARP, fma
from moec.codegen.specs.routing import CombineSpec
from moec.target.cuda import CudaTarget

_MOST_THREADS = 256


def combine(spec: CombineSpec, target: CudaTarget, name: str = "combine") -> PrimFunc:
    """A kernel (y[R, D], slots i32[T, k], ends i32[E][, weights[T, k]][, addend[T, D]], out[T, D]).

    Without weights, the rows are added unscaled.
    """
    threads = min(_MOST_THREADS, -(-spec.width // WARP) * WARP)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tir.noalias": True})
            t, r = T.int32(), T.int32()
            y = T.match_buffer(T.arg("y", T.handle()), (r, spec.width), spec.rows)
            slots = T.match_buffer(T.arg("slots", T.handle()), (t, spec.top_k), "int32")
            ends = T.match_buffer(T.arg("ends", T.handle()), (spec.num_experts,), "int32")
            weights = addend = None
            if spec.weights is not None:
                handle = T.arg("weights", T.handle())
                weights = T.match_buffer(handle, (t, spec.top_k), spec.weights)
            if spec.addend is not None:
                handle = T.arg("addend", T.handle())
                addend = T.match_buffer(handle, (t, spec.width), spec.addend)
            out = T.match_buffer(T.arg("out", T.handle()), (t, spec.width), spec.out)
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
