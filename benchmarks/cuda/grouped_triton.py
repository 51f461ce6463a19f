"""Products of experts by Triton, in the form of fused MoE kernels: rows sorted by expert, padded to
whole tiles, gathered on load. It is compared with, and is no part of moec.

    up[E, 2H, D], down[E, D, H]
    y[t] = sum over j of weight[t, j] * down[e] @ swiglu(up[e] @ x[t])        e = expert[t, j]

A block of `rows` rows has one expert. rows i64[blocks * rows]: the number t * k + j of each row;
T * k for padding. owners i64[blocks]: the expert of each block; E beyond the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth}"


TILES = (
    Tile(16, 64, 128, 4, 4),
    Tile(32, 64, 128, 4, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(128, 128, 64, 8, 3),
)


@dataclass(frozen=True)
class Blocks:
    rows: torch.Tensor
    owners: torch.Tensor


def blocks_of(experts: torch.Tensor, count: int, rows: int) -> Blocks:
    """The blocks of `rows` rows for experts[T, k] out of `count`; their number depends on T, k and
    `count` alone."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = torch.zeros(count, dtype=torch.int64, device=flat.device)
    counts = counts.scatter_add(0, flat, torch.ones_like(flat))
    padded = (counts + rows - 1) // rows * rows
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    blocks = -(-len(flat) // rows) + count
    numbers = torch.full((blocks * rows,), len(flat), device=flat.device)
    numbers[torch.arange(len(flat), device=flat.device) + shift[flat[order]]] = order
    starts = torch.arange(blocks, device=flat.device) * rows
    return Blocks(numbers, torch.searchsorted(padded.cumsum(0), starts, right=True))


@triton.jit
def product(
    x, w, y, rows, owners, weights, count, experts, n, k,
    top_k: tl.constexpr, weighted: tl.constexpr,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """y[r] = x[r // top_k] @ w[owner]^T, times weights[r] if `weighted`."""
    across = tl.cdiv(n, tile_columns)
    block, column = tl.program_id(0) // across, tl.program_id(0) % across
    owner = tl.load(owners + block)
    if owner < experts:
        row = tl.load(rows + block * tile_rows + tl.arange(0, tile_rows))
        inside = row < count
        columns = column * tile_columns + tl.arange(0, tile_columns)
        sums = tl.zeros((tile_rows, tile_columns), tl.float32)
        for start in range(0, k, depth):
            at = start + tl.arange(0, depth)
            a = tl.load(
                x + (row // top_k)[:, None] * k + at[None, :],
                mask=inside[:, None] & (at < k)[None, :],
                other=0.0,
            )
            b = tl.load(
                w + owner * n * k + columns[None, :] * k + at[:, None],
                mask=(columns < n)[None, :] & (at < k)[:, None],
                other=0.0,
            )
            sums = tl.dot(a, b, sums)
        if weighted:
            sums = sums * tl.load(weights + row, mask=inside, other=0.0).to(tl.float32)[:, None]
        tl.store(
            y + row[:, None] * n + columns[None, :],
            sums.to(y.dtype.element_ty),
            mask=inside[:, None] & (columns < n)[None, :],
        )


@triton.jit
def swiglu(both, y, n, size: tl.constexpr):
    """y[r, c] = silu(both[r, c]) * both[r, n + c]"""
    row, column = tl.program_id(0), tl.program_id(1) * size + tl.arange(0, size)
    gate = tl.load(both + row * 2 * n + column, mask=column < n, other=0.0).to(tl.float32)
    value = tl.load(both + row * 2 * n + n + column, mask=column < n, other=0.0).to(tl.float32)
    result = gate / (1 + tl.exp(-gate)) * value
    tl.store(y + row * n + column, result.to(y.dtype.element_ty), mask=column < n)


def layer(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    blocks: Blocks,
    tile: Tile,
) -> torch.Tensor:
    """x[T, D], weights[T, k] -> y[T, D]."""
    (tokens, width), top_k = x.shape, weights.shape[1]
    experts, hidden = len(up), down.shape[2]
    count = tokens * top_k

    def multiply(x: torch.Tensor, w: torch.Tensor, top_k: int, weighted: bool) -> torch.Tensor:
        n, k = w.shape[1:]
        y = torch.empty(count, n, dtype=x.dtype, device=x.device)
        grid = (len(blocks.owners) * triton.cdiv(n, tile.columns),)
        arguments: tuple[Any, ...] = (x, w, y, blocks.rows, blocks.owners, weights)
        constants = (top_k, weighted, tile.rows, tile.columns, tile.depth)
        launch: Any = product[grid]
        launch(
            *arguments, count, experts, n, k, *constants,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return y

    both = multiply(x, up, top_k, False)
    inner = torch.empty(count, hidden, dtype=x.dtype, device=x.device)
    swiglu[(count, triton.cdiv(hidden, 1024))](both, inner, hidden, 1024)
    return multiply(inner, down, 1, True).view(tokens, top_k, width).sum(1)
