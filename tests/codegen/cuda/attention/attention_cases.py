"""Cases of attention in 16 bits for emulated kernels, and their errors against torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moec.codegen.cuda.attention.key_tiles import KeyTile
from moec.codegen.cuda.attention.tiles import tile_attention
from moec.codegen.specs.attention import AttentionSpec
from tests.cuda_emulator.bugs import Bug, check_found
from tests.cuda_emulator.emulate import SCHEDULES, SM_80, Emulated, Schedule, emulated

TILE = KeyTile(1, 16, 64)
"""Few keys at a time, so that few keys are several tiles."""


@dataclass(frozen=True)
class Case:
    """`queries` of two texts attend to `keys` keys; `first` are their positions in a cache."""

    spec: AttentionSpec
    queries: int
    keys: int
    tile: KeyTile | None = TILE
    first: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Tensors:
    """Those of a case, [B, heads, S or L, D] and as in AttentionSpec."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    sinks: Tensor | None


def _tensors(case: Case) -> _Tensors:
    spec, generator = case.spec, torch.Generator().manual_seed(3)
    dtype = torch.bfloat16 if spec.dtype == "bf16" else torch.float16

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    q = random(2, spec.q_heads, case.queries, spec.key_dim)
    k = random(2, spec.kv_heads, case.keys, spec.key_dim)
    v = random(2, spec.kv_heads, case.keys, spec.value_dim)
    mask = None
    if spec.mask is not None:
        sizes = (2, spec.q_heads, case.queries, case.keys)
        shape = [size if full else 1 for size, full in zip(sizes, spec.mask.full, strict=True)]
        mask = torch.randn(shape, generator=generator)
        mask = mask.masked_fill(mask < 0, -torch.inf)
        mask[..., case.queries // 2, :] = -torch.inf  # a query that attends to no key
        mask = mask > 0 if spec.mask.dtype == "bool" else mask
    return _Tensors(q, k, v, mask, random(spec.q_heads) if spec.sinks else None)


def result(run: Emulated, case: Case, schedule: Schedule) -> Tensor:
    """The kernel's, [B, Hq, S, Dv]. A cache is NaN beyond the positions that were written."""
    spec, tensors = case.spec, _tensors(case)
    for b, first in enumerate(case.first or ()):
        tensors.k[b, :, first + case.queries :] = torch.nan
        tensors.v[b, :, first + case.queries :] = torch.nan
    shape = (*tensors.q.shape[:3], spec.value_dim)
    out = torch.full(shape, torch.nan, dtype=tensors.q.dtype)
    named = {"q": tensors.q, "k": tensors.k, "v": tensors.v, "out": out}
    arguments = [
        t.transpose(1, 2).contiguous() if name in spec.tokens_first else t
        for name, t in named.items()
    ]
    optional = [t for t in (tensors.mask, tensors.sinks) if t is not None]
    if case.first is not None:
        optional.append(torch.tensor(case.first))
    run(*arguments[:3], *optional, arguments[3], schedule=schedule)
    return arguments[3].transpose(1, 2) if "out" in spec.tokens_first else arguments[3]


def error(run: Emulated, case: Case, schedule: Schedule) -> float:
    """The greatest error, in roundings of the greatest value: the weights and the result are each
    rounded once."""
    tensors, y = _tensors(case), result(run, case, schedule)
    rounding = torch.finfo(y.dtype).eps / 2
    expected = meaning(case, tensors)
    return float((y.float() - expected).abs().max() / tensors.v.abs().max() / rounding)


def meaning(case: Case, tensors: _Tensors) -> Tensor:
    """By the definition in AttentionSpec, all scores at once."""
    spec, mask, sinks = case.spec, tensors.mask, tensors.sinks
    q = tensors.q.float()
    k, v = (t.float().repeat_interleave(spec.group, 1) for t in (tensors.k, tensors.v))
    scores = q @ k.mT * spec.scale
    first = torch.tensor(case.first or (0, 0))[:, None, None, None]
    at, s = torch.arange(case.keys), first + torch.arange(case.queries)[:, None]
    visible = (at <= s) if spec.is_causal else torch.ones(scores.shape, dtype=torch.bool)
    if spec.window is not None:
        visible = visible & (at > s - spec.window)
    if spec.chunk is not None:
        visible = visible & (at // spec.chunk == s // spec.chunk)
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        scores = scores + mask
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    return scores.softmax(-1).nan_to_num()[..., : case.keys] @ v


@cache
def kernel(case: Case, bug: Bug | None = None) -> Emulated:
    """The emulated kernel of a case, with a planted bug or without."""
    function = tile_attention(case.spec, SM_80, tile=case.tile)
    return emulated(function, change=bug.plant if bug else str)


def is_right(run: Emulated, case: Case, schedule: Schedule) -> bool:
    return error(run, case, schedule) <= 2


def check_schedules(case: Case) -> None:
    for schedule in SCHEDULES:
        assert is_right(kernel(case), case, schedule), schedule


def check_bug(case: Case, bug: Bug) -> None:
    """The bug is found under exactly the schedules that it names."""
    run = kernel(case, bug)
    check_found(bug, lambda schedule: is_right(run, case, schedule))
