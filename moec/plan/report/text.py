"""A plan as text: a table of layers, the reasons for a layer's degrees, and a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from moec.errors import UsageError
from moec.plan.plan import LayerPlan, Plan
from moec.plan.search.planner import CostedDegrees

_HEAD = (
    "layers", "attention", "experts", "exchange", "slots", "busiest/mean", "bound",
    "exchange ms", "experts ms", "layer ms",
)  # fmt: skip

_OVERLAP = {
    False: "shared experts run while rows travel",
    True: "rows of one micro-batch travel during the products of the other",
}


def show(plan: Plan) -> str:
    """The plan as a table, with the numbers on which it is based."""
    per_step = plan.workload.tokens / plan.seconds if plan.seconds else 0.0
    lines = [
        f"{plan.model} on {plan.cluster}: {plan.devices} devices",
        f"{plan.workload.phase}: {plan.workload.tokens} tokens a step, "
        f"{plan.workload.sequences} sequences of {plan.workload.context} tokens; "
        f"routing: {plan.routing}",
        "",
        *columns([_HEAD, *(_row(group) for group in _groups(plan.layers))]),
        "",
        f"step {plan.seconds * 1e3:.2f} ms, {per_step:,.0f} tokens/s; "
        f"{plan.memory / 1e9:.1f} of {plan.memory_limit / 1e9:.1f} GB a device (predicted)",
        *_latency(plan),
        *_sends(plan),
        *_bound(plan.layers),
        "",
        "Numbers used:",
        *columns([(n.name, f"{n.value:.4g}", n.source, n.note) for n in plan.numbers]),
        f"All times are predicted from these; {_OVERLAP[plan.workload.overlap]} (assumed).",
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _latency(plan: Plan) -> list[str]:
    target = plan.workload.latency
    if target is None:
        return []
    word = "within" if plan.seconds <= target.value else "BEYOND"
    return [f"{word} the target of {target.value * 1e3:.2f} ms a step"]


def _sends(plan: Plan) -> list[str]:
    """To how many nodes and ranks a row goes, if the plan is of a trace."""
    sends = [layer.sends for layer in plan.layers if layer.sends]
    if not sends:
        return []
    nodes, nodes_by_load = _mean(s.nodes for s in sends), _mean(s.nodes_by_load for s in sends)
    ranks, ranks_by_load = _mean(s.ranks for s in sends), _mean(s.ranks_by_load for s in sends)
    targets = f"{ranks:.2f} other ranks ({ranks_by_load:.2f})"
    if plan.devices > plan.node_size:
        targets = f"{nodes:.2f} other nodes ({nodes_by_load:.2f}) and {targets}"
    return [
        f"sent once to each, a row goes to {targets}; in brackets with experts placed by load",
        "alone (counted on the trace, mean of the layers)",
    ]


def _bound(layers: Sequence[LayerPlan]) -> list[str]:
    """The ranks of each group of experts."""
    bound: dict[str, list[int]] = {}
    for layer in layers:
        parts = [
            f"{name} rank{'s' if last > first else ''} {_ranges(range(first, last + 1))}"
            for name, (first, last) in layer.groups.items()
        ]
        if parts:
            bound.setdefault(", ".join(parts), []).append(layer.layer)
    return [f"experts of layers {_ranges(numbers)}: {parts}" for parts, numbers in bound.items()]


def _groups(layers: Sequence[LayerPlan]) -> list[list[LayerPlan]]:
    """Layers of equal degrees, in the order of the first of each."""
    groups: dict[tuple[object, ...], list[LayerPlan]] = {}
    for layer in layers:
        groups.setdefault(_degrees(layer), []).append(layer)
    return list(groups.values())


def _ranges(numbers: Sequence[int]) -> str:
    """ "3-5,9" for 3, 4, 5 and 9; long lists end in how many more there are."""
    parts = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        values = [number for _, number in run]
        parts.append(str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}")
    if len(parts) <= 4:
        return ",".join(parts)
    return f"{len(numbers)} layers: {','.join(parts[:3])}…"


def _degrees(layer: LayerPlan) -> tuple[object, ...]:
    slots = sum(map(len, layer.slots))
    return (
        layer.experts, layer.attention, layer.ranks, layer.slices, layer.copies, layer.form, slots
    )  # fmt: skip


def _row(group: Sequence[LayerPlan]) -> tuple[str, ...]:
    one = group[0]
    name = _ranges([layer.layer for layer in group])
    total = f"{_mean(layer.total for layer in group) * 1e3:.3f}"
    if not one.experts:
        return (name, f"TP {one.attention}", "dense", *["-"] * 6, total)
    experts = f"EP {one.ranks}"
    experts += f" x slice {one.slices}" if one.slices > 1 else ""
    experts += f" x DP {one.copies}" if one.copies > 1 else ""
    parts = ("exchange out", "exchange back")
    moved = _mean(sum(layer.seconds.get(part, 0.0) for part in parts) for layer in group)
    return (
        name,
        f"TP {one.attention}",
        experts,
        one.form,
        f"{sum(map(len, one.slots))} of {one.experts}",
        f"{max(layer.imbalance for layer in group):.3f}",
        f"{max(layer.bound for layer in group):.3f}",
        f"{moved * 1e3:.3f}",
        f"{_mean(layer.seconds.get('experts', 0.0) for layer in group) * 1e3:.3f}",
        total,
    )


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


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
        raise UsageError(
            f"{names[1]} is a plan of {two.model}, whose layers or experts are not those of "
            f"{one.model}: compare plans of one model"
        )
    rows = [("", *names)]
    rows.append(("cluster", one.cluster, two.cluster))
    rows.append(("step, ms", f"{one.seconds * 1e3:.3f}", f"{two.seconds * 1e3:.3f}"))
    rows.append(("GB a device", f"{one.memory / 1e9:.1f}", f"{two.memory / 1e9:.1f}"))
    for a, b in zip(one.layers, two.layers, strict=True):
        if _degrees(a) != _degrees(b):
            first, second = _row([a]), _row([b])
            rows.append(
                (
                    f"layer {a.layer}",
                    ", ".join(cell for cell in first[1:5] if cell != "-"),
                    ", ".join(cell for cell in second[1:5] if cell != "-"),
                )
            )
    return "\n".join(line.rstrip() for line in columns(rows)) + "\n"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
