"""Rotary position embedding, as Hugging Face models write it, becomes nn.rotary.

    x * cos + cat(-x[.., D/2:], x[.., :D/2]) * sin          Llama: pairs are halves
    cat(a*cos - b*sin, b*cos + a*sin)                       GPT-OSS, where a and b are halves of
                                                            x; DeepSeek-V3, where they are x's
                                                            even and odd features
    real(complex(x) * polar(1, angle))                      Llama 4, DeepSeek-V2: neighbours

nn.rotary computes in float32 and rounds once. In half types these forms round each product: the
results differ by a unit in the last place of the products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.errors import IRError, NoMatch
from moec.ir.graph import Attr, DType, Op, Program, Ref, Stage, TensorType, Value
from moec.ir.sizes.dims import product
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass


@dataclass(frozen=True)
class FuseRotary(Pass):
    """Make one op of each rotary embedding of queries or keys."""

    name: ClassVar[str] = "fuse-rotary"
    gives: ClassVar[Stage] = Stage.ATEN

    def run(self, program: Program, log: Log) -> Program:
        return Program(rewrite(program.graph, fuse_rotary, log), program.weights)


def fuse_rotary(op: Op, b: Builder) -> Sequence[Value] | None:
    """The rule. Run after canonicalise."""
    rule = _RULES.get(op.name)
    return rule(op, b) if rule is not None else None


@dataclass(frozen=True)
class _Piece:
    """Half of the features of x: the first or second half, or the even or odd ones."""

    x: Value
    pairs: str
    second: bool


def _match_sum(op: Op, b: Builder) -> Sequence[Value] | None:
    """Matches x * cos + rotate_half(x) * sin."""
    if len(op.inputs) != 2 or op.attrs.get("alpha", 1) != 1:
        return None
    products = [_factors(value, b) for value in op.inputs]
    for plain, other in (products, products[::-1]):
        for turned, sin in _orders(other):
            source = _rotate_half(turned, b)
            if source is None:
                continue
            for x, cos in _orders(plain):
                if x is source:
                    return _emit_rotary(op, b, x, cos, sin, "halves")
            if plain:
                names = " by ".join(value.name for value in plain)
                raise NoMatch(f"rotates the halves of {source.name}, but adds {names}")
    return None


def _rotate_half(value: Value, b: Builder) -> Value | None:
    """x of cat(-x[.., D/2:], x[.., :D/2])."""
    op = b.producers.get(value)
    if not _joins_two(op):
        return None
    assert op is not None
    minus = b.producers.get(op.inputs[0])
    if minus is None or minus.name != "aten.neg.default":
        return None
    low, high = _piece(op.inputs[1], b), _piece(minus.inputs[0], b)
    if low is None or high is None or low.x is not high.x or low.pairs != "halves":
        return None
    return low.x if high.second and not low.second and high.pairs == "halves" else None


def _match_cat(op: Op, b: Builder) -> Sequence[Value] | None:
    """Matches cat(a*cos - b*sin, b*cos + a*sin)."""
    if not _joins_two(op):
        return None
    difference, total = (b.producers.get(value) for value in op.inputs)
    if difference is None or total is None or len(difference.inputs) != 2:
        return None
    names = (difference.name, total.name)
    if names != ("aten.sub.Tensor", "aten.add.Tensor") or len(total.inputs) != 2:
        return None
    if difference.attrs.get("alpha", 1) != 1 or total.attrs.get("alpha", 1) != 1:
        return None
    rotation = _match_rotation(difference, total, b)
    if rotation is None:
        return None
    x, pairs, cos, sin = rotation
    return _emit_rotary(op, b, x, cos, sin, pairs)


def _match_rotation(
    difference: Op, total: Op, b: Builder
) -> tuple[Value, str, Value, Value] | None:
    """x, the layout of its pairs, cos and sin."""
    plain, minus = (_split(value, b) for value in difference.inputs)
    ones = [_split(value, b) for value in total.inputs]
    if plain is None or minus is None or ones[0] is None or ones[1] is None:
        return None
    second, first = (ones[0], ones[1]) if ones[0][0].second else (ones[1], ones[0])
    (a, cos), (c, sin) = plain, minus
    if a.second or not c.second or a.x is not c.x or a.pairs != c.pairs:
        return None
    if (first[0], second[0]) != (a, c):
        return None
    if (second[1], first[1]) != (cos, sin):
        raise NoMatch("the two halves are rotated by different angles")
    return a.x, a.pairs, cos, sin


def _split(value: Value, b: Builder) -> tuple[_Piece, Value] | None:
    """A piece of x and its factor."""
    for part, factor in _orders(_factors(value, b)):
        piece = _piece(part, b)
        if piece is not None:
            return piece, factor
    return None


def _factors(value: Value, b: Builder) -> tuple[Value, ...]:
    op = b.producers.get(value)
    return op.inputs if op is not None and op.name == "aten.mul.Tensor" else ()


def _orders(pair: Sequence[Value]) -> list[tuple[Value, Value]]:
    return [(pair[0], pair[1]), (pair[1], pair[0])] if len(pair) == 2 else []


def _joins_two(op: Op | None) -> bool:
    """Whether op is cat(a, b) along the last axis."""
    if op is None or op.name != "aten.cat.default" or len(op.inputs) != 2:
        return False
    last = op.attrs.get("dim", 0) in (-1, len(op.outputs[0].shape) - 1)
    return last and op.attrs.get("tensors") == (Ref(0), Ref(1))


def _piece(value: Value, b: Builder) -> _Piece | None:
    op = b.producers.get(value)
    if op is None or op.name not in ("aten.slice.Tensor", "aten.split_with_sizes.default"):
        return None
    x = op.inputs[0]
    width, rank = x.shape[-1], len(x.shape)
    if op.attrs.get("dim", 0) not in (-1, rank - 1) or not isinstance(width, int):
        return None
    half = width // 2
    if width % 2 or value.shape != (*x.shape[:-1], half):
        return None
    if op.name == "aten.split_with_sizes.default":
        halves = op.attrs["split_sizes"] == (half, half)
        return _Piece(x, "halves", value is op.outputs[1]) if halves else None
    start, step = op.attrs.get("start") or 0, op.attrs.get("step", 1)
    pieces = {
        (0, 1): ("halves", False),
        (half, 1): ("halves", True),
        (-half, 1): ("halves", True),
        (0, 2): ("neighbours", False),
        (1, 2): ("neighbours", True),
    }
    piece = pieces.get((start, step))  # type: ignore[arg-type]
    return _Piece(x, *piece) if piece is not None else None


def _complex(op: Op, b: Builder) -> Sequence[Value] | None:
    """Matches reshape(real(complex(reshape(x)) * turns)), where x may have any shape."""
    real = b.producers.get(op.inputs[0])
    if real is None or real.name != "aten.view_as_real.default":
        return None
    for pairs, turns in _orders(_factors(real.inputs[0], b)):
        source = b.producers.get(pairs)
        if source is None or source.name != "aten.view_as_complex.default":
            continue
        width = product((2, pairs.shape[-1]))
        joined = TensorType("f32", (*pairs.shape[:-1], width))
        x = _reshape(source.inputs[0], joined, op, b)
        cos, sin = (_with_rank(v, x, op, b) for v in complex_parts(turns, op, b))
        attrs = {"pairs": "neighbours", "gives": "neighbours"}
        outputs = _rotary(op, b, (x, cos, sin), attrs)
        return (
            outputs
            if outputs[0].type == op.outputs[0].type
            else [_reshape(outputs[0], op.outputs[0].type, op, b)]
        )
    return None


def _cast(op: Op, b: Builder) -> Sequence[Value] | None:
    """Folds casts: cast(rotary(float32(x))) is nn.rotary(x)."""
    rotary = b.producers.get(op.inputs[0])
    if rotary is None or rotary.name != "nn.rotary" or set(op.attrs) != {"dtype"}:
        return None
    cast = b.producers.get(rotary.inputs[0])
    if cast is None or cast.name != "aten._to_copy.default":
        return None
    x = cast.inputs[0]
    exact = cast.attrs.get("dtype") == DType("f32") and x.dtype in ("f16", "bf16")
    if not exact or x.type != op.outputs[0].type:
        return None
    return b.emit("nn.rotary", [x, *rotary.inputs[1:]], like=op, attrs=rotary.attrs)


def _emit_rotary(
    op: Op, b: Builder, x: Value, cos: Value, sin: Value, pairs: str
) -> Sequence[Value]:
    if x.type != op.outputs[0].type:
        raise NoMatch(f"rotates {x.type} into {op.outputs[0].type}")
    attrs = {} if pairs == "halves" else {"pairs": pairs}
    return _rotary(op, b, (x, _with_rank(cos, x, op, b), _with_rank(sin, x, op, b)), attrs)


def _rotary(
    op: Op, b: Builder, inputs: Sequence[Value], attrs: Mapping[str, Attr]
) -> Sequence[Value]:
    try:
        return b.emit("nn.rotary", inputs, like=op, attrs=attrs)
    except IRError as error:
        raise NoMatch(str(error).lstrip(" =")) from None


def _with_rank(value: Value, x: Value, op: Op, b: Builder) -> Value:
    """`value` with as many axes as x: the leading axes that broadcasting would add are explicit."""
    missing = len(x.shape) - len(value.shape)
    return _reshape(value, TensorType(value.dtype, (*(1,) * missing, *value.shape)), op, b)


def _reshape(value: Value, to: TensorType, op: Op, b: Builder) -> Value:
    source = b.producers.get(value)
    if source is not None and source.name == "aten.reshape.default" and value.type != to:
        value = source.inputs[0]
    return b.reshape(value, to.shape, like=op)


_RULES: dict[str, Callable[[Op, Builder], Sequence[Value] | None]] = {
    "aten.add.Tensor": _match_sum,
    "aten.cat.default": _match_cat,
    "aten.reshape.default": _complex,
    "aten._to_copy.default": _cast,
}


# ---- the real and imaginary parts of a complex tensor, without complex numbers where possible ---
# polar(1, angle) * c is (cos(angle) * c, sin(angle) * c), which is enough for rotary embeddings in
# complex form. Any other complex value is split by view_as_real.


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
