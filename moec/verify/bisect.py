"""Finds the rewrite that changed the numbers, by running passes with less and less fuel.

Graphs are compared in eager PyTorch with bf16 and f16 widened to float32, so that a difference
comes from the rewrite and not from rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from moec.capture import Captured
from moec.errors import InputError
from moec.ir.graph import Program, stage_of
from moec.ir.interpret.run_in_float32 import MEANING, in_float32
from moec.oracle.agree import with_states
from moec.oracle.cases import cases
from moec.oracle.draws import Draw
from moec.oracle.tolerance import distance
from moec.passes.core.runner import Pass, run
from moec.pipeline import from_stage

Inputs = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Culprit:
    """The first rewrite after which the results differ. `rewrite` counts from 1 in the pass."""

    pass_name: str
    rewrite: int
    of: int
    what: str
    before: float
    after: float


@dataclass(frozen=True)
class Bisection:
    """`errors` has the error after each pass, up to the first that exceeds `tolerance`."""

    tolerance: float
    rewrites: int
    errors: tuple[tuple[str, float], ...]
    culprit: Culprit | None = None

    def __str__(self) -> str:
        if self.culprit is None:
            worst = max((error for _, error in self.errors), default=0.0)
            return (
                f"{self.rewrites} rewrites in {len(self.errors)} passes, and none changes the "
                f"numbers: the greatest error is {worst:.1e}, allowed up to {self.tolerance:.0e}"
            )
        c = self.culprit
        which = f"{c.rewrite} of {c.of}, {c.what}" if c.of else "the pass as a whole"
        return (
            "The first rewrite that changes the numbers:\n"
            f"  pass     {c.pass_name}\n"
            f"  rewrite  {which}\n"
            f"  error    {c.before:.1e} before, {c.after:.1e} after "
            f"(allowed {self.tolerance:.0e})\n"
            f"Leave the pass out with --passes -{c.pass_name}, and report it."
        )


def drawn_cases(captured: Captured, seed: int) -> list[list[torch.Tensor]]:
    """Inputs of a captured graph, with the contents of its states last: draws that the module
    accepts. Raises InputError where there are no example inputs."""
    program, example = captured.program, captured.example
    if not example and program.graph.inputs:
        raise InputError(
            "the model was captured without example inputs: give example inputs to bisect it"
        )
    draws = (Draw("random", seed), Draw("large", seed + 1))
    accepted = cases(program, example, captured.eager, draws)
    return [with_states(program, case) for case, _ in accepted]


def bisect(
    program: Program,
    passes: Sequence[Pass],
    inputs: Sequence[Inputs],
    *,
    tolerance: float = MEANING,
    progress: Callable[[str], None] = lambda phase: None,
) -> Bisection:
    """The first rewrite of `passes` after which some case differs by more than `tolerance`.

    `inputs` are those of the program's graph (with the states' contents last). The search halves
    the rewrites of the first pass that breaks, until the results are right before a rewrite and
    wrong after it.
    """
    expected = list(map(in_float32(program), inputs))
    stage = stage_of(program.graph)
    passes = from_stage(passes, stage)

    def error(candidate: Program) -> float:
        widened = in_float32(candidate)
        return max(
            (
                distance(actual, reference)
                for case, results in zip(inputs, expected, strict=True)
                for actual, reference in zip(widened(case), results, strict=True)
            ),
            default=0.0,
        )

    pass_results = run(program, passes, stage=stage)
    rewrites = sum(pass_result.rewrites for pass_result in pass_results)
    errors: list[tuple[str, float]] = []
    before, spent = 0.0, 0
    for index, (last, pass_result) in enumerate(pairwise(pass_results)):
        progress(f"compare after {pass_result.name}")
        after = before if pass_result.program is last.program else error(pass_result.program)
        errors.append((pass_result.name, after))
        if not after <= tolerance:
            low, high = spent, spent + pass_result.rewrites  # fuel: right with low, wrong with high
            what = pass_result.last
            while high - low > 1:
                middle = (low + high) // 2
                progress(f"halve {pass_result.name}, {high - low} rewrites left")
                candidate = run(program, passes[: index + 1], stage=stage, fuel=middle)[-1]
                candidate_error = error(candidate.program)
                if candidate_error <= tolerance:
                    low, before = middle, candidate_error
                else:
                    high, after, what = middle, candidate_error, candidate.last
            culprit = Culprit(
                pass_result.name, high - spent, pass_result.rewrites, what, before, after
            )
            return Bisection(tolerance, rewrites, tuple(errors), culprit)
        before, spent = after, spent + pass_result.rewrites
    return Bisection(tolerance, rewrites, tuple(errors))
