"""nn.append: writes the keys or values of new tokens to a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.ir.graph import Op, TensorType, Value
from moec.ir.opdef import Runner, defop, inputs_of, require, tensors_of
from moec.ir.ops.dense.attention import SWAP, tokens_first_shape
from moec.ir.ops.dense.rotary import require_rotary, rotate_pairs


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
