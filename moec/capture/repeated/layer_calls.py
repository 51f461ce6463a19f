"""What the layers of a list do in a call of the model, each called with the result of the one
before it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moec.capture.calls.call import ModuleCall
from moec.capture.export.huggingface import experts_as_ops
from moec.torch_private import TorchDispatchMode, pytree


@dataclass
class LayerCall:
    """One call of a layer: its number, its arguments beside the result of the layer before (of
    tensors, which they are), the operators that it calls with their arguments (of tensors, the
    types), and the tensors that go in and come out."""

    number: int
    beside: list[Any]
    operators: list[str] = field(default_factory=list)
    arguments: list[torch.Tensor] = field(default_factory=list)
    results: list[torch.Tensor] = field(default_factory=list)


def layer_calls(
    call: ModuleCall, lists: Sequence[Sequence[nn.Module]]
) -> list[list[LayerCall] | None]:
    """The calls of the layers in each of `lists`, in order; None for a list whose layers are not
    called once each, in order, with a result of the one before. Raises what the module raises."""
    calls: list[list[LayerCall]] = [[] for _ in lists]
    with ExitStack() as stack, torch.no_grad(), experts_as_ops(call.module):
        record = stack.enter_context(_Record())
        for layers, noted in zip(lists, calls, strict=True):
            for number, layer in enumerate(layers):
                for hook in record.hooks(layer, number, noted):
                    stack.callback(hook.remove)
        call(*(tensor.clone() for tensor in call.tensors))
    for noted in calls:  # what only the first layer reads is carried to it
        others = {each for later in noted[1:] for each in later.beside}
        for first in noted[:1]:
            first.beside = [each for each in first.beside if each in others]
    return [
        noted if _is_chain(noted, len(each)) else None
        for each, noted in zip(lists, calls, strict=True)
    ]


def _is_chain(calls: Sequence[LayerCall], length: int) -> bool:
    return [each.number for each in calls] == list(range(length)) and all(
        any(argument is result for argument in later.arguments for result in earlier.results)
        for earlier, later in itertools.pairwise(calls)
    )


class _Record(TorchDispatchMode):  # type: ignore[misc]
    """Notes the operators that the layer which runs calls."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[LayerCall] = []

    def hooks(self, layer: nn.Module, number: int, calls: list[LayerCall]) -> list[Any]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            results = calls[-1].results if calls else []
            carried = {id(result) for result in results}
            leaves = pytree.tree_leaves((args, kwargs))
            beside = [_named(leaf) for leaf in leaves if id(leaf) not in carried]
            calls.append(LayerCall(number, beside, [], _tensors((args, kwargs))))
            self.running.append(calls[-1])

        def leave(module: nn.Module, args: Any, result: Any) -> None:
            self.running.pop().results.extend(_tensors(result))

        return [
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.register_forward_hook(leave),
        ]

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self.running:
            described = pytree.tree_map(_described, (args, dict(kwargs or {})))
            self.running[-1].operators.append(f"{func} {described}")
        return func(*args, **(kwargs or {}))


def _described(value: Any) -> Any:
    tensor = isinstance(value, torch.Tensor)
    return f"{value.dtype} {tuple(value.shape)} {value.stride()}" if tensor else value


def _named(value: Any) -> Any:
    """An argument beside the last layer's result: of tensors, which one it is."""
    return id(value) if isinstance(value, torch.Tensor) else repr(value)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]
