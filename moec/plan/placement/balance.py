"""Statistics of recorded routing: balance, unused experts, drift, co-activation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.plan.inputs.importers import ImportedRouting
from moec.plan.inputs.workload import normalised
from moec.plan.placement.coactivation import coactivation
from moec.runtime.call.routing_trace import RoutingTrace


@dataclass(frozen=True)
class LayerBalance:
    """Statistics of one layer. The last three need a trace.

    `busiest` is the share of the most chosen expert over the mean share; `entropy` is the entropy
    of the shares over that of equal shares; `unused` counts experts that were never chosen. `drift`
    is half the sum of differences between the shares in the first and the second half of the tokens
    (0 to 1). `pair` are the two experts that are most often chosen for one token, and `lift` how
    many times more often than by chance.
    """

    layer: int
    experts: int
    busiest: float
    entropy: float
    unused: int
    drift: float | None = None
    pair: tuple[int, int] | None = None
    lift: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def balance(routing: ImportedRouting) -> list[LayerBalance]:
    """One entry per layer."""
    return [_balance(layer, count, routing.trace) for layer, count in enumerate(routing.counts)]


def _balance(layer: int, count: NDArray[np.float64], trace: RoutingTrace | None) -> LayerBalance:
    shares = normalised(count)
    positive = shares[shares > 0]
    experts = len(shares)
    entropy = -float((positive * np.log(positive)).sum()) / np.log(experts) if experts > 1 else 1.0
    plain = LayerBalance(
        layer, experts, float(shares.max()) * experts, float(entropy), int((count == 0).sum())
    )
    if trace is None or trace.tokens < 2:
        return plain
    pair, lift = strongest_pair(coactivation(trace, layer))
    first, second = (normalised(half.counts()[layer].astype(float)) for half in trace.halves())
    drift = float(np.abs(first - second).sum()) / 2
    return LayerBalance(
        plain.layer, experts, plain.busiest, plain.entropy, plain.unused, drift, pair, lift
    )


def strongest_pair(meets: NDArray[np.int64]) -> tuple[tuple[int, int] | None, float | None]:
    """The pair that is most often chosen together, and how many times as often as by independent
    choices (with the same number of pairs in total)."""
    experts = len(meets)
    off = np.triu(meets, 1)
    if experts < 2 or off.max() == 0:
        return None, None
    one, two = divmod(int(off.argmax()), experts)
    alone = np.diag(meets).astype(float)
    pairs = off.sum()
    expected = alone[one] * alone[two] / _pair_norm(alone) * pairs
    return (one, two), float(off[one, two] / expected)


def _pair_norm(alone: NDArray[np.float64]) -> float:
    """The sum of products over all pairs of different experts."""
    return float((alone.sum() ** 2 - (alone**2).sum()) / 2)
