"""Which weights are trained, and whether a block may be replaced where gradients are needed.

A graph may stop gradients inside the region of a block (`detach`, `no_grad`). The IR, which
describes values only, cannot represent that, so such a block is left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from moec.dynamo.graph.regions import Region
from moec.torch_private import set_grad_enabled

_SWITCH = set_grad_enabled


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
    ends = {*region.inputs, *region.params}
    for node in _along_floats(region):
        if node in without and node not in ends:
            return f"gradients stop at {node.name} inside the block (detach or no_grad)"
    return ""


def choice_tensors(region: Region) -> list[fx.Node]:
    """The inputs of the graph that the region reads only for the choice of experts, such as a bias
    that balances their load. No gradient needs them, so that eager allows writes into them before
    the backward pass."""
    reached = set(_along_floats(region))
    nodes = (*region.inputs, *region.params)
    return [node for node in nodes if node.op == "placeholder" and node not in reached]


def _along_floats(region: Region) -> Iterator[fx.Node]:
    """The nodes through which gradients pass, down to the region's inputs and params: integer
    choices carry none."""
    ends = {*region.inputs, *region.params}
    pending, visited = [region.output], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node in visited or not _floating(node):
            continue
        visited.add(node)
        yield node
        if node not in ends:
            pending += node.all_input_nodes


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
