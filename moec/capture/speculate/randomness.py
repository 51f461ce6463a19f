"""Random numbers in an export: a compiled model has none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.export import ExportedProgram

from moec.errors import CaptureError


def refuse_random(name: str, exported: ExportedProgram, lines: Sequence[str] = ()) -> None:
    """Remove random numbers that nothing reads. Raises CaptureError for others; `lines` are those
    of the user's that draw."""
    graph = exported.graph
    for node in reversed(list(graph.nodes)):
        if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            continue
        if node.users:
            shown = "".join(f"  {line}\n" for line in list(lines)[-2:])
            raise CaptureError(
                f"{name} cannot be captured: its result depends on random numbers\n"
                f"{shown}  {node.target} draws others in every call, a compiled model draws none\n"
                "  leave it out where the module is not training, or make the numbers an input"
            )
        graph.erase_node(node)
