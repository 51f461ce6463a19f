"""Roundings to 16 bits that the choices of a router depend on.

    s = softmax(l: f16[T, E])              ->  moe.route(l) <k=2, score_dtype=f16>
    w, i = topk(s, 2)

A softmax of float16 is 0 below 6e-8, and a sigmoid of bfloat16 is 1 above 6: scores tie that do not
in float32, and the first of equals is chosen. Proofs run in float32, where a rounding makes no
difference, so a routing that is proved is then compared with the region in the region's own dtypes,
with equal scores in their order, on logits small, large and close together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from moec.dtypes import FLOATS, HALVES
from moec.errors import NoMatch
from moec.ir.aten import TORCH_DTYPES
from moec.ir.graph import Graph, Op, Value
from moec.ir.interpret.evaluate import run_graph
from moec.ir.interpret.stable_topk import FirstOfEquals
from moec.ir.ops.routing.routing import Routing
from moec.ir.sizes.dims import Bounds, evaluate_dim, symbols
from moec.ir.traits import CASTS, is_elementwise
from moec.passes.proof.input_generators import Feed, sample
from moec.passes.recognise.routers.router_hypotheses import before_choices

_SCALES = ((0.05, 0.0), (1.0, 0.0), (4.0, 0.0), (24.0, 0.0), (0.02, 0.6), (0.02, 1.8))
"""The spread of logits, and what they are about: those close together differ by few roundings."""
_ROWS = 1000
"""Rows of logits of each spread, at least."""
_STRAYS = 1
"""Rows of all that may choose others: an exponential that differs in the last of 24 bits may round
to the other of two neighbours in 16 bits."""


def roundings(region: Graph, routing: Routing, corrected: bool) -> Iterator[Routing]:
    """The routing with each pair of dtypes that the region may round scores and choices to, the
    likeliest first; as it is alone if nothing is rounded before a choice."""
    rounded = {op.outputs[0].dtype for op in before_choices(region) if _rounds(op)}
    for dtype in HALVES:
        if dtype not in rounded:
            continue
        if corrected or routing.groups > 1:
            yield replace(routing, score_dtype=dtype, choice_dtype=dtype)
            yield replace(routing, choice_dtype=dtype)
        yield replace(routing, score_dtype=dtype)
    yield routing


def _rounds(op: Op) -> bool:
    """Whether an op computes floats of 16 bits, or rounds wider ones."""
    if not op.outputs or op.outputs[0].dtype not in HALVES:
        return False
    floats = [value for value in op.inputs if value.dtype in FLOATS]
    if op.name in CASTS:
        return any(value.dtype != op.outputs[0].dtype for value in floats)
    computes = op.name in _ACROSS or (is_elementwise(op.name) and op.name not in _EXACT)
    return bool(floats) and computes


_EXACT = frozenset(
    f"aten.{name}"
    for name in (
        *("neg.default", "abs.default", "relu.default", "where.self", "maximum.default"),
        *("minimum.default", "masked_fill.Scalar", "masked_fill.Tensor", "clamp.default"),
    )
)
_ACROSS = frozenset(
    {
        "aten.softmax.int",
        "aten._softmax.default",
        "aten.sum.dim_IntList",
        "aten.mean.dim",
        "aten.cumsum.default",
    }
)


@dataclass(frozen=True)
class EagerChoices:
    """The choices of a region in its own dtypes, on random inputs."""

    region: Graph
    logits: Value
    correction: Value | None
    feeds: Mapping[Value, Feed]
    weights: Mapping[str, torch.Tensor]

    def equal(self, replacement: Graph) -> bool:
        """Whether a replacement with the same inputs makes the same choices. A region that rounds
        nothing before its choices is not run: the proof compared them."""
        if not any(map(_rounds, before_choices(self.region))):
            return True
        differing = 0
        for case, ids in zip(self._cases, self._ids, strict=True):
            others = self._chosen(replacement, case)
            differing += int((ids != others).any(-1).sum())
        return differing <= _STRAYS

    @cached_property
    def _cases(self) -> Sequence[Mapping[Value, torch.Tensor]]:
        generator = torch.Generator().manual_seed(21)
        sizes = _sizes(self.region)
        experts = evaluate_dim(self.logits.shape[-1], sizes)
        elements = math.prod(evaluate_dim(dim, sizes) for dim in self.logits.shape)
        draws = -(-_ROWS * experts // max(elements, 1))
        cases = []
        for (spread, middle), _ in itertools.product(_SCALES, range(draws)):
            case = {}
            for value in self.region.inputs:
                tensor = sample(value, self.feeds.get(value), "random", sizes, generator)
                if value is self.logits:
                    tensor = tensor * spread + middle
                case[value] = tensor.to(TORCH_DTYPES[value.dtype])
            cases.append(case)
        return cases

    @cached_property
    def _ids(self) -> Sequence[torch.Tensor]:
        return [self._chosen(self.region, case) for case in self._cases]

    def _chosen(self, graph: Graph, case: Mapping[Value, torch.Tensor]) -> torch.Tensor:
        """The sorted ids of each row."""
        tensors = [case[value] for value in graph.inputs]
        tensors += [self.weights[param.name] for param in graph.params]
        try:
            with FirstOfEquals():
                results = run_graph(graph, tensors, _sizes(self.region))
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise NoMatch(f"it fails in its own dtypes: {str(error).splitlines()[0]}") from None
        return results[-1].reshape(math.prod(case[self.logits].shape[:-1]), -1).sort(-1).values


def _sizes(graph: Graph) -> dict[str, int]:
    names = sorted({n for v in graph.inputs for d in v.shape for n in symbols(d)})
    sizes = {}
    for position, name in enumerate(names):
        limits = graph.bounds.get(name, Bounds())
        size = max(_ROWS if not position else 2, limits.low)
        sizes[name] = size if limits.high is None else min(size, limits.high)
    return sizes
