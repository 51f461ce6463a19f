"""The placement of DeepSeek's expert-parallel load balancer (EPLB), for comparison and export.

Groups of experts are assigned to nodes, hot experts get copies inside their node, and copies are
assigned to devices, always with equal numbers of slots. Where the number of groups is no multiple
of that of nodes, there is one group and one node.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from moec.errors import UsageError

Ids = NDArray[np.int64]


def rebalance(loads: NDArray[np.float64], slots: int, groups: int, nodes: int, ranks: int) -> Ids:
    """physical_to_logical_map [L, slots] for loads [L, E]; slot q is on rank q // (slots/ranks).

    Raises UsageError where slots do not divide by ranks or ranks by nodes.
    """
    if slots % ranks or ranks % nodes:
        raise UsageError(
            f"EPLB needs {slots} slots to be divisible by {ranks} ranks, and the "
            f"ranks by {nodes} nodes"
        )
    if groups % nodes:
        groups, nodes = 1, 1
    return np.stack([_layer(row, slots, groups, nodes, ranks) for row in loads])


def _layer(load: NDArray[np.float64], slots: int, groups: int, nodes: int, ranks: int) -> Ids:
    each = len(load) // groups
    per_node = len(load) // nodes
    node_of, rank_in = _pack(load.reshape(groups, each).sum(-1), nodes)
    position = (node_of * (groups // nodes) + rank_in) * each
    order = (position[:, None] + np.arange(each)).reshape(-1)
    by_node = np.argsort(order).reshape(nodes, per_node)
    result = []
    for experts in by_node:
        local = load[experts]
        copy_of, copies = _replicate(local, slots // nodes)
        bin_of, index = _pack((local / copies)[copy_of], ranks // nodes)
        slot = bin_of * (slots // ranks) + index
        filled = np.empty(slots // nodes, np.int64)
        filled[slot] = experts[copy_of]
        result.append(filled)
    return np.concatenate(result)


def _pack(weight: NDArray[np.float64], bins: int) -> tuple[Ids, Ids]:
    """(bin, position) of each weight, with equal numbers in each bin: the greatest weight first,
    each into the lightest bin with room."""
    each = len(weight) // bins
    bin_of, index = np.zeros(len(weight), np.int64), np.zeros(len(weight), np.int64)
    filled = [0] * bins
    with_room = [(0.0, b) for b in range(bins)]  # a heap of (load, bin)
    for item in np.argsort(-weight, kind="stable").tolist():
        load, best = with_room[0]
        bin_of[item], index[item] = best, filled[best]
        filled[best] += 1
        if filled[best] < each:
            heapq.heapreplace(with_room, (load + float(weight[item]), best))
        else:
            heapq.heappop(with_room)
    return bin_of, index


def _replicate(load: NDArray[np.float64], slots: int) -> tuple[Ids, Ids]:
    copies = np.ones(len(load), np.int64)
    copy_of = list(range(len(load)))
    for _ in range(slots - len(load)):
        best = int(np.argmax(load / copies))
        copies[best] += 1
        copy_of.append(best)
    return np.array(copy_of), copies
