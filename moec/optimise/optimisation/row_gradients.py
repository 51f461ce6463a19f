"""What changes of the rows that products compute do to a model: gradients of some rows.

The damage of small changes d of a row is, to second order, half the mean of (g d)^2, with g the
gradient of the log likelihood of tokens that are drawn from the model's own distribution: the
Fisher information (arXiv 2203.07259, section 3), of which the diagonal is taken; for a model that
writes no tokens, the squared change of its outputs is the mean of (g d)^2, with g the gradient of
a random projection. A few tokens have activations a thousand times as large as the others', in a
few features: the gradient knows what comes of a change there, their size does not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from moec.ir.graph import Graph, Op, Program, Value
from moec.ir.interpret.evaluate import bind, run_part
from moec.ir.interpret.threads import copied, gradients_needed
from moec.ir.opdef import Reference, Runner, tensors_of
from moec.ir.ops import OPS
from moec.passes.calibration.evaluator import Evaluator, float32
from moec.passes.quantise.quantise_linears import LINEAR

# Gradients of what a graph computes, with the values of a few of its ops in memory at once.
#
# The graph runs without gradients, and what is alive between its parts is held. Then each part runs
# again, the last first, with gradients (arXiv 1604.06174, section 4).

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


_PRODUCT = "grouped.linear"
_FEWEST = 4


@dataclass(frozen=True, eq=False)
class Gradients:
    """Of each product, by the name of its result, `rows` for each of its matrices and experts (a
    linear layer has one). Damage is `scale` times the sum of the squares of changes times
    gradients."""

    rows: Mapping[str, list[list[RowGradients]]]
    scale: float


@dataclass(eq=False)
class RowGradients:
    """Of one matrix of one expert: some of its input rows, f32[S, K], how many rows each counts
    for, f32[S], and the gradients by what the matrix computes of them, f32[S, N]; a part for each
    case of the calibration data."""

    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def sampled(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The parts together; None where no result depends on a row."""
        if not self.parts:
            return None
        x, times, gradients = (torch.cat(each) for each in zip(*self.parts, strict=True))
        return x, times, gradients


