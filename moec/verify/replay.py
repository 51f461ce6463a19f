"""A graph with the choices that code made in the place of its own.

Rounding decides between two experts with nearly equal scores, and all that follows depends on it.
With the same choices two right results differ by roundings alone, in every row. A choice itself is
right if scores that are off by a rounding lead to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch

from moec.dtypes import FLOATS
from moec.ir.graph import Graph, Op, Program
from moec.ir.interpret.evaluate import run_graph, run_op
from moec.ir.interpret.run_in_float32 import all_in_float32
from moec.ir.opdef import Reference, Runner
from moec.ir.ops.routing.gate import logits_of
from moec.ir.ops.routing.routing import Routing, choice_scores, chosen_by, top_k
from moec.oracle.agree import with_states
from moec.oracle.cases import Case
from moec.oracle.rounding import row_distances

Tensors: TypeAlias = Mapping[str, torch.Tensor]

TIMES = 3.0
"""With the same choices an error may be so many times that of nine of ten rows of the graph in 16
bits: it was at most 2.3 times the median, in every row of trained and of random models."""


@dataclass(frozen=True)
class Scored:
    """A choice, and the scores by which the graph would choose: `is_wrong(error)` is true where no
    scores choose so that are off by at most `error`."""

    scores: torch.Tensor
    is_wrong: Callable[[float], torch.Tensor]


Replayed: TypeAlias = tuple[tuple[torch.Tensor, ...], dict[str, Scored]]
"""Results, and by name those choices in them that scores make."""


def choices(graph: Graph, written: Tensors) -> dict[str, torch.Tensor]:
    """Of what kernels wrote, the results of ops that choose by scores."""
    by_scores = (op for op in graph.ops if any(v.dtype in FLOATS for v in op.inputs))
    choosing = (op for op in by_scores if op.name in {*_ROUTERS, *_BEST, *_COMPARISONS})
    return {v.name: written[v.name] for op in choosing for v in op.outputs if v.name in written}


def replayed(program: Program, cases: Sequence[Case], chosen: Sequence[Tensors]) -> list[Replayed]:
    """The results of each case in float32."""
    scored: list[dict[str, Scored]] = [{} for _ in cases]
    meanings = [_meanings(program.graph, *pair) for pair in zip(chosen, scored, strict=True)]
    inputs = [with_states(program, case) for case in cases]
    return list(zip(all_in_float32(program, inputs, meanings=meanings), scored, strict=True))


def replayed_as_is(program: Program, case: Case, chosen: Tensors) -> Replayed:
    """The results in the dtypes of the graph."""
    scored: dict[str, Scored] = {}
    meanings = _meanings(program.graph, chosen, scored)
    weights = [program.weights[param.name] for param in program.graph.params]
    tensors = [*with_states(program, case), *weights]
    with torch.no_grad():
        return run_graph(program.graph, tensors, meanings=meanings), scored


def usual(errors: torch.Tensor) -> float:
    """How large errors may be, by what they are in the graph in 16 bits."""
    finite = errors[errors.isfinite()]
    return TIMES * float(finite.quantile(0.9)) if len(finite) else 0.0


def wrong_choices(
    exact: Sequence[Replayed], rounded: Mapping[int, Replayed], least: float
) -> Iterator[tuple[int, str]]:
    """The cases with a choice that scores in float32 do not explain, and what it is. Scores may be
    off by what is `usual` in 16 bits, relative to their greatest, or by `least`."""
    for name in dict.fromkeys(name for _, scored in exact for name in scored):
        each = {n: scored[name] for n, (_, scored) in enumerate(exact) if name in scored}
        pairs = [(low[name].scores, each[n].scores) for n, (_, low) in rounded.items() if n in each]
        errors = [row_distances(*pair, False) for pair in pairs]
        limit = max(least, usual(torch.cat(errors)) if errors else 0.0)
        for number, choice in each.items():
            finite = choice.scores[choice.scores.isfinite()].abs()
            wrong = choice.is_wrong(limit * float(finite.max()) if len(finite) else 0.0)
            if wrong.any():
                rows = f"{int(wrong.sum())} of {wrong.numel()} choices"
                yield number, f"{name}: {rows} are not those of scores that are off by {limit:.0e}"


def _meanings(graph: Graph, chosen: Tensors, scored: dict[str, Scored]) -> dict[str, Reference]:
    """Ops that choose take what is `chosen`; that, with its scores, is added to `scored`."""

    def meaning(
        op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], _: Runner
    ) -> Any:
        computed = run_op(replace(op, attrs=attrs), tensors, {})
        if all(value.name not in chosen for value in op.outputs):
            return computed
        recorded = [
            chosen[value.name].reshape(tensor.shape).to(tensor.dtype)
            if value.name in chosen and chosen[value.name].numel() == tensor.numel()
            else tensor  # of a size that depends on data
            for value, tensor in zip(op.outputs, computed, strict=True)
        ]
        number = next(n for n, tensor in enumerate(computed) if not tensor.is_floating_point())
        same = recorded[number] == computed[number]
        if (choice := _scored(op, tensors, attrs, recorded[number], same)) is not None:
            scored[op.outputs[number].name] = choice
        return tuple(  # the weight of the same choice is the graph's
            torch.where(same, a, b) if a.shape == same.shape else b
            for a, b in zip(computed, recorded, strict=True)
        )

    return {op.name: meaning for op in graph.ops if any(v.name in chosen for v in op.outputs)}


_ROUTERS = ("moe.gate", "moe.route")
_COMPARISONS = {
    f"aten.{n}.{of}" for n in "lt le gt ge eq ne".split() for of in ("Scalar", "Tensor")
}
_BEST = {
    "aten.topk.default": ("largest", True),
    "aten.sort.default": ("descending", False),
    "aten.max.dim": ("", True),
    "aten.argmax.default": ("", True),
}
"""Ops that choose the greatest first, or the least: by which attribute, and by default."""


def _scored(
    op: Op,
    tensors: Sequence[torch.Tensor],
    attrs: Mapping[str, Any],
    ids: torch.Tensor,
    same: torch.Tensor,
) -> Scored | None:
    """The choice `ids` of an op, some of which are the `same` as it makes of these tensors."""
    if op.name in _ROUTERS:
        routing = Routing.of(op)
        scores = choice_scores(routing, *logits_of(op, tensors, attrs))
        return _ranked(scores, ids, partial(chosen_by, routing), min(routing.groups, 2))
    dim = attrs.get("dim", None if op.name == "aten.argmax.default" else -1)
    if op.name in _BEST and ids.ndim and dim is not None:
        attr, default = _BEST[op.name]
        scores = tensors[0].float() if attrs.get(attr, default) else -tensors[0].float()
        ids = (ids if ids.ndim == scores.ndim else ids.unsqueeze(dim)).movedim(dim, -1)
        return _ranked(scores.movedim(dim, -1), ids, partial(top_k, k=ids.shape[-1]))
    if op.name in _COMPARISONS:
        away = tensors[0].float() - (tensors[1].float() if len(tensors) > 1 else attrs["other"])
        return Scored(away, lambda error: ~same & (away.abs() > error))
    return None


def _ranked(
    scores: torch.Tensor,
    ids: torch.Tensor,
    choose: Callable[[torch.Tensor], torch.Tensor],
    terms: int = 1,
) -> Scored:
    """The choice of ids [.., k] by scores [.., E], or by sums of so many `terms` of them."""

    def is_wrong(error: float) -> torch.Tensor:
        favour = torch.full(ids.shape, 2 * error * terms, dtype=scores.dtype)
        raised = scores.scatter_add(-1, ids, favour)
        better = raised.gather(-1, choose(raised)) - raised.gather(-1, ids)
        return (better.abs() > 2 * error).any(-1)

    return Scored(scores, is_wrong)
