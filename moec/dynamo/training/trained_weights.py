"""Which weights are trained, and whether a block may be replaced where gradients are needed.

A graph may stop gradients inside the region of a block (`detach`, `no_grad`). The IR, which
describes values only, cannot represent that, so such a block is left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from moec.dynamo.graph.regions import Region

_SWITCH = torch._C._set_grad_enabled


def needs_gradient(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in inputs
    )


def trainable_inputs(traced: fx.GraphModule, inputs: Sequence[Any]) -> set[fx.Node]:
    """The inputs of a graph that need a gradient."""
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    pairs = zip(placeholders, inputs, strict=True)
    return {node for node, value in pairs if needs_gradient([value])}


def mostly_trainable(params: Sequence[fx.Node], learning: set[fx.Node]) -> bool:
    """Whether most elements of `params` are `learning`: an optimiser step changes them."""
    sizes: dict[fx.Node, int] = {node: node.meta["val"].numel() for node in params}
    return 2 * sum(sizes[node] for node in params if node in learning) > sum(sizes.values())


def gradient_barrier(traced: fx.GraphModule, region: Region) -> str:
    """The reason why a region's gradient is not that of its values; empty where it is."""
    without = _without_gradient(traced)
    pending, visited = [region.output], {*region.inputs, *region.params}
    while pending:  # along floats only: integer choices carry no gradient
        node = pending.pop()
        if node in visited or not _floating(node):
            continue
        visited.add(node)
        if node in without:
            return f"gradients stop at {node.name} inside the block (detach or no_grad)"
        pending += node.all_input_nodes
    return ""


def _floating(node: fx.Node) -> bool:
    val = node.meta.get("val")
    parts = val if isinstance(val, tuple | list) else [val]
    return any(isinstance(part, torch.Tensor) and part.is_floating_point() for part in parts)


def _without_gradient(traced: fx.GraphModule) -> set[fx.Node]:
    """The nodes at which gradients stop: detach, and nodes under no_grad."""
    enabled, barriers = True, set()
    for node in traced.graph.nodes:
        if node.target is _SWITCH:
            enabled = bool(node.args[0])
        elif not enabled or node.target is torch.ops.aten.detach.default:
            barriers.add(node)
    return barriers