def row_gradients(
    program: Program, evaluator: Evaluator, products: Mapping[str, int], samples: int
) -> Gradients:
    """Those of `products`, experts and linear layers: the number of experts by the name of the
    result. About `samples` rows of each expert: the most important half and others, evenly
    spaced. Raises UsageError where gradients cannot be computed."""
    if not products:
        return Gradients({}, 0.0)
    graph, weights, states = evaluator.widened(program)
    params = [weights[param.name].detach() for param in graph.params]
    generator = torch.Generator().manual_seed(0)
    cases, text = evaluator.calibration.cases, evaluator.text
    each = max(_FEWEST, samples // max(1, len(cases)))
    rows: dict[str, list[list[RowGradients]]] = {}
    meanings: dict[str, Reference] = {"aten.copy.default": copied}
    watched = meanings | {
        _PRODUCT: partial(_watched_product, products, rows, each),
        LINEAR: partial(_watched_linear, products, rows, each),
    }
    score = partial(_score, text=text, generator=generator)
    total = 0.0
    for case in cases:
        tensors = [*(float32(tensor) for tensor in (*case, *states)), *params]
        needed = f"optimize needs gradients of what the products of {graph.name} compute"
        with gradients_needed(needed, "use moec compile with --quant"):
            outputs = run_forth_and_back(graph, tensors, products, meanings, watched, score)
        total += sum(float(y.detach().square().sum()) for y in outputs) if text is None else 0.0
        total += 0 if text is None else 2 * case[text[0]].numel()
    return Gradients(rows, 1 / total if total else 0.0)


def _watched_linear(
    products: Mapping[str, int],
    rows: dict[str, list[list[RowGradients]]],
    each: int,
    op: Op,
    tensors: Sequence[Tensor],
    attrs: Mapping[str, Any],
    run: Runner,
) -> Any:
    """A linear layer, whose backward pass adds to `rows`."""
    result, name = torch.nn.functional.linear(*tensors), op.outputs[0].name
    if name in products:
        (expert,) = rows.setdefault(name, [[RowGradients()]])[0]
        _watch(result, [(expert, _rows(tensors[0].detach()))], each)
    return result


def _watched_product(
    products: Mapping[str, int],
    rows: dict[str, list[list[RowGradients]]],
    each: int,
    op: Op,
    tensors: Sequence[Tensor],
    attrs: Mapping[str, Any],
    run: Runner,
) -> Any:
    """grouped.linear, whose backward pass adds to `rows`."""
    reference, name = OPS[_PRODUCT].reference, op.outputs[0].name
    if name not in products:
        return reference(op, tensors, attrs, run)
    if name not in rows:
        counts = range(attrs["matrices"] if op.body else 1)
        rows[name] = [[RowGradients() for _ in range(products[name])] for _ in counts]
    inputs = _rows_of_experts(op, tensors, attrs)
    experts = iter(enumerate(inputs))

    def watched(body: Graph, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
        expert, x = next(experts)
        for matrix, product in zip(rows[name], arguments, strict=True):
            _watch(product, [(matrix[expert], x)], each)
        return run(body, arguments)

    result: Tensor = reference(op, tensors, attrs, watched)
    if not op.body:
        _watch(result, list(zip(rows[name][0], inputs, strict=True)), each)
    return result


def _rows_of_experts(op: Op, tensors: Sequence[Tensor], attrs: Mapping[str, Any]) -> list[Tensor]:
    """What each expert multiplies, [R, K]."""
    x, ends, _, _, order, scale = tensors_of(_PRODUCT, op, tensors, attrs).values()
    x = x.detach()
    if order is not None:
        x = x[order.long() // attrs["gather"]]
        if scale is not None:
            x = x * scale.detach().reshape(-1)[order.long()][:, None].to(x.dtype)
    return [x[first:end] for first, end in pairwise([0, *ends.tolist()])]


def _watch(product: Tensor, experts: Sequence[tuple[RowGradients, Tensor]], each: int) -> None:
    """Samples the gradients of rows, one expert's after the other's, and what each expert
    multiplied, when a backward pass has them."""
    sizes = _rows(product.detach()).square().sum(-1)

    def fill(gradient: Tensor) -> None:
        gradient, first = _rows(gradient), 0
        for expert, x in experts:
            part = slice(first, first := first + len(x))
            if len(x):
                index, times = _sample(gradient[part].square().sum(-1) * sizes[part], each)
                expert.parts.append((x[index].float(), times, gradient[part][index]))

    if not product.requires_grad:
        product.requires_grad_()
    product.register_hook(fill)  # type: ignore[no-untyped-call]


def _rows(x: Tensor) -> Tensor:
    """x [.., K] as rows [R, K]."""
    return x.reshape(-1, x.shape[-1])


def _sample(importance: Tensor, each: int) -> tuple[Tensor, Tensor]:
    """The numbers of about `each` rows, and how many each counts for: the most important half for
    itself, the others, evenly spaced by importance, for those between, too."""
    order = importance.argsort(descending=True)
    first, rest = order[: each // 2], order[each // 2 :]
    between = rest[:: max(1, -(-len(rest) // (each - each // 2)))]
    times = torch.full((len(between),), len(rest) / max(1, len(between)))
    return torch.cat([first, between]), torch.cat([torch.ones(len(first)), times])


def _score(
    outputs: Sequence[Tensor], text: tuple[int, int] | None, generator: torch.Generator
) -> Tensor:
    if text is None:
        projections = [torch.randn(y.shape, generator=generator) for y in outputs]
        parts = [(v * y).sum() for v, y in zip(projections, outputs, strict=True)]
        return torch.stack(parts).sum()
    logs = outputs[text[1]].flatten(0, -2).log_softmax(-1)
    drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
    return logs.gather(-1, drawn).sum()
