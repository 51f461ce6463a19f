"""Whether the ranks of a plan together compute what the model computes.

All ranks are simulated in this process. Every rank gets the example, then each gets inputs of its
own: a row that comes back to another rank is noticed there. In 16 bits ranks and model are both
computed in float32, where an error in a weight is not hidden by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from moec.capture import Captured
from moec.errors import VerificationError
from moec.ir.aten import TORCH_DTYPES
from moec.ir.graph import Module, Program
from moec.ir.interpret.evaluate import evaluate_anywhere
from moec.ir.interpret.ranks import evaluate_ranks
from moec.ir.interpret.run_in_float32 import MEANING, all_in_float32, wide, widened
from moec.ir.interpret.stable_topk import FirstOfEquals
from moec.ir.sizes.thresholds import allows
from moec.oracle.agree import at_sizes, error_of, with_states
from moec.oracle.cases import Case, Eager, drawn_and_run, shapes
from moec.oracle.draws import DRAWS
from moec.oracle.rounding import FACTOR
from moec.oracle.tolerance import default_tolerance, distance, rounds_to_16_bits
from moec.passes.decode import logits_of
from moec.plan.groups import Parts, groups_of, tp_group, tp_texts
from moec.plan.plan import Plan
from moec.runtime.package import MAIN
from moec.verify.cases import Reference, least_sizes, odd_sizes
from moec.verify.references import exact_eager

_DRAWS = 3
"""Draws of the example's sizes."""

_Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Ranked:
    """A function of a model in stage MOE, and that of the ranks of a plan: `rank.N.name`.

    `main` takes the model's inputs, `decode` token ids [B, S] of new texts and empty caches.
    """

    program: Program
    module: Module
    plan: Plan
    name: str = MAIN

    def of_rank(self, rank: int) -> Program:
        return self.module[f"rank.{rank}.{self.name}"]

    def inputs(self, cases: Sequence[Case]) -> list[_Tensors]:
        """The inputs of each rank's graph for its case."""
        if self.name == MAIN:
            return [with_states(self.of_rank(rank), case) for rank, case in enumerate(cases)]
        groups = groups_of_texts(self.plan).items()
        return [
            first_step(
                self.of_rank(rank),
                ids,
                {
                    size: sum(len(cases[other][0]) for other in part)
                    for size, parts in groups
                    for part in parts
                    if rank in part
                },
            )
            for rank, (ids,) in enumerate(cases)
        ]


def check_ranks(captured: Captured, ranked: Ranked, tolerance: float | None = None) -> None:
    """Compare the ranks with `captured.eager`, and the caches of `decode` with its program's, on
    the example and on drawn inputs. `tolerance` is the greatest error allowed; None where the
    dtypes decide.

    A capacity that counts the tokens of all ranks is compared on the inputs of all ranks together.
    Raises VerificationError, naming the rank and the output, where one of the results differs.
    """
    graph = ranked.program.graph
    sixteen = rounds_to_16_bits(graph)
    if tolerance is None:
        tolerance = _limit_in_float32(captured) if sixteen else default_tolerance(graph)
    joint = any(op.name == "moe.capacity" for op in graph.ops)
    module = widened(ranked.module) if sixteen else ranked.module
    reference, groups = _reference(captured, ranked, sixteen), groups_of(ranked.plan)
    for references in _references(captured, ranked, reference):
        cases = [case for case, _ in references]
        inputs = [list(map(wide, tensors)) for tensors in ranked.inputs(cases)]
        results = evaluate_ranks(module, inputs, groups, ranked.name)
        expected = _expected(reference, cases, joint=joint)
        why = _difference(ranked, cases, results, expected, tolerance)
        if why:
            with FirstOfEquals():
                expected = _expected(reference, cases, joint=joint)
            why = _difference(ranked, cases, results, expected, tolerance)
        if why:
            raise VerificationError(why)


