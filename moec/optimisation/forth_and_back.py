"""Gradients of what a graph computes, with the values of a few of its ops in memory at once.

The graph runs without gradients, and what is alive between its parts is held. Then each part runs
again, the last first, with gradients (arXiv 1604.06174, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from moec.interpret.evaluate import bind, run_part
from moec.ir.graph import Graph, Value
from moec.ir.opdef import Reference

PRODUCTS = 8
"""Products of a part, at least; fewer than twice as many."""

Meanings = Mapping[str, Reference]
Values = dict[Value, Tensor]


def run_forth_and_back(
    graph: Graph,
    tensors: Sequence[Tensor],
    products: Collection[str],
    meanings: Meanings,
    watched: Meanings,
    score: Callable[[Sequence[Tensor]], Tensor],
) -> list[Tensor]:
    """The results of `graph`, all floats, for the tensors of its inputs and params, after a
    backward pass from their `score`, a scalar. `meanings` are those of ops without gradients,
    `watched` with them. Parts end between `products`, names of results."""
    sizes: dict[str, int] = {}
    with torch.no_grad():
        values = bind(graph, tensors, sizes)
        constants, starts = frozenset(values), list[tuple[range, Values]]()
        for part in parts(graph, products):
            starts.append((part, dict(values)))
            run_part(graph, part, values, sizes, meanings)
    results = [values[v].detach().requires_grad_() for v in graph.results]
    with torch.enable_grad():
        score(results).backward()  # type: ignore[no-untyped-call]
        gradients: Values = {}
        for value, result in zip(graph.results, results, strict=True):
            _add(gradients, value, result)
        for part, start in reversed(starts):
            leaves = {v: t if v in constants else _leaf(t) for v, t in start.items()}
            start.clear()
            _run_back(graph, part, leaves, sizes, watched, gradients)
    return results


def _run_back(
    graph: Graph,
    part: range,
    leaves: Values,
    sizes: dict[str, int],
    watched: Meanings,
    gradients: Values,
) -> None:
    """From the gradients of what a part computes those of what it reads."""
    values = dict(leaves)
    run_part(graph, part, values, sizes, watched)
    ends = {v: gradients.pop(v) for v in list(gradients) if v not in leaves}
    scored = [v for v in ends if values[v].requires_grad]
    if scored:
        torch.autograd.backward([values[v] for v in scored], [ends[v] for v in scored])
    for value, leaf in leaves.items():
        _add(gradients, value, leaf)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _add(gradients: Values, value: Value, leaf: Tensor) -> None:
    if leaf.grad is not None:
        gradients[value] = gradients[value] + leaf.grad if value in gradients else leaf.grad


def parts(graph: Graph, products: Collection[str]) -> Iterator[range]:
    """Numbers of ops that follow each other, cut where the fewest values are alive."""
    last = graph.last_reads
    outer = {*graph.inputs, *graph.params}
    alive = list(
        accumulate(
            len(op.outputs) - sum(value not in outer for value in last.get(i, ()))
            for i, op in enumerate(graph.ops)
        )
    )
    at = [i for i, op in enumerate(graph.ops) if op.outputs and op.outputs[0].name in products]
    start, first = 0, 0
    while first + 2 * PRODUCTS <= len(at):
        window = range(at[first + PRODUCTS - 1], at[first + 2 * PRODUCTS - 1])
        cut = min(window, key=lambda i: alive[i]) + 1
        yield range(start, cut)
        start, first = cut, sum(i < cut for i in at)
    yield range(start, len(graph.ops))
