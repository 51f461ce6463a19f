"""Generators of the random inputs of a proof: ids, masks, scores, weights, or any floats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moec.dtypes import FLOATS
from moec.errors import NoMatch
from moec.ir.aten import TORCH_DTYPES
from moec.ir.graph import Value
from moec.ir.sizes.dims import Dim, evaluate_dim


@dataclass(frozen=True)
class Ids:
    """The input holds expert ids, `slots` for each token; `absent` allows the id E, which means no
    expert. The ids of a token are `distinct`, as those of a top-k are, or may be equal. Some are
    negative if the `least` is."""

    num_experts: int
    slots: int
    absent: bool = False
    distinct: bool = True
    least: int = 0


@dataclass(frozen=True)
class ChosenRows:
    """The input [.., ..] holds numbers of rows below `rows`, distinct along `axis`, as those that a
    top-k over the rows chooses."""

    rows: Dim
    axis: int


@dataclass(frozen=True)
class Flags:
    """The input holds masks, or integers that are compared with `numbers`: 0, 1, another true
    value, and the numbers with their neighbours."""

    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class OneHot:
    """The input holds masks [.., E] with at most one expert set."""


@dataclass(frozen=True)
class AnyMask:
    """The input holds masks with any number of elements set."""


@dataclass(frozen=True)
class Logits:
    """The input holds scores [.., E] before any softmax."""


@dataclass(frozen=True)
class Correction:
    """The input is added to scores before experts are chosen: small as after training, zero, or
    greater than any score."""


@dataclass(frozen=True)
class Positive:
    """The input holds routing weights."""


@dataclass(frozen=True)
class Sparse:
    """The input holds routing weights, some of which are zero."""


@dataclass(frozen=True)
class Uniform:
    """The input holds numbers in [0, 1) by which choices are dropped or kept."""


Feed = (
    Ids
    | ChosenRows
    | Flags
    | OneHot
    | AnyMask
    | Logits
    | Correction
    | Positive
    | Sparse
    | Uniform
    | None
)
"""The kind of a random input; None means any floats."""


_ABOUT = "weights about "


def input_cases(feeds: Mapping[Value, Feed], thresholds: Sequence[float] = ()) -> tuple[str, ...]:
    """The names of the cases to draw. In one, weights are on both sides of each threshold."""
    has = {type(feed) for feed in feeds.values()}
    return (
        *("random", "tied", "one expert", "few experts"),
        *(["uneven", "saturated"] if Logits in has else []),
        *(f"{_ABOUT}{limit!r}" for limit in thresholds if Positive in has),
    )


def sample(
    value: Value, feed: Feed, pattern: str, sizes: Mapping[str, int], generator: torch.Generator
) -> torch.Tensor:
    shape = tuple(evaluate_dim(d, sizes) for d in value.shape)
    dtype = TORCH_DTYPES[value.dtype]
    dtype = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    match feed:
        case Ids():
            tokens = math.prod(shape) // feed.slots
            return _ids(tokens, feed, pattern, generator).reshape(shape).to(dtype)
        case ChosenRows():
            rows = evaluate_dim(feed.rows, sizes)
            if shape[feed.axis] > rows:
                raise NoMatch(f"{value.name} chooses {shape[feed.axis]} of {rows} rows")
            scores = torch.rand((shape[1 - feed.axis], rows), generator=generator)
            if pattern == "one expert":  # all experts choose as it does
                scores = scores[:1].expand_as(scores)
            chosen = scores.topk(shape[feed.axis]).indices.to(dtype)
            return chosen if feed.axis == 1 else chosen.T
        case Flags():
            near = {number + step for number in feed.numbers for step in (-1, 0, 1)}
            values = torch.tensor(sorted({0, 1, 2} | near))
            return values[torch.randint(len(values), shape, generator=generator)].to(dtype)
        case OneHot():
            count = shape[-1]
            ids = _ids(math.prod(shape[:-1]), Ids(count, 1, absent=True), pattern, generator)
            hot = torch.nn.functional.one_hot(ids, count + 1)[..., :count]
            return hot.reshape(shape).to(dtype)
        case AnyMask():
            return torch.rand(shape, generator=generator) < 0.5
        case Logits():
            return _logits(shape, pattern, generator).to(dtype)
        case Correction():
            drawn = torch.randn(shape, generator=generator)
            return (drawn * correction_scale(pattern)).to(dtype)
        case Positive():
            weights = torch.rand(shape, generator=generator)
            if pattern.startswith(_ABOUT):
                return (weights * 2 * float(pattern.removeprefix(_ABOUT))).to(dtype)
            return weights.add(0.1).to(dtype)
        case Sparse():
            weights = torch.rand(shape, generator=generator)
            return (weights * (torch.rand(shape, generator=generator) < 0.6)).to(dtype)
        case Uniform():
            return torch.rand(shape, generator=generator).to(dtype)
    if value.dtype not in FLOATS:
        raise NoMatch(f"{value.name} is {value.type}, and its range of values is unknown")
    return torch.randn(shape, generator=generator).to(dtype)


def correction_scale(pattern: str) -> float:
    """The size of what is added to scores: none, small as after training, or decisive."""
    return {"tied": 0.0, "one expert": 1.0}.get(pattern, 0.1)


def _ids(tokens: int, feed: Ids, pattern: str, generator: torch.Generator) -> torch.Tensor:
    slots, count = feed.slots, feed.num_experts
    scores = torch.rand(tokens, count, generator=generator)
    if pattern == "one expert":
        scores[..., count // 2] += 2
    elif pattern == "few experts":
        scores[..., :slots] += 2
    if feed.distinct and slots > count:
        raise NoMatch(f"a token has {slots} different ids of {count} experts")
    ids = scores.topk(min(slots, count)).indices
    if slots > count or (not feed.distinct and pattern == "tied"):
        ids = torch.randint(count, (tokens, slots), generator=generator)
    if feed.least and pattern == "random":
        below = torch.randint(feed.least, 0, ids.shape, generator=generator)
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, below, ids)
    if feed.absent and pattern == "tied":
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, count, ids)
    return ids


def _logits(shape: tuple[int, ...], pattern: str, generator: torch.Generator) -> torch.Tensor:
    logits = torch.randn(shape, generator=generator)
    if pattern == "uneven":
        share = torch.rand((*shape[:-1], 1), generator=generator)
        low = torch.where(torch.rand(share.shape, generator=generator) < 0.5, -12.0, -3.0)
        return logits + torch.where(torch.rand(shape, generator=generator) < share, 0.0, low)
    if pattern == "saturated":  # above 17, a sigmoid in float32 is 1
        return 40 * torch.rand(shape, generator=generator)
    if pattern == "tied":
        return logits.round()
    if pattern == "one expert":
        logits[..., shape[-1] // 2] += 6
    elif pattern == "few experts":
        logits[..., : (shape[-1] + 1) // 2] += 3
    return logits
