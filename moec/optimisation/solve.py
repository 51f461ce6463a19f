"""The cheapest or the least damaging choice of one option for each product: a multiple-choice
knapsack, solved as a mixed-integer linear program by HiGHS (scipy)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moec.optimisation.sensitivity import Option, StoredProduct

SECONDS = 30.0
GAP = 1e-4


@dataclass(frozen=True)
class FormatChoice:
    """One option of each product. `gap` is the greatest relative distance from the optimum."""

    options: tuple[Option, ...]
    gap: float

    @property
    def bytes(self) -> int:
        return sum(option.bytes for option in self.options)

    @property
    def damage(self) -> float:
        return sum(option.damage for option in self.options)


def least_damage(products: Sequence[StoredProduct], room: int) -> FormatChoice | None:
    """The choice of at most `room` bytes with the least predicted damage; None if none fits."""
    return _solve(products, minimised="damage", limited="bytes", limit=float(room))


def fewest_bytes(products: Sequence[StoredProduct], damage: float) -> FormatChoice | None:
    """The choice with at most that predicted damage that has the fewest bytes."""
    return _solve(products, minimised="bytes", limited="damage", limit=damage)


def _solve(
    products: Sequence[StoredProduct], *, minimised: str, limited: str, limit: float
) -> FormatChoice | None:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    options = [option for product in products for option in product.options]
    if not options:
        return FormatChoice((), 0.0)
    cost = np.array([getattr(option, minimised) for option in options], float)
    load = np.array([getattr(option, limited) for option in options], float)
    # HiGHS works to absolute tolerances, so that both are scaled to at most 1.
    cost /= cost.max() or 1.0
    scale = max(limit, 1e-300)
    possible = load <= limit
    load = np.where(possible, load / scale, 0)
    counts = [len(product.options) for product in products]
    rows = np.repeat(np.arange(len(products)), counts)
    one_each = csr_array((np.ones(len(options)), (rows, np.arange(len(options)))))
    result = milp(
        cost,
        integrality=np.ones(len(options)),
        bounds=Bounds(0, possible.astype(float)),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(load[None], -np.inf, 1),
        ],
        options={"time_limit": SECONDS, "mip_rel_gap": GAP},
    )
    if result.x is None:
        return None
    chosen = np.flatnonzero(result.x > 0.5)
    return FormatChoice(tuple(options[n] for n in chosen), float(result.mip_gap or 0.0))
