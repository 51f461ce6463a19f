"""moe.gate on the CPU: the router's linear layer and its top-k in one kernel.

    x[T, D]  weight[E, D]  bias?[E]  correction?[E]  ->  weights[T, k]  experts[T, k] int64

The weight is not packed: vectors run along D, `lanes` dot products (some tokens by some experts)
are accumulated side by side, and their lanes are then summed together. Sums are float32; bf16 by
bf16 uses dot products of pairs where the CPU has them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cpu import parallel
from moec.codegen.cpu.frame import argument, kernel
from moec.codegen.cpu.parallel import bytes_of
from moec.codegen.cpu.routing.route import (
    TOKENS,
    correction_argument,
    route_token,
    routing_work,
    scratch,
)
from moec.codegen.cpu.vector import Softmax, Vector, rounded
from moec.codegen.specs.routing import GateSpec
from moec.dtypes import LONG_NAMES
from moec.target.cpu import CpuTarget

TOKENS_OF_A_PRODUCT = 32  # tokens that read one block of the weight while it is in the cache


@dataclass(frozen=True)
class _Linear:
    spec: GateSpec
    v: Vector
    soft: Softmax
    tokens: Expr
    x: Buffer
    weight: Buffer
    bias: Buffer | None
    logits: Buffer  # [T, E to whole vectors] float32

    @property
    def pairs(self) -> bool:
        """Whether to multiply bf16 pairs."""
        spec = self.spec
        both = spec.x == "bf16" and spec.weight == "bf16"
        return both and self.v.target.bf16_dot and spec.width % (2 * self.v.lanes) == 0


def gate(spec: GateSpec, target: CpuTarget, name: str = "gate") -> PrimFunc:
    """The kernel (x, weight, bias?, correction?, weights, experts)."""
    v = Vector(target)
    soft = Softmax(v)
    routing, count = spec.route.routing, spec.route.num_experts
    with kernel(name, target) as frame:
        tokens = T.int64()

        x = argument("x", (tokens, spec.width), LONG_NAMES[spec.x])
        weight = argument("weight", (count, spec.width), LONG_NAMES[spec.weight])
        bias = spec.bias and argument("bias", (count,), LONG_NAMES[spec.bias])
        correction = correction_argument(spec.route.correction, count)
        weights = argument("weights", (tokens, routing.k), LONG_NAMES[routing.dtype])
        experts = argument("experts", (tokens, routing.k), "int64")
        columns = -(-count // v.lanes) * v.lanes
        logits = T.alloc_buffer((tokens, columns), "float32")
        _linear(_Linear(spec, v, soft, tokens, x, weight, bias, logits))
        work = routing_work(count, tokens)
        with parallel.parallel_for(T.ceildiv(tokens, TOKENS), work) as task:
            router = scratch(routing, count, v, correction)
            first = T.bind(task * TOKENS)
            with T.serial(0, T.min(tokens - first, TOKENS)) as i:
                t = T.bind(first + i)
                route_token(
                    router,
                    lambda j: logits[t, T.ramp(j * v.lanes, 1, v.lanes)],
                    weights,
                    experts,
                    t,
                )
    return frame.function


def _linear(c: _Linear) -> None:
    """Fill c.logits, one block of experts and some tokens a task."""
    v = c.v
    count = c.spec.route.num_experts
    blocks = -(-count // v.lanes)
    parts = T.bind(T.ceildiv(c.tokens, TOKENS_OF_A_PRODUCT))
    rows = {16: 4, 8: 2, 4: 2}[v.lanes]
    columns = v.lanes // rows
    sums = c.tokens * (count * c.spec.width)
    weights = count * c.spec.width * bytes_of(c.weight)
    with parallel.parallel_for(parts * blocks, sums, weights) as task:
        block, part = parallel.divide(task, parts)
        first = T.bind(part * TOKENS_OF_A_PRODUCT)
        block_tokens = T.bind(T.min(c.tokens - first, TOKENS_OF_A_PRODUCT))
        expert = T.bind(block * v.lanes)
        several = T.bind(T.floordiv(block_tokens, rows))
        with T.serial(0, several) as i:
            t = T.bind(first + i * rows)
            with T.serial(0, T.min(T.ceildiv(count - expert, columns), rows)) as j:
                _products(c, t, rows, expert, j * columns)
            with T.serial(0, rows) as j:
                _finish(c, t + j, expert)
        with T.serial(0, block_tokens - several * rows) as i:
            t = T.bind(first + several * rows + i)
            _products(c, t, 1, expert, 0)
            _finish(c, t, expert)


def _products(c: _Linear, t: Expr, rows: int, block: Expr, offset: Expr | int) -> None:
    """logits of `rows` tokens by lanes/rows experts of a block; the last expert may be repeated."""
    v, spec = c.v, c.spec
    lane = T.ramp(0, 1, v.lanes)
    columns = v.lanes // rows
    acc = [[T.alloc_buffer((v.lanes,), "float32") for _ in range(columns)] for _ in range(rows)]
    last = spec.route.num_experts - 1
    experts = [T.bind(T.min(block + offset + j, last)) for j in range(columns)]
    for a in (a for row in acc for a in row):
        T.buffer_store(a, v.splat(0.0), [lane])

    def add(xs: list[Expr], weights: list[Expr]) -> None:
        for row, x in zip(acc, xs, strict=True):
            for a, w in zip(row, weights, strict=True):
                T.buffer_store(
                    a, v.dot2(a[lane], x, w) if c.pairs else v.fma(x, w, a[lane]), [lane]
                )

    if c.pairs:
        x = T.decl_buffer((c.tokens, spec.width // 2), "int32", data=c.x.data)
        weight = T.decl_buffer((last + 1, spec.width // 2), "int32", data=c.weight.data)
        with T.serial(0, spec.width // (2 * v.lanes)) as d:
            lanes = T.ramp(d * v.lanes, 1, v.lanes)
            xs = [T.bind(x[t + i, lanes]) for i in range(rows)]
            add(xs, [T.bind(weight[e, lanes]) for e in experts])
    else:
        full_vectors, rest = divmod(spec.width, v.lanes)
        with T.serial(0, full_vectors) as d:
            xs = [v.load(c.x, (t + i, d * v.lanes)) for i in range(rows)]
            add(xs, [v.load(c.weight, (e, d * v.lanes)) for e in experts])
        if rest:
            tail, d = T.int32(rest), full_vectors * v.lanes
            xs = [v.load_tail(c.x, (t + i, d), tail) for i in range(rows)]
            add(xs, [v.load_tail(c.weight, (e, d), tail) for e in experts])
    sums = T.alloc_buffer((v.lanes,), "float32")
    T.buffer_store(sums, c.soft.sums([a[lane] for row in acc for a in row]), [lane])
    for i in range(rows):
        for j in range(columns):
            T.buffer_store(c.logits, sums[i * columns + j], [t + i, block + offset + j])


def _finish(c: _Linear, t: Expr, block: Expr) -> None:
    """Add the bias to `lanes` logits and round them."""
    v, route = c.v, c.spec.route
    lanes = T.ramp(block, 1, v.lanes)
    x = c.logits[t, lanes]
    if c.bias is not None:
        left = T.cast(route.num_experts - block, "int32")
        x = x + v.load_tail(c.bias, (block,), T.min(left, T.int32(v.lanes)))
    T.buffer_store(c.logits, rounded(v, x, LONG_NAMES[route.logits]), [t, lanes])
