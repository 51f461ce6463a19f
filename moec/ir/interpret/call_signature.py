"""How calls of a compiled module bind: like those of its forward.

Tensors of the arguments are the inputs of the graph, by the names of their parameters and, where
they are nested, of their keys. All other arguments have the values of the example.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moec.errors import InputError
from moec.runtime.call.arguments import bind
from moec.torch_private import pytree


@dataclass(frozen=True)
class CallSignature:
    """The parameters of a `forward`; the `inputs` of the graph, by the names of the tensors of its
    arguments; and arguments `fixed`, by name, which have the values of the example."""

    forward: inspect.Signature
    inputs: Mapping[str, str]
    fixed: Mapping[str, Any]

    def of(self, inputs: Iterable[str]) -> CallSignature:
        """The signature for a graph with these names of its inputs, in order."""
        return replace(self, inputs=dict(zip(self.inputs, inputs, strict=False)))

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for each argument that the example fixes, for the report."""
        kinds = (bool, int, float, str)
        items = [(name, value) for name, value in self.fixed.items() if isinstance(value, kinds)]
        return tuple(f"argument {name} is always {value!r}" for name, value in items)

    def bind(
        self, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The inputs by name, of a call of the forward or, where that takes no such arguments, of
        the inputs `names`. Raises InputError where an argument has another value than the fixed
        one."""
        try:
            arguments = bound_arguments(self.forward, args, kwargs)
        except TypeError:
            return bind(names, args, kwargs)
        direct = {name: arguments.pop(name) for name in self.inputs if name in arguments}
        inputs = {self.inputs[name]: value for name, value in direct.items() if value is not None}
        for name, value in leaves_of(arguments):
            parameter = self.forward.parameters.get(name)
            if name in self.fixed or (parameter is not None and name not in self.inputs):
                self._check(name, value)
            elif value is not None:
                inputs[self.inputs.get(name, name)] = value
        for name in self.fixed.keys() - arguments.keys() - direct.keys():
            parameter = self.forward.parameters.get(name)
            if parameter is not None and parameter.default is not None:
                self._check(name, parameter.default)
        return inputs

    def _check(self, name: str, value: Any) -> None:
        parameter = self.forward.parameters.get(name)
        held = self.fixed[name] if name in self.fixed else parameter and parameter.default
        if not _are_same(value, held):
            raise InputError(
                f"argument {name} is {_shown(held)} in the compiled model, as in its example, and "
                f"{_shown(value)} in this call: compile the module with that"
            )


def bound_arguments(
    forward: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Each argument by the name of its parameter; elements of *args as name_0, name_1, … Raises
    TypeError where the forward does not take them."""
    arguments: dict[str, Any] = {}
    for name, value in forward.bind(*args, **kwargs).arguments.items():
        kind = forward.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            arguments |= {f"{name}_{i}": item for i, item in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= value
        else:
            arguments[name] = value
    return arguments


def leaves_of(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The leaves of arguments, each with the name of its parameter, then its keys where it is
    nested. A dataclass is a tree of its fields from then on, for torch.export too."""
    names: set[str] = set()
    for argument, value in arguments.items():
        for part in pytree.tree_leaves(value):
            if dataclasses.is_dataclass(part) and not isinstance(part, type):
                pytree.register_dataclass(type(part))
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            name = "_".join([argument, *map(_key, path)])
            while name in names:
                name += "_"
            names.add(name)
            yield name, leaf


def _key(step: Any) -> str:
    return str(getattr(step, "key", getattr(step, "idx", getattr(step, "name", step))))


def _are_same(value: Any, held: Any) -> bool:
    if isinstance(value, torch.Tensor) or isinstance(held, torch.Tensor):
        tensors = isinstance(value, torch.Tensor) and isinstance(held, torch.Tensor)
        return tensors and torch.equal(value, held)
    return value is held or (type(value) is type(held) and bool(value == held))


def _shown(value: Any) -> str:
    return "a tensor" if isinstance(value, torch.Tensor) else repr(value)
