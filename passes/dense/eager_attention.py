"""Matches eager attention, softmax(q @ k^T * scale + masks) @ v, from its last product backwards.

p = aten.matmul(q, k^T)              T5 and Switch leave the scale out
s = aten.mul(p, scale); s = aten.add(s, mask) …  |  aten.where(allowed, s, -inf)
s = aten.cat(s, sinks)               GPT-OSS: one more column of logits …
s = aten.sub(s, aten.max(s))         … whose greatest is subtracted: softmax does it anyway
w = aten.softmax(s, -1); w = w[.., :-1]
y = aten.matmul(w, v)                casts between floats may occur anywhere
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from moec.dtypes import FLOATS
from moec.errors import NoMatch
from moec.ir.graph import Op, Ref, TensorType, Value
from moec.ir.ops.dense.attention import Attention
from moec.passes.core.rewrite import Builder

_SOFTMAX = (
    "aten.softmax.int",
    "aten._softmax.default",
    "aten._safe_softmax.default",
)
# A mask value of this or less acts like -inf, even in a row that is masked entirely: in float32 it
# absorbs the scores that it is added to, so that the softmax of the row is uniform.
HIDDEN = -1e9
_DEEPEST = 8  # of the ops between the product and the softmax


@dataclass(frozen=True)
class _Scores:
    """q @ k^T * scale and the masks added to it; `allowed` is a bool mask of visible keys."""

    q: Value
    turned: Value  # k^T [B, H, D, L]
    scale: float = 1.0
    masks: tuple[Value, ...] = ()
    allowed: Value | None = None


def eager_attention(
    op: Op, b: Builder, numbers: Mapping[Value, float]
) -> tuple[Attention, tuple[Value, ...]] | None:
    """The attention that ends in this product, and its masks; None if it is another product.

    `numbers` holds the params of one element. Raises NoMatch for attention that nn.attention cannot
    express.
    """
    shares, v = op.inputs
    if len(shares.shape) != 4 or len(v.shape) != 4:
        return None
    softmax, cut = _softmax(shares, b)
    if softmax is None:
        return None
    logits = _through_max_shift(_through_casts(softmax.inputs[0], b), b)
    sinks: Value | None = None
    if cut:
        joined = _split_sinks(logits, b)
        if joined is None:
            return None
        logits, column = joined
        sinks = _per_head(column, op, b)
    scores = _match_scores(logits, b, numbers)
    if scores is None:
        return None
    k = _transposed(scores.turned, op, b)
    attention = Attention(scores.q, k, v, None, sinks, scores.scale, False, None, None)
    if scores.allowed is None:
        return attention, scores.masks
    return attention, (*scores.masks, scores.allowed)


def _softmax(value: Value, b: Builder) -> tuple[Op | None, bool]:
    """The softmax over the last axis that gives `value`, and whether its last column is cut off."""
    cut = False
    while True:
        value = _through_casts(value, b)
        op = b.producers.get(value)
        if op is not None and not cut and _cuts_last(op):
            cut, value = True, op.inputs[0]
            continue
        if op is None or op.name not in _SOFTMAX or op.attrs.get("dim") not in (-1, 3):
            return None, cut
        return op, cut


def _cuts_last(op: Op) -> bool:
    if op.name != "aten.slice.Tensor" or op.attrs.get("dim", 0) not in (-1, 3):
        return False
    (x,), (y,) = op.inputs, op.outputs
    from_start = op.attrs.get("start") in (None, 0) and op.attrs.get("step", 1) == 1
    return from_start and x.shape[-1] - y.shape[-1] == 1


def _through_casts(value: Value, b: Builder) -> Value:
    """The operand of the casts between floats that compute `value`."""
    op = b.producers.get(value)
    while op is not None and op.name == "aten._to_copy.default" and op.inputs[0].dtype in FLOATS:
        value = op.inputs[0]
        op = b.producers.get(value)
    return value


def _through_max_shift(value: Value, b: Builder) -> Value:
    """x of x - max(x, -1): subtracting one number from a row does not change its softmax."""
    op = b.producers.get(value)
    if op is None or op.name != "aten.sub.Tensor" or len(op.inputs) != 2:
        return value
    top = b.producers.get(op.inputs[1])
    if top is None or top.name not in ("aten.max.dim", "aten.amax.default"):
        return value
    over_last = top.attrs.get("dim") in (-1, 3, (-1,), (3,)) and top.attrs.get("keepdim")
    same = top.inputs[0] is op.inputs[0] and top.outputs[0] is op.inputs[1]
    return _through_casts(op.inputs[0], b) if over_last and same else value


def _split_sinks(value: Value, b: Builder) -> tuple[Value, Value] | None:
    """scores, column of cat(scores, column)."""
    op = b.producers.get(value)
    if op is None or op.name != "aten.cat.default" or len(op.inputs) != 2:
        return None
    last = op.attrs.get("dim") in (-1, 3) and op.attrs.get("tensors") == (Ref(0), Ref(1))
    scores, column = op.inputs
    return (_through_casts(scores, b), column) if last and column.shape[-1] == 1 else None


def _per_head(column: Value, op: Op, b: Builder) -> Value:
    """[Hq] of a column of logits that is the same for every query."""
    column = _through_casts(column, b)
    source = b.producers.get(column)
    if source is not None and source.name == "aten.expand.default":
        column = source.inputs[0]
    heads = op.outputs[0].shape[1]
    if column.shape != (1, heads, 1, 1):
        raise NoMatch(f"the column of sinks is {column.type}, not one logit per head")
    return b.reshape(column, (heads,), like=op, named="sinks")


def _match_scores(
    value: Value, b: Builder, numbers: Mapping[Value, float], depth: int = 0
) -> _Scores | None:
    value = _through_casts(value, b)
    op = b.producers.get(value)
    if op is None or len(value.shape) != 4 or depth > _DEEPEST:
        return None

    def inner(value: Value) -> _Scores | None:
        return _match_scores(value, b, numbers, depth + 1)

    if op.name == "aten.matmul.default":
        q, turned = op.inputs
        return _Scores(q, turned) if len(q.shape) == len(turned.shape) == 4 else None
    if op.name in ("aten.mul.Tensor", "aten.div.Tensor"):
        return _match_scale(op, numbers, inner)
    if op.name == "aten.add.Tensor" and len(op.inputs) == 2 and op.attrs.get("alpha", 1) == 1:
        for x, mask in (op.inputs, op.inputs[::-1]):
            scores = inner(x)
            if scores is None:
                continue
            if mask.dtype not in FLOATS:
                raise NoMatch(f"{mask} is added to the scores; a mask that is added has floats")
            return replace(scores, masks=(*scores.masks, mask))
    if op.name == "aten.where.self" and len(op.inputs) == 3:
        return _match_where(op, b, numbers, inner)
    return None


def _match_scale(
    op: Op, numbers: Mapping[Value, float], inner: Callable[[Value], _Scores | None]
) -> _Scores | None:
    factor = op.attrs.get("other") if len(op.inputs) == 1 else numbers.get(op.inputs[1])
    if not isinstance(factor, int | float):
        return None
    scores = inner(op.inputs[0])
    if scores is None:
        return None
    if scores.masks or scores.allowed is not None:
        raise NoMatch("the scores are scaled after the mask was added")
    scale = scores.scale * factor if op.name == "aten.mul.Tensor" else scores.scale / factor
    return replace(scores, scale=scale)


def _match_where(
    op: Op,
    b: Builder,
    numbers: Mapping[Value, float],
    inner: Callable[[Value], _Scores | None],
) -> _Scores | None:
    """Matches where(allowed, scores, hidden), a bool mask if `hidden` is (close to) -inf, and
    where(forbidden, hidden, scores), which masked_fill becomes.
    """
    condition, *branches = op.inputs
    scores, other = inner(branches[0]), branches[1]
    if scores is None:
        scores, other = inner(branches[1]), branches[0]
        if scores is None:
            return None
        target = TensorType("bool", condition.shape)
        (condition,) = b.emit("aten.logical_not.default", [condition], [target], like=op)
    hidden = constant(other, b, numbers)
    if hidden is None or hidden > HIDDEN:
        raise NoMatch(f"masked scores become {other.name if hidden is None else hidden}, not -inf")
    if scores.allowed is not None:
        raise NoMatch("the scores have two bool masks")
    return replace(scores, allowed=condition)


def constant(value: Value, b: Builder, numbers: Mapping[Value, float]) -> float | None:
    """The number that all elements equal; None if there is none, or it is not known."""
    op = b.producers.get(value)
    while op is not None and op.name in ("aten.expand.default", "aten._to_copy.default"):
        value = op.inputs[0]
        op = b.producers.get(value)
    if value in numbers:
        return numbers[value]
    names: Mapping[str, str] = {
        "aten.full.default": "fill_value",
        "aten.full_like.default": "fill_value",
        "aten.scalar_tensor.default": "s",
    }
    if op is None or op.name not in names:
        return None
    number = op.attrs.get(names[op.name])
    return float(number) if isinstance(number, int | float) and not math.isnan(number) else None


def _transposed(value: Value, op: Op, b: Builder) -> Value:
    """`value` with its last two axes swapped: x itself if it is a permute of x."""
    source = value
    order: tuple[int, ...] = (0, 1, 3, 2)
    permute = b.producers.get(value)
    if permute is not None and permute.name == "aten.permute.default":
        dims = permute.attrs["dims"]
        assert isinstance(dims, tuple)
        source = permute.inputs[0]
        order = tuple(int(dims[axis]) % 4 for axis in order)
    return b.permute(source, order, like=op)
