"""Plans as text: the reasons for a layer's degrees, and a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from moec.errors import SetupError
from moec.files.printable import columns
from moec.plan.plan import LayerPlan, Plan, degrees_of, layer_row
from moec.plan.search.planner import CostedDegrees


def explain(
    layer: LayerPlan, candidates: Sequence[CostedDegrees], limit: float, most: int = 8
) -> str:
    """The degrees considered for a layer, quickest first, and the costs of the chosen ones."""
    chosen = next(c for c in candidates if _is_same(c, layer))
    ranked = sorted(candidates, key=lambda c: (c.cost.seconds, c.cost.memory))
    at = ranked.index(chosen)
    shown = ranked[:most] if at < most else [*ranked[:most], chosen]
    rows = [("", "degrees", "ms", "GB", "of which ms")]
    for candidate in shown:
        parts = sorted(candidate.cost.parts.items(), key=lambda part: -part[1])
        rows.append(
            (
                ">" if candidate is chosen else "",
                _words(candidate),
                f"{candidate.cost.seconds * 1e3:.3f}",
                f"{candidate.cost.memory / 1e9:.2f}",
                ", ".join(f"{name} {value * 1e3:.3f}" for name, value in parts if value > 0),
            )
        )
    if at == 0:
        why = "It is the fastest of all."
    else:
        quicker = ranked[0]
        why = (
            f"{at} faster ones were not chosen: the fastest needs {quicker.cost.memory / 1e9:.2f} "
            f"GB of the {limit / 1e9:.1f} GB of all layers, or attention of another degree than "
            "its neighbours."
        )
    head = f"layer {layer.layer}: {len(candidates)} combinations of degrees considered. {why}"
    bound = (
        f"Busiest rank {layer.imbalance:.3f} of the mean; lower bound of any placement of these "
        "copies:"
    )
    tail = [f"{bound} {layer.bound:.3f}."] if layer.experts else []
    return "\n".join(line.rstrip() for line in [head, "", *columns(rows), *tail]) + "\n"


def _is_same(candidate: CostedDegrees, layer: LayerPlan) -> bool:
    degrees = candidate.degrees
    if not layer.experts:
        return degrees.attention == layer.attention
    return (
        degrees.attention, degrees.experts, degrees.slices, degrees.slots, degrees.form
    ) == (
        layer.attention, layer.ranks, layer.slices, sum(map(len, layer.slots)), layer.form
    )  # fmt: skip


def _words(candidate: CostedDegrees) -> str:
    degrees = candidate.degrees
    if not degrees.slots:
        return f"TP {degrees.attention}"
    slices = f" slice {degrees.slices}" if degrees.slices > 1 else ""
    return (
        f"TP {degrees.attention}, EP {degrees.experts}{slices}, {degrees.slots} slots, "
        f"{degrees.form}"
    )


def compare(one: Plan, two: Plan, names: tuple[str, str]) -> str:
    """Two plans of one model side by side: totals, and the layers whose degrees differ. Raises
    UsageError for plans of models with other numbers of experts."""
    if [layer.experts for layer in one.layers] != [layer.experts for layer in two.layers]:
        raise SetupError(
            f"{names[1]} is a plan of {two.model}, whose layers or experts are not those of "
            f"{one.model}: compare plans of one model"
        )
    rows = [("", *names)]
    rows.append(("cluster", one.cluster, two.cluster))
    rows.append(("step, ms", f"{one.seconds * 1e3:.3f}", f"{two.seconds * 1e3:.3f}"))
    rows.append(("GB a device", f"{one.memory / 1e9:.1f}", f"{two.memory / 1e9:.1f}"))
    for a, b in zip(one.layers, two.layers, strict=True):
        if degrees_of(a) != degrees_of(b):
            first, second = layer_row([a]), layer_row([b])
            rows.append(
                (
                    f"layer {a.layer}",
                    ", ".join(cell for cell in first[1:5] if cell != "-"),
                    ", ".join(cell for cell in second[1:5] if cell != "-"),
                )
            )
    return "\n".join(line.rstrip() for line in columns(rows)) + "\n"
