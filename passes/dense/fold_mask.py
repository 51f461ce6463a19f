"""A mask that depends on sizes only becomes attributes of nn.attention, or is removed.

    y = nn.attention(q, k, v, mask) <masked>   ->   y = nn.attention(q, k, v) <causal, window=W>

The mask's elements are compared with each closed form: no mask; causal; causal within a window of W
keys; causal within chunks of C keys (Llama 4); chunks only. A bool mask that is a conjunction is
split, and its parts that read data (padding) stay a mask. mask_forms explains why comparing some
sizes proves it for all.

Masks that are added may hold 0 where a key is visible, and -inf or the dtype's least number
where it is hidden: exp(score + mask - max) is 0 either way if the row has one visible key, which
a causal row has (key 0, or with as many keys as queries its own).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import sympy
import torch

from moec.dtypes import FLOATS
from moec.errors import NoMatch
from moec.ir.graph import Attr, Graph, Op, Program, Stage, TensorType, Value
from moec.ir.ops.dense.attention import Attention, attends
from moec.ir.sizes.dims import Bounds, symbols
from moec.passes.core.rewrite import Builder, rewrite, sizes_in
from moec.passes.core.runner import Log, Pass
from moec.passes.dense.eager_attention import HIDDEN
from moec.passes.dense.mask_values import FILLED, SMALL, Cut, Elements, Positions, cut

# The closed form of a mask, as attributes of nn.attention.
#
# Why comparing some sizes is enough: only ops that compare, shift, divide by constants and combine
# positions are allowed (mask_values), so an element is a Boolean function of comparisons between
# positions, sums of positions and constants of the graph. It can change only where a position, or a
# difference of two, crosses a constant or a multiple of one. So every constant c adds the sizes c -
# 1, c, c + 1, 2c + 1 and 2c + 3, and within each size the rows and columns around c, its multiples
# and the diagonal; masks of sizes up to 33, and other small masks, are compared element by element.
# Sizes stay within the graph's bounds and include them. One element that differs excludes a form. A
# mask that is read from a weight (a triangle in a buffer) may have any content: its size must have
# a bound, and all elements are compared.

_LIMITS = ("other", "self", "start", "end", "fill_value", "step", "min", "max", "diagonal", "s")
_BEYOND = 1 << 18  # no size and no constant above this is studied
_EVERY = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33)
_TABLE = 4096  # the greatest size at which a mask is compared element by element
_MOST = 160  # combinations of sizes


@dataclass(frozen=True)
class MaskForm:
    """A mask as attributes of nn.attention."""

    causal: bool = False
    window: int | None = None
    chunk: int | None = None


def closed_form(
    parts: Sequence[Value], source: Cut, attention: Attention, bounds: Mapping[str, Bounds]
) -> MaskForm:
    """The closed form of the conjunction of `parts`. Raises NoMatch if there is none."""
    numbers = sorted(_numbers(source.ops))
    tables = [value for value, tensor in source.weights.items() if tensor.numel() > 1]
    forms = [MaskForm(), MaskForm(causal=True)]
    if attention.shape("q")[2] == attention.shape("k")[2]:
        near = sorted({n + d for n in numbers for d in (0, 1, -1)})
        forms += [MaskForm(causal=True, window=n) for n in near if n >= 1]
        forms += [MaskForm(causal=True, chunk=n) for n in numbers if n >= 1]
        forms += [MaskForm(chunk=n) for n in numbers if n >= 1]
    for sizes in _environments(parts, source, attention, numbers, bounds, tables):
        elements = Elements(source, sizes)
        shape = _mask_shape(parts, attention, elements)
        if 0 in shape:
            continue
        for positions in _positions(shape, numbers, every=bool(tables)):
            mask = _mask_at(parts, elements, positions)
            forms = [f for f in forms if _matches(f, attention, mask, positions)]
            if not forms:
                raise NoMatch(
                    "the mask is neither causal nor a window, nor chunks, nor all True "
                    f"(at {', '.join(f'{k}={v}' for k, v in sizes.items())})"
                )
    return forms[0]


def _matches(
    form: MaskForm, attention: Attention, mask: torch.Tensor, positions: Positions
) -> bool:
    says = replace(attention, causal=form.causal, window=form.window, chunk=form.chunk)
    return torch.equal(attends(positions[2], positions[3], says), mask)


def _mask_at(parts: Sequence[Value], elements: Elements, positions: Positions) -> torch.Tensor:
    mask = torch.ones(len(positions[0]), dtype=torch.bool)
    for part in parts:
        values = elements.at(part, elements.broadcast(part, positions)).expand(len(mask))
        if part.dtype == "bool":
            mask = mask & values
            continue
        zero, hidden = values == 0, values <= max(torch.finfo(values.dtype).min, HIDDEN)
        if not bool((zero | hidden).all()):
            raise NoMatch("the mask adds other numbers than 0 and -inf to the scores")
        mask = mask & zero
    return mask


def _mask_shape(
    parts: Sequence[Value], attention: Attention, elements: Elements
) -> tuple[int, int, int, int]:
    """B, Hq, S and L of the mask, with 1 for B and Hq where no part depends on them."""
    batch, heads, queries, _ = elements.sizes_of(attention.shape("q"))
    shapes = [(1, 1, *part.shape)[-4:] for part in parts if len(part.shape) > 1]
    batch = batch if any(shape[0] != 1 for shape in shapes) else 1
    heads = heads if any(shape[1] != 1 for shape in shapes) else 1
    return batch, heads, queries, elements.sizes_of(attention.shape("k"))[2]


def _numbers(ops: Iterable[Op]) -> set[int]:
    """The constants that positions are compared with, shifted and divided by."""
    numbers: set[int] = set()

    def visit(attr: Attr) -> None:
        if isinstance(attr, bool) or attr is None:
            return
        if isinstance(attr, sympy.Expr):
            numbers.update(abs(int(n)) for n in attr.atoms(sympy.Integer))
        elif isinstance(attr, int) or (isinstance(attr, float) and attr.is_integer()):
            if abs(attr) < 2**62:
                numbers.add(abs(int(attr)))

    for op in ops:
        if op.outputs[0].dtype not in FLOATS:
            for name in _LIMITS:
                visit(op.attrs.get(name))
    return numbers - {0}


def _environments(
    parts: Sequence[Value],
    source: Cut,
    attention: Attention,
    numbers: Sequence[int],
    bounds: Mapping[str, Bounds],
    tables: Sequence[Value],
) -> Iterator[dict[str, int]]:
    """The combinations of sizes that are compared, small ones first."""
    names = {n for op in source.ops for n in sizes_in(op)}
    names |= {n for v in attention.inputs for dim in v.shape for n in symbols(dim)}
    unknown = sorted(names - bounds.keys())
    if unknown:
        raise NoMatch(f"the mask depends on the size {unknown[0]}, which is read from data")
    lengths = {n for name in "qk" for n in symbols(attention.shape(name)[2])}
    choices: dict[str, list[int]] = {}
    for name in sorted(names):
        limits = bounds[name]
        if tables and name in lengths and (limits.high is None or limits.high > _TABLE):
            raise NoMatch(f"the mask is read from {tables[0].name}, and {name} has no small bound")
        candidates = set(_EVERY)
        if name in lengths:
            for n in numbers:
                candidates |= {n - 1, n, n + 1, 2 * n + 1, 2 * n + 3}
            if limits.high is not None and limits.high <= _BEYOND:
                candidates.add(limits.high)
        else:
            candidates = {1, 2, 3}
        low = max(limits.low, 1)
        candidates |= {low, low + 1}
        top = limits.high
        sizes = sorted(n for n in candidates if n >= low and (top is None or n <= top))
        if sizes and sizes[-1] > 2 * _BEYOND + 3:
            raise NoMatch(f"the mask has a constant of {max(numbers)}, too large to analyse")
        choices[name] = sizes
    every = itertools.product(*choices.values())
    combined = [dict(zip(choices, sizes, strict=True)) for sizes in every]
    if len(combined) > _MOST:
        step = len(combined) / _MOST
        combined = [combined[int(i * step)] for i in range(_MOST)] + combined[-1:]
    yield from combined


def _positions(
    shape: tuple[int, int, int, int], numbers: Sequence[int], every: bool
) -> Iterator[Positions]:
    """All positions of a small mask; the positions of a large one around which it may change.

    With `every`, all positions of a large mask too, in blocks of rows.
    """
    batch, heads, queries, keys = shape
    if batch * heads * queries * keys <= SMALL:
        grids = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
        yield tuple(grid.reshape(-1) for grid in grids)
        return
    if every:
        block = max(SMALL // (batch * heads * keys), 1)
        for rows_from in range(0, queries, block):
            block_rows = torch.arange(rows_from, min(rows_from + block, queries))
            axes = (torch.arange(batch), torch.arange(heads), block_rows, torch.arange(keys))
            grids = torch.meshgrid(*axes, indexing="ij")
            yield tuple(grid.reshape(-1) for grid in grids)
        return
    rows = {0, 1, queries // 2, queries - 2, queries - 1}
    for n in numbers:
        rows |= {n * m + d for m in (1, 2) for d in (-1, 0, 1, 2)}
    generator = torch.Generator().manual_seed(0)
    rows |= set(torch.randint(queries, (32,), generator=generator).tolist())
    for row in sorted(r for r in rows if 0 <= r < queries):
        columns = {0, 1, keys - 2, keys - 1, row - 1, row, row + 1}
        for n in numbers:
            columns |= {row + sign * n + d for sign in (-1, 1) for d in (-2, -1, 0, 1, 2)}
            columns |= {row // n * n + d for d in (-1, 0, 1)} | {n - 1, n, n + 1}
        columns |= set(torch.randint(keys, (32,), generator=generator).tolist())
        inside = torch.tensor(sorted(c for c in columns if 0 <= c < keys))
        for h in {0, heads - 1}:
            for item in {0, batch - 1}:
                fixed = [torch.full_like(inside, n) for n in (item, h, row)]
                yield (*fixed, inside)


_AND = ("aten.bitwise_and.Tensor", "aten.logical_and.default")


@dataclass(frozen=True)
class FoldMask(Pass):
    """Replace masks that depend on sizes only by attributes: causal, window, chunk."""

    name: ClassVar[str] = "fold-mask"
    gives: ClassVar[Stage] = Stage.ATEN

    def run(self, program: Program, log: Log) -> Program:
        folder = _MaskFolder(program.graph, program.weights)
        return Program(rewrite(program.graph, folder.rule, log), program.weights)


@dataclass
class _MaskFolder:
    """The rewrite rule, and the forms of the masks so far, as layers share masks."""

    graph: Graph
    weights: Mapping[str, torch.Tensor]
    forms: dict[tuple[Value, ...], MaskForm | NoMatch] = field(default_factory=dict)
    reading: set[Value] = field(default_factory=set)
    followed: int = 0

    def rule(self, op: Op, b: Builder) -> Sequence[Value] | None:
        if op.name != "nn.attention" or not op.attrs.get("masked"):
            return None
        attention = Attention.of(op)
        mask = attention.mask
        assert mask is not None
        sized, read = self.parts(mask, b)
        form = self.form(tuple(sized), attention, b)
        if attention.window is not None or attention.chunk is not None:
            raise NoMatch("the attention has a window or chunks besides its mask")
        left = _conjunction(read, op, b)
        causal = attention.causal or form.causal
        folded = replace(attention, mask=left, causal=causal, window=form.window, chunk=form.chunk)
        return b.emit("nn.attention", folded.inputs, like=op, attrs=folded.attrs())

    def parts(self, mask: Value, b: Builder) -> tuple[list[Value], list[Value]]:
        """The parts that depend on sizes only, and those that read data."""
        self.follow(b)
        parts = list(_conjuncts(mask, b)) if mask.dtype == "bool" else [mask]
        sized = [part for part in parts if part not in self.reading]
        return (sized, [p for p in parts if p in self.reading]) if sized else (parts, [])

    def follow(self, b: Builder) -> None:
        """Update `reading`, the values that depend on inputs' data, up to the last op."""
        self.reading |= set(self.graph.inputs)
        for op in b.ops[self.followed :]:
            if op.name not in FILLED and not self.reading.isdisjoint(op.inputs):
                self.reading |= set(op.outputs)
        self.followed = len(b.ops)

    def form(self, parts: tuple[Value, ...], attention: Attention, b: Builder) -> MaskForm:
        if parts not in self.forms:
            try:
                source = cut(parts, self.graph, self.weights, b.producers)
                self.forms[parts] = closed_form(parts, source, attention, self.graph.bounds)
            except NoMatch as why:
                self.forms[parts] = why
        form = self.forms[parts]
        if isinstance(form, NoMatch):
            raise NoMatch(str(form))
        return form


def _conjuncts(mask: Value, b: Builder) -> Iterator[Value]:
    op = b.producers.get(mask)
    if op is not None and op.name in _AND and all(v.dtype == "bool" for v in op.inputs):
        for part in op.inputs:
            yield from _conjuncts(part, b)
    elif op is not None and op.name == "aten.expand.default":
        yield from _conjuncts(op.inputs[0], b)
    else:
        yield mask


def _conjunction(parts: Sequence[Value], op: Op, b: Builder) -> Value | None:
    """The `and` of masks, with four axes."""
    total: Value | None = None
    for part in parts:
        part = b.reshape(part, (*(1,) * (4 - len(part.shape)), *part.shape), like=op)
        if total is not None:
            pairs = zip(total.shape, part.shape, strict=True)
            target = TensorType("bool", tuple(y if x == 1 else x for x, y in pairs))
            (part,) = b.emit("aten.bitwise_and.Tensor", [total, part], [target], like=op)
        total = part
    return total
