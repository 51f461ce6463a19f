"""Which experts a block's rows belong to, and with which weights: hypotheses for the proof.

A region shows masks, sort orders and weights in the form its author needed. Behind them lie the
ids [T, k] and the weights [T, k]; a dense [T, E] tensor of weights is read at the ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from moec.errors import NoMatch
from moec.ir import FLOATS, Attr, DType, Op, TensorType, Value
from moec.passes.prove import Feed, Ids, Logits, OneHot, Positive
from moec.passes.recognise.block import Capacity, Recipe
from moec.passes.recognise.layout import divide
from moec.passes.recognise.region import CASTS, CHOICES, VIEWS, Emitter, Scope, choices, is_routing
from moec.sizes import Dim, product

_THROUGH = VIEWS | CASTS | {"aten.expand.default", "aten.permute.default"}


class Unlike(NoMatch):
    """Not like a block at all: no reason to report."""


@dataclass(frozen=True)
class Choice:
    """A hypothesis: recipes for experts and weights, and where to cut the region."""

    experts: Recipe
    weights: Recipe | None
    top_k: int
    cut: tuple[Value, ...]
    feeds: Mapping[Value, Feed] = field(default_factory=dict)
    capacity: Capacity | None = None


@dataclass(frozen=True)
class Evidence:
    """What a region showed: values by role, its tokens and its result's."""

    uses: Mapping[str, Sequence[Value]]
    experts: int
    rows_in: Dim
    rows_out: Dim
    output: Value
    reads: tuple[Value, ...]  # the tokens, and what the sum starts from
    open: bool = False  # ids beyond the experts are allowed and add nothing

    def values(self, *roles: str) -> list[Value]:
        return [v for role in roles for v in self.uses.get(role, ())]


def hypotheses(scope: Scope, evidence: Evidence) -> Iterator[Choice]:
    """Raises NoMatch where nothing in the region chooses experts."""
    everything = evidence.values("ids", "order", "ends", "dispatch", "weights", "mask", "mix")
    found = [
        *(Chosen.of(parts, evidence) for parts in chosen(scope, evidence, everything)),
        *(Chosen.mask(value, evidence) for value in masks(scope, evidence, everything)),
    ]
    if not found and not everything:
        raise Unlike(f"nothing weighs or chooses among {evidence.experts} results")
    if not found:
        raise NoMatch(
            f"every token uses all {evidence.experts} experts: nothing chooses among them"
        )
    for ids in found[:6]:
        slots = divide(product((ids.per_row, evidence.rows_in)), evidence.rows_out)
        if not isinstance(slots, int):
            continue
        for base, weights in weightings(scope, evidence, ids, slots):
            for capacity in capacities(scope, evidence, ids.per_row):
                for cut, feeds in cuts(scope, evidence, ids, base):
                    yield Choice(ids.recipe, weights, slots, cut, feeds, capacity)


@dataclass(frozen=True)
class Chosen:
    """A hypothesis about the ids: the values that hold them, and the recipe for [T, k]."""

    values: tuple[Value, ...]
    per_row: int
    recipe: Recipe
    feed: Feed

    @staticmethod
    def of(parts: tuple[Value, ...], evidence: Evidence) -> Chosen:
        per_row = sum(cast(int, _per(v, evidence.rows_in)) for v in parts)
        recipe = _ids_recipe(parts, evidence.rows_in)
        slots = per_row // len(parts)
        last = parts[0].shape[-1]
        if len(parts[0].shape) > 1 and isinstance(last, int) and last <= evidence.experts:
            slots = max(slots, last)  # distinct before they were flattened
        feed = Ids(evidence.experts, slots, absent=evidence.open)
        return Chosen(parts, per_row, recipe, feed)

    @staticmethod
    def mask(value: Value, evidence: Evidence) -> Chosen:
        per_row = cast(int, _per(value, evidence.rows_in)) // evidence.experts
        recipe = _mask_recipe(value, (evidence.rows_in, per_row), evidence.experts)
        return Chosen((value,), per_row, recipe, OneHot())


