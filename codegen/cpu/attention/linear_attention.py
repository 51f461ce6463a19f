"""nn.linear_attention on the CPU: the recurrent state of a head, position by position.

    q, k[B, S, G, Dk]  v[B, S, H, Dv]  decay  rates?  beta?  start?  ->  y[B, S, H, Dv]  end

The columns of a state are independent, so a task computes `lanes` columns, [Dk, lanes], in the L1
cache, over all positions. Tasks do not depend on the number of threads, and so neither do sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cpu import parallel
from moec.codegen.cpu.frame import argument, kernel
from moec.codegen.cpu.parallel import ELEMENT
from moec.codegen.cpu.vector import Vector
from moec.codegen.specs.attention import LinearAttentionSpec
from moec.target.cpu import CpuTarget

_SIDE_BY_SIDE = 4  # independent sums, since an addition waits for the previous one to its sum


@dataclass(frozen=True)
class _Task:
    """`lanes` columns of the state of one head; `count` of them exist (None: all)."""

    spec: LinearAttentionSpec
    v: Vector
    buffers: dict[str, Buffer]
    batch: Expr
    head: Expr
    column: Expr
    count: Expr | None
    state: Buffer

    def load(self, name: str, *index: Expr) -> Expr:
        where = (*index, self.column)
        if self.count is None:
            return self.v.load(self.buffers[name], where)
        return self.v.load_tail(self.buffers[name], where, self.count)

    def store(self, name: str, x: Expr, *index: Expr) -> None:
        where = (*index, self.column)
        if self.count is None:
            self.v.store(self.buffers[name], where, x)
        else:
            self.v.store_tail(self.buffers[name], where, x, self.count)

    def row(self, i: Expr) -> tuple[Expr, Expr]:
        return i, T.ramp(0, 1, self.v.lanes)


def linear_attention(
    spec: LinearAttentionSpec, target: CpuTarget, name: str = "linear_attention"
) -> PrimFunc:
    """The kernel (q, k, v, decay, rates?, beta?, start?, y, end), all of float32."""
    v = Vector(target)
    state = (spec.heads, spec.key_dim, spec.value_dim)
    with kernel(name, target) as frame:
        batch, length = T.int64(), T.int64()
        per_head = (batch, length, spec.heads)
        keys = (batch, length, spec.shared, spec.key_dim)
        values = (*per_head, spec.value_dim)
        each = {"head": (), "key": (spec.key_dim,), "rate": (spec.value_dim,)}[spec.per]
        shapes: dict[str, Sequence[Expr | int]] = {"q": keys, "k": keys, "v": values}
        shapes["decay"] = (*per_head, *each)
        if spec.per == "rate":
            shapes["rates"] = state
        if spec.delta:
            shapes["beta"] = per_head
        if spec.started:
            shapes["start"] = (batch, *state)
        shapes |= {"y": values, "end": (batch, *state)}
        buffers = {name: argument(name, shape, "float32") for name, shape in shapes.items()}
        blocks = -(-spec.value_dim // v.lanes)
        count = batch * (spec.heads * blocks)
        work = length * (count * (spec.key_dim * v.lanes * ELEMENT))
        with parallel.parallel_for(count, work) as task:
            head = T.bind(T.floordiv(task, blocks))
            column = T.bind((task - head * blocks) * v.lanes)
            exact = spec.value_dim % v.lanes == 0
            _carry(
                _Task(
                    spec,
                    v,
                    buffers,
                    T.bind(T.floordiv(head, spec.heads)),
                    T.bind(T.floormod(head, spec.heads)),
                    column,
                    None if exact else T.bind(T.min(spec.value_dim - column, v.lanes)),
                    T.alloc_buffer((spec.key_dim, v.lanes), "float32"),
                ),
                length,
            )
    return frame.function


def _carry(c: _Task, length: Expr) -> None:
    v, spec = c.v, c.spec
    with T.serial(0, spec.key_dim) as i:
        first = c.load("start", c.batch, c.head, i) if spec.started else v.splat(0.0)
        T.buffer_store(c.state, first, c.row(i))
    factors = T.alloc_buffer((-(-spec.key_dim // v.lanes) * v.lanes,), "float32")
    with T.serial(0, length) as t:
        _step(c, t, factors)
    with T.serial(0, spec.key_dim) as i:
        c.store("end", c.state[c.row(i)], c.batch, c.head, i)


def _step(c: _Task, t: Expr, factors: Buffer) -> None:
    v, spec, state = c.v, c.spec, c.state
    position = (c.batch, t, c.head)
    group = (c.batch, t, T.bind(T.floordiv(c.head, spec.heads // spec.shared)))
    factor = _decay(c, t, factors)
    new = c.load("v", *position)

    def entry(name: str, i: Expr) -> Expr:
        return v.splat(v.scalar(c.buffers[name], (*group, i)))

    if spec.delta:

        def read(i: Expr, projection: Buffer, lane: Expr) -> None:
            row = T.bind(state[c.row(i)] * factor(i))
            T.buffer_store(state, row, c.row(i))
            T.buffer_store(projection, v.fma(entry("k", i), row, projection[lane]), [lane])

        beta = v.splat(v.scalar(c.buffers["beta"], position))
        new = T.bind((new - _sum(c, read)) * beta)

    def write(i: Expr, total: Buffer, lane: Expr) -> None:
        row = state[c.row(i)] if spec.delta else state[c.row(i)] * factor(i)
        row = T.bind(v.fma(entry("k", i), new, row))
        T.buffer_store(state, row, c.row(i))
        T.buffer_store(total, v.fma(entry("q", i), row, total[lane]), [lane])

    c.store("y", _sum(c, write), *position)


def _decay(c: _Task, t: Expr, factors: Buffer) -> Callable[[Expr], Expr]:
    """The decay factor of row i of the state at position t."""
    v, spec, decay = c.v, c.spec, c.buffers["decay"]
    position = (c.batch, t, c.head)
    if spec.per == "head":
        factor = v.exp(v.splat(v.scalar(decay, position)))
        return lambda i: factor
    if spec.per == "rate":
        decay_row = c.load("decay", *position)
        return lambda i: v.exp(decay_row * c.load("rates", c.head, i))
    full_vectors, rest = divmod(spec.key_dim, v.lanes)
    with T.serial(0, full_vectors) as j:
        x = v.exp(v.load(decay, (*position, j * v.lanes)))
        T.buffer_store(factors, x, [T.ramp(j * v.lanes, 1, v.lanes)])
    if rest:
        last = T.int64(full_vectors * v.lanes)
        x = v.exp(v.load_tail(decay, (*position, last), T.int32(rest)))
        T.buffer_store(factors, x, [T.ramp(last, 1, v.lanes)])
    return lambda i: v.splat(factors[i])


def _sum(c: _Task, body: Callable[[Expr, Buffer, Expr], None]) -> Expr:
    """The sum over the rows of the state; body(row, partial sum, lanes) adds a row to it."""
    v = c.v
    lane = T.ramp(0, 1, v.lanes)
    parts = [T.alloc_buffer((v.lanes,), "float32") for _ in range(_SIDE_BY_SIDE)]
    for part in parts:
        T.buffer_store(part, v.splat(0.0), [lane])
    rounds, rest = divmod(c.spec.key_dim, _SIDE_BY_SIDE)
    with T.serial(0, rounds) as j:
        for n, part in enumerate(parts):
            body(j * _SIDE_BY_SIDE + n, part, lane)
    for n in range(rest):
        body(T.int64(rounds * _SIDE_BY_SIDE + n), parts[n], lane)
    a, b, d, e = (part[lane] for part in parts)
    return T.bind((a + b) + (d + e))
