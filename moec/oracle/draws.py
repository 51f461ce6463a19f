"""The values of one input of a module, drawn by what the input is for.

role        such as                       drawn
tokens      hidden states                 random, large, all rows alike, two kinds of rows, zeros
ids         rows of a table of the graph  random, all alike, two
mask        bool, or integers of 0 and 1  prefixes, random, none, suffixes, one element, all
float mask  0 and 1, or 0 and -inf        the same patterns, and random; of what is added, those of
            what is added to scores       the dtype's minimum; for graphs, rows of -inf and +inf
numbers     a temperature, scales         positive, 0 and 1, negative and large
integers    lengths, positions, tasks     0 to a size, around the example's, below 0 and beyond a
            counts                        size, shifted, 0 and 1, large
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch

from moec.dtypes import FLOATS
from moec.ir.graph import Graph, Program, Value
from moec.ir.sizes.dims import symbols
from moec.ir.traits import THROUGH, is_elementwise
from moec.oracle.table_ids import nonzero_rows, table_rows

FEW = 8
"""A float input of at most this many elements, and of a fixed size, is numbers."""
_MASKING = -1e4
"""A float at most this is a masked entry of an additive mask, and so may be drawn."""
_SHIFT = 3
_LARGE = 1 << 12
"""A loop that runs so often, or an axis of this length, still ends soon."""


@dataclass(frozen=True)
class Draw:
    """How tokens and ids are drawn, and the place in the order of values of the other roles."""

    tokens: Literal["random", "alike", "large", "tied", "two"]
    number: int
    infinite: bool = False


DRAWS = (
    Draw("random", 0),
    Draw("alike", 1),
    Draw("large", 2),
    Draw("tied", 3),
    Draw("two", 4),
    Draw("random", 5),
)
"""In this order any three that follow one another reach most of the values of each role."""


INFINITE = (Draw("random", 2, True), Draw("random", 1, True))
"""Of masks, which graphs are compared with too, where a softmax may be left out."""


class Role(Enum):
    TOKENS = "tokens"
    IDS = "ids"
    MASK = "mask"
    FLOAT_MASK = "float mask"
    NUMBERS = "numbers"
    INTEGERS = "integers"


def role_of(program: Program, value: Value, example: torch.Tensor) -> Role | None:
    """What an input is for; None for other dtypes and for inputs without elements."""
    if value.dtype in FLOATS:
        if not example.numel():
            return Role.TOKENS
        if example.numel() <= FEW and all(isinstance(dim, int) for dim in value.shape):
            return Role.NUMBERS
        masks = _masks(example) or _is_added_to_scores(program.graph, value)
        return Role.FLOAT_MASK if masks else Role.TOKENS
    if example.dtype == torch.bool:
        return Role.MASK
    if example.is_complex() or not example.numel():
        return None
    if table_rows(program.graph, value):
        return Role.IDS
    # A mask of zeros alone would mask everything: such integers may be counts, or anything.
    return Role.MASK if int(example.min()) >= 0 and int(example.max()) == 1 else Role.INTEGERS


_ATTENTION = ("aten.scaled_dot_product_attention.default", "nn.attention")
_SOFTMAX = frozenset(
    f"aten.{n}softmax.{o}" for n in ("", "_", "_safe_") for o in ("int", "default")
)
_MOVES = THROUGH | {"aten.slice.Tensor", "aten.select.int"}
_SUMS = ("aten.add.Tensor", "aten.sub.Tensor")


def _is_added_to_scores(graph: Graph, value: Value) -> bool:
    """Whether an input, moved or scaled, is added to a computed value whose softmax is taken."""
    waiting, added = [value], {value: False}
    while waiting:
        value = waiting.pop()
        for op in graph.readers.get(value, ()):
            masks = op.name in _ATTENTION and value in op.inputs[3:]
            if masks or (added[value] and op.name in _SOFTMAX):
                return True
            adds = op.name in _SUMS and all(v is value or v in graph.producers for v in op.inputs)
            alone = op.name in _MOVES or (len(op.inputs) == 1 and is_elementwise(op.name))
            if (adds or alone) and op.outputs[0] not in added:
                added[op.outputs[0]] = added[value] or (adds and len(op.inputs) == 2)
                waiting.append(op.outputs[0])
    return False


def _masks(example: torch.Tensor) -> bool:
    zeros_and = example.eq(0) | example.eq(1) | example.le(_MASKING)
    return bool(zeros_and.all()) and not (example.gt(0).any() and example.lt(0).any())


def constant_masks(program: Program, example: Sequence[torch.Tensor]) -> tuple[str, ...]:
    """A sentence for each mask that the example leaves at one value."""
    pairs = zip(program.graph.inputs, example, strict=False)
    masks = [(v.name, t) for v, t in pairs if role_of(program, v, t) in _MASKS and t.numel()]
    return tuple(
        f"{name} is {tensor.flatten()[0].item():g} everywhere in the example; it was compared with "
        "drawn masks too"
        for name, tensor in masks
        if bool((tensor == tensor.flatten()[0]).all())
    )


_MASKS = (Role.MASK, Role.FLOAT_MASK)


def values_of(
    program: Program,
    number: int,
    example: Sequence[torch.Tensor],
    draw: Draw,
    generator: torch.Generator,
) -> Iterator[torch.Tensor]:
    """Values of input `number`, of the shape and dtype that it has in `example`: that of the draw,
    then others of its role, for where the module refuses it. Nothing where it cannot vary."""
    value, tensor = program.graph.inputs[number], example[number]
    match role_of(program, value, tensor):
        case Role.TOKENS:
            yield tokens_of(tensor, draw, generator)
        case Role.IDS:
            ids = _ids(program, value, tensor, draw, generator)
            yield ids
            yield with_runs(tensor, ids)
        case Role.MASK:
            for turn in range(len(_PATTERNS)):
                yield pattern(tensor.shape, draw.number + turn, generator).to(tensor.dtype)
        case Role.FLOAT_MASK:
            added = _is_added_to_scores(program.graph, value)
            yield from _float_masks(tensor, draw, generator, added)
        case Role.NUMBERS:
            for turn in range(3):
                yield _numbers(tensor, draw.number + turn, generator)
        case Role.INTEGERS:
            yield from _integers(program, number, example, draw, generator)


def tokens_of(tensor: torch.Tensor, draw: Draw, generator: torch.Generator) -> torch.Tensor:
    """Tokens as a draw has them, of the shape and dtype of `tensor`."""
    drawn = torch.randn(tensor.shape, generator=generator)
    if draw.tokens == "tied":
        drawn = torch.zeros(tensor.shape)
    if draw.tokens == "large":
        drawn = drawn * 9
    if tensor.ndim and tensor.numel() and draw.tokens in _REPEATED:
        drawn = _repeated(drawn.reshape(-1, tensor.shape[-1]), draw).reshape(tensor.shape)
    return drawn.to(tensor.dtype)


def _ids(
    program: Program, value: Value, tensor: torch.Tensor, draw: Draw, generator: torch.Generator
) -> torch.Tensor:
    rows = nonzero_rows(program, value)
    drawn = rows[torch.randint(len(rows), tensor.shape, generator=generator)]
    if draw.tokens in _REPEATED:
        drawn = _repeated(drawn.reshape(-1, 1), draw).reshape(tensor.shape)
    return drawn.to(tensor.dtype)


_REPEATED = {"alike": 1, "two": 2}


def _repeated(rows: torch.Tensor, draw: Draw) -> torch.Tensor:
    """The first row, or the first two, again and again."""
    kinds = min(len(rows), _REPEATED[draw.tokens])
    return rows[torch.arange(len(rows)) % max(kinds, 1)]


def pattern(shape: Sequence[int], first: int, generator: torch.Generator) -> torch.Tensor:
    """bool[shape], each row along the last axis of more than one element in the next of
    `_PATTERNS`, beginning with number `first`."""
    inner = list(shape)
    while len(inner) > 1 and inner[-1] == 1:
        inner.pop()
    length = inner[-1] if inner else 1
    count = 1
    for size in inner[:-1]:
        count *= size
    position = torch.arange(length).expand(count, length)
    cut = torch.randint(length + 1, (count, 1), generator=generator)
    random = torch.rand(count, length, generator=generator) < 0.5
    kind = (first + torch.arange(count)) % len(_PATTERNS)
    rows = torch.zeros(count, length, dtype=torch.bool)
    for number, mask in enumerate(_PATTERNS):
        rows = torch.where((kind == number)[:, None], mask(position, cut, random), rows)
    return rows.reshape(tuple(shape))


_Pattern = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_PATTERNS: tuple[_Pattern, ...] = (
    lambda position, cut, random: position < cut,
    lambda position, cut, random: random,
    lambda position, cut, random: torch.zeros_like(random),
    lambda position, cut, random: position >= cut,
    lambda position, cut, random: position == cut.clamp(max=max(position.shape[1] - 1, 0)),
    lambda position, cut, random: torch.ones_like(random),
)
"""Prefixes, random, none, suffixes, one element, all."""


def is_factor(mask: torch.Tensor) -> bool:
    """Whether a float mask is multiplied: from 0 to 1, and not 0 everywhere."""
    return bool(mask.gt(0).any()) and bool(mask.le(1).all()) and bool(mask.ge(0).all())


def _float_masks(
    tensor: torch.Tensor, draw: Draw, generator: torch.Generator, added: bool
) -> Iterator[torch.Tensor]:
    """Patterns of the example's two values, and floats, which a graph must take for them too.
    What is not `added` to scores may be no mask, and is not as low as its dtype allows. A row
    whose every entry is -inf, or one of +inf, is drawn by `infinite` draws alone: its softmax is
    NaN, and 0 in fused attention."""
    factors = is_factor(tensor)
    least, lowest = torch.finfo(tensor.dtype).min if added else _MASKING, float(tensor.min())
    off = -math.inf if draw.infinite else lowest if lowest <= _MASKING else least
    for turn in range(len(_PATTERNS)):
        number = draw.number + turn
        on = pattern(tensor.shape, number, generator)
        low = torch.tensor(0.0 if factors else off, dtype=tensor.dtype)
        drawn = torch.where(on, torch.tensor(float(factors), dtype=tensor.dtype), low)
        if not (factors or draw.infinite) and on.ndim:
            drawn = torch.where(on.any(-1, keepdim=True), drawn, least)
        if number % 3 == 1:
            drawn = torch.randn(tensor.shape, generator=generator)
            drawn = torch.where(on, math.inf, drawn) if draw.infinite else drawn
        yield drawn.to(tensor.dtype)


def _numbers(tensor: torch.Tensor, number: int, generator: torch.Generator) -> torch.Tensor:
    if number % 3 == 0:
        drawn = 0.25 + 3 * torch.rand(tensor.shape, generator=generator)
    elif number % 3 == 1:
        drawn = (torch.arange(tensor.numel()) + number // 3).remainder(2).reshape(tensor.shape)
    else:
        drawn = 5 * torch.randn(tensor.shape, generator=generator)
        drawn = drawn if tensor.ndim else -drawn.abs() if number % 2 else drawn.abs()
    return drawn.to(tensor.dtype)


def _integers(
    program: Program,
    number: int,
    example: Sequence[torch.Tensor],
    draw: Draw,
    generator: torch.Generator,
) -> Iterator[torch.Tensor]:
    tensor = example[number]
    low, high = int(tensor.min()), int(tensor.max())
    sizes = _sizes_beside(program, number, example) or [high + 1]
    most = max(high, *sizes)
    ranges = (
        (0, sizes[draw.number // 4 % len(sizes)]),
        (low, high + 2),
        (-most - _SHIFT, most + _SHIFT),
        None,
        (0, 1),
        (-_LARGE, _LARGE),
        (low, high),
    )
    for turn in range(len(ranges)):
        limits = ranges[(draw.number + turn) % len(ranges)]
        if limits is None:
            yield tensor + _SHIFT
            continue
        drawn = torch.randint(limits[0], max(limits) + 1, tensor.shape, generator=generator)
        yield drawn.to(tensor.dtype)


def _sizes_beside(program: Program, number: int, example: Sequence[torch.Tensor]) -> list[int]:
    """The named sizes of the inputs: those of axes that this one lacks, which are the limits of
    lengths [B], or else that of its own last axis, the limit of positions [B, S]."""
    named = {
        str(dim): size
        for value, tensor in zip(program.graph.inputs, example, strict=False)
        for dim, size in zip(value.shape, tensor.shape, strict=True)
        if symbols(dim)
    }
    its_own = [str(dim) for dim in program.graph.inputs[number].shape]
    others = [size for name, size in named.items() if name not in its_own]
    return others or [named[name] for name in its_own[-1:] if name in named]


# Ids of texts with placeholders, which a model counts.
#
# A text with images has a run of equal ids for each image, as long as the image has features, and
# the model refuses any other number. Where random ids are refused, runs keep their places and only
# the other ids are random.
def with_runs(example: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`ids`, with the runs of equal ids in `example`, and without their ids elsewhere; `ids` alone
    where the example has no runs, or nothing else."""
    runs = _runs(example) if example.ndim else torch.zeros((), dtype=torch.bool)
    if not runs.any() or runs.all():
        return ids
    plain = example[~runs]
    free = torch.isin(ids, example[runs], invert=True)
    return torch.where(runs, example, torch.where(free, ids, plain[0]))


def _runs(ids: torch.Tensor) -> torch.Tensor:
    """Which ids equal a neighbour in the last axis."""
    equal = torch.zeros(ids.shape, dtype=torch.bool)
    same = ids[..., 1:] == ids[..., :-1]
    equal[..., 1:] |= same
    equal[..., :-1] |= same
    return equal
