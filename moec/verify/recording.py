"""Runs a compiled model with a copy of what each of its kernels got and wrote."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.utils.dlpack

from moec.runtime.call.executor import Executor
from moec.runtime.call.profile import SHAPES
from moec.runtime.device.tensors import to_caller
from moec.runtime.device.timed import open_watched
from moec.runtime.package import KernelCall, Package

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class KernelRecord:
    """A call of `function`, in tensors by the names of its graph's values: its inputs, those of
    states too, what its kernels wrote, and what was put in the place of some of that. `kernels` are
    the names of the kernels that wrote them. Of a `complete` call everything is compared, of others
    at least what is compared is copied. `shapes` are those of all inputs."""

    function: str
    inputs: Tensors
    shapes: Mapping[str, tuple[int, ...]]
    complete: bool
    results: dict[str, torch.Tensor] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)

    def read_after(self, name: str) -> torch.Tensor:
        """What the kernels that follow read."""
        return self.replaced[name] if name in self.replaced else self.results[name]


@dataclass(eq=False)
class Recording:
    """The calls of the functions of a package for CPUs. `experts` are the numbers of experts by the
    names of values that are choices of them: while `spread`, other choices take their place, of
    each expert equally many. `complete` is that of the calls that follow. Of one that is not
    the values are copied that `needs` names, by the first call and the number of those before."""

    package: Package
    experts: Mapping[str, int]
    spread: bool = False
    complete: bool = False
    needs: Callable[[KernelRecord, int], Collection[str]] | None = None
    calls: list[KernelRecord] = field(default_factory=list)

    def executor(self) -> Executor:
        """The package, recorded. Its calls must not overlap."""
        functions = open_watched(self.package.library, self.package.functions, self._watch)
        wrapped = {name: partial(self._call, name, f) for name, f in functions.items()}
        return Executor(self.package, wrapped)

    def take(self) -> list[KernelRecord]:
        """The calls since the last time."""
        calls, self.calls = self.calls, []
        return calls

    def _call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        signature = self.package.functions[name]
        ports = (*signature.inputs, *signature.states, *signature.caches)
        before = [call for call in self.calls if call.function == name]
        self._copied: Collection[str] | None = None
        if self.needs and before and not self.complete:
            self._copied = self.needs(before[0], len(before))
        inputs = {
            port.name: to_caller(tensor, port, torch, self._copies(port.name))
            for port, tensor in zip(ports, arguments, strict=False)
        }
        shapes = {port: tuple(tensor.shape) for port, tensor in inputs.items()}
        copies = {port: tensor for port, tensor in inputs.items() if self._copies(port)}
        self.calls.append(KernelRecord(name, copies, shapes, self.complete))
        self._left = iter(self.package.calls[name])
        try:
            return function(*arguments)
        except BaseException:
            self.calls.pop()  # a refused input: nothing to compare
            raise

    def _copies(self, value: str) -> bool:
        return self._copied is None or value in self._copied

    def _watch(self, name: str, kernel: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        if name.startswith(SHAPES):
            return kernel(*arguments)
        site: KernelCall = next(self._left)
        result, call = kernel(*arguments), self.calls[-1]
        for index, value in site.results:
            if self._copies(value):
                call.results[value] = torch.utils.dlpack.from_dlpack(arguments[index]).clone()
            call.kernels[value] = name
            if self.spread and value in self.experts:
                choices = torch.utils.dlpack.from_dlpack(arguments[index])
                choices.copy_(spread_choices(choices.shape, self.experts[value]))
                call.replaced[value] = choices.clone()
        return result


def spread_choices(shape: Sequence[int], experts: int) -> torch.Tensor:
    """i64[.., k]: k different ones of `experts` for each token, each expert as often as others."""
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(0))
    return order[torch.arange(torch.Size(shape).numel()) % experts].reshape(tuple(shape))
