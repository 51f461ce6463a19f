"""What changes of the rows that experts compute do to a model: gradients of some rows.

The damage of small changes d of a row is, to second order, half the mean of (g d)^2, with g the
gradient of the log likelihood of tokens that are drawn from the model's own distribution: the
Fisher information (arXiv 2203.07259, section 3), of which the diagonal is taken; for a model that
writes no tokens, of a random projection of its outputs. A few tokens have activations a thousand
times as large as the others', in a few features: the gradient knows what comes of a change there,
their size does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moec.interpret.evaluate import run_graph
from moec.ir.graph import Graph, Op, Program
from moec.ir.opdef import Runner, tensors_of
from moec.ops import OPS
from moec.passes.calibration.evaluator import Evaluator, float32

_PRODUCT = "grouped.linear"
_FEWEST = 4


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


Gradients = list[list[RowGradients]]
"""Of one product, for each matrix and expert."""


def row_gradients(
    program: Program, evaluator: Evaluator, products: Mapping[str, int], samples: int
) -> dict[str, Gradients]:
    """Those of each of `products` of experts: the number of experts by the name of the result.
    About `samples` rows for each expert, the most important half and others evenly spaced."""
    graph, weights, states = evaluator.widened(program)
    params = [weights[param.name].detach() for param in graph.params]
    generator = torch.Generator().manual_seed(0)
    cases = evaluator.calibration.cases
    each = max(_FEWEST, samples // max(1, len(cases)))
    gradients: dict[str, Gradients] = {}
    meaning = partial(_watched_product, products, gradients, each)
    for case in cases:
        inputs = [float32(tensor) for tensor in (*case, *states)]
        with torch.enable_grad():
            outputs = run_graph(graph, [*inputs, *params], meanings={_PRODUCT: meaning})
            score = _score(outputs, evaluator.text, generator)
        if score.requires_grad:
            score.backward()  # type: ignore[no-untyped-call]
    return gradients


def _watched_product(
    products: Mapping[str, int],
    gradients: dict[str, Gradients],
    each: int,
    op: Op,
    tensors: Sequence[Tensor],
    attrs: Mapping[str, Any],
    run: Runner,
) -> Any:
    """grouped.linear, whose backward pass adds to `gradients`."""
    reference, name = OPS[_PRODUCT].reference, op.outputs[0].name
    if name not in products:
        return reference(op, tensors, attrs, run)
    if name not in gradients:
        counts = range(attrs["matrices"] if op.body else 1)
        gradients[name] = [[RowGradients() for _ in range(products[name])] for _ in counts]
    inputs = _rows_of_experts(op, tensors, attrs)
    experts = iter(enumerate(inputs))

    def watched(body: Graph, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
        expert, x = next(experts)
        for matrix, product in zip(gradients[name], arguments, strict=True):
            _watch(product, [(matrix[expert], x)], each)
        return run(body, arguments)

    result: Tensor = reference(op, tensors, attrs, watched)
    if not op.body:
        _watch(result, list(zip(gradients[name][0], inputs, strict=True)), each)
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
    sizes = product.detach().square().sum(-1)

    def fill(gradient: Tensor) -> None:
        first = 0
        for expert, x in experts:
            part = slice(first, first := first + len(x))
            if len(x):
                index, times = _sample(gradient[part].square().sum(-1) * sizes[part], each)
                expert.parts.append((x[index].float(), times, gradient[part][index]))

    if not product.requires_grad:
        product.requires_grad_()
    product.register_hook(fill)  # type: ignore[no-untyped-call]


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
