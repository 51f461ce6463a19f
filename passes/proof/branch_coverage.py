"""Branch coverage of proofs: comparisons of floats with a threshold, and clamps.

A proof by running covers a branch only if both outcomes occur in it: otherwise a graph without the
branch gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from moec.dtypes import FLOATS
from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Value
from moec.ir.traits import CHOICES, THROUGH

_BOUNDING = frozenset(
    f"aten.{name}"
    for name in (
        *("abs.default", "clamp.default", "clamp_max.default", "clamp_min.default"),
        *("hardtanh.default", "maximum.default", "minimum.default", "relu.default"),
    )
)
"""Ops that change values beyond a bound and keep the others."""
_GUARD = 1e-4
"""A clamp from below at this value or less only guards against division by zero: no case has to
reach it."""
_LIMITS = ("other", "min", "max", "min_val", "max_val")
_MASKS = frozenset({"aten.scatter.value", "aten.full.default"})


def decisions(graph: Graph) -> Iterator[Op]:
    """The ops that bound floats, or that map floats to other types: comparisons, roundings.

    Ops that choose the best scores are left out, as proofs compare choices, and so are comparisons
    of masks that are stored as floats.
    """
    for op in graph.ops:
        reads = [value for value in op.inputs if value.dtype in FLOATS]
        gives = [value for value in op.outputs if value.dtype in FLOATS]
        if reads and not gives and op.name not in CHOICES:
            if not all(_is_mask(graph, value) for value in reads):
                yield op
        elif reads and op.name in _BOUNDING and not _is_guard(op):
            yield op


def _is_guard(op: Op) -> bool:
    limits = [op.attrs[name] for name in _LIMITS if op.attrs.get(name) is not None]
    lowest = op.attrs.get("min")
    return len(limits) == 1 and isinstance(lowest, int | float) and 0 < lowest <= _GUARD


def _is_mask(graph: Graph, value: Value) -> bool:
    maker = graph.producers.get(value)
    while maker is not None and maker.name in THROUGH and value.dtype in FLOATS:
        value = maker.inputs[0]
        maker = graph.producers.get(value)
    return value.dtype not in FLOATS or (maker is not None and maker.name in _MASKS)


def missing_decisions(before: Graph, after: Graph, body: Graph, features: Value) -> Iterator[Op]:
    """The decisions of a region that its replacement does not contain.

    Decisions on values that depend on `features`, the experts' rows, are left out where the
    experts' body has decisions too.
    """
    remaining = set(after.ops)
    inside = {features} if any(decisions(body)) else set()
    for op in before.ops if inside else ():
        if inside.intersection(op.inputs):
            inside.update(op.outputs)
    for op in decisions(before):
        if op not in remaining and not inside.intersection(op.outputs):
            yield op


def thresholds(ops: Iterable[Op]) -> tuple[float, ...]:
    """The positive constants that floats are compared with or clamped to, each once."""
    numbers = (op.attrs.get(name) for op in ops for name in _LIMITS)
    return tuple(dict.fromkeys(float(n) for n in numbers if isinstance(n, int | float) and n > 0))


def branch_taken(op: Op, read: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """The outcome of a decision per element: a comparison's result, or whether a clamp bound."""
    return result != read if result.is_floating_point() else result


def require_both_branches(ops: Sequence[Op], outcomes: Sequence[Sequence[torch.Tensor]]) -> None:
    """Raises NoMatch for a decision with the same outcome everywhere; `outcomes` is [case][op]."""
    for op, results in zip(ops, zip(*outcomes, strict=True), strict=True):
        bounds = {bound for t in results if t.numel() for bound in (int(t.min()), int(t.max()))}
        if len(bounds) < 2:
            does = "changes all values or none" if op.name in _BOUNDING else "has the same result"
            raise NoMatch(
                f"{op.name} of {op.inputs[0].name} {does} on all random inputs, so the proof does "
                "not cover its effect"
            )