def masks(scope: Scope, evidence: Evidence, everything: Sequence[Value]) -> Iterator[Value]:
    """One-hot masks [.., E], nearest first: the ids of choices of which some were dropped."""
    stack, visited = list(everything), set(everything)
    found: list[Value] = []
    while stack and len(visited) < 200:
        value = stack.pop(0)
        per_row = _per(value, evidence.rows_in)
        if value.shape[-1:] == (evidence.experts,) and per_row and not value.dtype.startswith("f"):
            if per_row % evidence.experts == 0 and value not in scope.constants:
                found.append(value)
        op = scope.maker(value)
        if op is None or not is_routing(op) or op.name in CHOICES:
            continue
        for source in op.inputs:
            if source not in visited:
                visited.add(source)
                stack.append(source)
    yield from found[:3]


def _mask_recipe(mask: Value, shape: tuple[Dim, int], experts: int) -> Recipe:
    """The sum over e of mask[e] * (e - E), plus E: the expert that is set, or E for none."""

    def make(emit: Emitter) -> Value:
        hot = emit.reshape(emit.cast(emit.old(mask), "i64"), (*shape, experts))
        wanted = TensorType("i64", (experts,))
        attrs: dict[str, Attr] = {"start": -experts, "end": 0, "dtype": DType("i64")}
        (table,) = emit("aten.arange.start_step", [], [wanted], attrs=attrs)
        (named,) = emit("aten.mul.Tensor", [hot, table], [hot.type])
        wanted = TensorType("i64", shape)
        (total,) = emit("aten.sum.dim_IntList", [named], [wanted], attrs={"dim": (-1,)})
        return emit("aten.add.Tensor", [total], [wanted], attrs={"other": experts})[0]

    return make


def _per(value: Value, rows: Dim) -> int | None:
    count = divide(product(value.shape), rows)
    return count if isinstance(count, int) else None


def chosen(
    scope: Scope, evidence: Evidence, everything: Sequence[Value]
) -> Iterator[tuple[Value, ...]]:
    """Values that hold the ids, nearest first; several stand side by side as slots."""
    seen: set[tuple[Value, ...]] = set()
    direct = [source_of_ids(scope, v) for v in evidence.values("ids")]
    for op in choices(scope, everything):
        if op.inputs[0].dtype not in FLOATS and op.name in (
            "aten.sort.default",
            "aten.sort.stable",
        ):
            direct.append(source_of_ids(scope, op.inputs[0]))
    found: list[tuple[Value, ...]] = [(v,) for v in direct]
    singles: list[Value] = []
    for op in choices(scope, everything):
        if op.inputs[0].dtype in FLOATS and evidence.experts in op.inputs[0].shape[-1:]:
            value = picked(scope, op)
            if value is not None:
                singles.append(value)
    found += [(v,) for v in reversed(singles)]
    once = [v for v in singles if _per(v, evidence.rows_in) == 1]
    if len(once) > 1:
        found.insert(len(direct), tuple(once))
    for parts in found:
        whole = all(_per(v, evidence.rows_in) for v in parts)
        if parts not in seen and whole and all(v.dtype.startswith("i") for v in parts):
            seen.add(parts)
            yield parts


def chosen_among(scope: Scope, evidence: Evidence) -> int | None:
    """How many experts the choices are among, where the scores tell."""
    return widest_choice(scope, evidence.values("ids", "order", "weights", "mask", "mix"))


def widest_choice(scope: Scope, values: Sequence[Value]) -> int | None:
    """Among how many scores the choices behind `values` are, at most."""
    counts = [
        op.inputs[0].shape[-1]
        for op in choices(scope, values)
        if op.inputs[0].dtype in FLOATS and op.inputs[0].shape
    ]
    whole = [c for c in counts if isinstance(c, int)]
    return max(whole, default=None)


def source_of_ids(scope: Scope, value: Value) -> Value:
    """Ids before they were flattened, sorted or repeated along features."""
    while True:
        value = scope.behind(value)
        op = scope.maker(value)
        if op is None:
            return value
        sorted_ids = op.name in ("aten.sort.default", "aten.sort.stable")
        if (sorted_ids and value is op.outputs[0]) or op.name in ("aten.expand.default", *CASTS):
            value = op.inputs[0]
        elif op.name in ("aten.index.Tensor", "aten.gather.default"):
            value = op.inputs[0]
        else:
            return value


