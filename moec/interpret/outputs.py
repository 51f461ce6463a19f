"""What a module returns: its tensors in order, and how to put tensors back in their stead.

Dataclasses, None, numbers and other constants stay where they are; pytrees are torch's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class _Slot:
    """Where a tensor stands, by its number."""

    index: int


@dataclass(frozen=True)
class Structure:
    """The result of a module, with slots where its tensors stand."""

    template: Any
    count: int

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """The result with these tensors. Constants are those of the capture."""
        return _mapped(self.template, lambda slot: tensors[slot.index], _Slot)

    @property
    def named(self) -> bool:
        """Whether the result is a mapping, such as the outputs of transformers."""
        return isinstance(self.template, Mapping)

    @property
    def constants(self) -> tuple[str, ...]:
        """Where the result holds a number or another constant, and which: "aux_loss is 0.0"."""
        return tuple(_constants(self.template, ""))

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each tensor: keys or fields where the module returns such, else output_0."""
        fields = _fields(self.template)
        if fields is None:
            many = self.count != 1
            return tuple(f"output_{i}" if many else "output" for i in range(self.count))
        names = [""] * self.count
        for key, part in fields.items():
            slots = _slots(part)
            for number, slot in enumerate(slots):
                names[slot.index] = str(key) if len(slots) == 1 else f"{key}_{number}"
        return tuple(names)


def of_leaves(spec: pytree.TreeSpec, leaves: Sequence[Any]) -> Structure:
    """The structure of a pytree whose leaves are constants, or `SLOT` for a tensor."""
    slots = iter(range(len(leaves)))
    filled = [_Slot(next(slots)) if leaf is SLOT else leaf for leaf in leaves]
    count = sum(leaf is SLOT for leaf in leaves)
    return Structure(pytree.tree_unflatten(filled, spec), count)


SLOT = object()
"""Stands for a tensor among the leaves of a result."""


def flatten(result: Any) -> tuple[tuple[torch.Tensor, ...], Structure]:
    """The tensors of a result in order, and its structure."""
    tensors: list[torch.Tensor] = []

    def slot(tensor: torch.Tensor) -> _Slot:
        tensors.append(tensor)
        return _Slot(len(tensors) - 1)

    template = _mapped(result, slot, torch.Tensor)
    return tuple(tensors), Structure(template, len(tensors))


def _mapped(tree: Any, change: Callable[[Any], Any], kind: type) -> Any:
    """`tree` with every leaf of `kind` changed; dataclasses are trees of their fields."""
    if isinstance(tree, kind):
        return change(tree)
    if _is_record(tree):
        record = object.__new__(type(tree))
        record.__dict__.update(vars(tree))
        for field in dataclasses.fields(tree):
            value = _mapped(getattr(tree, field.name), change, kind)
            object.__setattr__(record, field.name, value)
        return record
    leaves, spec = pytree.tree_flatten(tree, is_leaf=lambda part: part is not tree)
    if not leaves or leaves[0] is tree:
        return tree
    return pytree.tree_unflatten([_mapped(leaf, change, kind) for leaf in leaves], spec)


def _is_record(tree: Any) -> bool:
    registered = type(tree) in pytree.SUPPORTED_NODES
    is_data = dataclasses.is_dataclass(tree) and not isinstance(tree, type | _Slot)
    return is_data and not registered


def _fields(tree: Any) -> Mapping[str, Any] | None:
    if _is_record(tree):
        return {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    return tree if isinstance(tree, Mapping) else None


def _parts(tree: Any) -> list[tuple[str, Any]]:
    fields = _fields(tree)
    if fields is not None:
        return [(str(key), part) for key, part in fields.items()]
    if isinstance(tree, list | tuple):
        return [(str(number), part) for number, part in enumerate(tree)]
    return []


def _slots(tree: Any) -> list[_Slot]:
    if isinstance(tree, _Slot):
        return [tree]
    return [slot for _, part in _parts(tree) for slot in _slots(part)]


def _constants(tree: Any, name: str) -> list[str]:
    if isinstance(tree, _Slot) or tree is None:
        return []
    parts = _parts(tree)
    if parts or isinstance(tree, list | tuple | Mapping):
        return [line for key, part in parts for line in _constants(part, f"{name}.{key}")]
    return [f"{name.strip('.') or 'the output'} is always {tree!r}"]
