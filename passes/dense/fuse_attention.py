"""Attention, fused or spelled out, becomes nn.attention.

    y = aten.scaled_dot_product_attention(q, k, v, mask)            ->   y = nn.attention(..)
    y = aten.matmul(softmax(aten.matmul(q, k^T) * scale + mask), v) ->   y = nn.attention(..)

The repetition of keys and values for groups of query heads (Hugging Face's repeat_kv: an expand of
a new axis after the heads) and the expansion of masks are removed. Which masks are causal is left
to fold_mask.

nn.attention computes in float32 and rounds once. Eager attention in half types also rounds the
scores, the masked scores and the softmax; so half types agree to a few units in the last place of
the values, float32 up to reordered sums. A query that attends to no key gives zeros, where eager
with a mask of -inf gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch

from moec.dtypes import FLOATS
from moec.errors import IRError, NoMatch
from moec.ir.aten import IR_DTYPES, TORCH_DTYPES
from moec.ir.graph import Op, Program, Stage, TensorType, Value
from moec.ir.ops.dense.attention import Attention
from moec.ir.sizes.dims import Dim
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass
from moec.passes.dense.eager_attention import constant, eager_attention

_SDPA = "aten.scaled_dot_product_attention.default"


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Make one op of each attention, without the repetition of keys and values."""

    name: ClassVar[str] = "fuse-attention"
    gives: ClassVar[Stage] = Stage.ATEN

    def run(self, program: Program, log: Log) -> Program:
        weights = program.weights
        numbers = {
            param: float(weights[param.name])
            for param in program.graph.params
            if param.name in weights and param.shape in ((), (1,)) and param.dtype in FLOATS
        }
        rule = partial(fuse_attention, numbers=numbers)
        return Program(rewrite(program.graph, rule, log), weights)


def fuse_attention(op: Op, b: Builder, numbers: Mapping[Value, float]) -> Sequence[Value] | None:
    """The rule; `numbers` are the params of one element. Run after canonicalise."""
    if op.name == _SDPA:
        attention, masks = _match_sdpa(op)
    elif op.name == "aten.matmul.default":
        eager = eager_attention(op, b, numbers)
        if eager is None:
            return None
        attention, masks = eager
    else:
        return None
    effective = [m for m in masks if m.dtype == "bool" or constant(m, b, numbers) != 0]
    attention = replace(attention, mask=_mask(effective, op, b))
    k, v = _grouped_heads(attention.k, op, b), _grouped_heads(attention.v, op, b)
    if k.shape[1] == v.shape[1]:
        attention = replace(attention, k=k, v=v)
    for value in (attention.q, attention.k, attention.v):
        if len(value.shape) == 4 and not all(isinstance(value.shape[axis], int) for axis in (1, 3)):
            raise NoMatch(f"{value.type} has heads or features whose number varies")
    try:
        outputs = b.emit("nn.attention", attention.inputs, like=op, attrs=attention.attrs())
    except IRError as error:
        raise NoMatch(str(error).lstrip(" =")) from None
    if outputs[0].type != op.outputs[0].type:
        raise NoMatch(f"gives {op.outputs[0].type} of queries {attention.q.type}")
    return outputs


def _match_sdpa(op: Op) -> tuple[Attention, tuple[Value, ...]]:
    q, k, v, *masks = op.inputs
    if len(q.shape) != 4:
        raise NoMatch(f"the queries are {q.type}; attention is fused for [B, H, S, D]")
    if op.attrs.get("dropout_p", 0.0):
        raise NoMatch(f"has dropout, dropout_p={op.attrs['dropout_p']}")
    scale = op.attrs.get("scale")
    if scale is None:
        width = q.shape[3]
        if not isinstance(width, int):
            raise NoMatch("the scale depends on a size")
        scale = 1 / math.sqrt(width)
    if not isinstance(scale, int | float):
        raise NoMatch("the scale depends on a size")
    causal = bool(op.attrs.get("is_causal", False))
    attention = Attention(q, k, v, None, None, float(scale), causal, None, None)
    return attention, tuple(masks)


def _grouped_heads(value: Value, op: Op, b: Builder) -> Value:
    """[B, Hkv, L, D] where `value` repeats each of its heads g times in a row, else itself."""
    if len(value.shape) != 4:
        return value
    batch, _, keys, width = value.shape
    source = b.producers.get(value)
    if source is not None and source.name == "aten.expand.default":
        one = source.inputs[0]
        return one if one.shape == (batch, 1, keys, width) else value
    if source is None or source.name != "aten.reshape.default":
        return value
    expand = b.producers.get(source.inputs[0])
    if expand is None or expand.name != "aten.expand.default" or len(expand.inputs[0].shape) != 5:
        return value
    one, many = expand.inputs[0], expand.outputs[0]
    shared, repeats = many.shape[1:3]
    if one.shape != (batch, shared, 1, keys, width):
        return value
    if many.shape != (batch, shared, repeats, keys, width):
        return value
    target = TensorType(value.dtype, (batch, shared, keys, width))
    inner = b.producers.get(one)
    if inner is not None and inner.name == "aten.reshape.default":
        if inner.inputs[0].type == target:
            return inner.inputs[0]
    return b.reshape(one, target.shape, like=op, named=one.name)


def _mask(masks: Sequence[Value], op: Op, b: Builder) -> Value | None:
    """The sum of all masks that are added to the scores, with four axes; None without masks."""
    total: Value | None = None
    for mask in masks:
        plain = _without_expand(mask, op, b)
        total = plain if total is None else _sum(total, plain, op, b)
    return total


def _without_expand(mask: Value, op: Op, b: Builder) -> Value:
    source = b.producers.get(mask)
    while source is not None and source.name == "aten.expand.default":
        mask = source.inputs[0]
        source = b.producers.get(mask)
    rank = len(mask.shape)
    if rank >= 4:
        return mask
    shape: tuple[Dim, ...] = (*(1,) * (4 - rank), *mask.shape)
    return b.reshape(mask, shape, like=op)


def _sum(a: Value, c: Value, op: Op, b: Builder) -> Value:
    if a.dtype == "bool" or c.dtype == "bool":
        raise NoMatch("the scores have a mask that is added and one that is bool")
    pairs = list(zip(a.shape, c.shape, strict=True))
    if any(1 not in pair and pair[0] != pair[1] for pair in pairs):
        raise NoMatch(f"the masks {a.type} and {c.type} do not broadcast")
    shape = tuple(y if x == 1 else x for x, y in pairs)
    dtype = IR_DTYPES[torch.promote_types(TORCH_DTYPES[a.dtype], TORCH_DTYPES[c.dtype])]
    target = TensorType(dtype, shape)
    return b.emit("aten.add.Tensor", [a, c], [target], like=op, named="mask")[0]
