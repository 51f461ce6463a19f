"""The data of a picture: the model as nested parts in the order of the flow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from moec.report.data import Block, DeclinedLine, PortLine

Edges: TypeAlias = tuple[tuple[int, int], ...]

KINDS = ("moe", "router", "shared", "attention", "mlp", "linear", "embedding", "norm", "other")
ENTRY = -1  # the source of an edge that comes from above the parts


@dataclass(frozen=True)
class ScenePart:
    """One box. `edges` are the skip connections among `parts`, by index; ENTRY is the top."""

    path: str
    label: str
    kind: str
    parameters: int = 0
    ops: Mapping[str, int] = field(default_factory=dict)
    weights: tuple[tuple[str, str], ...] = ()
    tied: tuple[str, ...] = ()  # weights that it reads and another part holds
    times: int = 1
    blocks: tuple[Block, ...] = ()  # of an MoE card; nearly always one
    declined: tuple[DeclinedLine, ...] = ()
    parts: tuple[ScenePart, ...] = ()
    edges: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Scene:
    """A model. `parts` flow from `inputs` to `outputs`."""

    title: str
    inputs: tuple[PortLine, ...]
    outputs: tuple[PortLine, ...]
    root: ScenePart

    @property
    def parameters(self) -> int:
        return self.root.parameters
