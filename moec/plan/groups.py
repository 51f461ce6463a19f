"""The ranks of each group of a layer's exchange: partitions of 0..p-1 by name.

Rank = (copy * EP + expert rank) * slices + slice. A node holds consecutive ranks.
"""

from __future__ import annotations

from moec.errors import UsageError
from moec.plan.network.exchange import STAGED
from moec.plan.plan import LayerPlan, Plan

Parts = tuple[tuple[int, ...], ...]

WORLD = "world"


def suffix(layer: LayerPlan) -> str:
    """The suffix that distinguishes the groups of layers with different degrees."""
    return f"{layer.ranks}x{layer.slices}"


def tp_group(degree: int) -> str:
    """The name of the group of ranks that share the heads of an attention."""
    return f"tp.{degree}"


def tp_texts(degree: int) -> str:
    """The name of the size that counts the texts of all ranks of such a group."""
    return f"tp{degree}_texts"


def near(layer: LayerPlan, node_size: int) -> int:
    """The number of ranks of equal slice of an expert group that share a node.

    Raises UsageError where a staged exchange cannot divide the group by nodes.
    """
    ranks = min(layer.ranks, max(1, node_size // layer.slices))
    if layer.form in STAGED and layer.ranks % ranks:
        raise UsageError(
            f"layer {layer.layer}: {layer.ranks} ranks do not fill nodes of {ranks} for a "
            f"{layer.form} exchange; plan it with a flat exchange"
        )
    return ranks


def groups_of(plan: Plan) -> dict[str, Parts]:
    """All groups that the layers of a plan name: `ep` (equal slice), `slice`, and the `node` and
    `rail` parts of an `ep` group; `tp` of each attention degree; and the group of all ranks."""
    result: dict[str, Parts] = {WORLD: (tuple(range(plan.devices)),)}
    for layer in plan.layers:
        if layer.attention > 1:
            starts = range(0, plan.devices, layer.attention)
            parts = tuple(tuple(range(s, s + layer.attention)) for s in starts)
            result[tp_group(layer.attention)] = parts
        if not layer.experts:
            continue
        name = suffix(layer)
        ep, by_slice = _ep(layer, plan.devices), _slices(layer, plan.devices)
        result |= {f"ep.{name}": ep, f"slice.{name}": by_slice}
        if layer.form in STAGED:
            g = near(layer, plan.node_size)
            result[f"node.{name}"] = tuple(
                part[start : start + g] for part in ep for start in range(0, layer.ranks, g)
            )
            result[f"rail.{name}"] = tuple(part[local::g] for part in ep for local in range(g))
    return result


def _ep(layer: LayerPlan, devices: int) -> Parts:
    span = layer.ranks * layer.slices
    return tuple(
        tuple(range(base + part, base + span, layer.slices))
        for base in range(0, devices, span)
        for part in range(layer.slices)
    )


def _slices(layer: LayerPlan, devices: int) -> Parts:
    size = layer.slices
    return tuple(tuple(range(base, base + size)) for base in range(0, devices, size))
