"""Soft mixtures written as a loop that adds the output of each expert.

    for e, expert in enumerate(experts):
        y = y + combine[:, :, e] @ expert(dispatch[:, :, e].mT @ x)

The weights of one expert are a slice of the weights of all experts. With the axis that they are
sliced from, the sum is one product over all slots, as in `soft_mixture`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moec.errors import NoMatch
from moec.ir.graph import Op
from moec.ir.traits import VIEWS
from moec.passes.recognise.forms.branches.unrolled_experts import Family, family, read_branch
from moec.passes.recognise.forms.soft.mixture import ADD, adds_on, summed
from moec.passes.recognise.forms.soft.soft_weights import WeighedSum, weighed_sum
from moec.passes.recognise.reading.layout import size_of
from moec.passes.recognise.reading.opnames import REARRANGE
from moec.passes.recognise.region import Scope


@dataclass(frozen=True)
class Step:
    """The slots of one expert, and the values that it adds to the tokens."""

    dispatch: WeighedSum
    combine: WeighedSum


@dataclass(frozen=True)
class SoftLoop:
    """The last add of the loop, and its steps in the order of the experts."""

    op: Op
    steps: tuple[Step, ...]

    @property
    def dispatch(self) -> WeighedSum:
        """The weighted sum that computes the slots of all experts."""
        first = self.steps[0].dispatch
        weights = first.weights
        return replace(first, weights=replace(weights, free=(*weights.picked, *weights.free)))

    @property
    def combine(self) -> WeighedSum:
        """The sum over the slots of all experts."""
        first = self.steps[0].combine
        weights = first.weights
        every = replace(weights, summed=(*weights.picked, *weights.summed))
        return replace(first, op=self.op, weights=every, flipped=False)

    def experts(self, scope: Scope) -> Family:
        """The experts of all steps. Raises NoMatch unless they are of one kind, with one step per
        expert."""
        count = size_of(self.steps[0].combine.weights.picked)
        numbers = [(s.dispatch.weights.index, s.combine.weights.index) for s in self.steps]
        if numbers != [(number, number) for number in range(len(numbers))]:
            raise NoMatch(
                f"its steps weight the slots and the tokens of different experts: {numbers}"
            )
        if len(numbers) != count:
            raise NoMatch(f"it has {len(numbers)} steps, and weights of {count} experts")
        tokens = {scope.source_of(step.dispatch.values, VIEWS) for step in self.steps}
        if len(tokens) > 1:
            raise NoMatch("its steps read different tokens")
        branches = []
        for step in self.steps:
            between = scope.upstream([step.combine.values], step.dispatch.op.outputs)
            branches.append(read_branch(scope, step.combine.values, between))
        return family(scope, branches)


def soft_loops(scope: Scope) -> Iterator[SoftLoop]:
    """Sums of products whose weights are slices of a softmax; their slots are weighted by such
    slices too."""
    for op in scope.graph.ops:
        if op.name != ADD or adds_on(scope, op):
            continue
        steps = [
            _step(scope, scope.maker(scope.source_of(t.value, REARRANGE)))
            for t in summed(scope, op)
        ]
        alike = [step for step in steps if step is not None]
        if len(alike) > 1 and len(alike) == len(steps) and _of_one_softmax(alike):
            yield SoftLoop(op, tuple(sorted(alike, key=lambda s: s.combine.weights.index)))


def _step(scope: Scope, op: Op | None) -> Step | None:
    combine = None if op is None else weighed_sum(scope, op)
    if combine is None or not combine.weights.picked:
        return None
    for before in reversed(scope.upstream([combine.values])):
        dispatch = weighed_sum(scope, before)
        if dispatch is not None:
            return Step(dispatch, combine) if dispatch.weights.picked else None
    return None


def _of_one_softmax(steps: Sequence[Step]) -> bool:
    return len({(s.dispatch.weights.logits, s.combine.weights.logits) for s in steps}) == 1
