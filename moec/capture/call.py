"""One calling convention for every module: the tensors of its arguments, in order, by name.

Everything else in the arguments (flags, None, numbers) is fixed at the values of the example.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree

from moec.errors import CaptureError
from moec.interpret.outputs import Structure, checked, flatten

PREFIX = "module"


class ModuleCall(torch.nn.Module):
    """`ModuleCall(...)(*tensors)`: `module(*args, **kwargs)` with its tensors replaced in order."""

    def __init__(
        self, module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.module = module
        self.leaves, self.spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        self.places = [i for i, x in enumerate(self.leaves) if isinstance(x, torch.Tensor)]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.leaves[index] for index in self.places)

    def forward(self, *tensors: torch.Tensor) -> Any:
        filled = list(self.leaves)
        for index, tensor in zip(self.places, tensors, strict=True):
            filled[index] = tensor
        args, kwargs = pytree.tree_unflatten(filled, self.spec)
        return self.module(*args, **kwargs)


@dataclass
class _Returned:
    """What the last forward of a `FlatCall` returned. No pytree: an export ignores it."""

    structure: Structure | None = None


class FlatCall(ModuleCall):
    """A call that gives the tensors of its result, whatever they stand in: an export takes no
    dataclass. Raises CaptureError for a result whose tensors are not found."""

    def __init__(self, call: ModuleCall) -> None:
        super().__init__(call.module, (), {})
        self.leaves, self.spec, self.places = call.leaves, call.spec, call.places
        self.returned = _Returned()

    @property
    def structure(self) -> Structure:
        """The result of the last forward, without its tensors."""
        assert self.returned.structure is not None
        return self.returned.structure

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results, structure = flatten(super().forward(*tensors))
        self.returned.structure = checked(structure)
        return results


@contextmanager
def casts_done() -> Iterator[None]:
    """While open, `Module.to` of a module that is cast already does nothing.

    For modules that cast a submodule in their own forward (Switch's router does):
    torch.export cannot trace `Module.to`, even where it would change nothing.
    """
    original = torch.nn.Module.to

    def to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        done = all(
            (dtype is None or not p.is_floating_point() or p.dtype == dtype)
            and (device is None or p.device == torch.device(device))
            for p in self.parameters()
        )
        return self if done else original(self, *args, **kwargs)

    with mock.patch.object(torch.nn.Module, "to", to):
        yield


def named_arguments(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Each argument under the name of its parameter; an element of *args under name_0, name_1, …

    Raises CaptureError where the module does not take the arguments.
    """
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(f"{type(module).__name__}.forward: {error}") from None
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            arguments |= {f"{name}_{i}": item for i, item in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= value
        else:
            arguments[name] = value
    return arguments


def tensor_names(arguments: Mapping[str, Any]) -> list[str]:
    """A name for each tensor in the arguments: the parameter's, with its place where nested."""
    names = []
    for name, value in arguments.items():
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, torch.Tensor):
                names.append("_".join([name, *(_key(step) for step in path)]))
    return names


def _key(step: Any) -> str:
    return str(getattr(step, "key", getattr(step, "idx", getattr(step, "name", step))))
