"""Ops that create elements without reading a tensor."""

from __future__ import annotations

from tvm import tirx

from moec.codegen.loops import scalars as sc
from moec.codegen.loops.emission import Point
from moec.codegen.loops.rules import point
from moec.codegen.loops.scalars import Scalar
from moec.dtypes import INTS


def _constant(*names: str, value: float | None = None, argument: str = "") -> None:
    @point(*names, cost=0, exact=True)
    def constant(p: Point) -> Scalar:
        if value is not None:
            return sc.constant(value, p.dtype)
        return sc.rounded(p.get(p[argument], p.dtype))


_constant(
    "zeros",
    "zeros_like",
    "new_zeros",
    "empty.memory_format",
    "empty_like",
    "new_empty",
    "empty_permuted",
    "new_empty_strided",
    "empty_strided",
    value=0,
)
_constant("ones", "ones_like", "new_ones", value=1)
_constant("full", "full_like", "new_full", argument="fill_value")
_constant("scalar_tensor", argument="s")
_constant("fill.Scalar", "fill.Tensor", argument="value")


@point("arange", "arange.start", "arange.start_step", cost=0, exact=True, same_position=False)
def arange(p: Point) -> Scalar:
    named = p.emission.named(p.op)
    start, step = named.get("start", 0), named.get("step", 1)
    position = Scalar("i64", p.at[0].expr)
    if start == 0 and step == 1:
        return sc.cast(position, p.dtype)
    if p.dtype in INTS:
        exprs = [p.emission.sizes.expr(v) for v in (start, step)]
        return sc.cast(Scalar("i64", exprs[0] + position.expr * exprs[1]), p.dtype)
    wide = sc.cast(position, "f64").expr
    first, by = (p.get(v, "f64").expr for v in (start, step))
    return sc.cast(Scalar("f64", first + wide * by), p.dtype)


@point("eye", "eye.m", cost=0, exact=True, same_position=False)
def eye(p: Point) -> Scalar:
    return sc.cast(Scalar("bool", tirx.EQ(p.at[0].expr, p.at[1].expr)), p.dtype)
