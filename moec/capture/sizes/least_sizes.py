"""The least sizes, 0, 1 or 2, from which a captured graph and its module agree.

torch takes it that no size is 0 or 1. It is silent about a branch on 0 (`if tokens:`), and in
`max(tokens, 1)` it sees the tokens alone; at 1 the module may take another branch, of which there
may be no guard.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moec.capture.calls.trials import Undone
from moec.capture.sizes.false_sizes import can_run
from moec.capture.sizes.guards import Guard
from moec.ir.graph import Program
from moec.ir.interpret.outputs import VaryingOutput
from moec.ir.sizes.dims import Bounds
from moec.ir.sizes.thresholds import allows, truth_of
from moec.oracle.agree import agree, agree_at_sizes, at_sizes, sizes_of
from moec.oracle.cases import Eager

_OTHERS = (2, 3, 5, 37, 257)


@dataclass(frozen=True)
class LeastSizes:
    """Compares a program with its module at sizes of 0 and 1, in the first of `examples` that the
    module runs at them. `guards` are those of the program."""

    program: Program
    eager: Eager
    examples: Sequence[Sequence[torch.Tensor]]
    guards: Sequence[Guard]

    def bounded(self, fixed: Collection[str]) -> Program:
        """The program with a lower bound of 1 or 2 for each size at which graph and module differ
        at 0 or at 1, and of at most 1 for each at which they agree at 1.

        Sizes in `fixed`, whose bounds the user set, are not tried at 1, and a size at which the
        module does not run with 1 keeps its bound. Each size is tried at 1 alone and together with
        the sizes lowered before it, and at 0 alone; at the end all are tried at 1 together.
        """
        graph = self.program.graph
        bounds = dict(graph.bounds)
        lowered: frozenset[str] = frozenset()
        for name in filter(str.isidentifier, graph.bounds):
            if bounds[name].low <= 2 and name not in fixed:
                tried = dict.fromkeys((frozenset({name}), lowered | {name}))
                answers = [self._agree_at_one(names) for names in tried]
                if all(answers):
                    bounds[name] = replace(bounds[name], low=min(bounds[name].low, 1))
                    lowered |= {name}
                elif False in answers:
                    bounds[name] = Bounds(2, bounds[name].high)
            if not bounds[name].low:
                bounds[name] = self._bounded_at_zero(name, bounds[name])
        # The module may refuse a size of 1 until that of another input is 1 too.
        together = {n for n in bounds if n.isidentifier() and bounds[n].low <= 1} - {*fixed}
        if together - lowered and self._agree_at_one(together) is False:
            for name in together - lowered:
                bounds[name] = Bounds(2, bounds[name].high)
        return replace(self.program, graph=replace(graph, bounds=bounds))

    def _agree_at_one(self, names: Collection[str]) -> bool | None:
        """Whether graph and module agree where these sizes are 1. If a guard changes there, also
        with small and large other sizes: `if n > 1 or length > 4` shows nothing of the length where
        n is above 1."""
        ones = self._allowed(dict.fromkeys(names, 1))
        if ones is None:
            return True
        for example in self.examples:
            at_one = at_sizes(self.program, example, ones)
            answer = agree_at_sizes(self.program, self.eager, example, ones)
            if answer is not None:
                break
        if not answer or not any(self._false_at(name, 1) for name in names):
            return answer
        others = [name for name in self.program.graph.bounds if name.isidentifier()]
        longer = ({name: size} for name in others if name not in names for size in _OTHERS)
        here = sizes_of(self.program, at_one)
        tried = (s for s in longer if self._allow(names, {**ones, **s}) and can_run({**here, **s}))
        resized = (at_sizes(self.program, at_one, sizes) for sizes in tried)
        return all(agree(self.program, self.eager, case) is not False for case in resized)

    def _allowed(self, sizes: dict[str, int]) -> dict[str, int] | None:
        """These sizes, or with another one that is longer, as limits of products allow."""
        names = sizes_of(self.program, self.examples[0]).keys() - sizes.keys()
        longer = ({**sizes, name: size} for name in sorted(names) for size in _OTHERS)
        return next((each for each in (sizes, *longer) if self._allow(sizes, each)), None)

    def _allow(self, names: Collection[str], sizes: Mapping[str, int]) -> bool:
        """Whether the limits of other sizes than `names`, and of expressions, allow these sizes."""
        limits = {**self.program.graph.bounds} | dict.fromkeys(names, Bounds())
        return allows(limits, {**sizes_of(self.program, self.examples[0]), **sizes})

    def _false_at(self, name: str, size: int) -> Guard | None:
        """A guard that does not hold where this one size is another than in the export."""
        sizes: Mapping[str, int] = {**sizes_of(self.program, self.examples[0]), name: size}
        guards = (g for g in self.guards if name in g.names and g.names <= sizes.keys())
        return next((g for g in guards if not truth_of(g.condition).holds(sizes)), None)

    def _bounded_at_zero(self, name: str, limits: Bounds) -> Bounds:
        guard = self._false_at(name, 0)
        for example in self.examples:
            answer = self._agree_at_zero(at_sizes(self.program, example, {name: 0}))
            if answer is not None:
                break
        if answer is False or (answer is None and guard is not None):
            line = str(guard) if guard is not None and guard.file else limits.line
            return replace(limits, low=1, line=line)
        return limits

    def _agree_at_zero(self, tensors: Sequence[torch.Tensor]) -> bool | None:
        """Whether graph and module agree where a size is 0. An operator of torch that fails there
        (None) has no other result; where Python's arithmetic fails, the graph has one."""
        try:
            with Undone():  # it refuses what torch does not check
                self.eager(*tensors)
        except (VaryingOutput, ArithmeticError, ValueError):
            return False
        except Exception:  # whatever the module raises
            return None
        return agree(self.program, self.eager, tensors)
