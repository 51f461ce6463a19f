"""Weights that are distributed over ranks (DTensor), in a graph that reads only the local part.

    f(w: DTensor):  part = w.to_local()         f(part):
                    y = experts(x, part)   ->   y = experts(x, part)

Expert parallelism of transformers does this. The local parts become the graph's inputs; its caller
takes them, and gradients flow through that step. A graph that also uses the complete tensor is not
changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from moec.torch_private import ConstantSource, DimDynamic, StatefulSymbolicContext, TracingContext

Run = Callable[..., Any]


def take_local_parts(
    module: fx.GraphModule, inputs: Sequence[Any]
) -> tuple[list[Any], tuple[int, ...]]:
    """(inputs, numbers): the inputs with local parts instead of tensors of which the graph takes
    only the parts, and the positions of these inputs. The graph is changed accordingly."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    new, numbers = list(inputs), []
    for number, (node, value) in enumerate(zip(placeholders, inputs, strict=True)):
        users = list(node.users)
        if not (users and hasattr(value, "to_local") and all(map(_takes_part, users))):
            continue
        for key in ("example_value", "val"):
            if key in users[0].meta:
                node.meta[key] = users[0].meta[key]
        for user in users:
            user.replace_all_uses_with(node)
            module.graph.erase_node(user)
        new[number] = value.to_local().detach().requires_grad_(value.requires_grad)
        _fix_sizes(new[number], node.name)
        numbers.append(number)
    if numbers:
        module.graph.lint()
        module.recompile()
    return new, tuple(numbers)


def _fix_sizes(part: torch.Tensor, name: str) -> None:
    """Marks the sizes of a weight as constant, even if `dynamic` makes those of inputs symbolic."""
    contexts: Any = TracingContext.get().tensor_to_context
    contexts[part] = StatefulSymbolicContext(
        dynamic_sizes=[DimDynamic.STATIC] * part.ndim, tensor_source=ConstantSource(name)
    )


def _takes_part(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "to_local" and len(node.args) == 1


def with_parts(run: Run, numbers: tuple[int, ...]) -> Run:
    """`run` with the inputs at `numbers` replaced by their local parts."""
    return partial(_with_parts, run, frozenset(numbers)) if numbers else run


def _with_parts(run: Run, numbers: frozenset[int], *inputs: torch.Tensor) -> Any:
    return run(*(x.to_local() if n in numbers else x for n, x in enumerate(inputs)))  # type: ignore[attr-defined]
