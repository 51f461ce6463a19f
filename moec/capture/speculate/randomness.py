"""Random numbers in an export, which a compiled model does not support."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.export import ExportedProgram

from moec.errors import CaptureError
from moec.torch_private import OpOverload, schema_of


def refuse_random(name: str, exported: ExportedProgram, lines: Sequence[str] = ()) -> None:
    """Remove random numbers that nothing reads. Raises CaptureError for any others; `lines` are the
    user's lines that draw random numbers."""
    graph = exported.graph
    for node in reversed(list(graph.nodes)):
        if not _draws(node):
            continue
        if node.users:
            shown = "".join(f"  {line}\n" for line in list(lines)[-2:])
            raise CaptureError(
                f"{name} cannot be captured: its result depends on random numbers\n"
                f"{shown}  {node.target} draws others in every call, a compiled model draws none\n"
                "  leave it out where the module is not training, or make the numbers an input"
            )
        graph.erase_node(node)


def _draws(node: torch.fx.Node) -> bool:
    """Whether an op draws random numbers. Dropout does not in eval mode or where p is 0."""
    target = node.target
    if not isinstance(target, OpOverload):
        return False
    names = [argument.name for argument in schema_of(target).arguments]
    values = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    idle = values.get("train") is False or values.get("training") is False
    if idle or any(name in names and not values.get(name) for name in ("dropout_p", "p")):
        return False
    return torch.Tag.nondeterministic_seeded in target.tags
