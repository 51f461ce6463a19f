"""The inputs on which a description is tested: of many sizes, and chosen to distinguish rules."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moec.capture.behaviour.proof.code_numbers import numbers_of_code
from moec.capture.behaviour.proof.draws import all_on, draws, near_threshold, ties
from moec.capture.behaviour.proof.probe import Probe
from moec.oracle.draws import Draw, tokens_of

SIZES = ((2, 12), (1, 1), (3, 29), (1, 7), (5, 3), (1, 200), (4, 64))
LENGTHS = (3, 9, 16, 17, 20, 33, 41, 255, 1000)
SMALL = range(1, 41)
"""Each is tried as the batch and as the length: a module may treat multiples of a number apart."""
SCALES = (1.0, 0.01, 20.0, 1000.0)
_SEEDS = 2
_FACTORS = 12
"""Of how many numbers of the code the products are taken."""
_EXACT_LENGTHS = (24, 4)
"""How many lengths to test at which the capacity is an integer before it is rounded, where a float
product may round to the wrong side: the first ones, and some of the rest. A double errs at twice a
length where it errs at the length, so that more of the long runs would show little else."""


@dataclass(frozen=True)
class BehaviourCase:
    """Tokens, and optionally logits that replace the router's; `size` is (batch, length)."""

    kind: str
    size: tuple[int, int]
    tokens: torch.Tensor
    logits: torch.Tensor | None = None
    scale: float = 1.0

    def __str__(self) -> str:
        return f"{self.size[0]} x {self.size[1]} tokens, {self.kind}"


def cases(probe: Probe) -> Iterator[BehaviourCase]:
    """Natural and steered routings of all kinds at small sizes, long inputs where every token
    chooses the same expert, and batches of many sizes."""
    generator = torch.Generator().manual_seed(11)
    for seed, size in itertools.product(range(_SEEDS), SIZES):
        for scale in SCALES:
            tokens = probe.tokens(*size, scale, seed)
            yield BehaviourCase(f"tokens times {scale:g}", size, tokens, scale=scale)
        yield from _equal_tokens(probe, size, seed)
        for kind, logits in _steered(probe, size[0] * size[1], generator).items():
            yield BehaviourCase(kind, size, probe.tokens(*size, seed=seed), logits)
    for length in (*(n for n in LENGTHS if n < probe.longest), probe.longest):
        tokens = probe.tokens(1, length, seed=_SEEDS)
        yield BehaviourCase("tokens times 1", (1, length), tokens)
        steered = _steered(probe, length, generator)
        for kind in ("usual logits", "equal logits"):
            if kind in steered:
                yield BehaviourCase(kind, (1, length), tokens, steered[kind])
    yield from _shapes(probe)
    for length in _exact_lengths(probe):
        logits = all_on(0, length, probe.columns, 5.0)
        tokens = probe.tokens(1, length, seed=_SEEDS)
        yield BehaviourCase("a length at which the capacity is whole", (1, length), tokens, logits)


def far_cases(probe: Probe) -> Iterator[BehaviourCase]:
    """Natural tokens at the lengths that the module's code may treat apart, at most sixteen times
    the longest run in all, and at the greatest length."""
    left = 16 * probe.longest
    numbers = numbers_of_code(probe.module, lambda: probe.run(probe.tokens(2, 12)))
    for size in _sizes_around(numbers, probe):
        rows = size[0] * size[1]
        if rows <= min(left, probe.farthest):
            left -= rows
            yield BehaviourCase("a number of its code", size, probe.tokens(*size, seed=_SEEDS))
    tokens = probe.tokens(1, probe.farthest, seed=_SEEDS)
    yield BehaviourCase("the most tokens", (1, probe.farthest), tokens)


def _sizes_around(numbers: Sequence[int], probe: Probe) -> Iterator[tuple[int, int]]:
    """Batches and lengths at which a number of elements, of choices or of tokens meets one of the
    numbers, or a product of two of them, or passes it."""
    flat = len(probe.arguments.shape) == 2
    divisors = (probe.width, probe.description.routing.top_k or 1, 1)
    rows = [number // divisor for divisor in divisors for number in numbers]
    rows += [a * b for a, b in itertools.combinations(numbers[:_FACTORS], 2)]
    for n in dict.fromkeys(n + more for n in rows for more in (0, 1)):
        if n > SMALL[-1]:
            yield from ((1, n), (n, 1))[: 1 if flat else 2]


def _shapes(probe: Probe) -> Iterator[BehaviourCase]:
    """Few tokens, as one text and as texts of one token; and many such texts."""
    flat = len(probe.arguments.shape) == 2
    batches = () if flat else (*SMALL, *(n for n in LENGTHS if n not in SMALL))
    for size in (*((1, n) for n in SMALL), *((n, 1) for n in batches if n < probe.longest)):
        yield BehaviourCase("tokens times 1", size, probe.tokens(*size, seed=_SEEDS))


def _equal_tokens(probe: Probe, size: tuple[int, int], seed: int) -> Iterator[BehaviourCase]:
    """Tokens that are all equal, of two kinds, or zero, so that their routing is tied or equal."""
    tokens = probe.tokens(*size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for kind, draw in _KINDS.items():
        yield BehaviourCase(kind, size, tokens_of(tokens, draw, generator))


_KINDS = {
    "tokens all alike": Draw("alike", 0),
    "tokens of two kinds": Draw("two", 0),
    "tokens of zeros": Draw("tied", 0),
}


def _steered(probe: Probe, rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Logits of every kind, by name; empty where the router cannot be steered."""
    rule, columns = probe.description.routing, probe.columns
    if not probe.weight_name:
        return {}
    kinds = draws(columns, rows, generator)
    kinds["tied"] = ties(columns, rows, generator)
    kinds["close"] = near_threshold(rule, columns, rows, generator)
    kinds["equal"] = all_on(rows % columns, rows, columns, 5.0)
    return {f"{kind} logits": logits for kind, logits in kinds.items()}


def _exact_lengths(probe: Probe) -> list[int]:
    """The lengths of `_EXACT_LENGTHS`, at which n * factor / C is an integer."""
    capacity = probe.description.capacity
    if capacity is None or not capacity.factor:
        return []
    step = (capacity.factor / probe.columns).denominator
    (least, few), lengths = _EXACT_LENGTHS, range(step, probe.longest, step)
    rest = lengths[least:]
    return [*lengths[:least], *rest[:: -(-len(rest) // few) or 1]]
