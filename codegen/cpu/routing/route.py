"""moe.route on the CPU: logits -> the experts of each token and their weights.

    logits[T, E]  correction?[E]  ->  weights[T, k]  experts[T, k] int64

Everything is computed in float32. Of equal scores the lower id wins, as in
`moec.ir.ops.routing.routing` (torch.topk on the CPU keeps no order among equals: of
[0, 0, 0, 0, 0, 0, 0, 0] its best three are 6, 5 and 4). NaN is the greatest, as in torch. For any
logits, the experts of a token are k distinct ids below E, except that a sparsemixer may choose one
of several -infinities twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cpu import parallel
from moec.codegen.cpu.frame import argument, kernel
from moec.codegen.cpu.vector import Vector, rounded
from moec.codegen.specs.routing import RouteSpec
from moec.dtypes import HALVES, LONG_NAMES
from moec.ir.ops.routing.routing import Routing
from moec.target.cpu import CpuTarget

TOKENS = 16  # of a task


@dataclass(frozen=True)
class RouterScratch:
    """Scratch for one token, in whole vectors: scores[E], ranks[E], weights[k], chosen[k]."""

    routing: Routing
    num_experts: int
    v: Vector
    ranking: Ranking
    correction: Buffer | None
    scores: Buffer
    ranks: Buffer
    weights: Buffer
    chosen: Buffer
    argmax: Buffer  # scratch of Ranking.take

    def vectors(self, n: int) -> int:
        return -(-n // self.v.lanes)

    def lanes(self, j: Expr) -> Expr:
        return T.ramp(j * self.v.lanes, 1, self.v.lanes)

    def is_one_of(self, j: Expr, n: int) -> Expr:
        """Whether the index of each lane of vector j is below n."""
        lanes = self.v.lanes
        return T.ramp(T.cast(j * lanes, "int32"), 1, lanes) < T.broadcast(T.int32(n), lanes)

    def count(self, j: Expr, n: int) -> Expr:
        """The number of lanes of vector j whose index is below n."""
        return T.min(T.cast(n - j * self.v.lanes, "int32"), T.int32(self.v.lanes))


def route(spec: RouteSpec, target: CpuTarget, name: str = "route") -> PrimFunc:
    """The kernel (logits, correction?, weights, experts)."""
    v = Vector(target)
    k, experts = spec.routing.k, spec.num_experts
    with kernel(name, target) as frame:
        tokens = T.int64()
        logits = argument("logits", (tokens, experts), LONG_NAMES[spec.logits])
        correction = correction_argument(spec.correction, experts)
        weights = argument("weights", (tokens, k), LONG_NAMES[spec.routing.dtype])
        chosen = argument("experts", (tokens, k), "int64")
        count = T.ceildiv(tokens, TOKENS)
        work = routing_work(experts, tokens)
        with parallel.parallel_for(count, work) as task:
            router = scratch(spec.routing, experts, v, correction)
            first = T.bind(task * TOKENS)
            with T.serial(0, T.min(tokens - first, TOKENS)) as i:
                t = T.bind(first + i)
                route_token(router, lambda j: load(v, logits, t, j, experts), weights, chosen, t)
    return frame.function


def correction_argument(dtype: str | None, experts: int) -> Buffer | None:
    if dtype is None:
        return None
    return argument("correction", (experts,), LONG_NAMES[dtype])


def routing_work(experts: int, tokens: Expr) -> Expr:
    """The work of routing, fitted to measurements: 2 of 8, 8 of 64 and 8 of 128 experts took 0.1,
    0.17 and 0.23 µs per token."""
    return tokens * (6000 + 80 * experts)


def scratch(routing: Routing, experts: int, v: Vector, correction: Buffer | None) -> RouterScratch:
    wide = -(-experts // v.lanes) * v.lanes
    few = -(-routing.k // v.lanes) * v.lanes
    return RouterScratch(
        routing,
        experts,
        v,
        Ranking(v),
        correction,
        T.alloc_buffer((wide,), "float32"),
        T.alloc_buffer((wide,), "int32"),
        T.alloc_buffer((few,), "float32"),
        T.alloc_buffer((few,), "int32"),
        T.alloc_buffer((2 * v.lanes,), "int32"),
    )


def load(v: Vector, buffer: Buffer, t: Expr, j: Expr, n: int) -> Expr:
    """Vector j of row t of n elements, padded with 0."""
    if n % v.lanes == 0:
        return v.load(buffer, (t, j * v.lanes))
    left = T.min(T.cast(n - j * v.lanes, "int32"), T.int32(v.lanes))
    return v.load_tail(buffer, (t, j * v.lanes), left)


def route_token(
    c: RouterScratch, logits: Callable[[Expr], Expr], weights: Buffer, experts: Buffer, t: Expr
) -> None:
    """weights[t], experts[t] from the vectors of the token's logits, whose padding is arbitrary."""
    v, routing = c.v, c.routing
    with T.serial(0, c.vectors(c.num_experts)) as j:
        x = T.Select(c.is_one_of(j, c.num_experts), logits(j), v.splat(float("-inf")))
        T.buffer_store(c.scores, x, [c.lanes(j)])
    if routing.score == "sparsemixer":
        _sparsemixer(c)
    else:
        _score(c, routing.score, c.scores, c.num_experts)
        if routing.score_dtype in HALVES:
            with T.serial(0, c.vectors(c.num_experts)) as j:
                x = c.scores[c.lanes(j)]
                T.buffer_store(
                    c.scores, rounded(v, x, LONG_NAMES[routing.score_dtype]), [c.lanes(j)]
                )
        _rank(c)
        if routing.groups > 1:
            _keep_best_groups(c)
        _fill(c.weights, v.splat(0.0), c)
        with T.serial(0, routing.k) as s:
            expert = c.ranking.take(c.ranks, c.argmax)
            T.buffer_store(c.chosen, expert, [s])
            T.buffer_store(c.weights, c.scores[expert], [s])
        _score(c, routing.after, c.weights, routing.k)
        _scale(c)
    with T.serial(0, c.vectors(routing.k)) as j:
        x = T.bind(c.weights[c.lanes(j)])
        v.store_tail(weights, (t, j * v.lanes), x, c.count(j, routing.k))
    with T.serial(0, routing.k) as s:
        T.buffer_store(experts, T.cast(c.chosen[s], "int64"), [t, s])


