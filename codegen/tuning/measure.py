"""Measures the seconds of a kernel with several tunings, in turn on the same rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count

from tvm.tirx import PrimFunc

from moec.codegen.build import compile_kernels
from moec.codegen.tuning.arguments import BenchArguments, arguments
from moec.codegen.tuning.tunable import Tunable, Values
from moec.target.cpu import CpuTarget

TOKENS = (1, 8, 64, 512)
SECONDS = 0.3  # the time for all calls of one number of tokens, within the limits of rounds
FEWEST, MOST = 7, 31  # rounds

Times = Mapping[int, Sequence[Sequence[float]]]
"""For each number of tokens and each tuning, the seconds of each round. All calls of a round had
the same rows and the same routing, one after the other."""

Bench = Callable[[Sequence[Values]], Times]
Measure = Callable[[Tunable], Bench]
"""Times one kernel with the given tunings; may be called repeatedly."""


@dataclass(frozen=True)
class OnThisMachine:
    """A `Measure` that runs kernels on this machine. For `footprint` and errors, see
    `arguments`."""

    target: CpuTarget
    footprint: int
    opt_level: int = 2
    clock: Callable[[], float] = time.perf_counter

    def __call__(self, kernel: Tunable) -> Bench:
        operands = arguments(kernel, kernel.make("measured", {}), self.footprint)

        @cache
        def function(values: frozenset[tuple[str, int]]) -> Callable[..., None]:
            return self._compiled(kernel.make("measured", dict(values)))

        def bench(tunings: Sequence[Values]) -> Times:
            functions = [function(frozenset(values.items())) for values in tunings]
            return {tokens: self._rounds(functions, operands, tokens) for tokens in TOKENS}

        return bench

    def _rounds(
        self, functions: Sequence[Callable[..., None]], operands: BenchArguments, tokens: int
    ) -> list[list[float]]:
        copies = count()

        def once(function: Callable[..., None], call: Callable[[int], list[object]]) -> float:
            values = call(next(copies))
            start = self.clock()
            function(*values)
            return self.clock() - start

        call = operands.draw(tokens)
        elapsed = sum(once(function, call) for function in functions)  # first calls are not counted
        seconds: list[list[float]] = [[] for _ in functions]
        for turn in range(max(FEWEST, min(MOST, int(SECONDS / max(elapsed, 1e-6))))):
            call = operands.draw(tokens)
            for i in _rotated(len(functions), turn):
                seconds[i].append(once(functions[i], call))
        return seconds

    def _compiled(self, kernel: PrimFunc) -> Callable[..., None]:
        library = compile_kernels(kernel, target=self.target, opt_level=self.opt_level)
        function: Callable[..., None] = library[str(kernel.attrs["global_symbol"])]
        return function


def _rotated(count: int, turn: int) -> list[int]:
    """The order of `count` items in a round, so that each is first in some rounds."""
    return [(i + turn) % count for i in range(count)]
