"""Exports a module on the other side of its guards, and merges the programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch

from moec.capture.sizes.guards import CaptureForm, Guard
from moec.capture.sizes.merged_size import Choice, Unmergeable
from moec.capture.sizes.settle import GuardRefused, Settled, settled
from moec.errors import CaptureError
from moec.ir.graph import Attr, Graph, Op, Program, State, TensorType, Value
from moec.ir.interpret.resized import with_sizes
from moec.ir.sizes.dims import Bounds, parse_dim
from moec.ir.sizes.thresholds import sizes_around, sizes_at_changes, truth_of
from moec.oracle.agree import agree_at_sizes, sizes_of
from moec.torch_private import schema_of

_SIZED = re.compile(r"\b(?:SymInt|Scalar|Tensor)(?:\[\d*\])?\?? (\w+)")
"""Arguments, in a schema of ATen, that may be expressions of sizes, some in place of a tensor."""


def merge_programs(first: Program, second: Program, choice: Choice) -> Program:
    """The program that is `first` and `second`, each where it holds; ops without a reader are left
    out. Raises Unmergeable where they differ in more than sizes."""
    a, b = _without_identities(first.graph), _without_identities(second.graph)
    values: dict[Value, Value] = {}
    for left, right in zip((*a.inputs, *a.params), (*b.inputs, *b.params), strict=False):
        if left.name != right.name or left.type != right.type:
            raise Unmergeable(f"{left} and {right}")
        values[right] = left
    if len(values) != len(a.inputs) + len(a.params) or len(values) != len(b.inputs) + len(b.params):
        raise Unmergeable("the weights")
    for value in a.params:
        if not _are_equal(first.weights[value.name], second.weights[value.name]):
            raise Unmergeable(f"the constant {value.name}")
    results = {value: value for value in values.values()}
    ours, theirs = _live(a), _live(b)
    if [op.name for op in ours] != [op.name for op in theirs]:
        raise Unmergeable("the operations")
    ops: list[Op] = []
    for op, twin in zip(ours, theirs, strict=True):
        if [values.get(value) for value in twin.inputs] != list(op.inputs) or op.body:
            raise Unmergeable(f"the operands of {op}")
        values |= dict(zip(twin.outputs, op.outputs, strict=True))
        pairs = zip(op.outputs, twin.outputs, strict=True)
        outputs = tuple(_value(x, y, choice) for x, y in pairs)
        results |= dict(zip(op.outputs, outputs, strict=True))
        attrs = _attrs(op, twin, choice)
        inputs = tuple(results[value] for value in op.inputs)
        ops.append(replace(op, inputs=inputs, outputs=outputs, attrs=attrs))
    if [values.get(value) for value in b.results] != list(a.results):
        raise Unmergeable("the results")
    states = tuple(State(state.before, results[state.after]) for state in a.states)
    outputs = tuple(results[value] for value in a.outputs)
    return Program(replace(a, ops=tuple(ops), outputs=outputs, states=states), first.weights)


def _are_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


_IDENTITIES = frozenset({"aten.slice.Tensor", "aten.expand.default", "aten.reshape.default"})
"""Ops that change nothing if they keep the shape; torch leaves some out where sizes are ints."""
_EFFECTS = frozenset({"moec.size", "aten._is_all_true.default"})
"""Ops that stay although nothing reads them. The second is an assertion (torch._check)."""


def _without_identities(graph: Graph) -> Graph:
    values: dict[Value, Value] = {}
    ops = []
    for op in graph.ops:
        inputs = tuple(values.get(value, value) for value in op.inputs)
        if op.name in _IDENTITIES and op.outputs[0].shape == inputs[0].shape:
            values[op.outputs[0]] = inputs[0]
        else:
            ops.append(replace(op, inputs=inputs))
    return replace(graph, ops=tuple(ops))


def _live(graph: Graph) -> list[Op]:
    """The ops on which the results depend, each behind its operands, in the order in which the
    results need them. Ops that bind a size or assert come first, in the order of the graph."""
    ops: dict[Op, None] = {}
    effects = [value for op in graph.ops if op.name in _EFFECTS for value in op.outputs]
    stack = [(value, False) for value in reversed((*effects, *graph.results))]
    while stack:
        value, ready = stack.pop()
        op = graph.producers.get(value)
        if op is None or op in ops:
            continue
        if ready:
            ops[op] = None
            continue
        stack.append((value, True))
        stack += [(operand, False) for operand in reversed(op.inputs)]
    return list(ops)


def _value(a: Value, b: Value, choice: Choice) -> Value:
    if a.dtype != b.dtype or len(a.shape) != len(b.shape):
        raise Unmergeable(f"{a} and {b}")
    shape = tuple(choice.size(x, y) for x, y in zip(a.shape, b.shape, strict=True))
    return Value(a.name, TensorType(a.dtype, shape))


def _attrs(a: Op, b: Op, choice: Choice) -> dict[str, Attr]:
    left, right = _arguments(a), _arguments(b)
    if left == right:
        return dict(a.attrs)
    if left.keys() != right.keys():
        raise Unmergeable(f"the arguments of {a}")
    sized = _sized_arguments(a.name)
    return {
        name: _attr(attr, right[name], choice if name in sized else None)
        for name, attr in left.items()
    }


def _arguments(op: Op) -> dict[str, Attr]:
    """Those of an op, without the start of a slice that is the first row: torch writes it where the
    end is a number."""
    first = op.name == "aten.slice.Tensor" and op.attrs.get("start") == 0
    return {name: attr for name, attr in op.attrs.items() if not (first and name == "start")}


def _attr(a: Any, b: Any, choice: Choice | None) -> Any:
    if type(a) is type(b) and a == b:
        return a
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return tuple(_attr(x, y, choice) for x, y in zip(a, b, strict=True))
    sizes = all(isinstance(x, int | sympy.Expr) and not isinstance(x, bool) for x in (a, b))
    if choice is None or not sizes:
        raise Unmergeable(f"{a} and {b}")
    return choice.size(a, b)


def _sized_arguments(name: str) -> Sequence[str]:
    """The arguments of an ATen operator that may be expressions of sizes."""
    if not name.startswith("aten."):
        return ()
    _, packet, overload = name.split(".")
    return _SIZED.findall(str(schema_of(getattr(getattr(torch.ops.aten, packet), overload))))


Recapture = Callable[[Mapping[str, int]], CaptureForm]
"""Captures the same module at other sizes. Raises CaptureError."""

MOST_SIDES = 8
"""How many exports are merged: a loop that rounds a capacity up to a multiple of 8 has 8."""
_TRIED = 2
_MOVED = 16
_COMPARED = 12
Sizes = Mapping[str, int]


def with_other_sides(
    name: str,
    form: CaptureForm,
    example: Sequence[torch.Tensor],
    recapture: Recapture,
    limits: Mapping[str, Bounds],
) -> tuple[CaptureForm, Settled]:
    """The form that holds on both sides of as many guards as possible, and its settled guards.

    `form` was exported at the sizes of `example`; `limits` are those that the user set. Raises
    GuardRefused where a guard neither can be settled nor has another side that differs in sizes
    alone.
    """
    forms = [(form, _settled(name, form, example))]
    unjoined: set[sympy.Basic] = set()
    while len(forms) < MOST_SIDES:
        last, settlement = forms[-1]
        guard = _restricting(settlement, unjoined)
        if guard is None:
            break
        wider = _wider(name, last, guard, example, recapture, limits)
        if wider is None:
            unjoined.add(guard.condition)
        else:
            forms.append((wider, _settled(name, wider, example)))
    for wider, settlement in reversed(forms):
        if isinstance(settlement, Settled):
            return wider, _compared(name, wider, settlement, example, unjoined, limits)
    _, refusal = forms[0]
    assert isinstance(refusal, GuardRefused)
    raise refusal


def _settled(
    name: str,
    form: CaptureForm,
    example: Sequence[torch.Tensor],
    unjoined: Collection[sympy.Basic] = (),
) -> Settled | GuardRefused:
    """The settled guards of a form, or the refusal of one. This runs module and graph at many
    sizes."""
    converted = form.converted
    try:
        return settled(
            name, converted.program, converted.guards, converted.eager, example, unjoined
        )
    except GuardRefused as refusal:
        return refusal


def _compared(
    name: str,
    form: CaptureForm,
    settlement: Settled,
    example: Sequence[torch.Tensor],
    unjoined: Collection[sympy.Basic],
    limits: Mapping[str, Bounds],
) -> Settled:
    """The settlement without bounds of sizes beyond which the form computes the same as the module,
    though the sides of the branch could not be joined: they have other operations."""
    alone = [g for g in settlement.limiting if g.condition in unjoined and len(g.names) == 1]
    if not alone:
        return settlement
    program = form.converted.program
    wide = {size: limits.get(size, Bounds()) for guard in alone for size in guard.names}
    graph = replace(program.graph, bounds={**program.graph.bounds, **wide})
    converted = replace(form.converted, program=replace(program, graph=graph))
    wider = _settled(name, replace(form, converted=converted), example, unjoined)
    return wider if isinstance(wider, Settled) else settlement


def _restricting(
    settlement: Settled | GuardRefused, unjoined: Collection[sympy.Basic] = ()
) -> Guard | None:
    """The first guard outside `unjoined` that is refused or limits a size."""
    limiting = settlement.limiting if isinstance(settlement, Settled) else (settlement.guard,)
    return next((guard for guard in limiting if guard.condition not in unjoined), None)


def _wider(
    name: str,
    form: CaptureForm,
    guard: Guard,
    example: Sequence[torch.Tensor],
    recapture: Recapture,
    limits: Mapping[str, Bounds],
) -> CaptureForm | None:
    """A form that holds where `form` does and on the other side of `guard`; None if none is found:
    both sides merged, or that of the other side, if no guard limits it."""
    here = sizes_of(form.converted.program, example)
    for sizes in _beyond(guard, limits, here):
        try:
            other = recapture(sizes)
        except CaptureError:
            continue
        merged = _merged(form, other, guard, example, sizes)
        if merged is not None:
            return merged
        inputs = other.converted.program.graph.inputs
        if [v.type for v in inputs] != [v.type for v in form.converted.program.graph.inputs]:
            continue  # `if b == s`: the other side has one size for both
        pairs = zip(example, inputs, strict=False)
        there = [with_sizes(tensor, value.shape, sizes) for tensor, value in pairs]
        return other if _restricting(_settled(name, other, there)) is None else None
    return None


def sizes_beyond(
    program: Program,
    limiting: Sequence[Guard],
    guards: Sequence[Guard],
    example: Sequence[torch.Tensor],
    limits: Mapping[str, Bounds],
) -> tuple[Sizes, ...]:
    """Sizes outside of the program's bounds, near those of `example`: where each of the guards that
    limit it is false, and most others of its `guards` hold, and 1 for each size, or for those of a
    product, that may not be 1. `limits` are the user's."""
    here, bounds = sizes_of(program, example), program.graph.bounds
    beyond = []
    for guard in limiting:
        others = [truth_of(other.condition) for other in guards if other is not guard]
        nearest = [*_beyond(guard, limits, here, _MOVED)]
        nearest.sort(key=lambda sizes: sum(not other.holds(sizes) for other in others))
        beyond += nearest[:1]
    products = (truth_of(parse_dim(name)).names for name in bounds if bounds[name].low == 2)
    ones = (names for names in products if names <= here.keys() - limits.keys())
    return (*beyond, *({**here, **dict.fromkeys(names, 1)} for names in ones))


