"""Drops experts that a task hardly uses, with their columns of the router.

    kept = the experts with usage > threshold / k, and no fewer than the k most used

The usage is counted on the calibration data (of the one task), or read from a recorded table. If
the router renormalises, the result is exact as long as no token of the task has a dropped expert
among its k best. Otherwise the remaining experts' weights grow by the weight of the dropped ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from moec.errors import NoMatch, SetupError
from moec.files.os_errors import reason
from moec.files.regular_file import read_regular
from moec.ir.graph import Program
from moec.passes.approximate.prune_experts import drop_experts
from moec.passes.calibration.evaluator import LayerStats
from moec.passes.calibration.session import Change
from moec.passes.core.moe_layer import Layer
from moec.passes.core.options import option, validate


@dataclass(frozen=True)
class KeepUsed:
    """Keep the experts of each layer that one task uses, to specialise a model for that task."""

    threshold: float = option(0.1, "the least usage of an expert, as a multiple of 1/k", low=0)
    usage: str = option(
        "",
        "a .json with the usage of each layer's experts, by layer name; empty: measured on "
        "the calibration data",
    )
    name: ClassVar[str] = "keep-used"
    source: ClassVar[str] = "Mod-Squad, arXiv 2212.08066, per-task extraction; arXiv 2306.17165"

    def __post_init__(self) -> None:
        validate(self)

    def change(self, program: Program, layer: Layer, stats: LayerStats) -> Change:
        return drop_experts(program, layer, self.experts_to_keep(layer, stats))

    def experts_to_keep(self, layer: Layer, stats: LayerStats) -> list[int]:
        """The experts that stay, in rising order."""
        routing = layer.routing
        if routing.groups > 1:
            raise NoMatch("the router chooses among groups of experts, which must keep equal sizes")
        share = self.recorded(layer) if self.usage else stats.usage(layer.count).double()
        share = share / share.sum().clamp(min=1e-30)
        order = torch.sort(share, descending=True, stable=True).indices
        used = int((share > self.threshold / routing.k).sum())
        experts = sorted(order[: max(used, routing.k)].tolist())
        if len(experts) == layer.count:
            raise NoMatch(f"each of {layer.count} experts is used enough to be kept")
        return experts

    def recorded(self, layer: Layer) -> torch.Tensor:
        """The usage in the table: f64[E]. Raises UsageError for a table that does not hold it."""
        path = f"keep-used: {self.usage}"
        try:
            table = json.loads(read_regular(Path(self.usage)))
            share = torch.tensor(table[layer.name], dtype=torch.float64)
        except OSError as error:
            raise SetupError(f"{path} cannot be read: {reason(error)}") from None
        except KeyError:
            raise SetupError(
                f"{path} has no layer {layer.name}; it has {', '.join(table)}"
            ) from None
        except (ValueError, TypeError):
            raise SetupError(
                f'{path} is not a table of usage: write {{"{layer.name}": [0.5, 0.25, …]}}'
            ) from None
        if share.shape != (layer.count,) or not bool((share >= 0).all()):
            raise SetupError(
                f"{path}: {layer.name} has {layer.count} experts: give as many shares, none below 0"
            )
        return share
