"""moe.zero_experts on the CPU: no rows and no sort, one pass over the tokens.

    z[t] = share[t] * x[t] + sum over c of pull[t, c] * constants[c]  (+ addend[t])

share[t] is the sum of the weights of token t's copies, and of the parts of its constants that
multiply x; pull[t, c] is the part that multiplies the constant. Where a share or pull is 0, x or
the constant is not read: for a token without such experts, zeros or the addend are stored.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cpu import parallel
from moec.codegen.cpu.frame import argument, kernel
from moec.codegen.cpu.parallel import ELEMENT
from moec.codegen.cpu.vector import Vector
from moec.codegen.specs.routing import ZeroSpec
from moec.target.cpu import CpuTarget


def zero_experts(target: CpuTarget, spec: ZeroSpec, name: str = "zero_experts") -> PrimFunc:
    """A kernel (x[T, D], experts i64[T, k][, weights[T, k]][, mix[C, 2, D]][, constants[C, D]]
    [, addend[T, D]], out[T, D])."""
    v = Vector(target)
    count, width = spec.kinds.count("constant"), spec.width
    with kernel(name, target) as frame:
        t = T.int64()
        x = argument("x", (t, width), spec.x)
        experts = argument("experts", (t, spec.top_k), "int64")
        weights = mix = values = None
        if spec.weights is not None:
            weights = argument("weights", (t, spec.top_k), spec.weights)
        if spec.mix is not None:
            mix = argument("mix", (count, 2, width), spec.mix)
        if spec.values is not None:
            values = argument("values", (count, width), spec.values)
        addend = None
        if spec.addend is not None:
            addend = argument("addend", (t, width), spec.addend)
        out = argument("out", (t, width), spec.out)
        lanes = T.ramp(0, 1, v.lanes)

        def register() -> Buffer:
            buffer = T.alloc_buffer((v.lanes,), "float32")
            T.buffer_store(buffer, v.splat(0.0), [lanes])
            return buffer

        def add(to: Buffer, value: Expr) -> None:
            T.buffer_store(to, to[lanes] + value, [lanes])

        work = t * (width * ELEMENT)
        with parallel.parallel_for(t, work) as token:
            share = register()
            pulls = [register() for _ in range(count)]
            with T.serial(0, spec.top_k) as s:
                e = T.bind(experts[token, s])
                with T.If(e >= spec.first), T.Then():
                    weight = v.splat(1.0)
                    if weights is not None:
                        weight = T.bind(v.splat(v.scalar(weights, [token, s])))
                    rows = iter(range(count))
                    for number, kind in enumerate(spec.kinds, spec.first):
                        if kind == "zero":
                            continue
                        with T.If(e == number), T.Then():
                            if kind == "copy":
                                add(share, weight)
                                continue
                            c, rest = next(rows), weight
                            if mix is not None:
                                part = _part(v, x, mix, token, c, width)
                                add(share, weight * part)
                                rest = weight * (v.splat(1.0) - part)
                            add(pulls[c], rest)

            def add_copies(
                load: Callable[[Buffer, Expr], Expr], store: Callable[[Expr], None]
            ) -> None:
                total = register()
                with T.If(share[0] != 0.0), T.Then():
                    add(total, share[lanes] * load(x, token))
                for c, pull in enumerate(pulls):
                    with T.If(pull[0] != 0.0), T.Then():
                        T.buffer_store(
                            total, v.fma(pull[lanes], load(values, c), total[lanes]), [lanes]
                        )
                if addend is not None:
                    add(total, load(addend, token))
                store(total[lanes])

            with T.serial(0, width // v.lanes) as j:
                add_copies(
                    lambda buffer, row: v.load(buffer, [row, j * v.lanes]),
                    lambda value: v.store(out, [token, j * v.lanes], value),
                )
            if tail := width % v.lanes:
                add_copies(
                    lambda buffer, row: v.load_tail(buffer, [row, width - tail], tail),
                    lambda value: v.store_tail(out, [token, width - tail], value, tail),
                )
    return frame.function


def _part(v: Vector, x: Buffer, mix: Buffer, token: Expr, c: int, width: int) -> Expr:
    """softmax(mix[c] @ x[token])[0] in all lanes, computed as a sigmoid of the difference."""
    lanes, tail = T.ramp(0, 1, v.lanes), width % v.lanes
    total = T.alloc_buffer((v.lanes,), "float32")
    T.buffer_store(total, v.splat(0.0), [lanes])

    def step(load: Callable[[Buffer, list[Expr | int]], Expr]) -> None:
        value, one, other = load(x, [token]), load(mix, [c, 0]), load(mix, [c, 1])
        T.buffer_store(total, v.fma(value, one - other, total[lanes]), [lanes])

    with T.serial(0, width // v.lanes) as j:
        step(lambda buffer, row: v.load(buffer, [*row, j * v.lanes]))
    if tail:
        step(lambda buffer, row: v.load_tail(buffer, [*row, width - tail], tail))
    return v.sigmoid(v.splat(v.sum(total[lanes])))
