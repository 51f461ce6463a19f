"""Experts of different architectures are written out, and their weighted results are added.

    y = moe.mixture(a, x, w…) {            o0 = detect(x); o1 = segment(x); …
      o0 = detect(x); o1 = segment(x) } -> y = o0 * a[:, 0] + o1 * a[:, 1] + …

Experts that differ in more than their weights cannot share a grouped product. The weighted sum is
fused into the loops of the last ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from moec.ir.graph import Op, Program, TensorType, Value
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass


@dataclass(frozen=True)
class ExpandMixtures(Pass):
    """Write out the experts of a mixture, and the sum of their weighted results."""

    name: ClassVar[str] = "expand-mixtures"

    def run(self, program: Program, log: Log) -> Program:
        return Program(rewrite(program.graph, expand, log), program.weights)


def expand(op: Op, b: Builder) -> Sequence[Value] | None:
    if op.name != "moe.mixture" or op.body is None:
        return None
    shares, *rest = op.inputs
    body = op.body
    new = dict(zip((*body.inputs, *body.params), rest, strict=True))
    for inner in body.ops:
        outputs = tuple(Value(b.fresh(value.name), value.type) for value in inner.outputs)
        b.append(replace(inner, inputs=tuple(new[v] for v in inner.inputs), outputs=outputs))
        new |= dict(zip(inner.outputs, outputs, strict=True))
    result = op.outputs[0].type
    lead = shares.shape[:-1]
    column = TensorType(shares.dtype, lead)
    wide = TensorType(shares.dtype, (*lead, *(1 for _ in result.shape[len(lead) :])))
    total: Value | None = None
    for number, output in enumerate(body.outputs):
        attrs = {"dim": len(lead), "index": number}
        (share,) = b.emit("aten.select.int", [shares], [column], like=op, attrs=attrs)
        (share,) = b.emit(
            "aten.reshape.default", [share], [wide], like=op, attrs={"shape": wide.shape}
        )
        (part,) = b.emit("aten.mul.Tensor", [share, new[output]], [result], like=op)
        if total is not None:
            (part,) = b.emit("aten.add.Tensor", [total, part], [result], like=op)
        total = part
    assert total is not None
    return (total,)
