"""The bucket of a value is the number of boundaries below it.

bucketize(x, edges)        -> sum(not edges >= x[.., None], -1)
bucketize(x, edges, right) -> sum(not edges > x[.., None], -1)

NaN is above all boundaries, as in torch.

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
    comparison = "aten.gt.Tensor" if op.attrs.get("right") else "aten.ge.Tensor"
    column = b.reshape(x, (*x.shape, 1), like=op, named="column")
    mask_type = TensorType("bool", (*x.shape, *edges.shape))
    (reached,) = b.emit(comparison, [edges, column], [mask_type], like=op, named="reached")
    (below,) = b.emit("aten.logical_not.default", [reached], [mask_type], like=op, named="below")
    count = b.cast(below, "i64", like=op, named="below")
    attrs = {"dim": (-1,)}
    return b.emit("aten.sum.dim_IntList", [count], [op.outputs[0].type], like=op, attrs=attrs)
