"""The bucket of a value is the number of boundaries below it.

bucketize(x, edges)        -> sum(edges < x[.., None], -1)
bucketize(x, edges, right) -> sum(edges <= x[.., None], -1)

Vision towers number the patches of an image with a few dozen boundaries, so that counting them all
costs little.
"""

from __future__ import annotations

from collections.abc import Sequence

from moec.ir.graph import Op, TensorType, Value
from moec.passes.core.rewrite import Builder


def bucketize(op: Op, b: Builder) -> Sequence[Value] | None:
    x, edges = op.inputs
    if len(edges.shape) != 1 or op.attrs.get("out_int32"):
        return None
    comparison = "aten.le.Tensor" if op.attrs.get("right") else "aten.lt.Tensor"
    column = b.reshape(x, (*x.shape, 1), like=op, named="column")
    mask_type = TensorType("bool", (*x.shape, *edges.shape))
    (below,) = b.emit(comparison, [edges, column], [mask_type], like=op, named="below")
    count = b.cast(below, "i64", like=op, named="below")
    attrs = {"dim": (-1,)}
    return b.emit("aten.sum.dim_IntList", [count], [op.outputs[0].type], like=op, attrs=attrs)
