"""PhiMoE's sampler at inference (arXiv 2310.00811), by one warp: one choice after the other.

A choice is the greatest remaining logit. Its weight is its share of a softmax over those remaining
logits that are within a relative distance of 2 * jitter from it.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.instructions import exp, warp_max, warp_min, warp_sum
from moec.codegen.cuda.routing.ranks import LOWEST, float_of
from moec.ir.ops.routing.routing import Routing

_NOBODY = 2**31 - 1


def sparsemixer(
    routing: Routing, logits: Buffer, ranks: Buffer, lane: Expr, experts: list[Expr], count: int
) -> tuple[Buffer, Buffer]:
    """The weight f32[1] and the expert i32[1] of choice s, in lane s.

    Lane l holds the logits and ranks of the `experts` l, l + 32, ..., `count` in all. The rank of a
    choice becomes that of -infinity (it may be chosen again if no other expert remains).
    """
    weight = T.alloc_buffer((1,), "float32", scope="local")
    expert = T.alloc_buffer((1,), "int32", scope="local")
    T.buffer_store(weight, T.float32(0), [0])
    T.buffer_store(expert, T.int32(0), [0])
    with T.serial(0, routing.k) as s:
        most = ranks[0]
        for turn in range(1, len(experts)):
            most = T.max(most, ranks[turn])
        top = warp_max(T.bind(most))
        first = T.int32(_NOBODY)
        for turn in reversed(range(len(experts))):
            first = T.Select(ranks[turn] == top, experts[turn], first)
        best = warp_min(T.bind(first))
        greatest = float_of(top)
        part = T.float32(0)
        for turn, e in enumerate(experts):
            logit = logits[turn]
            size = T.call_extern("float32", "fabsf", logit)
            factor = T.call_extern("float32", "fmaxf", size, greatest)
            far = T.bind((greatest - logit) / factor > T.float32(2 * routing.jitter))
            share = exp(float_of(ranks[turn]) - greatest)
            out = T.Or(far, e >= count)
            part = part + T.bind(T.if_then_else(out, T.float32(0), share))
        total = warp_sum(T.bind(part))
        for turn, e in enumerate(experts):
            with T.If(e == best), T.Then():
                T.buffer_store(ranks, T.int32(LOWEST), [turn])
        with T.If(lane == s), T.Then():
            T.buffer_store(weight, T.float32(1) / total, [0])
            T.buffer_store(expert, best, [0])
    return weight, expert
