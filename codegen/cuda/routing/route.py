"""moe.route on GPUs: logits to the chosen experts and their weights, one warp per token.

    logits[T, E]  correction?[E]  ->  weights[T, k]  experts[T, k] int64

Lane l holds the experts l, l + 32, ... in registers. A choice takes two reductions over the warp:
the greatest rank, then the lowest id with that rank. The scores are also stored in shared memory,
for the lane that stores the choice, and for groups.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cuda.activation import sigmoid
from moec.codegen.cuda.instructions import (
    WARP,
    argument,
    ballot,
    exp,
    kernel,
    warp_barrier,
    warp_greatest,
    warp_max,
    warp_min,
    warp_sum,
)
from moec.codegen.specs.routing import RouteSpec
from moec.dtypes import HALVES, LONG_NAMES
from moec.errors import NoMatch
from moec.ir.ops.routing.routing import Routing
from moec.target.cuda import CudaTarget

_WARPS = 4  # tokens per block
_NOBODY = 2**31 - 1
_INFINITY = float("inf")


@dataclass(frozen=True)
class _Router:
    """The state of one token: scores and ranks of this lane's experts, and those of all in shared
    memory."""

    spec: RouteSpec
    lane: Expr
    warp: Expr
    scores: Buffer  # local float32
    ranks: Buffer  # local int32
    shared_scores: Buffer  # [warps * stride]
    shared_ranks: Buffer | None

    @property
    def turns(self) -> range:
        return range(-(-self.spec.num_experts // WARP))

    @property
    def stride(self) -> int:
        return len(self.turns) * WARP

    def expert(self, turn: int) -> Expr:
        return self.lane + turn * WARP


def route(spec: RouteSpec, target: CudaTarget, name: str = "route") -> PrimFunc:
    """The kernel (logits, correction?, weights, experts). Raises NoMatch as `check` does."""
    check(spec)
    routing, experts = spec.routing, spec.num_experts
    with kernel(name) as builder:
        t = T.int32()
        logits = argument("logits", (t, experts), LONG_NAMES[spec.logits])
        correction = None
        if spec.correction is not None:
            correction = argument("correction", (experts,), LONG_NAMES[spec.correction])
        weights = argument("weights", (t, routing.k), LONG_NAMES[routing.dtype])
        chosen = argument("experts", (t, routing.k), "int64")
        blocks = T.max((t + (_WARPS - 1)) // _WARPS, 1)  # a grid of 0 is an error
        grid = T.launch_thread("blockIdx.x", blocks)
        with grid as block, T.launch_thread("threadIdx.x", _WARPS * WARP) as thread:
            router = _router(spec, thread)
            token = T.bind(block * _WARPS + router.warp)
            with T.If(token < t), T.Then():
                _route(router, logits, correction, weights, chosen, T.cast(token, "int64"))
    return builder.get()


def check(spec: RouteSpec) -> None:
    """Raises NoMatch for routers that this kernel does not support."""
    if spec.routing.k > WARP:
        raise NoMatch(f"{spec.routing.k} choices of a token are more than the lanes of a warp")
    if spec.routing.groups > WARP:
        raise NoMatch(f"{spec.routing.groups} groups are more than the lanes of a warp")


def _router(spec: RouteSpec, thread: Expr) -> _Router:
    turns = -(-spec.num_experts // WARP)
    size = _WARPS * turns * WARP
    grouped = spec.routing.groups > 1
    return _Router(
        spec,
        T.bind(thread % WARP),
        T.bind(thread // WARP),
        T.alloc_buffer((turns,), "float32", scope="local"),
        T.alloc_buffer((turns,), "int32", scope="local"),
        T.alloc_buffer((size,), "float32", scope="shared"),
        T.alloc_buffer((size,), "int32", scope="shared") if grouped else None,
    )


def _route(
    r: _Router,
    logits: Buffer,
    correction: Buffer | None,
    weights: Buffer,
    chosen: Buffer,
    token: Expr,
) -> None:
    routing = r.spec.routing
    for turn in r.turns:
        e = r.expert(turn)
        inside = T.min(e, r.spec.num_experts - 1)
        x = T.cast(logits[token, inside], "float32")
        x = T.if_then_else(e < r.spec.num_experts, x, T.float32(-_INFINITY))
        T.buffer_store(r.scores, x, [turn])
    _score(r.scores, len(r.turns), routing.score)
    if routing.score_dtype in HALVES:
        for turn in r.turns:
            T.buffer_store(r.scores, _rounded(r.scores[turn], routing.score_dtype), [turn])
    base = r.warp * r.stride
    for turn in r.turns:
        T.buffer_store(r.shared_scores, r.scores[turn], [base + r.expert(turn)])
    _rank(r, correction)
    if routing.score == "sparsemixer":
        experts = [T.bind(r.expert(turn)) for turn in r.turns]
        weight, expert = sparsemixer(
            routing, r.scores, r.ranks, r.lane, experts, r.spec.num_experts
        )
        _store(r, weight, expert, weights, chosen, token)
        return
    if routing.groups > 1:
        _keep_best_groups(r)
    warp_barrier()
    weight = T.alloc_buffer((1,), "float32", scope="local")
    expert = T.alloc_buffer((1,), "int32", scope="local")
    T.buffer_store(weight, T.float32(-_INFINITY), [0])
    T.buffer_store(expert, T.int32(0), [0])
    with T.serial(0, routing.k) as s:
        best = _take(r)
        with T.If(r.lane == s), T.Then():
            T.buffer_store(expert, best, [0])
            T.buffer_store(weight, r.shared_scores[base + best], [0])
    _score(weight, 1, routing.after)
    _scale(weight, r.lane, routing)
    _store(r, weight, expert, weights, chosen, token)


def _store(
    r: _Router, weight: Buffer, expert: Buffer, weights: Buffer, chosen: Buffer, token: Expr
) -> None:
    dtype = LONG_NAMES[r.spec.routing.dtype]
    with T.If(r.lane < r.spec.routing.k), T.Then():
        T.buffer_store(weights, T.cast(weight[0], dtype), [token, r.lane])
        T.buffer_store(chosen, T.cast(expert[0], "int64"), [token, r.lane])


def _score(values: Buffer, count: int, score: str) -> None:
    """Applies the score function in place. Padding elements are -infinity, and become 0."""
    if score == "sigmoid":
        for i in range(count):
            T.buffer_store(values, sigmoid(values[i]), [i])
    if score != "softmax":
        return
    greatest = values[0]
    for i in range(1, count):
        greatest = T.call_extern("float32", "fmaxf", greatest, values[i])
    top = warp_greatest(T.bind(greatest))
    # If all are -infinity, or one is infinity or NaN, all become NaN, as in torch.
    for i in range(count):
        T.buffer_store(values, exp(values[i] - top), [i])
    total = values[0]
    for i in range(1, count):
        total = total + values[i]
    total = warp_sum(T.bind(total))
    for i in range(count):
        T.buffer_store(values, values[i] / total, [i])


def _rounded(x: Expr, dtype: str) -> Expr:
    """x as it would be read back from memory of `dtype`, if that has 16 bits."""
    return T.call_extern("float32", f"moec_round_{dtype}", x) if dtype in HALVES else x


def _rank(r: _Router, correction: Buffer | None) -> None:
    """Computes the ranks of scores + correction; padding elements rank below all experts."""
    for turn in r.turns:
        e = r.expert(turn)
        x = r.scores[turn]
        if correction is not None:
            x = x + T.cast(correction[T.min(e, r.spec.num_experts - 1)], "float32")
        x = _rounded(x, r.spec.routing.choice_dtype)
        rank = T.Select(e < r.spec.num_experts, rank_of(T.bind(x)), T.int32(TAKEN))
        T.buffer_store(r.ranks, rank, [turn])
        if r.shared_ranks is not None:
            T.buffer_store(r.shared_ranks, r.ranks[turn], [r.warp * r.stride + e])


def _take(r: _Router) -> Expr:
    """int32: the expert of the greatest rank, the lowest id of equals. Its rank becomes TAKEN."""
    greatest = r.ranks[0]
    for turn in r.turns[1:]:
        greatest = T.max(greatest, r.ranks[turn])
    top = warp_max(T.bind(greatest))
    first = T.int32(_NOBODY)
    for turn in reversed(r.turns):
        first = T.Select(r.ranks[turn] == top, r.expert(turn), first)
    best = warp_min(T.bind(first))
    for turn in r.turns:
        with T.If(r.expert(turn) == best), T.Then():
            T.buffer_store(r.ranks, T.int32(TAKEN), [turn])
    return best


def _keep_best_groups(r: _Router) -> None:
    """Gives the rank of -infinity to experts outside the best groups. Lane g handles group g."""
    routing, experts = r.spec.routing, r.spec.num_experts
    size = experts // routing.groups
    assert r.shared_ranks is not None
    warp_barrier()
    best = T.alloc_buffer((2,), "int32", scope="local")
    T.buffer_store(best, T.int32(TAKEN), [0])
    T.buffer_store(best, T.int32(TAKEN), [1])
    group = T.bind(T.min(r.lane, routing.groups - 1))
    with T.serial(0, size) as i:
        rank = T.bind(r.shared_ranks[r.warp * r.stride + group * size + i])
        T.buffer_store(best, T.max(best[1], T.min(best[0], rank)), [1])
        T.buffer_store(best, T.max(best[0], rank), [0])
    score = float_of(best[0])
    if routing.group_score == "top2sum" and size > 1:
        score = _rounded(score + float_of(best[1]), routing.choice_dtype)
    rank = T.Select(r.lane < routing.groups, rank_of(T.bind(score)), T.int32(TAKEN))
    left = T.alloc_buffer((1,), "int32", scope="local")
    chosen = T.alloc_buffer((1,), "int32", scope="local")
    T.buffer_store(left, rank, [0])
    T.buffer_store(chosen, T.int32(0), [0])
    with T.serial(0, routing.top_groups):
        top = warp_max(left[0])
        first = warp_min(T.bind(T.Select(left[0] == top, r.lane, T.int32(_NOBODY))))
        with T.If(r.lane == first), T.Then():
            T.buffer_store(left, T.int32(TAKEN), [0])
            T.buffer_store(chosen, T.int32(1), [0])
    groups = ballot(chosen[0])
    for turn in r.turns:
        e = r.expert(turn)
        bit = T.shift_right(groups, T.cast(T.min(e // size, routing.groups - 1), "uint32"))
        dropped = T.bitwise_and(bit, T.uint32(1)) == T.uint32(0)
        with T.If(T.And(dropped, e < experts)), T.Then():
            T.buffer_store(r.ranks, T.int32(LOWEST), [turn])


def _scale(weight: Buffer, lane: Expr, routing: Routing) -> None:
    if routing.renormalize:
        part = T.bind(T.Select(lane < routing.k, weight[0], T.float32(0)))
        total = warp_sum(part)
        value = weight[0] / T.bind(total + T.float32(routing.epsilon))
        T.buffer_store(weight, value, [0])
    T.buffer_store(weight, weight[0] * T.float32(routing.scale), [0])


def sparsemixer(
    routing: Routing, logits: Buffer, ranks: Buffer, lane: Expr, experts: list[Expr], count: int
) -> tuple[Buffer, Buffer]:
    """PhiMoE's sampler at inference (arXiv 2310.00811): the weight f32[1] and the expert i32[1] of
    choice s, in lane s. A choice is the greatest remaining logit; its weight is its share of a
    softmax over those remaining within a relative distance of 2 * jitter from it.

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


