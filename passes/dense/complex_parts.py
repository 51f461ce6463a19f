"""The real and imaginary parts of a complex tensor, without complex numbers where possible.

polar(1, angle) * c is (cos(angle) * c, sin(angle) * c), which is enough for rotary embeddings in
complex form. Any other complex value is split by view_as_real.
"""

from __future__ import annotations

from moec.ir.graph import Op, TensorType, Value
from moec.passes.core.rewrite import Builder


def complex_parts(value: Value, like: Op, b: Builder) -> tuple[Value, Value]:
    """Ops that compute the real and the imaginary part of `value`, appended to `b`."""
    op = b.producers.get(value)
    if op is not None and op.name == "aten.reshape.default":
        a, c = complex_parts(op.inputs[0], like, b)
        return _on_each_part(op, a, c, like, b)
    if op is not None and op.name == "aten.mul.Tensor" and isinstance(op.attrs.get("other"), float):
        a, c = complex_parts(op.inputs[0], like, b)
        return (a, c) if op.attrs["other"] == 1.0 else _on_each_part(op, a, c, like, b)
    if op is not None and op.name == "aten.polar.default" and _is_one(op.inputs[0], b):
        angle = op.inputs[1]
        (cos,) = b.emit("aten.cos.default", [angle], [angle.type], like=op)
        (sin,) = b.emit("aten.sin.default", [angle], [angle.type], like=op)
        return cos, sin
    apart = TensorType("f32", (*value.shape, 2))
    part = TensorType("f32", value.shape)
    (pairs,) = b.emit("aten.view_as_real.default", [value], [apart], like=like)
    real, imaginary = (
        b.emit("aten.select.int", [pairs], [part], like=like, attrs={"dim": -1, "index": index})[0]
        for index in (0, 1)
    )
    return real, imaginary


def _on_each_part(op: Op, a: Value, c: Value, like: Op, b: Builder) -> tuple[Value, Value]:
    """`op` applied to each part, for ops that treat both parts alike."""
    target = TensorType("f32", op.outputs[0].shape)
    (real,) = b.emit(op.name, [a], [target], like=op, attrs=op.attrs)
    (imaginary,) = b.emit(op.name, [c], [target], like=op, attrs=op.attrs)
    return real, imaginary


def _is_one(value: Value, b: Builder) -> bool:
    op = b.producers.get(value)
    filled = op is not None and op.name in ("aten.full.default", "aten.full_like.default")
    ones = op is not None and op.name == "aten.ones_like.default"
    return ones or (filled and op.attrs.get("fill_value") == 1)  # type: ignore[union-attr]