def picked(scope: Scope, op: Op) -> Value | None:
    """The ids that a choosing op gives; of a full sort, the slice that is used."""
    ids = op.outputs[-1]
    if op.name not in ("aten.sort.default", "aten.sort.stable"):
        return ids
    for reader in scope.graph.readers.get(ids, ()):
        if reader.name == "aten.slice.Tensor":
            return reader.outputs[0]
    return None


def _ids_recipe(parts: Sequence[Value], rows: Dim) -> Recipe:
    def make(emit: Emitter) -> Value:
        found = [emit.old(v) for v in parts]
        if len(found) > 1:
            return emit.stack([emit.reshape(v, (rows,)) for v in found], 1)
        return emit.reshape(found[0], (rows, cast(int, _per(found[0], rows))))

    return make


def weightings(
    scope: Scope, evidence: Evidence, ids: Chosen, slots: int
) -> Iterator[tuple[Value | None, Recipe | None]]:
    """Ways to weigh the choices: a value that the region holds, and the recipe for [T, k]."""
    used = evidence.values("weights", "mix")
    if not used:
        yield None, None
        return
    shape = (evidence.rows_out, slots)
    for value in candidates(scope, used, product((ids.per_row, evidence.rows_in))):
        yield value, _reshaped(value, shape)
    if len(ids.values) > 1:
        singles = list(candidates(scope, used, evidence.rows_in))
        for group in _runs(singles, len(ids.values)):
            yield None, _side_by_side(group, evidence.rows_in)
    if isinstance(ids.feed, Ids):
        for dense in dense_weights(scope, used, evidence):
            yield None, _at_ids(dense, ids, evidence, shape)
    yield None, None  # a weight of one, or a mask that the region calls a weight


def candidates(scope: Scope, used: Sequence[Value], count: Dim) -> Iterator[Value]:
    """Float values of `count` elements behind the weights, through routing ops: those that
    only moved come first, farthest first; then the others, nearest first."""
    moved: list[Value] = []
    seen: set[Value] = set()
    for value in used:
        while True:
            if value.dtype in FLOATS and product(value.shape) == count:
                moved.append(value)
            op = scope.maker(value)
            if op is None or op.name not in (
                *_THROUGH,
                "aten.index.Tensor",
                "aten.slice.Tensor",
                "aten.gather.default",
            ):
                break
            value = op.inputs[0]
    for value in reversed(moved):
        if value not in seen:
            seen.add(value)
            yield value
    stack, visited = list(used), set(used)
    others: list[Value] = []
    while stack and len(visited) < 300:
        op = scope.maker(stack.pop())
        if op is None or not is_routing(op):
            continue
        for value in (*op.inputs, *op.outputs):
            if value in visited and value not in used:
                continue
            if value.dtype in FLOATS and product(value.shape) == count and value not in seen:
                others.append(value)
            if value in op.inputs and value not in visited:
                visited.add(value)
                stack.append(value)
    for value in sorted(
        dict.fromkeys(others),
        key=lambda v: -scope.position[cast(Op, scope.maker(v))] if scope.maker(v) else 1,
    )[:8]:
        if value not in seen:
            seen.add(value)
            yield value


def _runs(values: Sequence[Value], length: int) -> Iterator[tuple[Value, ...]]:
    """Neighbours among values that each weigh one slot, in both orders."""
    for start in range(len(values) - length + 1):
        group = tuple(values[start : start + length])
        yield tuple(reversed(group))
        yield group


def _reshaped(value: Value, shape: tuple[Dim, ...]) -> Recipe:
    return lambda emit: emit.reshape(emit.old(value), shape)


def _side_by_side(values: Sequence[Value], rows: Dim) -> Recipe:
    return lambda emit: emit.stack([emit.reshape(emit.old(v), (rows,)) for v in values], 1)


