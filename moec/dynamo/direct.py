"""Calls a graph of blocks and views directly, without AOTAutograd.

What AOTAutograd adds to a graph (gradients, writes into inputs, aliases) is not needed where there
are no gradients and nothing but blocks and views. Its Python code takes longer than the kernels of
a small layer, and a tenth of the time of one token in a large layer, whose weights have evicted
that code from the caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx

from moec.dynamo.operators import SITES


def direct(module: fx.GraphModule) -> Callable[..., Any] | None:
    """A function that calls the graph's sites without dispatch, if the graph holds only blocks
    without gradients, views and arithmetic on sizes; else None."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copies[node] = copied = graph.node_copy(node, copies.__getitem__)
        size = isinstance(node.meta.get("val"), torch.SymInt | int)
        if node.op in ("placeholder", "output") or size:
            continue
        if node.target is torch.ops.moec.block_forward.default:
            inputs, params, name = copied.args
            copied.target, copied.args = SITES[cast(str, name)].run, (inputs, params)
        elif node.target is torch.ops.aten.view.default:
            copied.op, copied.target = "call_method", "view"
        else:
            return None
    forward: Callable[..., Any] = fx.GraphModule({}, graph).forward
    return forward
