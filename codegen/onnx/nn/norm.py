"""nn.rms_norm, nn.add_norm and nn.rotary: ONNX's operators if they have the same meaning."""

from __future__ import annotations

from collections.abc import Sequence

from moec.codegen.onnx.profiles import FUSED
from moec.codegen.onnx.rules import Call, build
from moec.codegen.onnx.sizes import reshaped
from moec.codegen.onnx.writer import NodeWriter
from moec.ir.graph import Graph, Ref, Value
from moec.ir.sizes.dims import Dim


@build("nn.rms_norm")
def rms_norm(c: Call) -> str:
    x, *weight = c.op.inputs
    return _rms(c, c.w.read(x), x, weight)


@build("nn.add_norm")
def add_norm(c: Call) -> tuple[str, str]:
    w, (x, residual, *weights) = c.w, c.op.inputs
    name, dtype, scale = c.read(x), x.dtype, c.op.attrs.get("scale")
    if scale is not None:
        name = w("Mul", name, w.constant(float(str(scale)), dtype))
    total = w("Add", name, c.read(residual))
    if c.op.attrs["kind"] == "rms":
        return total, _rms(c, total, x, weights)
    named = [c.read(weight, dtype) for weight in weights]
    ones = [] if weights else [w.constant([1.0] * w.bound(x.shape[-1]), dtype)]
    epsilon = float(str(c.op.attrs["epsilon"]))
    return total, w("LayerNormalization", total, *ones, *named, axis=-1, epsilon=epsilon)


def _rms(c: Call, name: str, x: Value, weight: Sequence[Value]) -> str:
    """RMSNormalization in float32; a variant that it does not support becomes separate ops."""
    w, width = c.w, x.shape[-1]
    epsilon = float(str(c.op.attrs["epsilon"]))
    one_rounding = x.dtype == "f32" or bool(c.op.attrs.get("round_first"))
    if w.opset >= FUSED and x.dtype != "f64" and one_rounding and isinstance(width, int):
        scale = c.read(weight[0], x.dtype) if weight else w.constant([1.0] * width, x.dtype)
        return w("RMSNormalization", name, scale, axis=-1, epsilon=epsilon)
    full = w.cast(name, x.dtype, "f32")
    mean = w("ReduceMean", w("Mul", full, full), w.constant([-1]), keepdims=1)
    output = w("Div", full, w("Sqrt", w("Add", mean, w.constant(epsilon, "f32"))))
    dtype = "f32"
    if c.op.attrs.get("round_first"):
        output, dtype = w.cast(output, "f32", x.dtype), x.dtype
    if weight:
        output = w("Mul", output, c.read(weight[0], dtype))
    return w.cast(output, dtype, x.dtype)


@build("nn.rotary")
def rotary(c: Call) -> str:
    w, (x, cos, sin) = c.w, c.op.inputs
    pairs = c.op.attrs.get("pairs", "halves")
    gives = c.op.attrs.get("gives", "halves")
    caches = [_cache(w, value, x) for value in (cos, sin)] if _fits(w, x, cos) else []
    if caches and pairs == gives and x.dtype in ("f32", "f16", "bf16"):
        turned = [
            w.cast(name, v.dtype, x.dtype) for name, v in zip(caches, (cos, sin), strict=True)
        ]
        return w("RotaryEmbedding", c.read(x), *turned, interleaved=int(pairs == "neighbours"))
    return _written_out(c, x, cos, sin, pairs == "halves", gives == "halves")


def _fits(w: NodeWriter, x: Value, cos: Value) -> bool:
    """Whether RotaryEmbedding supports the angles: one angle per pair, the same for all heads."""
    if w.opset < FUSED or len(x.shape) != 4 or cos.shape[1] != 1:
        return False
    same = cos.shape[0] in (1, x.shape[0]) and cos.shape[2] == x.shape[2]
    return same and (cos.shape[-1] != x.shape[-1] or all_equal_halves(w.graph, cos))


def _cache(w: NodeWriter, value: Value, x: Value) -> str:
    """[B, S, D/2] from cos or sin [1 or B, 1, S, D or D/2]."""
    batch, _, sequence, width = x.shape
    assert isinstance(width, int)
    name = w.read(value)
    if value.shape[-1] == width:
        name = w("Slice", name, *(w.constant([v]) for v in (0, width // 2, -1)))
    shape: tuple[Dim, ...] = (value.shape[0], 1, sequence, width // 2)
    name = reshaped(w, name, shape, (value.shape[0], sequence, width // 2))
    if value.shape[0] == batch:
        return name
    return w("Expand", name, w.shape((batch, 1, 1)))


_KEEP_HALVES = (
    "aten.cos.default",
    "aten.sin.default",
    "aten.alias.default",
    "aten.clone.default",
    "aten._to_copy.default",
    "aten.mul.Tensor",
    "aten.reshape.default",
)


def all_equal_halves(graph: Graph, value: Value) -> bool:
    """Whether both halves of the last axis are equal: the value is a cat(a, a)."""
    op = graph.producers.get(value)
    while op is not None and len(op.inputs) == 1 and op.name in _KEEP_HALVES:
        if op.inputs[0].shape[-1:] != value.shape[-1:]:
            return False
        op = graph.producers.get(op.inputs[0])
    if op is None or op.name != "aten.cat.default":
        return False
    parts, dim = op.attrs["tensors"], op.attrs.get("dim", 0)
    assert isinstance(parts, tuple)
    assert isinstance(dim, int)
    sources = [op.inputs[ref.index] for ref in parts if isinstance(ref, Ref)]
    last = dim in (-1, len(value.shape) - 1) and dim != 0
    return last and len(sources) == 2 and sources[0] is sources[1]


def _written_out(
    c: Call, x: Value, cos: Value, sin: Value, from_halves: bool, to_halves: bool
) -> str:
    """a cos - b sin and b cos + a sin for each pair (a, b)."""
    w, full = c.w, "f64" if x.dtype == "f64" else "f32"
    name, width = c.read(x, full), x.shape[-1]
    assert isinstance(width, int)
    half = width // 2
    if from_halves:
        a, b = _halves(w, name, half)
    else:
        every = [w.constant([v]) for v in (width, -1, 2)]
        a, b = (w("Slice", name, w.constant([start]), *every) for start in (0, 1))
    (cos_a, cos_b), (sin_a, sin_b) = (
        _halves(w, c.read(v, full), half) if v.shape[-1] == width else (c.read(v, full),) * 2
        for v in (cos, sin)
    )
    first = w("Sub", w("Mul", a, cos_a), w("Mul", b, sin_a))
    second = w("Add", w("Mul", b, cos_b), w("Mul", a, sin_b))
    if to_halves:
        output = w("Concat", first, second, axis=-1)
    else:
        last = w.constant([-1])
        pairs = w("Concat", w("Unsqueeze", first, last), w("Unsqueeze", second, last), axis=-1)
        output = reshaped(w, pairs, (*x.shape[:-1], half, 2), x.shape)
    return w.cast(output, full, x.dtype)


def _halves(w: NodeWriter, name: str, half: int) -> tuple[str, str]:
    first, second = w.many("Split", [name, w.constant([half, half])], 2, axis=-1)
    return first, second