def dense_weights(scope: Scope, used: Sequence[Value], evidence: Evidence) -> Iterator[Value]:
    """Weights [.., E] of every expert, or [.., E, C] of every place of every expert."""
    full = product((evidence.rows_in, evidence.experts))
    stack, visited = list(used), set(used)
    found: dict[Value, None] = {}
    while stack and len(visited) < 120:
        value = stack.pop(0)
        if value.dtype in FLOATS:
            if value.shape[-1:] == (evidence.experts,) and product(value.shape) == full:
                found[value] = None
            elif (
                len(value.shape) == 3
                and value.shape[1] == evidence.experts
                and value.shape[0] == evidence.rows_in
            ):
                found[value] = None
        op = scope.maker(value)
        if op is None or not is_routing(op):
            continue
        for source in op.inputs:
            if source not in visited:
                visited.add(source)
                stack.append(source)
    yield from list(found)[:4]


def _at_ids(dense: Value, ids: Chosen, evidence: Evidence, shape: tuple[Dim, ...]) -> Recipe:
    def make(emit: Emitter) -> Value:
        value = emit.old(dense)
        if len(value.shape) == 3 and value.shape[-1] != evidence.experts:
            wanted = TensorType(value.dtype, value.shape[:2])
            (value,) = emit("aten.sum.dim_IntList", [value], [wanted], attrs={"dim": (2,)})
        value = emit.reshape(value, (evidence.rows_in, evidence.experts))
        index = ids.recipe(emit)
        wanted = TensorType(value.dtype, index.shape)
        (value,) = emit("aten.gather.default", [value, index], [wanted], attrs={"dim": 1})
        return emit.reshape(value, shape)

    return make


def capacities(scope: Scope, evidence: Evidence, total: int) -> Iterator[Capacity | None]:
    """Limits that the shapes of the masks suggest: [.., E, C]."""
    sizes: dict[Dim, None] = {}
    for value in evidence.values("dispatch", "mix"):
        for op in (scope.maker(value), scope.maker(scope.behind(value, _THROUGH))):
            for shown in (value, *(op.inputs if op else ()), *(op.outputs if op else ())):
                if len(shown.shape) == 3 and evidence.experts in shown.shape[:2]:
                    at = shown.shape.index(evidence.experts)
                    rest = [d for i, d in enumerate(shown.shape) if i != at]
                    for dim in rest:
                        if dim != evidence.rows_in:
                            sizes[dim] = None
    if "dispatch" not in evidence.uses:
        yield None
        return
    for size in sizes:
        yield Capacity(size, "slot")
        if total > 1:
            yield Capacity(size, "token")
    yield None


def cuts(
    scope: Scope, evidence: Evidence, ids: Chosen, weights: Value | None
) -> Iterator[tuple[tuple[Value, ...], dict[Value, Feed]]]:
    """Where the region may begin: at the choices or, where it reads more, at logits."""
    near: dict[Value, Feed] = dict.fromkeys(ids.values, ids.feed)
    if weights is not None:
        near[weights] = Positive()
    if len(ids.values) == 1 and closes(scope, evidence, tuple(near)):
        yield tuple(near), near
        return
    for value in logits_behind(scope, ids.values, evidence.experts):
        if closes(scope, evidence, (value,)):
            yield (value,), {value: Logits()}
            return
    yield tuple(near), near


def closes(scope: Scope, evidence: Evidence, cut: tuple[Value, ...]) -> bool:
    stops = (*evidence.reads, *cut)
    ops = scope.upstream([evidence.output], stops)
    return all(v in scope.params for v in scope.leaves(ops, stops))


def logits_behind(scope: Scope, results: Sequence[Value], experts: int) -> Iterator[Value]:
    """Values that may be the logits: [.., E] floats behind every choice, farthest first."""
    stack, seen = list(results), set(results)
    found: list[Value] = []
    while stack:
        value = stack.pop()
        if value.dtype in FLOATS and value.shape and value.shape[-1] == experts:
            if value not in scope.constants and len(value.shape) > 1:
                found.append(value)
        op = scope.maker(value)
        if op is None or not is_routing(op):
            continue
        for source in op.inputs:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    found.sort(key=lambda v: scope.position.get(cast(Op, scope.maker(v)), -1))
    yield from found[:8]
