"""Loss against bytes: the best choices for several memories, and one format for all products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moec.optimise.optimisation.search import ChoiceSearch
from moec.optimise.optimisation.sensitivity import damage_of
from moec.passes.approximate.choices.model_choices import UNCHANGED

ROOMS = 6
CHOSEN = "chosen"


@dataclass(frozen=True)
class ParetoPoint:
    """A measured choice, with codes rounded to nearest: "chosen", or the format of all products."""

    choice: str
    bytes: int
    token_bytes: int
    damage: float


def pareto_points(search: ChoiceSearch) -> list[ParetoPoint]:
    """Those for ROOMS memories between the smallest and that of the weights as they are."""
    formats = dict.fromkeys(
        o.format for p in search.products for o in p.options if o.format != UNCHANGED
    )
    picks = [(format, in_one_format(search, format).solve("bytes")) for format in formats]
    least, most = search.solve("bytes"), sum(p.options[0].bytes for p in search.products)
    assert least is not None, "nothing is limited"
    for n in range(ROOMS):
        room = least.bytes + (most - least.bytes) * n // ROOMS
        picks.append((CHOSEN, search.solve("damage", bytes=room)))
    points = []
    with search.compiled.source.memory.reading():
        for name, pick in picks:
            if pick is not None:
                damage = damage_of(search.measured(pick).distance)
                sizes = (search.rest + pick.bytes, search.token_rest + pick.token_bytes)
                points.append(ParetoPoint(name, *sizes, damage))
    return points


def in_one_format(search: ChoiceSearch, format: str) -> ChoiceSearch:
    """Nothing else to choose for the products that the format fits, nor for others and layers."""
    options = [[o for o in p.options if o.format == format] for p in search.products]
    each = zip(search.products, options, strict=True)
    products = tuple(
        replace(p, options=tuple(fitting) or p.options[:1], experts=()) for p, fitting in each
    )
    layers = {name: settings[:1] for name, settings in search.layers.items()}
    return replace(search, products=products, layers=layers)


def draw_points(points: Sequence[ParetoPoint], metric: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis = figure.subplots()
    chosen = sorted((p.bytes / 1e6, p.damage) for p in points if p.choice == CHOSEN and p.damage)
    axis.plot([x for x, _ in chosen], [y for _, y in chosen], "o-", color="#0b6e4f", label=CHOSEN)
    for point in (p for p in points if p.choice != CHOSEN):
        axis.plot(point.bytes / 1e6, point.damage, "s", color="#b23a48")
        axis.annotate(f" all {point.choice}", (point.bytes / 1e6, point.damage), fontsize=8)
    axis.set(xlabel="MB of weights", ylabel=f"{metric}, measured", yscale="log")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)
