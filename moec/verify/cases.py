"""The inputs with which a compiled model is compared with its module, and the module's results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from moec.capture import Captured
from moec.errors import CaptureError
from moec.ir.graph import Graph, Value
from moec.ir.replace_sizes import size_expressions
from moec.ir.sizes.dims import Bounds, Dim, evaluate_dim, parse_dim, symbols
from moec.ir.sizes.thresholds import allows, nearest_allowed, sizes_at_changes
from moec.oracle.agree import at_sizes, sizes_of
from moec.oracle.cases import Case, drawn_and_run, other_roles, shapes
from moec.oracle.draws import DRAWS, Draw
from moec.oracle.tolerance import rounds_to_16_bits
from moec.runtime.checks import show_bytes
from moec.sources.memory.budget import MOST_RESULTS
from moec.sources.memory.lock_step import Together, one_by_one

_CASES = 12
"""At most this many cases, the smallest ones, so that a verification takes seconds."""
_ELEMENTS = 1 << 12
"""The product of all sizes may be this large, or four times the example's."""
_KEEPS = (
    *(f"aten.{name}.default" for name in ("unsqueeze", "reshape", "expand", "_to_copy", "permute")),
    *("aten.slice.Tensor", "aten.sub.Tensor", "aten.add.Tensor"),
)
_COMPARISONS = tuple(f"aten.{name}.Scalar" for name in ("lt", "le", "gt", "ge", "eq", "ne"))


def _turns(captured: Captured) -> list[dict[str, int]]:
    """Sizes on both sides of each threshold of a size expression, of a mask over positions, and of
    the bounds; only a few small ones."""
    graph, sizes = captured.program.graph, sizes_of(captured.program, captured.example)
    bounds = {name: limits for name, limits in graph.bounds.items() if name in sizes}
    expressions = dict.fromkeys(e for op in graph.ops for e in size_expressions(op))
    moved = sizes_at_changes(expressions, bounds, sizes)
    moved += [{**sizes, name: size} for name, size in _masks(graph, bounds)]
    moved += [{**sizes, name: size} for name, size in _ends(bounds)]
    moved += [{**sizes, name: sizes[name] + 1} for name in _in_expressions(graph) & bounds.keys()]
    moved = [nearest_allowed(graph.bounds, m, way) for m in moved for way in (1, -1)]
    most = max(_ELEMENTS, 4 * math.prod(sizes.values()))
    moved = [m for m in moved if math.prod(m.values()) <= most and allows(graph.bounds, m)]
    small = {tuple(sorted(m.items())): m for m in moved}
    small.pop(tuple(sorted(sizes.items())), None)
    return sorted(small.values(), key=lambda m: math.prod(m.values()))[:_CASES]


def _masks(graph: Graph, bounds: Mapping[str, Bounds]) -> Iterator[tuple[str, int]]:
    """Sizes around integers with which positions are compared."""
    for op in graph.ops:
        number = op.attrs.get("other")
        if op.name not in _COMPARISONS or not isinstance(number, int):
            continue
        if _is_position(graph, op.inputs[0]):
            names = {n for dim in op.inputs[0].shape for n in symbols(dim)} & bounds.keys()
            for name in sorted(names):
                for size in (number, number + 1, number + 2):
                    if size >= 1 and bounds[name].contains(size):
                        yield name, size


def _is_position(graph: Graph, value: Value) -> bool:
    """Whether a value is a position along an axis: computed from aten.arange, without data."""
    op = graph.producers.get(value)
    if op is None or value.dtype != "i64":
        return False
    if op.name.startswith("aten.arange."):
        return True
    return op.name in _KEEPS and any(_is_position(graph, source) for source in op.inputs)


def _in_expressions(graph: Graph) -> set[str]:
    """The sizes that are bounded together: a product of them, or a remainder."""
    expressions = (parse_dim(name) for name in graph.bounds if not name.isidentifier())
    return {name for expression in expressions for name in symbols(expression)}


def _ends(bounds: Mapping[str, Bounds]) -> Iterator[tuple[str, int]]:
    for name, limits in bounds.items():
        first = (limits.low, limits.low + 1) if limits.low > 1 else ()
        for size in (*first, limits.high):
            if size is not None and limits.contains(size):
                yield name, size


Reference = tuple[Case, tuple[torch.Tensor, ...]]
"""Inputs, and the module's results for them."""
_Plan = tuple[Mapping[str, int], Draw]


