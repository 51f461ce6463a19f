"""Root-mean-square norms become nn.rms_norm.

    s = aten.pow(x, 2); m = aten.mean(s, -1, keepdim); r = aten.rsqrt(m + epsilon)
    y = aten.mul(w, aten.mul(x, r))        ->   y = nn.rms_norm(x, w) <epsilon>

The match grows outwards, one op at a time; each step is exact by itself:

    x * rsqrt(mean(x^2) + epsilon)         ->   rms_norm(x)        of float32 x
    cast(rms_norm(cast(x), w?))            ->   rms_norm(x, w?)    both casts are in the op
    rms_norm(x) * w                        ->   rms_norm(x, w)     round_first where x is a
                                                                   half type: x was rounded

So the norms of Llama (weight after the cast back), GPT-OSS (weight before it), Gemma (weight 1 + w)
and T5 (x itself is multiplied, not its float32 copy), and norms without a weight, need no separate
forms. x / sqrt(..) is treated as x * rsqrt(..): they differ by one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.dtypes import HALVES
from moec.errors import NoMatch
from moec.ir.graph import DType, Op, Program, Stage, Value
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass


@dataclass(frozen=True)
class FuseNorm(Pass):
    """Make one op of each root-mean-square norm, its weight and its casts."""

    name: ClassVar[str] = "fuse-norm"
    gives: ClassVar[Stage] = Stage.ATEN

    def run(self, program: Program, log: Log) -> Program:
        return Program(rewrite(program.graph, fuse_norm, log), program.weights)


def fuse_norm(op: Op, b: Builder) -> Sequence[Value] | None:
    """The rule. Run after canonicalise and fold-constants."""
    rule = _RULES.get(op.name)
    return rule(op, b) if rule is not None else None


def _match_product(op: Op, b: Builder) -> Sequence[Value] | None:
    if len(op.inputs) != 2:
        return None
    for x, other in (op.inputs, op.inputs[::-1]):
        source = b.producers.get(other)
        if source is None:
            continue
        if source.name == "aten.rsqrt.default":
            return _match_bare(op, x, source, b)
        if source.name == "nn.rms_norm" and len(source.inputs) == 1:
            return _emit_weighted(op, x, source, b)
    return None


def _match_quotient(op: Op, b: Builder) -> Sequence[Value] | None:
    source = b.producers.get(op.inputs[-1])
    if len(op.inputs) != 2 or source is None or source.name != "aten.sqrt.default":
        return None
    return _match_bare(op, op.inputs[0], source, b)


def _match_bare(op: Op, x: Value, root: Op, b: Builder) -> Sequence[Value] | None:
    """x * rsqrt(mean(x^2) + epsilon), of a mean of squares."""
    shifted = b.producers.get(root.inputs[0])
    if shifted is None or shifted.name != "aten.add.Tensor" or len(shifted.inputs) != 1:
        return None
    epsilon = shifted.attrs.get("other")
    mean = b.producers.get(shifted.inputs[0])
    if mean is None or mean.name != "aten.mean.dim" or not isinstance(epsilon, float):
        return None
    squared = _squared(b.producers.get(mean.inputs[0]))
    if squared is None:
        return None
    rank = len(squared.shape)
    if mean.attrs["dim"] not in ((-1,), (rank - 1,)):
        raise NoMatch(f"the mean of squares is over axes {mean.attrs['dim']}, not the last one")
    if not mean.attrs.get("keepdim") or shifted.attrs.get("alpha", 1) != 1:
        return None
    if x is not squared and x is not _lossless_source(squared, b):
        raise NoMatch(f"{x.name} is multiplied, but the mean is of the squares of {squared.name}")
    if squared.dtype != "f32" or op.outputs[0].type != squared.type:
        raise NoMatch(f"computed in {squared.dtype}; nn.rms_norm computes in f32")
    return b.emit("nn.rms_norm", [squared], like=op, attrs={"epsilon": epsilon})


def _squared(op: Op | None) -> Value | None:
    """x of x^2."""
    if op is None:
        return None
    if op.name == "aten.pow.Tensor_Scalar" and op.attrs["exponent"] == 2:
        return op.inputs[0]
    if op.name == "aten.mul.Tensor" and len(op.inputs) == 2 and op.inputs[0] is op.inputs[1]:
        return op.inputs[0]
    return None


def _emit_weighted(op: Op, weight: Value, norm: Op, b: Builder) -> Sequence[Value] | None:
    x = norm.inputs[0]
    if weight.shape != x.shape[-1:] or op.outputs[0].type != x.type:
        return None
    rounded = x.dtype in HALVES
    attrs = dict(norm.attrs) | ({"round_first": True} if rounded else {})
    return b.emit("nn.rms_norm", [x, weight], like=op, attrs=attrs)


def _cast(op: Op, b: Builder) -> Sequence[Value] | None:
    norm = b.producers.get(op.inputs[0])
    if norm is None or norm.name != "nn.rms_norm":
        return None
    x = _lossless_source(norm.inputs[0], b)
    if x is None or x.type != op.outputs[0].type or set(op.attrs) != {"dtype"}:
        return None
    return b.emit("nn.rms_norm", [x, *norm.inputs[1:]], like=op, attrs=norm.attrs)


def _lossless_source(value: Value, b: Builder) -> Value | None:
    """x where value is float32(x) and x is of a half type."""
    cast = b.producers.get(value)
    if cast is None or cast.name != "aten._to_copy.default":
        return None
    exact = cast.attrs.get("dtype") == DType("f32") and cast.inputs[0].dtype in HALVES
    return cast.inputs[0] if exact else None


_RULES: dict[str, Callable[[Op, Builder], Sequence[Value] | None]] = {
    "aten.mul.Tensor": _match_product,
    "aten.div.Tensor": _match_quotient,
    "aten._to_copy.default": _cast,
}