LOWEST = -0x7F800001  # the rank of -infinity
TAKEN = -(2**31 - 1)
"""Below all ranks: already chosen, or not an expert. (TVM rejects -2^31 as an int32 in a
comparison.)"""

_NO_SIGN, _INFINITE_BITS = 2**31 - 1, 0x7F800000


def rank_of(x: Expr) -> Expr:
    """float32 -> int32 of the same order, with -0.0 equal to 0.0 and NaN above infinity.

    It works on the bits, because a compiler may fold `x != x` to false and x + 0.0 to x.
    """
    bits = T.bind(T.reinterpret("int32", x))
    size = T.bind(T.bitwise_and(bits, T.int32(_NO_SIGN)))
    flip = T.bitwise_and(T.shift_right(bits, T.int32(31)), T.int32(_NO_SIGN))
    ordered = T.Select(size == 0, T.int32(0), T.bitwise_xor(bits, flip))
    is_nan = size > T.int32(_INFINITE_BITS)
    return T.bind(T.Select(is_nan, T.int32(_NO_SIGN), ordered))


def float_of(rank: Expr) -> Expr:
    """int32 rank -> the float32 of that rank."""
    flip = T.bitwise_and(T.shift_right(rank, T.int32(31)), T.int32(_NO_SIGN))
    return T.bind(T.reinterpret("float32", T.bitwise_xor(rank, flip)))
