"""Which sizes of the inputs may vary, and their names.

Unless the user says otherwise, every axis of an integer input and every axis but the last of a
float input may vary. Names: T for one free axis, B and S for two, then S1, S2 …
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.export import Dim as TorchDim

from moec.errors import CaptureError
from moec.ir.sizes.dims import Bounds
from moec.torch_private import pytree

Axes = Mapping[int, Any]
"""For each axis that may vary, a torch.export Dim or hint."""


def default_axes(tensor: torch.Tensor) -> Axes:
    free = tensor.ndim - 1 if tensor.is_floating_point() else tensor.ndim
    return {axis: TorchDim.AUTO for axis in range(free)}


def default_wishes(tensors: Sequence[torch.Tensor]) -> tuple[list[Axes], list[tuple[int, int]]]:
    """(wishes, last): `default_axes` of each tensor, and pairs (number of the tensor, axis) of last
    axes that vary only where they share a size with another tensor.

    These are the last axes of float tensors (an additive mask's is a sequence length), and of
    integer tensors [.., k] of the same shape as a float tensor: expert ids with their weights.
    """
    wishes = [default_axes(tensor) for tensor in tensors]
    weights = {t.shape for t in tensors if t.ndim > 2 and t.is_floating_point()}
    last = [
        (i, t.ndim - 1)
        for i, t in enumerate(tensors)
        if t.ndim and (t.is_floating_point() or t.shape in weights)
    ]
    if len(tensors) == 1 or not last:
        return wishes, []
    return [dict.fromkeys(range(tensor.ndim), TorchDim.AUTO) for tensor in tensors], last


def wished_axes(arguments: Mapping[str, Any], shapes: Any) -> list[Axes]:
    """The user's `dynamic_shapes` for each tensor in `arguments`, in order.

    `shapes` is a dict by argument name, or a sequence in the order of the arguments; an entry is
    None (nothing varies), a dict axis -> Dim, or a sequence with one Dim or None per axis. Raises
    CaptureError where it names an argument or axis that does not exist.
    """
    if not isinstance(shapes, Mapping):
        tensors = [name for name, value in arguments.items() if _tensors(value)]
        names = list(arguments) if len(shapes) == len(arguments) else tensors
        if len(shapes) != len(names):
            raise CaptureError(
                f"dynamic_shapes has {len(shapes)} entries for the arguments "
                f"{', '.join(arguments)}; give one entry for each, or a dict by name"
            )
        shapes = dict(zip(names, shapes, strict=True))
    unknown = set(shapes) - set(arguments)
    if unknown:
        raise CaptureError(
            f"dynamic_shapes names {', '.join(sorted(unknown))}, but the arguments are "
            f"{', '.join(arguments)}"
        )
    return [
        axes
        for name, value in arguments.items()
        for axes in _entries(name, value, shapes.get(name))
    ]


def _tensors(value: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _entries(name: str, value: Any, shape: Any) -> list[Axes]:
    if isinstance(value, torch.Tensor):
        dims = dict(enumerate(shape)) if isinstance(shape, list | tuple) else dict(shape or {})
        beyond = [axis for axis in dims if not -value.ndim <= axis < value.ndim]
        if beyond:
            raise CaptureError(
                f"dynamic_shapes: {name} has {value.ndim} axes, but axis {beyond[0]} is named"
            )
        return [{axis % value.ndim: dim for axis, dim in dims.items() if dim is not None}]
    if isinstance(value, Mapping):
        shape = shape or {}
        return [e for key in value for e in _entries(name, value[key], shape.get(key))]
    if isinstance(value, list | tuple):
        parts = shape or [None] * len(value)
        return [e for v, s in zip(value, parts, strict=True) for e in _entries(name, v, s)]
    return []


def name_symbols(
    tensors: Sequence[torch.Tensor],
    wishes: Sequence[Axes],
    groups: Iterable[Collection[tuple[int, int]]] = (),
) -> dict[str, str]:
    """torch's symbols (s0, s72) in the inputs' shapes -> names of the IR.

    A symbol that is the size of an axis by itself takes the name of the user's Dim, or the next
    free one. Axes in one of `groups` (number of the tensor, axis) share one name.
    """
    names: dict[str, str] = {}
    same = _equated(tensors, groups)
    for tensor, wish in zip(tensors, wishes, strict=True):
        free = [axis for axis, size in enumerate(tensor.shape) if isinstance(size, torch.SymInt)]
        for position, axis in enumerate(free):
            expr = tensor.shape[axis].node.expr  # type: ignore[attr-defined]
            if expr.is_Symbol and expr.name not in names:
                name = dim_name(wish.get(axis)) or _next_name(position, len(free))
                name = _distinct(name, set(names.values()))
                names |= dict.fromkeys(same.get(expr.name, {expr.name}), name)
    return names


def _equated(
    tensors: Sequence[torch.Tensor], groups: Iterable[Collection[tuple[int, int]]]
) -> dict[str, set[str]]:
    """For each symbol on an axis in `groups`, all symbols that are the same size."""
    same: dict[str, set[str]] = {}
    for group in groups:
        sizes: list[Any] = [tensors[tensor].shape[axis] for tensor, axis in group]
        exprs = [size.node.expr for size in sizes if isinstance(size, torch.SymInt)]
        names = {expr.name for expr in exprs if expr.is_Symbol}
        names = names.union(*(same.get(name, ()) for name in names))
        same |= dict.fromkeys(names, names)
    return same


def _next_name(position: int, count: int) -> str:
    if count == 1:
        return "T"
    return ("B", "S")[position] if position < 2 else f"S{position - 1}"


def _distinct(name: str, used: set[str]) -> str:
    candidate, number = name, 1
    while candidate in used:
        number += 1
        candidate = f"{name}{number}"
    return candidate


def dim_name(wish: Any) -> str | None:
    """The name of a torch.export.Dim("name"); None for hints such as Dim.AUTO."""
    name = getattr(wish, "__name__", None)
    return name if isinstance(name, str) and name.isidentifier() else None


def wished_bounds(wishes: Sequence[Axes]) -> dict[str, Bounds]:
    """The limits of the user's named Dims."""
    bounds: dict[str, Bounds] = {}
    for wish in wishes:
        for dim in wish.values():
            name, low, high = dim_name(dim), getattr(dim, "min", None), getattr(dim, "max", None)
            if name and isinstance(low, int):
                bounds[name] = Bounds(low, high if isinstance(high, int) and high < 2**62 else None)
    return bounds
