"""nn.append: the keys or values of new tokens, written into a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moec.ir import Op, TensorType
from moec.ops.attention import SWAP, swapped
from moec.ops.definition import Runner, defop, require


def _infer_append(op: Op) -> tuple[TensorType, ...]:
    require(op, len(op.inputs) == 3, "needs a cache, rows and places")
    cache, rows, first = op.inputs
    require(op, len(cache.shape) == 4 and len(rows.shape) == 4, f"{cache} and {rows}: four axes")
    batch, heads, _, width = cache.shape
    shape = swapped(rows.shape) if op.attrs.get("tokens_first") else rows.shape
    fits = (shape[0], shape[1], shape[3]) == (batch, heads, width)
    require(op, fits and rows.dtype == cache.dtype, f"{rows} is not for {cache}")
    require(op, first.type == TensorType("i64", (batch,)), f"{first} is not one place each")
    return (cache.type,)


@defop("nn.append", _infer_append)
def append(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """cache[B,H,L,D], rows[B,H,S,D], first i64[B] -> the cache with rows at first[b] and after.

    With `tokens_first` the rows are [B,S,H,D], as a linear layer gives them. first[b] + S is at
    most L; the caller sees to it.
    """
    cache, rows, first = tensors
    rows = rows.permute(SWAP) if attrs.get("tokens_first") else rows
    places = first[:, None] + torch.arange(rows.shape[2])
    index = places[:, None, :, None].expand(rows.shape)
    return cache.scatter(2, index, rows)
