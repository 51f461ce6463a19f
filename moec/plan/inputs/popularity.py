"""How often each expert of each layer is chosen: from counts, or drawn from a distribution."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moec.errors import UsageError

Loads = NDArray[np.float64]
_FORM = re.compile(r"(uniform|zipf|lognormal)(?::(\d+(?:\.\d+)?))?(?::(\d+))?")


def of_distribution(text: str, experts: Sequence[int]) -> tuple[Loads, ...]:
    """Loads [E_l] of each layer, summing to 1: "uniform", "zipf:EXPONENT[:SEED]" or
    "lognormal:SIGMA[:SEED]", in a random order for each layer.

    Raises UsageError for any other text, and for a parameter above 20.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise UsageError(
            f"{text} is not a distribution: write uniform, zipf:1.01 or lognormal:1.0, then :SEED"
        )
    kind, parameter, seed = match[1], float(match[2] or 1.0), int(match[3] or 0)
    if parameter > 20:
        raise UsageError(f"{text}: write a parameter of at most 20; 1 is a usual skew")
    generator = np.random.default_rng(seed)
    loads = []
    for count in experts:
        match kind:
            case "uniform":
                load = np.ones(count)
            case "zipf":
                load = generator.permutation(np.arange(1, count + 1) ** -parameter)
            case _:
                load = generator.lognormal(0.0, parameter, count)
        loads.append(normalised(load))
    return tuple(loads)


def normalised(load: Loads) -> Loads:
    """Shares that sum to 1; equal shares where the sum is 0."""
    total = float(load.sum())
    return load / total if total > 0 else np.full(len(load), 1 / max(1, len(load)))
