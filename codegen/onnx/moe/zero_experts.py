"""moe.zero_experts: shares [T, 1] of the token and of each constant, and one product with each.

A Where removes the terms that a token did not choose, so that there is no 0 times infinity.
"""

from __future__ import annotations

from moec.codegen.onnx.rules import Call, build
from moec.codegen.onnx.writer import NodeWriter
from moec.ir.ops.experts.zero_experts import ZeroExperts


@build("moe.zero_experts")
def zero_experts(c: Call) -> str:
    w, parts = c.w, ZeroExperts.of(c.op)
    x = w.cast(w.read(parts.x), parts.x.dtype, "f32")
    ids = w.cast(w.read(parts.experts), parts.experts.dtype, "i64")
    weights = w.constant(1.0, "f32")
    if parts.weights is not None:
        weights = w.cast(w.read(parts.weights), parts.weights.dtype, "f32")
    copy_shares, terms, rows = [], [], 0
    for number, kind in enumerate(parts.kinds, parts.first):
        if kind == "zero":
            continue
        chosen = w("Where", w("Equal", ids, w.constant(number)), weights, w.constant(0.0, "f32"))
        share = w("ReduceSum", chosen, w.constant([1]), keepdims=1)
        if kind == "copy":
            copy_shares.append(share)
            continue
        assert parts.constants is not None
        row = w("Gather", w.read(parts.constants), w.constant([rows]), axis=0)
        pulled = share
        if parts.mix is not None:
            mix = w("Gather", w.read(parts.mix), w.constant(rows), axis=0)
            turned = w("Transpose", w.cast(mix, parts.mix.dtype, "f32"), perm=[1, 0])
            alpha = w("Softmax", w("MatMul", x, turned), axis=-1)
            one, other = w.many("Split", [alpha], 2, axis=1, num_outputs=2)
            copy_shares.append(_times(w, share, one))
            pulled = _times(w, share, other)
        terms.append(_times(w, pulled, w.cast(row, parts.constants.dtype, "f32")))
        rows += 1
    if copy_shares:
        total = copy_shares[0]
        for share in copy_shares[1:]:
            total = w("Add", total, share)
        terms.append(_times(w, total, x))
    if parts.addend is not None:
        terms.append(w.cast(w.read(parts.addend), parts.addend.dtype, "f32"))
    total = terms[0] if terms else w("Mul", x, w.constant(0.0, "f32"))
    for term in terms[1:]:
        total = w("Add", total, term)
    return w.cast(total, "f32", c.out.dtype)


def _times(w: NodeWriter, share: str, value: str) -> str:
    """share[T, 1] * value, and 0 where the share is 0."""
    zero = w.constant(0.0, "f32")
    return w("Where", w("Equal", share, zero), zero, w("Mul", share, value))
