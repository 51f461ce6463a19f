"""The structure of a module's result: its tensors in order, and how to rebuild it from tensors.

Dataclasses, mappings, None, numbers and other constants are part of the structure.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any, cast

import torch

from moec.errors import CaptureError
from moec.torch_private import pytree


@dataclass(frozen=True)
class _Slot:
    """The position of tensor number `index`; a `number` is a Python number in the result."""

    index: int
    number: bool = False


class VaryingOutput(CaptureError):
    """The constants of a module's result differ between runs."""


_CONSTANTS = (bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device, torch.Size)
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_ITEMS = (torch.Tensor, int, float, torch.SymInt, torch.SymFloat)

_CACHES = "transformers.cache_utils"
"""The module of caches of keys and values and of their layers, which are records too."""

Holder = Callable[[Any], torch.Tensor | None]
"""Computes a tensor [] of a symbolic number; None where it cannot."""


@dataclass(frozen=True)
class Structure:
    """The result of a module, with slots in place of its tensors. `numbers` are the items of the
    result, counted from 0, that are Python numbers and that a tensor [] of the graph holds."""

    template: Any
    count: int
    numbers: frozenset[int] = frozenset()

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """The result with these tensors. Constants are those of the capture."""

        def filled(slot: _Slot) -> Any:
            tensor = tensors[slot.index]
            return tensor.item() if slot.number else tensor

        return _mapped(self.template, filled, _Slot)

    @property
    def constants(self) -> tuple[str, ...]:
        """The numbers and other constants of the result with their paths: "aux_loss is 0.0"."""
        return tuple(_constants(self.template, ""))

    def check(self, other: Structure, inputs: str) -> None:
        """Raises VaryingOutput where another result of the module, at `inputs`, has other constants
        or another number of tensors."""
        advice = "it depends on sizes or data: return it as a tensor, or remove it"
        pairs = zip(_leaves(self.template, ""), _leaves(other.template, ""), strict=False)
        for (name, first), (_, second) in pairs:
            if repr(first) != repr(second):  # nan is nan
                raise VaryingOutput(
                    f"output {name} is {first!r} in one run and {second!r} at inputs {inputs}: "
                    f"{advice}"
                )
        if self.count != other.count:
            raise VaryingOutput(
                f"{self.count} tensors come back in one run and {other.count} at inputs {inputs}: "
                "return the same number always"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each tensor: its key or field if it has one, else output_0."""
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
"""The placeholder of a tensor among the leaves of a result."""


def flatten(
    result: Any, numbers: Collection[int] = (), hold: Holder | None = None
) -> tuple[tuple[torch.Tensor, ...], Structure]:
    """The tensors of a result in order, and its structure. The items `numbers`, and symbolic
    numbers for which `hold` gives a tensor, become tensors [] too."""
    tensors: list[torch.Tensor] = []
    items, positions = itertools.count(), set[int]()

    def slot(leaf: Any) -> Any:
        item, tensor = next(items), leaf
        if isinstance(leaf, _SYMBOLIC):
            tensor = hold(leaf) if hold is not None else None
        elif item in numbers and not isinstance(leaf, torch.Tensor):
            tensor = torch.tensor(leaf)
        if not isinstance(tensor, torch.Tensor):
            return leaf
        if tensor is not leaf:
            positions.add(item)
        tensors.append(tensor)
        return _Slot(len(tensors) - 1, tensor is not leaf)

    template = _mapped(result, slot, _ITEMS)
    return tuple(tensors), Structure(template, len(tensors), frozenset(positions))


def checked(structure: Structure) -> Structure:
    """The structure. Raises CaptureError for a number that depends on sizes or data, and for an
    object of an unknown class, which may hold tensors."""
    for name, leaf in _leaves(structure.template, ""):
        output = f"output {name}" if name else "the output"
        if isinstance(leaf, _SYMBOLIC):
            raise CaptureError(f"{output} is a Python number that may vary; return it as a tensor")
        if leaf is not None and not isinstance(leaf, _CONSTANTS):
            raise CaptureError(
                f"{output} is a {type(leaf).__name__}, which may not contain tensors of a result; "
                "return tensors, numbers and None in tuples, lists, dicts or dataclasses"
            )
    return structure


def _mapped(tree: Any, change: Callable[[Any], Any], kind: type | tuple[type, ...]) -> Any:
    """`tree` with every leaf of `kind` changed; records are trees of their fields."""
    if isinstance(tree, kind):
        return change(tree)
    if type(tree) in pytree.SUPPORTED_NODES or pytree.is_namedtuple_instance(tree):
        leaves, spec = pytree.tree_flatten(tree, is_leaf=lambda part: part is not tree)
        return pytree.tree_unflatten([_mapped(leaf, change, kind) for leaf in leaves], spec)
    fields = _fields(tree)
    if fields is None:
        return tree
    parts = {key: _mapped(part, change, kind) for key, part in fields.items()}
    record = copy.copy(tree)  # copies attributes that are no fields, and skips the constructor
    for key, part in parts.items():
        if isinstance(record, MutableMapping):
            record[key] = part
        else:
            object.__setattr__(record, key, part)
    return record


def _fields(tree: Any) -> Mapping[str, Any] | None:
    """The named parts of a container; None if it has no names."""
    if isinstance(tree, MutableMapping):
        return tree
    if pytree.is_namedtuple_instance(tree):
        return cast(Mapping[str, Any], tree._asdict())
    if isinstance(tree, SimpleNamespace) or type(tree).__module__ == _CACHES:
        return cast(Mapping[str, Any], vars(tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type | _Slot):
        return {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    return None


def _parts(tree: Any) -> list[tuple[str, Any]]:
    fields = _fields(tree)
    if fields is not None:
        return [(str(key), part) for key, part in fields.items()]
    if type(tree) not in pytree.SUPPORTED_NODES:
        return []
    leaves = pytree.tree_leaves(tree, is_leaf=lambda part: part is not tree)
    return [(str(number), part) for number, part in enumerate(leaves)]


def _leaves(tree: Any, name: str) -> list[tuple[str, Any]]:
    """The leaves that are not slots, with their paths."""
    if isinstance(tree, _Slot):
        return []
    parts = _parts(tree)
    if parts or _fields(tree) is not None or type(tree) in pytree.SUPPORTED_NODES:
        return [leaf for key, part in parts for leaf in _leaves(part, f"{name}.{key}".strip("."))]
    return [(name, tree)]


def _slots(tree: Any) -> list[_Slot]:
    if isinstance(tree, _Slot):
        return [tree]
    return [slot for _, part in _parts(tree) for slot in _slots(part)]


def _constants(tree: Any, name: str) -> list[str]:
    return [
        f"{path or 'the output'} is always {leaf!r}"
        for path, leaf in _leaves(tree, name)
        if leaf is not None
    ]
