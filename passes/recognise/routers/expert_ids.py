"""Finds the expert ids of a region's rows behind masks, sorts and copies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

from moec.dtypes import FLOATS, INDEX_DTYPES
from moec.ir.graph import Attr, DType, Op, TensorType, Value
from moec.ir.index_uses import REQUIRE, IndexUse, index_uses
from moec.ir.sizes.dims import Dim, product
from moec.ir.traits import CASTS, CHOICES, VIEWS, rounds_doubles
from moec.passes.proof.input_generators import Feed, Ids, InputKind
from moec.passes.recognise.reading.layout import divide
from moec.passes.recognise.reading.opnames import PICKS
from moec.passes.recognise.region import (
    Recipe,
    RegionEmitter,
    Scope,
    choices,
    routing_behind,
)
from moec.passes.recognise.routers.evidence import Evidence
from moec.passes.recognise.routers.one_hot_masks import at_most_one

_RANKINGS = ("aten.topk.default", "aten.sort.default", "aten.sort.stable")
_DIFFERENCES = ("aten.sub.", "aten.rsub.", "aten.neg.")
_RANGES = ("aten.arange.default", "aten.arange.start", "aten.arange.start_step")


@dataclass(frozen=True)
class Chosen:
    """A hypothesis about the ids: the values that hold them, and the recipe for ids [T, k].
    `shared` is how many consecutive rows have one choice, such as all tokens of a window."""

    values: tuple[Value, ...]
    per_row: int
    recipe: Recipe
    feed: Feed
    shared: Dim = 1

    @staticmethod
    def of(parts: tuple[Value, ...], scope: Scope, evidence: Evidence) -> Chosen:
        per_row = sum(_elements_per_row(v, evidence.rows_in) or 1 for v in parts)
        outside = _outside(scope, parts, evidence)
        recipe = _ids_recipe(parts, evidence.rows_in, outside)
        distinct = ranked(scope, parts[0], evidence.experts) if len(parts) == 1 else None
        slots, apart = distinct or (per_row // len(parts), None)
        feed = Ids(evidence.experts, slots, evidence.open, apart, outside.least)
        shared = _shared_by(parts[0], evidence.rows_in) if len(parts) == 1 else None
        return Chosen(parts, per_row, recipe, feed, 1 if shared is None else shared)

    @staticmethod
    def of_groups(ids: Value, scope: Scope, evidence: Evidence) -> Chosen | None:
        """Ids [.., k] of which consecutive rows share all k; None if the shapes do not say so."""
        count = _rows_of_group(ids, evidence)
        if count is None:
            return None
        slots = cast(int, ids.shape[-1])
        outside = _outside(scope, [ids], evidence)
        distinct = ranked(scope, ids, evidence.experts)

        def make(emit: RegionEmitter) -> Value:
            shape = (evidence.rows_in, slots)
            return repeated(emit, outside.named(emit, emit.old(ids)), count, shape)

        drawn, apart = distinct or (slots, None)
        feed = Ids(evidence.experts, drawn, evidence.open, apart, outside.least)
        return Chosen((ids,), slots, make, feed, count)

    @staticmethod
    def mask(value: Value, evidence: Evidence) -> Chosen:
        per_row = cast(int, _elements_per_row(value, evidence.rows_in)) // evidence.experts
        recipe = _mask_recipe(value, (evidence.rows_in, per_row), evidence.experts)
        return Chosen((value,), per_row, recipe, InputKind.ONE_HOT)


@dataclass(frozen=True)
class Outside:
    """Ids of no expert. Where they index a stack [E, ..], eager refuses or counts from the end
    of the stack; elsewhere a negative id means no expert."""

    experts: int
    least: int = 0
    picks: IndexUse | None = None

    @staticmethod
    def of(scope: Scope, ids: Sequence[Value], read: Sequence[Value], experts: int) -> Outside:
        """`read` are the values, made from the ids, that may index an axis of the experts."""
        picks = [
            use
            for value in read
            for op in scope.graph.readers.get(value, ())
            for use in index_uses(op)
            if use.ids is value and use.size == experts
        ]
        if not all(scope.ranges.inside(replace(use, negative=False)) for use in picks):
            use = IndexUse(ids[0], experts, all(use.negative for use in picks))
            return Outside(experts, -experts if use.negative else 0, use)
        return Outside(experts, -1 if may_be_negative(scope, ids) else 0)

    def named(self, emit: RegionEmitter, ids: Value) -> Value:
        """The ids without negative ones; a requirement, where eager may refuse them."""
        if self.picks is not None:
            what = f"the choice of one of {self.experts} experts"
            attrs: dict[str, Attr] = {"rows": self.experts, "negative": self.picks.negative}
            (ids,) = emit(REQUIRE, [ids], [ids.type], attrs={**attrs, "what": what})
        if self.least == 0:
            return ids
        number: Attr = self.experts
        if self.picks is not None:
            return emit("aten.remainder.Scalar", [ids], [ids.type], attrs={"other": number})[0]
        mask = [TensorType("bool", ids.shape)]
        inputs = [ids, *emit("aten.lt.Scalar", [ids], mask, attrs={"other": 0})]
        return emit("aten.masked_fill.Scalar", inputs, [ids.type], attrs={"value": number})[0]


def _outside(scope: Scope, parts: Sequence[Value], evidence: Evidence) -> Outside:
    read = [ids for ids in evidence.values("ids") if source_of_ids(scope, ids) in parts]
    return Outside.of(scope, parts, read, evidence.experts)


def ranked(scope: Scope, ids: Value, experts: int) -> tuple[int, Dim] | None:
    """How many ids a token has, and the elements from one of them to the next, if no token can have
    an expert twice: its ids are positions in a ranking, or in a list of all experts. None if not.
    Ids of `experts` and more, which are no experts, may repeat."""
    op = scope.maker(ids)
    if op is None or rounds_doubles(op):
        return None
    if op.name in _RANKINGS:
        axis = cast(int, op.attrs.get("dim", -1)) % len(ids.shape)
        return _apart(ids, axis) if ids is op.outputs[1] else None
    if op.name in _RANGES:
        return _apart(ids, 0)
    source = next((value for value in op.inputs if value.dtype != "bool"), None)
    before = None if source is None else ranked(scope, source, experts)
    if source is None or before is None or op.name in VIEWS | CASTS:
        return before
    if op.name in ("aten.masked_fill.Scalar", "aten.where.ScalarOther"):
        absent = op.attrs.get("value", op.attrs.get("other"))
        is_absent = isinstance(absent, int) and absent >= experts
        return before if is_absent and ids.shape == source.shape else None
    axes = [axis for axis in range(len(source.shape)) if _apart(source, axis) == before]
    if not axes:
        return None
    if op.name == "aten.permute.default":
        dims = [dim % len(ids.shape) for dim in cast("tuple[int, ...]", op.attrs["dims"])]
        return _apart(ids, dims.index(axes[0]))
    if op.name == "aten.slice.Tensor":
        return _apart(ids, axes[0])
    axis = len(ids.shape) - len(source.shape) + axes[0]
    is_kept = op.name == "aten.expand.default" and ids.shape[axis] == before[0]
    return _apart(ids, axis) if is_kept else None


def _apart(ids: Value, axis: int) -> tuple[int, Dim] | None:
    size = ids.shape[axis]
    return (size, product(ids.shape[axis + 1 :])) if isinstance(size, int) else None


def may_be_negative(scope: Scope, ids: Sequence[Value]) -> bool:
    """Whether a negative number, which is the id of no expert, may be among the ids: of an input, a
    constant, or a difference."""
    waiting, visited = list(ids), set(ids)
    while waiting:
        value = waiting.pop()
        op, low = scope.maker(value), scope.ranges.of(value).low
        if isinstance(low, int) and low >= 0:
            continue
        if op is None and low is None and value in scope.params:
            continue
        if op is None or op.name.startswith(_DIFFERENCES):
            return True
        numbers = [op.attrs.get(key) for key in ("value", "other", "self", "fill_value", "s")]
        if any(isinstance(number, int | float) and number < 0 for number in numbers):
            return True
        sources = [v for v in op.inputs if v.dtype in INDEX_DTYPES and v not in visited]
        visited.update(sources)
        waiting.extend(sources)
    return False


def masks(scope: Scope, evidence: Evidence, everything: Sequence[Value]) -> Iterator[Value]:
    """One-hot masks [.., E], nearest first; a mask without a set element is a dropped choice."""
    one_hot: list[Value] = []
    for value in routing_behind(scope, everything, 200, stops=CHOICES):
        per_row = _elements_per_row(value, evidence.rows_in)
        if value.shape[-1:] == (evidence.experts,) and per_row and value.dtype not in FLOATS:
            if per_row % evidence.experts == 0 and value not in scope.constants:
                if at_most_one(scope, value):  # the proof gives it one-hot masks only
                    one_hot.append(value)
    yield from one_hot[:3]


def _mask_recipe(mask: Value, shape: tuple[Dim, int], experts: int) -> Recipe:
    """Computes E + sum over e of mask[e] * (e - E): the id of the set expert, or E if none is
    set."""

    def make(emit: RegionEmitter) -> Value:
        hot = emit.reshape(emit.cast(emit.old(mask), "i64"), (*shape, experts))
        table_type = TensorType("i64", (experts,))
        attrs: dict[str, Attr] = {"start": -experts, "end": 0, "dtype": DType("i64")}
        (table,) = emit("aten.arange.start_step", [], [table_type], attrs=attrs)
        (named,) = emit("aten.mul.Tensor", [hot, table], [hot.type])
        ids_type = TensorType("i64", shape)
        (total,) = emit("aten.sum.dim_IntList", [named], [ids_type], attrs={"dim": (-1,)})
        return emit("aten.add.Tensor", [total], [ids_type], attrs={"other": experts})[0]

    return make


def _elements_per_row(value: Value, rows: Dim) -> int | None:
    count = divide(product(value.shape), rows)
    return count if isinstance(count, int) else None


def _shared_by(ids: Value, rows: Dim) -> Dim | None:
    """How many consecutive rows share one choice, such as all pixels of an image; None if each row
    has its own."""
    return None if _elements_per_row(ids, rows) else divide(rows, product(ids.shape))


def _rows_of_group(ids: Value, evidence: Evidence) -> Dim | None:
    """How many consecutive rows share the ids [.., k] of a group, k > 1; None if the shapes do not
    say so."""
    slots = ids.shape[-1] if len(ids.shape) > 1 else 1
    if not isinstance(slots, int) or not 1 < slots <= evidence.experts:
        return None
    count = divide(evidence.rows_in, product(ids.shape[:-1]))
    return None if count == 1 else count


def are_of_rows(parts: Sequence[Value], rows: Dim) -> bool:
    """Whether each value has as many ids for each row, or a single value one id for several."""
    return all(_elements_per_row(v, rows) for v in parts) or (
        len(parts) == 1 and _shared_by(parts[0], rows) is not None
    )


def chosen(
    scope: Scope, evidence: Evidence, everything: Sequence[Value]
) -> Iterator[tuple[Value, ...]]:
    """Tuples of values that hold the ids, nearest first. In a tuple of several values, each is one
    slot."""
    visited: set[tuple[Value, ...]] = set()
    direct = [source_of_ids(scope, v) for v in evidence.values("ids")]
    for op in choices(scope, everything):
        if op.inputs[0].dtype not in FLOATS and op.name in (
            "aten.sort.default",
            "aten.sort.stable",
        ):
            direct.append(source_of_ids(scope, op.inputs[0]))
    direct += computed_ids(scope, everything)
    proposals: list[tuple[Value, ...]] = [(v,) for v in direct]
    singles: list[Value] = []
    for op in choices(scope, everything):
        if op.inputs[0].dtype in FLOATS and evidence.experts in op.inputs[0].shape[-1:]:
            singles.extend(picked(scope, op))
    proposals += [(v,) for v in reversed(singles)]
    once = [v for v in singles if _elements_per_row(v, evidence.rows_in) == 1]
    if len(once) > 1:
        proposals.insert(len(direct), tuple(once))
    for parts in proposals:
        divides = are_of_rows(parts, evidence.rows_in) or (
            len(parts) == 1 and _rows_of_group(parts[0], evidence) is not None
        )
        named = all(v.dtype.startswith("i") and not _numbers_rows(scope, v) for v in parts)
        if parts not in visited and divides and named:
            visited.add(parts)
            yield parts


def _numbers_rows(scope: Scope, ids: Value) -> bool:
    """Whether ids are positions along an axis whose size varies, such as the ranks of tokens for
    each expert (`scores.argsort(dim=0)`): as expert ids, they would be beyond the experts."""
    ids = scope.behind_casts(ids)
    op = scope.maker(ids)
    if op is None or op.name not in CHOICES or ids is not op.outputs[-1]:
        return False
    shape, dim = op.inputs[0].shape, op.attrs.get("dim", -1)
    return bool(shape) and isinstance(dim, int) and not isinstance(shape[dim], int)


def computed_ids(scope: Scope, everything: Sequence[Value]) -> Iterator[Value]:
    """Ids that one-hot masks are compared from and that no choosing op returns, such as an input
    mask used as ids."""
    for value in routing_behind(scope, everything, 200, stops=CHOICES):
        compare = scope.made_by(value, "aten.eq.Tensor")
        if compare is not None and scope.made_by(compare.inputs[1], *_RANGES) is not None:
            ids = source_of_ids(scope, compare.inputs[0])
            if scope.made_by(ids, *CHOICES) is None:
                yield ids


def chosen_among(scope: Scope, evidence: Evidence) -> int | None:
    """The number of experts that the choices are made among, or None if no score shows it."""
    return widest_choice(scope, evidence.values("ids", "order", "weights", "mask", "mix"))


def widest_choice(scope: Scope, values: Sequence[Value]) -> int | None:
    """The largest number of scores that any choosing op behind `values` reads per row, or None."""
    counts = [
        op.inputs[0].shape[-1]
        for op in choices(scope, values)
        if op.inputs[0].dtype in FLOATS and op.inputs[0].shape
    ]
    int_counts = [c for c in counts if isinstance(c, int)]
    return max(int_counts, default=None)


def source_of_ids(scope: Scope, value: Value) -> Value:
    """The ids before they were flattened, sorted or repeated along features."""
    while True:
        value = scope.source_of(value)
        op = scope.maker(value)
        if op is None:
            return value
        sorted_ids = op.name in ("aten.sort.default", "aten.sort.stable")
        if (sorted_ids and value is op.outputs[0]) or op.name in ("aten.expand.default", *CASTS):
            value = op.inputs[0]
        elif op.name in (*PICKS, "aten.gather.default"):
            if op.inputs[0] in scope.constants:
                return value  # looked up in a constant table, such as a hash table
            value = op.inputs[0]
        else:
            return value


def picked(scope: Scope, op: Op) -> Iterator[Value]:
    """The ids that a choosing op returns (not for a sort), and the first slice of them if there is
    one."""
    ids = op.outputs[-1]
    slices = [r for r in scope.graph.readers.get(ids, ()) if r.name == "aten.slice.Tensor"]
    if op.name not in ("aten.sort.default", "aten.sort.stable"):
        yield ids
    yield from (first.outputs[0] for first in slices[:1])


def _ids_recipe(parts: Sequence[Value], rows: Dim, outside: Outside) -> Recipe:
    def make(emit: RegionEmitter) -> Value:
        ids = [outside.named(emit, emit.old(v)) for v in parts]
        if len(ids) > 1:
            return emit.stack([emit.reshape(v, (rows,)) for v in ids], 1)
        count = _shared_by(parts[0], rows)
        if count is not None:
            return repeated(emit, ids[0], count, (rows, 1))
        return emit.reshape(ids[0], (rows, cast(int, _elements_per_row(ids[0], rows))))

    return make


def repeated(emit: RegionEmitter, value: Value, count: Dim, shape: tuple[Dim, int]) -> Value:
    """A value of one row [k] for each group of `count` rows, as one for each row: [T, k]."""
    groups = divide(shape[0], count)
    assert groups is not None
    each = emit.reshape(emit.reshape(value, (groups, shape[1])), (groups, 1, shape[1]))
    return emit.reshape(emit.expand(each, (groups, count, shape[1])), shape)
