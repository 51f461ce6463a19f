"""The values at which a region may begin, and the capacities that it may have.

A region that drops choices at random reads random numbers besides the logits. An exported graph has
no random state, so the numbers are an input of the model, and the region begins at both. So is a
padding mask, where tokens of padding get no expert (NLLB, arXiv 2207.04672).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from moec.dtypes import FLOATS
from moec.ir.graph import Op, Value
from moec.ir.sizes.dims import Dim
from moec.ir.traits import CHOICES, THROUGH, rounds_doubles
from moec.passes.proof.input_generators import Feed, Flags, InputKind, weights_feed
from moec.passes.recognise.reading.block import RecognisedCapacity
from moec.passes.recognise.region import (
    Scope,
    is_routing,
    routing_behind,
)
from moec.passes.recognise.routers.evidence import Evidence
from moec.passes.recognise.routers.expert_ids import Chosen


def capacities(scope: Scope, evidence: Evidence, total: int) -> Iterator[RecognisedCapacity]:
    """Capacities C suggested by the shapes of masks, [.., E, C]."""
    sizes: dict[Dim, None] = {}
    for value in evidence.values("dispatch", "mix"):
        for op in (scope.maker(value), scope.maker(scope.source_of(value, THROUGH))):
            for shown in (value, *(op.inputs if op else ()), *(op.outputs if op else ())):
                if len(shown.shape) == 3 and evidence.experts in shown.shape[:2]:
                    at = shown.shape.index(evidence.experts)
                    rest = [d for i, d in enumerate(shown.shape) if i != at]
                    for dim in rest:
                        if dim != evidence.rows_in:
                            sizes[dim] = None
    for size in sizes if "dispatch" in evidence.uses else ():
        yield RecognisedCapacity(size, "slot")
        if total > 1:
            yield RecognisedCapacity(size, "token")


def counts_slots(scope: Scope, evidence: Evidence) -> bool:
    """Whether a cumulative sum numbers the positions of choices in the experts' buffers."""
    routing = routing_behind(scope, evidence.values("dispatch", "mix"), 200, stops=CHOICES)
    return any(scope.made_by(value, "aten.cumsum.default") for value in routing)


def cuts(
    scope: Scope, evidence: Evidence, ids: Chosen, weights: Value | None
) -> Iterator[tuple[tuple[Value, ...], dict[Value, Feed]]]:
    """Where the region may begin: at the choices; if it reads more than these, at the logits; if it
    also reads inputs of the model, at the logits and these inputs."""
    near: dict[Value, Feed] = dict.fromkeys(ids.values, ids.feed)
    if weights is not None:
        near[weights] = weights_feed(scope.ranges, weights)
    if len(ids.values) == 1 and closes(scope, evidence, tuple(near)):
        yield tuple(near), near
        return
    scores = [
        value
        for value in logits_behind(scope, ids.values, evidence.experts)
        if not _reads_tokens(scope, evidence, ids.values, value)
    ]
    for value in scores:
        if closes(scope, evidence, (value,)):
            yield (value,), {value: InputKind.LOGITS}
            return
    for value in scores:
        numbers = other_inputs(scope, evidence, value)
        if numbers:
            feeds: dict[Value, Feed] = {
                v: InputKind.UNIFORM if v.dtype in FLOATS else Flags(_compared_with(scope, v))
                for v in numbers
            }
            yield (value, *numbers), {value: InputKind.LOGITS, **feeds}
            return
    yield tuple(near), near


def _reads_tokens(scope: Scope, evidence: Evidence, ids: Sequence[Value], logits: Value) -> bool:
    """Whether the choices depend on the tokens in another way than by `logits`, as with a prior
    that is added to scores: random tokens would hide what happens to equal scores."""
    ops = scope.upstream(ids, (*evidence.reads, logits))
    return any(v in evidence.reads and v is not logits for op in ops for v in op.inputs)


def _compared_with(scope: Scope, flags: Value) -> tuple[int, ...]:
    """The numbers that an input of integers is compared with."""
    numbers: dict[int, None] = {}
    pending = [flags]
    while pending:
        for op in scope.graph.readers.get(pending.pop(), ()):
            other = op.attrs.get("other")
            if isinstance(other, int):
                numbers[int(other)] = None
            elif op.name in THROUGH:
                pending += op.outputs
    return tuple(numbers)


def closes(scope: Scope, evidence: Evidence, cut: tuple[Value, ...]) -> bool:
    return not opened(scope, evidence, cut)[1]


def opened(
    scope: Scope, evidence: Evidence, cut: tuple[Value, ...]
) -> tuple[tuple[Op, ...], tuple[Value, ...]]:
    """The ops of the region that begins at `cut`, and the values that it reads besides the cut and
    params."""
    stops = (*evidence.reads, *cut)
    ops = scope.upstream([evidence.output], stops)
    return ops, tuple(v for v in scope.leaves(ops, stops) if v not in scope.params)


def other_inputs(scope: Scope, evidence: Evidence, logits: Value) -> tuple[Value, ...]:
    """The inputs of the model that the region reads besides `logits` through routing ops only;
    empty if it reads anything else."""
    ops, leaves = opened(scope, evidence, (logits,))
    plain = all(v in scope.graph.inputs for v in leaves)
    routed = all(is_routing(op) for op in ops if any(v in leaves for v in op.inputs))
    return leaves if plain and routed else ()


def logits_behind(scope: Scope, results: Sequence[Value], experts: int) -> Iterator[Value]:
    """Values that may be the logits: floats [.., E] behind every choice, farthest first. A router
    computes in the dtype of its logits: a cast from or to float64 gives them."""
    stack, visited = list(results), set(results)
    logits: list[Value] = []
    while stack:
        value = stack.pop()
        if value.dtype in FLOATS and value.shape and value.shape[-1] == experts:
            if value not in scope.constants and len(value.shape) > 1:
                logits.append(value)
        op = scope.maker(value)
        if op is None or not is_routing(op) or rounds_doubles(op):
            continue
        for source in op.inputs:
            if source not in visited:
                visited.add(source)
                stack.append(source)
    logits.sort(key=lambda v: scope.position.get(cast(Op, scope.maker(v)), -1))
    yield from logits[:8]
