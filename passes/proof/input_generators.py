"""Generators of the random inputs of a proof: ids, masks, scores, weights, or any floats."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moec.dtypes import FLOATS
from moec.errors import NoMatch
from moec.ir.aten import TORCH_DTYPES
from moec.ir.graph import Value
from moec.ir.sizes.dims import Dim, evaluate_dim
from moec.ir.traits import THROUGH
from moec.ir.value_ranges import ValueRanges


@dataclass(frozen=True)
class Ids:
    """The input holds expert ids, `slots` for each token; `absent` allows the id E, which means no
    expert. The ids of a token are distinct, as those of a top-k are, and so many elements `apart`,
    or may be equal if that is None. Some are negative if the `least` is."""

    num_experts: int
    slots: int
    absent: bool = False
    apart: Dim | None = None
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


class InputKind(enum.Enum):
    """What else an input may hold."""

    ONE_HOT = "masks [.., E] with at most one expert set"
    MASK = "masks with any number of elements set"
    LOGITS = "scores [.., E] before any softmax"
    CORRECTION = "what is added to scores: small as after training, zero, or above any score"
    POSITIVE = "routing weights, none of them negative"
    SPARSE = "routing weights, some of which are zero and none negative"
    SIGNED = "weights of both signs, some of which are zero"
    UNIFORM = "numbers by which choices are dropped: in [0, 1), and in a case any"


Feed = Ids | ChosenRows | Flags | InputKind | None
"""The kind of a random input; None means any floats."""


_ABOUT = "weights about "


def input_cases(feeds: Mapping[Value, Feed], thresholds: Sequence[float] = ()) -> tuple[str, ...]:
    """The names of the cases to draw. In one, weights are on both sides of each threshold."""
    has = feeds.values()
    return (
        *("random", "tied", "one expert", "few experts"),
        *(["uneven", "saturated"] if InputKind.LOGITS in has else []),
        *(f"{_ABOUT}{limit!r}" for limit in thresholds if InputKind.POSITIVE in has),
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
            ids = _ids(tokens, feed, pattern, generator)
            if feed.apart is not None and (apart := evaluate_dim(feed.apart, sizes)):
                ids = ids.reshape(-1, apart, feed.slots).transpose(1, 2)
            return ids.reshape(shape).to(dtype)
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
        case InputKind.ONE_HOT:
            count = shape[-1]
            ids = _ids(math.prod(shape[:-1]), Ids(count, 1, absent=True), pattern, generator)
            hot = torch.nn.functional.one_hot(ids, count + 1)[..., :count]
            return hot.reshape(shape).to(dtype)
        case InputKind.MASK:
            return torch.rand(shape, generator=generator) < 0.5
        case InputKind.LOGITS:
            return _logits(shape, pattern, generator).to(dtype)
        case InputKind.CORRECTION:
            drawn = torch.randn(shape, generator=generator)
            return (drawn * correction_scale(pattern)).to(dtype)
        case InputKind.POSITIVE:
            weights = torch.rand(shape, generator=generator)
            if pattern.startswith(_ABOUT):
                return (weights * 2 * float(pattern.removeprefix(_ABOUT))).to(dtype)
            return weights.add(0.1).to(dtype)
        case InputKind.SPARSE | InputKind.SIGNED:
            weights = torch.rand(shape, generator=generator)
            if feed is InputKind.SIGNED:
                weights = weights * 2 - 1
            return (weights * (torch.rand(shape, generator=generator) < 0.6)).to(dtype)
        case InputKind.UNIFORM if pattern != "tied":
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
    if feed.apart is not None and slots > count:
        raise NoMatch(f"a token has {slots} different ids of {count} experts")
    ids = scores.topk(min(slots, count)).indices
    if slots > count or (feed.apart is None and pattern == "tied"):
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


# The signs of weights, by the ops that compute them. A softmax, and what is chosen, divided and
# summed of it, has no negative element; `tanh`, a difference or an input may have. Proofs with
# positive weights alone would let any weight pass a `relu`.

_ALWAYS = ("abs", "exp", "linalg_vector_norm", "relu", "sigmoid", "softmax", "softplus")
_OF_SUCH = (
    *(
        "add",
        "amax",
        "bmm",
        "cat",
        "clamp",
        "clamp_min",
        "cumsum",
        "div",
        "full",
        "gather",
        "index",
    ),
    *("index", "index_select", "masked_fill", "max", "maximum", "mean", "mul", "ones_like", "pow"),
    *("reciprocal", "rsqrt", "scatter", "scatter_add", "select", "slice", "sort", "sqrt", "stack"),
    *("sum", "topk", "where", "zeros_like", *(name.split(".")[1] for name in THROUGH)),
)
"""Ops without a negative result if nothing that they read is negative."""
_NUMBERS = ("alpha", "fill_value", "max", "other", "self", "value")


def weights_feed(ranges: ValueRanges, weights: Value) -> InputKind | None:
    return InputKind.POSITIVE if never_negative(ranges, weights) else None


def sparse_feed(ranges: ValueRanges, weights: Value) -> InputKind:
    if weights.dtype == "bool":
        return InputKind.MASK
    return InputKind.SPARSE if never_negative(ranges, weights) else InputKind.SIGNED


def never_negative(ranges: ValueRanges, value: Value) -> bool:
    if value.dtype not in FLOATS:
        low = ranges.of(value).low
        return isinstance(low, int) and low >= 0
    op = ranges.graph.producers.get(value)
    name = op.name.split(".")[1] if op is not None else ""
    if op is None or name in _ALWAYS:
        return op is not None
    least = op.attrs.get("min")
    if isinstance(least, int | float) and least >= 0:
        return name in _OF_SUCH
    numbers = [op.attrs[key] for key in _NUMBERS if key in op.attrs]
    if any(isinstance(number, int | float) and number < 0 for number in numbers):
        return False
    return name in _OF_SUCH and all(never_negative(ranges, read) for read in op.inputs)
