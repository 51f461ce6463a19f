"""The hits of each policy against the share of experts that are in memory, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from moec.errors import UsageError
from moec.plan.simulation.residency import Eviction
from moec.runtime.expert_store.native import POLICIES


def check_curves_name(path: Path) -> None:
    """Raises UsageError for a name that ends in neither .png nor .svg, and without matplotlib."""
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"{path}: a picture of hits ends in .png or .svg")
    if find_spec("matplotlib") is None:
        raise UsageError(f"{path}: --cache --picture needs matplotlib: pip install 'moec[bench]'")


def draw_hit_curves(
    rates: Mapping[Eviction, Sequence[float]], shares: Sequence[float], title: str, path: Path
) -> None:
    """`rates` are shares of the needed experts, for each of `shares` of all experts. Policies that
    the store of experts does not run are dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis = figure.subplots()
    for eviction, hits in rates.items():
        line = "o-" if eviction.policy in POLICIES else "o--"
        axis.plot([100 * share for share in shares], [100 * h for h in hits], line, ms=4)
        axis.lines[-1].set_label(eviction.label)
    axis.set(title=title, xlabel="% of the experts in memory", ylabel="% of needed experts there")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