def plans(captured: Captured) -> list[_Plan]:
    """Sizes and draws: the example's sizes, the least and odd ones, sizes on both sides of each
    threshold of a size expression, a mask or a guard, and each size at 0, as far as the bounds
    allow. Where an input is a mask, a length or a number, the first ones get several draws each.
    Rows that are all alike are drawn in float32 only: in 16 bits they are one row to the statistics
    of rounding.
    """
    program, graph = captured.program, captured.program.graph
    sixteen = rounds_to_16_bits(graph)
    kinds = [draw for draw in DRAWS if draw.tokens in ("random", "large") or not sixteen]
    varied = other_roles(program, captured.example)
    least = least_sizes(graph)
    few: list[tuple[Mapping[str, int], Sequence[Draw]]]
    few = [({}, kinds[:3]), (least, kinds[:2]), (odd_sizes(graph), kinds[:2])]
    result: list[_Plan]
    result = [(size, draw) for size, draws in few for draw in draws[: 3 if varied else 1]]
    if not sixteen and not varied:
        result.append(({}, DRAWS[1]))
    others = (*_turns(captured), *_zeros(graph))
    result += [(size, kinds[i % len(kinds)]) for i, size in enumerate(others)]
    return [plan for plan in result if allows(graph.bounds, plan[0])]


def least_sizes(graph: Graph) -> dict[str, int]:
    return _sizes(graph, lambda bounds: max(bounds.low, 1))


def odd_sizes(graph: Graph) -> dict[str, int]:
    """19 for each, as far as its bounds allow: no multiple of a tile."""
    return _sizes(graph, lambda b: max(b.low, 19 if b.high is None else min(b.high, 19)))


def _sizes(graph: Graph, choose: Callable[[Bounds], int]) -> dict[str, int]:
    """A size for each name; B is at most 3, so that the cases stay small."""
    sizes = {
        name: choose(bounds) if name != "B" else min(choose(bounds), 3)
        for name, bounds in graph.bounds.items()
        if name.isidentifier()
    }
    longer = nearest_allowed(graph.bounds, sizes)
    return longer if allows(graph.bounds, longer) else nearest_allowed(graph.bounds, sizes, -1)


def _zeros(graph: Graph) -> Iterator[dict[str, int]]:
    sizes = {name: max(bounds.low, 1) for name, bounds in graph.bounds.items()}
    for name, bounds in graph.bounds.items():
        if bounds.low == 0 and name.isidentifier() and allows(graph.bounds, {**sizes, name: 0}):
            yield {name: 0}


def references(
    captured: Captured, *, empty: bool = True, together: Together = one_by_one
) -> tuple[list[Reference], tuple[str, ...]]:
    """The module's results for the example and for each plan, and a sentence for each size at which
    it fails, other than 0, or whose results would take too much memory. Without `empty` no size is
    0.

    Raises CaptureError where it fails on its example.
    """
    planned, large = _within_memory(captured, plans(captured))
    planned = [plan for plan in planned if empty or 0 not in plan[0].values()]
    answers = together(
        [partial(_of_example, captured), *(partial(_of_plan, captured, *p) for p in planned)]
    )
    skipped = large + [answer for answer in answers if isinstance(answer, str)]
    results = [answer for answer in answers if not isinstance(answer, str)]
    return results, tuple(dict.fromkeys(filter(None, skipped)))


def _within_memory(captured: Captured, planned: Sequence[_Plan]) -> tuple[list[_Plan], list[str]]:
    """The plans whose results fit into memory together, the first ones, and a sentence for each
    other size."""
    graph, sizes = captured.program.graph, sizes_of(captured.program, captured.example)
    varying = {
        value.shape for op in graph.ops for value in op.outputs if any(map(symbols, value.shape))
    }

    def numbers(changed: Mapping[str, int]) -> tuple[int, int]:
        """Those of the outputs, and of the largest value of all."""
        at = {**sizes, **changed}
        most = max((_numbers(shape, at) for shape in varying), default=0)
        return sum(_numbers(value.shape, at) for value in graph.outputs), most

    left = max(MOST_RESULTS, 4 * max(numbers({})))
    plans_within: list[_Plan] = []
    large: dict[str, None] = {}
    for changed, draw in planned:
        results, most = numbers(changed)
        if max(results, most) <= left:
            plans_within.append((changed, draw))
            left -= results
        else:
            where = ", ".join(f"{name} = {size}" for name, size in changed.items())
            large[
                f"sizes {where} were not compared: that takes {show_bytes(8 * most)} of memory"
            ] = None
    return plans_within, list(large)


def _numbers(shape: Sequence[Dim], sizes: Mapping[str, int]) -> int:
    """The numbers of a value; 0 where a size depends on data."""
    if any(not symbols(dim) <= sizes.keys() for dim in shape):
        return 0
    return math.prod(max(0, evaluate_dim(dim, sizes)) for dim in shape)


def _of_example(captured: Captured) -> Reference | str:
    try:
        return captured.example, captured.eager(*captured.example)
    except Exception as error:
        raise CaptureError(f"the model fails on its example inputs: {error}") from error


def _of_plan(captured: Captured, sizes: Mapping[str, int], draw: Draw) -> Reference | str:
    """The inputs of a plan and the module's results, or why there are none ("" at a size of 0)."""
    resized = at_sizes(captured.program, captured.example, sizes)
    accepted = drawn_and_run(captured.program, resized, captured.eager, draw)
    if accepted is not None:
        return accepted
    try:
        return tuple(resized), captured.eager(*resized)
    except Exception as error:
        if 0 in sizes.values():
            return ""
        return f"inputs {shapes(resized)} were not compared: the model fails: {error}"
