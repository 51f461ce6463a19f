"""Experts that matter little are dropped, with their columns of the router.

    logits = aten.linear(x, w[8, D])          logits = aten.linear(x, w[4, D])
    w, ids = moe.route(logits)                w, ids = moe.route(logits)
    … = moe.dispatch(x, ids) <8>         ->   … = moe.dispatch(x, ids) <4>
    out = moe.experts(…, w1[8, H, D], …)      out = moe.experts(…, w1[4, H, D], …)

The same numbers as masking the dropped columns to minus infinity, and so exact where no token
would have chosen a dropped expert; the memory of their weights is saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moec.approximate import Change
from moec.errors import NoMatch
from moec.ir import Program
from moec.meter import Seen
from moec.passes.layer import Layer, Splice, constant, experts_replaced
from moec.passes.options import option, validate
from moec.passes.router import keep_columns


@dataclass(frozen=True)
class PruneExperts:
    """Drop the experts of each layer that matter least, and their columns of the router."""

    keep: float = option(0.5, "share of each layer's experts that stays", low=0, high=1)
    by: str = option(
        "usage",
        "what an expert is worth: how many tokens choose it (usage), the mean norm of what it "
        "adds to them (reap), or a random number",
        choices=("usage", "reap", "random"),
    )
    seed: int = option(0, "of the random numbers", low=0)
    name: ClassVar[str] = "prune-experts"
    exact: ClassVar[bool] = False
    source: ClassVar[str] = "usage and random: arXiv 2109.10465; reap: arXiv 2510.13999"

    def __post_init__(self) -> None:
        validate(self)

    def change(self, program: Program, layer: Layer, seen: Seen) -> Change:
        kept = self.kept(layer, seen)
        splice = Splice(program)
        keep_columns(splice, layer, kept)
        stacks = [constant(program, stack)[torch.tensor(kept)] for stack in layer.stacks]
        experts_replaced(splice, layer, stacks)
        says = f"keeps {', '.join(map(str, kept))} of {layer.count}"
        return Change(splice.done(), tuple((expert,) for expert in kept), says)

    def kept(self, layer: Layer, seen: Seen) -> list[int]:
        """The experts that stay, in rising order, as many in each of the router's groups; of
        equals the one with the lower number."""
        routing, share = layer.routing, f"keep={self.keep:g} of {layer.count} experts is"
        count = round(self.keep * layer.count)
        each, rest = divmod(count, routing.groups)
        if count == layer.count:
            raise NoMatch(f"{share} all of them")
        if rest:
            raise NoMatch(f"{share} {count}, which {routing.groups} groups cannot share evenly")
        if each * min(routing.top_groups, routing.groups) < routing.k:
            where = "" if routing.groups == 1 else f" from {routing.top_groups} groups of {each}"
            raise NoMatch(f"{share} {count}, and each token takes {routing.k}{where}")
        if routing.groups > 1 and routing.group_score == "top2sum" and each < 2:
            raise NoMatch(f"{share} one in each group, and groups are scored by their best two")
        worth = self.worth(layer, seen).reshape(routing.groups, -1)
        order = torch.sort(worth, descending=True, stable=True).indices[:, :each]
        first = torch.arange(routing.groups)[:, None] * worth.shape[1]
        return sorted((order + first).flatten().tolist())

    def worth(self, layer: Layer, seen: Seen) -> torch.Tensor:
        """What each expert is worth: [E]."""
        if self.by == "usage":
            return seen.usage(layer.count)
        if self.by == "reap":
            return seen.saliency(layer.count)
        # The name makes layers differ, whatever their order.
        generator = torch.Generator().manual_seed(self.seed + sum(layer.name.encode()))
        return torch.rand(layer.count, generator=generator)