def _beyond(
    guard: Guard, limits: Mapping[str, Bounds], example: Sizes, count: int = _TRIED
) -> Iterator[Sizes]:
    """The few sizes nearest to the example's at which a guard is false. None of them is 1, which
    torch.export treats specially."""
    truth = truth_of(guard.condition)
    if not guard.names <= example.keys():
        return
    least = {name: Bounds(2).intersect(limits.get(name, Bounds())) for name in example}
    false = [s for s in sizes_around([truth], least, example) if not truth.holds(s)]
    false.sort(key=lambda sizes: sum(abs(sizes[name] - example[name]) for name in example))
    yield from false[:count]


def _merged(
    first: CaptureForm,
    second: CaptureForm,
    guard: Guard,
    example: Sequence[torch.Tensor],
    sizes: Sizes,
) -> CaptureForm | None:
    """Both forms, of which a guard is the condition, as one that was compared with eager on both
    sides; None where they differ in more than sizes."""
    a, b = first.converted, second.converted
    shared = {guard.condition for guard in a.guards} & {guard.condition for guard in b.guards}
    shared |= {g.condition for g in (*a.guards, *b.guards) if _excludes_one(g.condition)}
    sides = [[g for g in form.guards if g.condition not in shared] for form in (a, b)]
    if not all(sides) or first.structure.constants != second.structure.constants:
        return None
    if not a.program.graph.bounds.keys() <= b.program.graph.bounds.keys():
        return None  # the other side has fewer sizes
    conditions = [sympy.And(*(guard.condition for guard in side)) for side in sides]
    here = sizes_of(a.program, example)
    bounds = _hull(a.program.graph.bounds, b.program.graph.bounds)
    least = {name: Bounds(1 if b.low == 2 else b.low, b.high) for name, b in bounds.items()}
    choice = Choice(conditions[0], conditions[1], least, here)
    try:
        program = merge_programs(a.program, b.program, choice)
    except Unmergeable:
        return None
    program = replace(program, graph=replace(program.graph, bounds=bounds))
    changes = sizes_at_changes(choice.expressions, least, here)[:_COMPARED]
    tried = (here, sizes, *({**here, **change} for change in changes))
    either = sympy.Or(*conditions)
    within = [size for size in tried if truth_of(either).holds(size)]
    if not all(agree_at_sizes(program, a.eager, example, s) in (True, None) for s in within):
        return None
    guards = {g.condition: g for g in (*b.guards, *a.guards) if g.condition in shared}.values()
    joined = replace(guard, condition=either)
    converted = replace(a, program=program, guards=(*guards, joined))
    return replace(first, converted=converted)


def _excludes_one(condition: sympy.Basic) -> bool:
    """Whether a guard is torch's own `size != 1`, which is tried at 1 in any case."""
    return isinstance(condition, sympy.Ne) and condition.rhs == 1 and condition.lhs.is_Symbol


def _hull(a: Mapping[str, Bounds], b: Mapping[str, Bounds]) -> Mapping[str, Bounds]:
    """The bounds that contain both: torch narrows them to the side that it exports."""
    hull = {}
    for name, limits in a.items():
        highs = [high for high in (limits.high, b[name].high) if high is not None]
        high = max(highs) if len(highs) == 2 else None
        hull[name] = Bounds(min(limits.low, b[name].low), high)
    return hull