def _fill(buffer: Buffer, value: Expr, c: RouterScratch) -> None:
    with T.serial(0, int(buffer.shape[0]) // c.v.lanes) as j:
        T.buffer_store(buffer, value, [c.lanes(j)])


def _score(c: RouterScratch, score: str, x: Buffer, n: int) -> None:
    """x = score(x[:n]), in place; lanes after n become 0 for a softmax."""
    v = c.v
    if score == "sigmoid":
        with T.serial(0, c.vectors(n)) as j:
            T.buffer_store(x, v.sigmoid(x[c.lanes(j)]), [c.lanes(j)])
    if score != "softmax":
        return
    state, lane = T.alloc_buffer((v.lanes,), "float32"), T.ramp(0, 1, v.lanes)
    T.buffer_store(state, v.splat(float("-inf")), [lane])
    with T.serial(0, c.vectors(n)) as j:
        one = T.Select(c.is_one_of(j, n), x[c.lanes(j)], v.splat(float("-inf")))
        T.buffer_store(x, one, [c.lanes(j)])
        T.buffer_store(state, T.max(x[c.lanes(j)], state[lane]), [lane])
    top = v.bind(v.splat(v.max(state[lane])))
    T.buffer_store(state, v.splat(0.0), [lane])
    with T.serial(0, c.vectors(n)) as j:
        # Where x is all -inf, or holds infinity or NaN, all of it becomes NaN, as in torch.
        T.buffer_store(x, v.exp(x[c.lanes(j)] - top), [c.lanes(j)])
        T.buffer_store(state, state[lane] + x[c.lanes(j)], [lane])
    total = v.bind(v.splat(v.sum(state[lane])))
    with T.serial(0, c.vectors(n)) as j:
        T.buffer_store(x, x[c.lanes(j)] / total, [c.lanes(j)])


def _rank(c: RouterScratch) -> None:
    """ranks = ranks of scores + correction."""
    v, n = c.v, c.num_experts
    with T.serial(0, c.vectors(n)) as j:
        x = c.scores[c.lanes(j)]
        if c.correction is not None:
            index = (j * v.lanes,)
            if n % v.lanes == 0:
                x = x + v.load(c.correction, index)
            else:
                x = x + v.load_tail(c.correction, index, c.count(j, n))
        ranks = c.ranking.ranks(_choice(c, x))
        sentinel = T.broadcast(T.int32(TAKEN), v.lanes)
        T.buffer_store(c.ranks, T.Select(c.is_one_of(j, n), ranks, sentinel), [c.lanes(j)])


def _choice(c: RouterScratch, x: Expr) -> Expr:
    """A vector of scores as choices compare them."""
    dtype = c.routing.choice_dtype
    return rounded(c.v, x, LONG_NAMES[dtype]) if dtype in HALVES else x


def _keep_best_groups(c: RouterScratch) -> None:
    """Experts of all but the best `top_groups` groups rank as -infinity."""
    v, groups = c.v, c.routing.groups
    size = c.num_experts // groups
    wide = c.vectors(groups) * v.lanes
    sums, ranks = T.alloc_buffer((wide,), "float32"), T.alloc_buffer((wide,), "int32")
    dropped = T.alloc_buffer((wide,), "int32")
    best = T.alloc_buffer((2,), "int32")
    _fill(sums, v.splat(0.0), c)
    _fill(dropped, T.broadcast(T.int32(1), v.lanes), c)
    with T.serial(0, groups) as g:
        T.buffer_store(best, T.int32(TAKEN), [0])
        T.buffer_store(best, T.int32(TAKEN), [1])
        with T.serial(0, size) as i:
            rank = T.bind(c.ranks[g * size + i])
            T.buffer_store(best, T.max(best[1], T.min(best[0], rank)), [1])
            T.buffer_store(best, T.max(best[0], rank), [0])
        score = float_of(best[0])
        if c.routing.group_score == "top2sum" and size > 1:
            score = score + float_of(best[1])
        T.buffer_store(sums, score, [g])
    with T.serial(0, c.vectors(groups)) as j:
        sentinel = T.broadcast(T.int32(TAKEN), v.lanes)
        x = T.Select(
            c.is_one_of(j, groups), c.ranking.ranks(_choice(c, sums[c.lanes(j)])), sentinel
        )
        T.buffer_store(ranks, x, [c.lanes(j)])
    with T.serial(0, c.routing.top_groups):
        T.buffer_store(dropped, T.int32(0), [c.ranking.take(ranks, c.argmax)])
    with T.serial(0, groups) as g, T.If(dropped[g] == 1), T.Then(), T.serial(0, size) as i:
        T.buffer_store(c.ranks, T.int32(LOWEST), [g * size + i])


def _scale(c: RouterScratch) -> None:
    v, routing = c.v, c.routing
    factor = v.splat(routing.scale)
    state, lane = T.alloc_buffer((v.lanes,), "float32"), T.ramp(0, 1, v.lanes)
    if routing.renormalize:
        T.buffer_store(state, v.splat(0.0), [lane])
        with T.serial(0, c.vectors(routing.k)) as j:
            x = T.Select(c.is_one_of(j, routing.k), c.weights[c.lanes(j)], v.splat(0.0))
            T.buffer_store(state, state[lane] + x, [lane])
        total = v.bind(v.splat(v.sum(state[lane]) + T.float32(routing.epsilon)))
    with T.serial(0, c.vectors(routing.k)) as j:
        x = c.weights[c.lanes(j)]
        x = x / total * factor if routing.renormalize else x * factor
        T.buffer_store(c.weights, x, [c.lanes(j)])


def _sparsemixer(c: RouterScratch) -> None:
    """Each choice is the greatest remaining logit; its weight is a softmax over the logits within
    2*jitter (relative) of it."""
    v, n = c.v, c.num_experts
    left = T.alloc_buffer(c.scores.shape, "float32")
    state, lane = T.alloc_buffer((v.lanes,), "float32"), T.ramp(0, 1, v.lanes)
    with T.serial(0, c.vectors(n)) as j:
        T.buffer_store(left, c.scores[c.lanes(j)], [c.lanes(j)])
    _rank(c)
    with T.serial(0, c.routing.k) as s:
        expert = c.ranking.take(c.ranks, c.argmax)
        greatest = T.bind(left[expert])
        T.buffer_store(state, v.splat(0.0), [lane])
        with T.serial(0, c.vectors(n)) as j:
            x = T.bind(c.scores[c.lanes(j)])
            top = v.splat(greatest)
            size = v.abs(x)
            # Comparisons with NaN are false, as in torch: such a logit is not far. (TVM would
            # turn a `not >` into a `<=`, which is false too.)
            far = (top - x) / T.Select(size < top, top, size) > v.splat(2 * c.routing.jitter)
            one = v.exp(T.Select(far, v.splat(float("-inf")), left[c.lanes(j)]) - top)
            # Padding must not add the NaN of -inf - -inf.
            one = T.Select(c.is_one_of(j, n), one, v.splat(0.0))
            T.buffer_store(state, state[lane] + one, [lane])
        total = v.sum(state[lane])
        T.buffer_store(c.chosen, expert, [s])
        T.buffer_store(c.weights, T.float32(1) / total, [s])
        T.buffer_store(left, T.float32(float("-inf")), [expert])
        T.buffer_store(c.ranks, T.int32(LOWEST), [expert])


# ---- top-k of floats by integer ranks: NaN is greatest, equal floats are taken in order ---
# Ranks have the order of their floats, with -0.0 equal to 0.0 and every NaN above infinity. TAKEN
# is below all ranks and marks those that were chosen. Buffers of ranks are padded to whole
# vectors with TAKEN.


TAKEN = -(2**31)
LOWEST = -0x7F800001  # the rank of -infinity


@dataclass(frozen=True)
class Ranking:
    v: Vector

    def ranks(self, x: Expr) -> Expr:
        """float32 lanes -> int32 lanes."""
        return self._call(f"int32x{self.v.lanes}", "ranks", x)

    def take(self, ranks: Buffer, argmax: Buffer) -> Expr:
        """The index of the greatest rank, the first of equals; that rank becomes TAKEN.

        ranks: int32[n * lanes]; argmax: int32[2 * lanes], scratch memory of this function.
        """
        n = self.v.lanes
        lane, second = T.ramp(0, 1, n), T.ramp(n, 1, n)
        T.buffer_store(argmax, ranks[lane], [lane])
        T.buffer_store(argmax, T.ramp(T.int32(0), 1, n), [second])
        with T.serial(1, int(ranks.shape[0]) // n) as j:
            x = T.bind(ranks[T.ramp(j * n, 1, n)])
            ids = T.ramp(T.cast(j * n, "int32"), 1, n)
            # Strictly greater, so that the first of equal ranks wins.
            T.buffer_store(argmax, T.Select(x > argmax[lane], ids, argmax[second]), [second])
            T.buffer_store(argmax, T.max(x, argmax[lane]), [lane])
        first = T.bind(self._call("int32", "first", argmax[lane], argmax[second]))
        T.buffer_store(ranks, T.int32(TAKEN), [first])
        return first

    def _call(self, dtype: str, name: str, *args: Expr) -> Expr:
        return T.bind(T.call_extern(dtype, f"moec_{name}_{self.v.lanes}", *args))


def float_of(rank: Expr) -> Expr:
    """int32 scalar -> the float32 it ranks."""
    flip = T.bitwise_and(T.shift_right(rank, T.int32(31)), T.int32(2**31 - 1))
    return T.bind(T.reinterpret("float32", T.bitwise_xor(rank, flip)))
