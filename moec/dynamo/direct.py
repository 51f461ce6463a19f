"""A graph that holds blocks and nothing to compile: called as it is, without AOTAutograd.

What AOTAutograd puts around a graph (gradients, writes into inputs, aliases) is of no use where
no gradient is wanted and blocks and views are all there is. Its Python costs more than the
kernels of a small layer, and for one token of a large one, whose weights have driven that Python
out of the caches, a tenth of the whole.
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
