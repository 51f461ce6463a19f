"""Where a region may begin, and the capacities that it may have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from moec.dtypes import FLOATS
from moec.ir.dims import Dim
from moec.ir.graph import Op, Value
from moec.ir.traits import THROUGH
from moec.passes.proof.input_generators import Feed, Logits, Positive
from moec.passes.recognise.block import RecognisedCapacity
from moec.passes.recognise.evidence import Evidence
from moec.passes.recognise.expert_ids import Chosen
from moec.passes.recognise.region import (
    Scope,
    is_routing,
)


def capacities(scope: Scope, evidence: Evidence, total: int) -> Iterator[RecognisedCapacity | None]:
    """Limits that the shapes of the masks suggest: [.., E, C]."""
    sizes: dict[Dim, None] = {}
    for value in evidence.values("dispatch", "mix"):
        for op in (scope.maker(value), scope.maker(scope.behind(value, THROUGH))):
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
        yield RecognisedCapacity(size, "slot")
        if total > 1:
            yield RecognisedCapacity(size, "token")
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
    stack, visited = list(results), set(results)
    logits: list[Value] = []
    while stack:
        value = stack.pop()
        if value.dtype in FLOATS and value.shape and value.shape[-1] == experts:
            if value not in scope.constants and len(value.shape) > 1:
                logits.append(value)
        op = scope.maker(value)
        if op is None or not is_routing(op):
            continue
        for source in op.inputs:
            if source not in visited:
                visited.add(source)
                stack.append(source)
    logits.sort(key=lambda v: scope.position.get(cast(Op, scope.maker(v)), -1))
    yield from logits[:8]