def _reference(captured: Captured, ranked: Ranked, sixteen: bool) -> Eager:
    """The outputs of the function for a case, and the caches of `decode`."""
    source = exact_eager(captured) if sixteen else captured.eager
    if ranked.name == MAIN:
        return source
    graph = captured.program.graph
    logits = graph.outputs.index(logits_of(graph))
    step = widened(Module.of(ranked.program)).main if sixteen else ranked.program

    def reference(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = list(map(wide, first_step(ranked.program, ids)))
        with torch.no_grad():
            _, *caches = evaluate_anywhere(step.graph, inputs, step.weights)
        return source(ids)[logits][:, -1:], *caches

    return reference


def _references(captured: Captured, ranked: Ranked, reference: Eager) -> Iterator[list[Reference]]:
    """The inputs of every rank, and the model's results for them. At other sizes than the
    example's, every second rank has one text more."""
    program, example, ranks = captured.program, captured.example, range(ranked.plan.devices)
    yield [(example, reference(*example))] * len(ranks)
    plans: list[Sequence[Mapping[str, int]]] = [[{}] for _ in range(_DRAWS)]
    plans += _other_sizes(captured, ranked)
    for number, plan in enumerate(plans):
        drawn = [
            drawn_and_run(
                program,
                at_sizes(program, example, plan[rank % len(plan)]),
                reference,
                DRAWS[(number + rank) % len(DRAWS)],
            )
            for rank in ranks
        ]
        accepted = [result for result in drawn if result is not None]
        if len(accepted) == len(ranks):
            yield accepted


def _other_sizes(captured: Captured, ranked: Ranked) -> Iterator[list[dict[str, int]]]:
    """Sizes, and the same with one text more, which all ranks can take."""
    graph = captured.program.graph
    texts = next((str(dim) for value in graph.inputs for dim in value.shape[:1]), "")
    for sizes in (least_sizes(graph), odd_sizes(graph)):
        more = {**sizes, texts: sizes[texts] + 1} if texts in sizes else sizes
        graphs = (ranked.of_rank(rank).graph for rank in range(ranked.plan.devices))
        yield [sizes, more] if all(allows(g.bounds, more) for g in (graph, *graphs)) else [sizes]


def _expected(
    reference: Eager, cases: Sequence[Case], *, joint: bool
) -> list[tuple[torch.Tensor, ...]]:
    """The results for the inputs of each rank, or `joint` ones, split into those of each."""
    if not joint:
        return [reference(*case) for case in cases]
    results = reference(*(torch.cat(tensors) for tensors in zip(*cases, strict=True)))
    texts = [len(case[0]) for case in cases]
    parts = (torch.split(t, [len(t) * count // sum(texts) for count in texts]) for t in results)
    return list(zip(*parts, strict=True))


def _limit_in_float32(captured: Captured) -> float:
    """The greatest error in float32 of a model of 16 bits, whose constants passes fold in 16."""
    folded = all_in_float32(
        captured.program, [with_states(captured.program, captured.example)], folded=True
    )[0]
    error = error_of(folded, exact_eager(captured)(*captured.example))
    return max(MEANING, FACTOR * error)


def _difference(
    ranked: Ranked,
    cases: Sequence[Case],
    results: Sequence[_Tensors],
    expected: Sequence[_Tensors],
    tolerance: float,
) -> str:
    """The first result that is too far from the one expected, or ""."""
    groups = groups_of_texts(ranked.plan)
    for rank, outputs in enumerate(results):
        values = ranked.of_rank(rank).graph.results
        for number, value in enumerate(values[: len(expected[rank])]):
            right = expected[rank][number]
            for part in groups.get(str(next(iter(value.shape), "")), ()):
                if rank in part:  # a cache with the heads of this rank, of all texts of the group
                    texts = torch.cat([expected[other][number] for other in part])
                    right = texts.chunk(len(part), 1)[part.index(rank)]
            error = distance(outputs[number], right)
            if not error <= tolerance or error == float("inf"):
                return (
                    f"rank {rank} computes another {value.name}: it differs from the model's by "
                    f"{error:.2e} of the greatest value, and at most {tolerance:.0e} is allowed "
                    f"(inputs {shapes(cases[rank])})"
                )
    return ""


def groups_of_texts(plan: Plan) -> dict[str, Parts]:
    """The groups of ranks that share heads, by the name of the size that counts their texts."""
    groups, degrees = groups_of(plan), {layer.attention for layer in plan.layers}
    return {tp_texts(degree): groups[tp_group(degree)] for degree in degrees if degree > 1}


def first_step(
    step: Program, ids: torch.Tensor, texts_of: Mapping[str, int] | None = None
) -> tuple[torch.Tensor, ...]:
    """Inputs of `decode` for token ids [B, S] without previous tokens, with empty caches: of B
    texts, or of those of all ranks that share the heads, `texts_of` the name of their size."""
    texts, tokens = ids.shape
    caches = [
        torch.zeros(
            [
                (texts_of or {}).get(str(value.shape[0]), texts),
                *(size if isinstance(size, int) else tokens for size in value.shape[1:]),
            ],
            dtype=TORCH_DTYPES[value.dtype],
        )
        for value in (state.before for state in step.graph.states)
    ]
    last = torch.full((texts,), tokens - 1)
    rows = torch.arange(texts) * tokens + last
    return ids, torch.zeros_like(last), rows[:, None], last, *caches
