"""What a recorded routing shows: balance, experts that nobody chose, drift, co-activation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.plan.importers import ImportedRouting
from moec.plan.popularity import normalised
from moec.runtime.routing_trace import RoutingTrace


@dataclass(frozen=True)
class LayerBalance:
    """`busiest` is the most chosen expert's share over the mean, `entropy` of the shares over that
    of equal ones; `drift` half the sum of differences between the shares of the first and of the
    second half of the tokens (0 to 1), `pairs` how much more often than by chance the most frequent
    pair of experts meets in a token. The last two need a trace."""

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
    """One entry a layer."""
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


def coactivation(trace: RoutingTrace, layer: int) -> NDArray[np.int64]:
    """[E, E]: in how many tokens two experts were chosen together; the diagonal: each by itself."""
    experts = int(trace.experts[layer])
    chosen = np.zeros((trace.tokens, experts + 1), np.float32)
    np.put_along_axis(chosen, trace.ids[:, layer].astype(np.int64) % (experts + 1), 1, axis=1)
    chosen = chosen[:, :experts]
    return (chosen.T @ chosen).round().astype(np.int64)


def strongest_pair(meets: NDArray[np.int64]) -> tuple[tuple[int, int] | None, float | None]:
    """The pair that meets most often, and how many times as often as if choices were independent
    (tokens are not fewer than the most chosen expert's)."""
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
    """Sum of products over all pairs of different experts."""
    return float((alone.sum() ** 2 - (alone**2).sum()) / 2)
