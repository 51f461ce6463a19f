"""Places groups of experts (of a modality, a task or a language) on ranks of their own.

A rank that serves one group's requests then exchanges rows only with that group's ranks, as in the
parallel training of Uni-MoE's modalities (arXiv 2405.11273, section 3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from moec.errors import SetupError, UsageError
from moec.files.os_errors import reason
from moec.files.regular_file import read_regular
from moec.plan.placement.placement import Loads, Placement, place


@dataclass(frozen=True)
class BoundPlacement:
    """`ranks[g]` are the consecutive ranks of group g; `placement` covers all ranks."""

    ranks: Mapping[str, range]
    placement: Placement


def read_groups(path: Path) -> dict[str, list[int]]:
    """The groups in a YAML or JSON file, {name: [expert, ...]}. Raises UsageError."""
    try:
        groups = msgspec.yaml.decode(read_regular(path), type=dict[str, list[int]])
    except OSError as error:
        raise SetupError(f"{path} cannot be read: {reason(error)}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SetupError(f"{path}: {error}; write a line such as text: [0, 1]") from None
    if not groups or not all(groups.values()):
        raise SetupError(f"{path}: a group has no expert; write a line such as text: [0, 1]")
    return groups


def place_bound(loads: Loads, groups: Mapping[str, Sequence[int]], ranks: int) -> BoundPlacement:
    """Place experts with loads [E] on `ranks` ranks, each on a rank of its group. Every group has
    at least one rank; each further rank goes to the group whose ranks have the greatest load.

    Raises UsageError where an expert is in no group or in several, or where groups outnumber ranks.
    """
    counts_of = Counter(expert for group in groups.values() for expert in group)
    for expert in sorted({*range(len(loads)), *counts_of}):
        if counts_of[expert] != 1 or not 0 <= expert < len(loads):
            raise SetupError(
                f"expert {expert} is in {counts_of[expert]} groups; each of the experts 0 to "
                f"{len(loads) - 1}, and no other, must be in one group"
            )
    if len(groups) > ranks:
        raise UsageError(f"{len(groups)} groups cannot have separate ranks among {ranks}")
    total = max(float(loads.sum()), 1e-300)
    share = {name: float(loads[list(group)].sum()) / total for name, group in groups.items()}
    counts = dict.fromkeys(groups, 1)
    for _ in range(ranks - len(groups)):
        counts[max(counts, key=lambda name: share[name] / counts[name])] += 1
    of_group: dict[str, range] = {}
    slots: list[tuple[int, ...]] = []
    busiest = bound = 0.0
    for name, group in groups.items():
        part = place(loads[np.array(group)], counts[name])
        of_group[name] = range(len(slots), len(slots) + counts[name])
        slots += [tuple(group[slot] for slot in rank) for rank in part.slots]
        busiest = max(busiest, share[name] * part.busiest)
        bound = max(bound, share[name] * part.bound)
    return BoundPlacement(of_group, Placement(tuple(slots), busiest, bound))
