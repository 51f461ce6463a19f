"""Rotary embedding as one op: pairs of features rotated by the angles of a token."""

from __future__ import annotations

from tvm import tirx

from moec.codegen.loops import index as ix
from moec.codegen.loops import scalars as sc
from moec.codegen.loops.elements.arithmetic import choose
from moec.codegen.loops.emission import Point
from moec.codegen.loops.index import Index
from moec.codegen.loops.moves.join import branch
from moec.codegen.loops.rules import point
from moec.codegen.loops.scalars import Scalar


@point("nn.rotary", cost=4, same_position=False)
def rotary(p: Point) -> Scalar:
    """One member of a rotated pair (a, b): a * cos - b * sin, or b * cos + a * sin."""
    x, cos, sin = p.op.inputs
    half = ix.const(p.shape[-1] // 2)
    kind = "f64" if x.dtype == "f64" else "f32"

    def rotate(pair: Index, first: bool) -> Scalar:
        if p.op.attrs.get("pairs", "halves") == "halves":
            members = (pair, ix.add(pair, half))
        else:
            twice = ix.mul(pair, ix.const(2))
            members = (twice, ix.add(twice, ix.const(1)))
        a, b = (p.read(x, (*p.at[:-1], member)).expr for member in members)
        doubled = cos.shape[-1] == x.shape[-1] and not first
        at = ix.add(pair, half) if doubled else pair
        tables = [
            sc.cast(p.read(t, p.emission.position(t, (*p.at[:-1], at), p.shape)), kind).expr
            for t in (cos, sin)
        ]
        expr = a * tables[0] - b * tables[1] if first else b * tables[0] + a * tables[1]
        return Scalar(p.dtype, expr)

    at = p.at[-1]
    if p.op.attrs.get("gives", "halves") == "neighbours":
        pair = ix.div(at, ix.const(2))
        even = tirx.EQ(ix.mod(at, ix.const(2)).expr, tirx.const(0, "int64"))
        return choose(even, rotate(pair, True), rotate(pair, False))
    middle = half.constant
    assert middle is not None
    if at.high is not None and at.high < middle:
        return rotate(at, True)
    second = ix.sub(at, half)
    second = Index(second.expr, second.key, max(0, second.low or 0), second.high)
    if at.low is not None and at.low >= middle:
        return rotate(second, False)
    p.emission.split(at, middle)
    return branch(p, at.expr < half.expr, lambda: rotate(at, True), lambda: rotate(second, False))
