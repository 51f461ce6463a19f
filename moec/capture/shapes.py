"""Which sizes of the inputs may vary, and what they are called.

Without a wish of the user's every axis of an integer input and every axis but the last of a
float input may vary. Names: B and S for two free axes, T for one, else B, S, S1, S2 …; inputs
whose free axes have the same name must agree in size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.export import Dim as TorchDim

from moec.sizes import Bounds


def default_shapes(args: Any) -> Any:
    """`dynamic_shapes` for torch.export: the free axes of each tensor in the tree `args`."""

    def shape(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        free = leaf.ndim - 1 if leaf.is_floating_point() else leaf.ndim
        return {axis: TorchDim.AUTO for axis in range(free)}

    return torch.utils._pytree.tree_map(shape, args)


def name_symbols(
    shapes: Iterable[tuple[torch.Size, tuple[str | None, ...]]],
) -> dict[str, str]:
    """torch's symbols (s0, s72) -> names of the IR, from each input's shape and its wished names.

    A symbol that stands alone on an axis takes the wished name, or the next of T or B, S, S1 …
    """
    names: dict[str, str] = {}
    for shape, wished in shapes:
        free = [axis for axis, size in enumerate(shape) if isinstance(size, torch.SymInt)]
        for place, axis in enumerate(free):
            expr = shape[axis].node.expr  # type: ignore[attr-defined]
            if not getattr(expr, "is_Symbol", False) or expr.name in names:
                continue
            wish = wished[axis] if axis < len(wished) else None
            names[expr.name] = wish or _next_name(place, len(free), set(names.values()))
    return names


def _next_name(place: int, count: int, taken: set[str]) -> str:
    first = "T" if count == 1 else ("B", "S")[place] if place < 2 else f"S{place - 1}"
    candidate, number = first, 1
    while candidate in taken:
        number += 1
        candidate = f"{first}{number}"
    return candidate


def wished_names(dynamic_shapes: Any, args: Any) -> list[tuple[str | None, ...]]:
    """For each tensor in `args`, in order, the name that the user gave to each axis."""
    leaves, _ = torch.utils._pytree.tree_flatten(args)
    if dynamic_shapes is None:
        return [() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    wishes = _flatten_like(dynamic_shapes, args)
    names = []
    for leaf, wish in zip(leaves, wishes, strict=True):
        if isinstance(leaf, torch.Tensor):
            given = dict(enumerate(wish)) if isinstance(wish, list | tuple) else (wish or {})
            names.append(tuple(_dim_name(given.get(axis)) for axis in range(leaf.ndim)))
    return names


def _flatten_like(shapes: Any, args: Any) -> list[Any]:
    """The entry of `shapes` for each leaf of `args`; a leaf's entry may itself be a dict."""
    if not isinstance(args, dict | list | tuple):
        return [shapes]
    if shapes is None:
        return [None] * len(torch.utils._pytree.tree_leaves(args))
    if isinstance(args, Mapping):
        return [w for key in args for w in _flatten_like(shapes.get(key), args[key])]
    return [w for s, a in zip(shapes, args, strict=True) for w in _flatten_like(s, a)]


def _dim_name(wish: Any) -> str | None:
    name = getattr(wish, "__name__", None)
    return name if isinstance(name, str) and name.isidentifier() and wish is not None else None


def wished_bounds(dynamic_shapes: Any) -> dict[str, Bounds]:
    """The bounds that the user's own torch.export.Dim objects carry."""
    found: dict[str, Bounds] = {}

    def visit(node: Any) -> None:
        if isinstance(node, Mapping):
            for item in node.values():
                visit(item)
        elif isinstance(node, list | tuple):
            for item in node:
                visit(item)
        else:
            name = _dim_name(node)
            low, high = getattr(node, "min", None), getattr(node, "max", None)
            if name and isinstance(low, int):
                whole = high if isinstance(high, int) and high < 2**62 else None
                found[name] = Bounds(low, whole)

    visit(dynamic_shapes)
    return found
