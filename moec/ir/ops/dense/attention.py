"""nn.attention: softmax(q @ k.T * scale + mask) @ v as one op.

B batch, Hq query heads, Hkv key heads (Hq is a multiple of Hkv: query head h reads key head
h // (Hq/Hkv)), S queries, L keys, Dk features of queries and keys, Dv of values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from moec.dtypes import FLOATS
from moec.ir.graph import Op, TensorType, Value
from moec.ir.opdef import Runner, defop, inputs_of, require, tensors_of
from moec.ir.ops.dense.rotary import require_rotary, rotate_pairs
from moec.ir.sizes.dims import Dim, broadcasts
from moec.torch_private import safe_softmax

OPERANDS = ("q", "k", "v", "out")
SWAP = (0, 2, 1, 3)
"""The permutation of [B, tokens, heads, features] to [B, heads, tokens, features], and back."""


def tokens_first_shape(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    return tuple(shape[axis] for axis in SWAP)


@dataclass(frozen=True)
class Attention:
    """The inputs and attributes of nn.attention by name.

    Query s attends to key l if all of these hold: l <= s if `causal`; l > s - window if `window`
    is set; l // chunk == s // chunk if `chunk` is set; the mask allows it. Queries and keys both
    count from 0 for any S and L (torch's meaning of is_causal), unless `first` holds the position
    of each sequence's first query.

    `tokens_first` lists which of q, k, v and out are [B, tokens, heads, features], the layout of
    linear layers, and not [B, heads, tokens, features].
    """

    q: Value
    k: Value
    v: Value
    mask: Value | None
    sinks: Value | None
    scale: float
    causal: bool
    window: int | None
    chunk: int | None
    first: Value | None = None
    tokens_first: tuple[str, ...] = ()

    @staticmethod
    def of(op: Op) -> Attention:
        """Raises IRError where inputs and attributes do not go together."""
        q, k, v, mask, sinks, first = inputs_of(op).values()
        scale = op.attrs.get("scale")
        require(op, isinstance(scale, float), "scale is not a float")
        limits: dict[str, int | None] = {}
        for name in ("window", "chunk"):
            limit = op.attrs.get(name)
            positive = isinstance(limit, int) and not isinstance(limit, bool) and limit >= 1
            require(op, limit is None or positive, f"{name} is not a positive int")
            limits[name] = cast("int | None", limit)
        causal = bool(op.attrs.get("causal", False))
        named = op.attrs.get("tokens_first", ())
        ordered = isinstance(named, tuple) and named == tuple(n for n in OPERANDS if n in named)
        require(op, ordered, f"tokens_first is not some of {', '.join(OPERANDS)}, in that order")
        near = limits["window"], limits["chunk"]
        layout = cast("tuple[str, ...]", named)
        return Attention(q, k, v, mask, sinks, cast(float, scale), causal, *near, first, layout)

    def attrs(self) -> dict[str, Any]:
        """As attributes of an op: scale, and all others that differ from their defaults."""
        attrs: dict[str, Any] = {"scale": self.scale}
        if self.causal:
            attrs["causal"] = True
        if self.window is not None:
            attrs["window"] = self.window
        if self.chunk is not None:
            attrs["chunk"] = self.chunk
        if self.mask is not None:
            attrs["masked"] = True
        if self.sinks is not None:
            attrs["sinked"] = True
        if self.first is not None:
            attrs["placed"] = True
        if self.tokens_first:
            attrs["tokens_first"] = self.tokens_first
        return attrs

    def shape(self, name: str) -> tuple[Dim, ...]:
        """[B, heads, tokens, features] of q, k or v, in either layout."""
        value: Value = getattr(self, name)
        return tokens_first_shape(value.shape) if name in self.tokens_first else value.shape

    def with_tokens_first(self, names: Set[str]) -> Attention:
        """The same with `names` as the operands that are [B, tokens, heads, features]."""
        return replace(self, tokens_first=tuple(name for name in OPERANDS if name in names))

    @property
    def inputs(self) -> tuple[Value, ...]:
        optional = (self.mask, self.sinks, self.first)
        return (self.q, self.k, self.v, *(value for value in optional if value is not None))


def _infer_attention(op: Op) -> tuple[TensorType, ...]:
    a = Attention.of(op)
    for name, value in (("q", a.q), ("k", a.k), ("v", a.v)):
        require(op, len(value.shape) == 4, f"{name} is {value.type}, expected four axes")
        require(op, value.dtype in FLOATS, f"{name} is {value.type}, expected floats")
        require(op, value.dtype == a.q.dtype, f"{name} is {value.type}, q is {a.q.type}")
        require(op, value.shape[0] == a.q.shape[0], f"{name} has another batch than q")
    batch, heads, queries, width = a.shape("q")
    _, shared, keys, _ = a.shape("k")
    require(op, a.k.shape[3] == width, f"q {a.q.type} by k {a.k.type}")
    require(op, a.shape("v")[1:3] == (shared, keys), f"k is {a.k.type}, v is {a.v.type}")
    require(op, divides(shared, heads), f"{heads} query heads share {shared} key heads")
    if a.mask is not None:
        scores_shape = (batch, heads, queries, keys)
        require(op, a.mask.dtype in ("bool", *FLOATS), f"the mask is {a.mask.type}")
        require(
            op,
            broadcasts(a.mask.shape, scores_shape),
            f"the mask {a.mask.type} is not for {scores_shape}",
        )
    if a.sinks is not None:
        require(op, a.sinks.type == TensorType(a.q.dtype, (heads,)), "sinks are not one per head")
    if a.first is not None:
        require(op, a.first.type == TensorType("i64", (batch,)), f"{a.first} is not one place each")
    out = (batch, heads, queries, a.v.shape[3])
    return (TensorType(a.q.dtype, tokens_first_shape(out) if "out" in a.tokens_first else out),)


def divides(shared: Dim, heads: Dim) -> bool:
    if isinstance(shared, int) and isinstance(heads, int):
        return shared > 0 and heads % shared == 0
    return shared == heads


@defop("nn.attention", _infer_attention, "q, k, v, mask?masked, sinks?sinked, first?placed")
def attention(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """q[B,Hq,S,Dk], k[B,Hkv,L,Dk], v[B,Hkv,L,Dv], mask?, sinks[Hq]?, first i64[B]?
    -> y[B,Hq,S,Dv].

    Attributes: `scale`, `causal`, `window`, `chunk`, `tokens_first` (see `Attention`), `masked`,
    `sinked`, `placed`. A bool mask is True where a query attends to a key; any other mask is added
    to the scaled scores; it broadcasts to [B,Hq,S,L]. `sinks` is an additional logit per head in
    the softmax's denominator (GPT-OSS). Computed in float32 (float64 where q is) and rounded at the
    end; a query that attends to no key gives zeros.
    """
    a = Attention.of(op)
    inputs = tensors_of("nn.attention", op, tensors, attrs)
    q, k, v = (
        inputs[name].permute(SWAP) if name in a.tokens_first else inputs[name] for name in "qkv"
    )
    mask, sinks, first = (inputs[name] for name in ("mask", "sinks", "first"))
    full = torch.float64 if q.dtype == torch.float64 else torch.float32
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.to(full).repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = q.to(full) @ k.mT * a.scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.to(full)
    positions = torch.arange(q.shape[2])[:, None]
    if first is not None:
        positions = first[:, None, None, None] + positions
    allowed = attends(positions, torch.arange(k.shape[2]), a)
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        column = sinks.to(full)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    shares = safe_softmax(scores, -1)
    out = (shares[..., : k.shape[2]] @ v).to(q.dtype)
    return out.permute(SWAP) if "out" in a.tokens_first else out


def attends(query: torch.Tensor, key: torch.Tensor, a: Attention) -> torch.Tensor:
    """Whether `a` lets the query at a position attend to the key at another; both broadcast."""
    allowed = (query >= 0) & (key >= 0)
    if a.causal:
        allowed = allowed & (key <= query)
    if a.window is not None:
        allowed = allowed & (key > query - a.window)
    if a.chunk is not None:
        allowed = allowed & (key // a.chunk == query // a.chunk)
    return allowed


@dataclass(frozen=True)
class Append:
    """The inputs and attributes of nn.append by name."""

    cache: Value
    rows: Value
    first: Value
    cos: Value | None = None
    sin: Value | None = None
    tokens_first: bool = False

    @staticmethod
    def of(op: Op) -> Append:
        """Raises IRError where inputs and attributes do not go together."""
        return Append(**inputs_of(op), tokens_first=bool(op.attrs.get("tokens_first")))

    def attrs(self) -> dict[str, bool]:
        """As attributes of an op: the flags that are set."""
        flags = {"turned": self.cos is not None, "tokens_first": self.tokens_first}
        return {name: True for name, held in flags.items() if held}

    @property
    def inputs(self) -> tuple[Value, ...]:
        turns = (self.cos, self.sin)
        return (self.cache, self.rows, self.first, *(v for v in turns if v is not None))


def _infer_append(op: Op) -> tuple[TensorType, ...]:
    a = Append.of(op)
    cache, rows, first = a.cache, a.rows, a.first
    require(op, len(cache.shape) == 4 and len(rows.shape) == 4, f"{cache} and {rows}: four axes")
    batch, heads, _, width = cache.shape
    shape = tokens_first_shape(rows.shape) if a.tokens_first else rows.shape
    fits = (shape[0], shape[1], shape[3]) == (batch, heads, width)
    require(op, fits and rows.dtype == cache.dtype, f"{rows} is not for {cache}")
    require(op, first.type == TensorType("i64", (batch,)), f"{first} is not one place each")
    if a.cos is not None and a.sin is not None:
        require_rotary(op, Value(rows.name, TensorType(rows.dtype, shape)), a.cos, a.sin)
    return (cache.type,)


@defop("nn.append", _infer_append, "cache, rows, first, cos?turned, sin?turned")
def append(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """cache[B,H,L,D], rows[B,H,S,D], first i64[B], cos?, sin?
    -> the cache with rows at first[b] and after.

    With `tokens_first` the rows are [B,S,H,D], the layout of linear layers. With `turned` they are
    rotated first by nn.rotary of halves: cos and sin [.., D or D/2] broadcast to [B,H,S]. The
    caller must ensure that first[b] + S is at most L.
    """
    cache, rows, first, cos, sin = tensors_of("nn.append", op, tensors, attrs).values()
    rows = rows.permute(SWAP) if attrs.get("tokens_first") else rows
    rows = rows if cos is None else rotate_pairs(rows, cos, sin)
    positions = first[:, None] + torch.arange(rows.shape[2])
    index = positions[:, None, :, None].expand(rows.shape)
    return cache.scatter(2, index, rows)
