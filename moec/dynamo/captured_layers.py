"""Gives a forward that Dynamo can capture to modules whose loop over experts it cannot.

A loop may branch on its data (`if rows.numel():`, `for count in counts.tolist()`). Where Dynamo
gives up on such a module, moec captures it, and its forward becomes the graph, as plain operators
with the module's own parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from moec.capture.behaviour.recorded import ExampleCall, ModelExample, may_hold_experts
from moec.capture.capture import capture
from moec.capture.captured import Captured
from moec.capture.earlier_calls.other_inputs import capture_stateless
from moec.capture.earlier_calls.two_runs import earlier_calls
from moec.capture.state.reach import values_kept
from moec.dynamo.layer_graph import (
    FORWARDS,
    previous_forward,
    replace_forward,
    restore_forward,
    torch_function,
)
from moec.dynamo.record import Fallback
from moec.errors import CaptureError, NoMatch
from moec.ir.aten import TORCH_DTYPES
from moec.ir.graph import Program, Value
from moec.oracle.agree import agree
from moec.torch_private import dynamo, hooks_of, pre_hooks_of

Axis = int | tuple[str, int, int | None]
"""A fixed size, or the name of a size with its least and its greatest value."""


@dataclass(frozen=True)
class CapturedLayer:
    """The graph of a module of this structure, in this mode, for tensors of these dtypes and sizes.

    graph: a function of None, the inputs and the tensors `weights`, those of the module by name, to
    a tuple. result: the module's result, with `...` in place of tensors.
    """

    graph: Callable[..., tuple[torch.Tensor, ...]]
    inputs: tuple[tuple[torch.dtype, tuple[Axis, ...]], ...]
    weights: tuple[str, ...]
    training: bool
    result: Any
    structure: ModuleStructure

    def covers(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if len(args) != len(self.inputs) or kwargs or module.training != self.training:
            return False
        sizes: dict[str, int] = {}
        for value, (dtype, axes) in zip(args, self.inputs, strict=True):
            if not isinstance(value, torch.Tensor) or value.dtype is not dtype:
                return False
            if value.dim() != len(axes) or not _fits(value, axes, sizes):
                return False
        return self.structure.is_that_of(module)

    def run(self, module: nn.Module, args: Sequence[torch.Tensor]) -> Any:
        held = (_tensor(module, name) for name in self.weights)
        outputs = iter(self.graph(None, *args, *held))
        leaves = (next(outputs) if leaf is ... else leaf for _, leaf in result_leaves(self.result))
        return result_like(self.result, iter(leaves))


_NAME = "captured"
_LAYER = "moec_layer"


def is_captured(module: nn.Module) -> bool:
    return _LAYER in module.__dict__


def capture_layers(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Fallback]:
    """Replaces the forward of each module that holds experts, that Dynamo cannot capture, and that
    moec captures. Returns the others that Dynamo cannot capture, with reasons."""
    modules = {name: part for name, part in model.named_modules() if may_hold_experts(part)}
    with values_kept(model):
        calls = ModelExample(model, args, kwargs).record(list(modules))
    settled: list[str] = []
    refusals = []
    for name in reversed(modules):
        if name not in calls or any(_inside(other, name) for other in settled):
            continue
        module, call = modules[name], calls[name]
        try:
            if not _is_one_graph(module, call):
                _replace(module, call)
            settled.append(name)
        except NoMatch as why:
            kind = type(module).__name__
            where = f"{name} ({kind})" if name else kind
            reason = f"Dynamo does not capture it, and neither does moec: {why}"
            refusals.append((name, Fallback(where, reason)))
    return [
        fallback
        for name, fallback in refusals
        if not any(_inside(name, other) or _inside(other, name) for other in settled)
    ]


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module that was captured, which is its own for calls of another kind."""
    layer: CapturedLayer = self.__dict__[_LAYER]
    if not layer.covers(self, args, kwargs):
        return previous_forward(self, _NAME, *args, **kwargs)
    return layer.run(self, args)


def _replace(module: nn.Module, call: ExampleCall) -> None:
    """Raises NoMatch where moec does not capture the module, or in no form that Dynamo captures."""
    if call.kwargs or not all(isinstance(value, torch.Tensor) for value in call.args):
        raise NoMatch("it is called with arguments that are no tensors, or by keyword")
    structure = ModuleStructure.of(module)
    why = "Dynamo captures no form of its graph"
    for captured in _forms(module, call):
        try:
            layer = _layer(module, structure, call, captured)
        except NoMatch as reason:
            why = str(reason)
            continue
        module.__dict__[_LAYER] = layer
        replace_forward(module, _NAME, forward)
        if _is_one_graph(module, call):
            return
        restore_forward(module, _NAME, forward)
        del module.__dict__[_LAYER]
    raise NoMatch(why)


def _forms(module: nn.Module, call: ExampleCall) -> Iterator[Captured]:
    """The captures of a module, the one that is recognised best first. Raises NoMatch where there
    is none."""
    try:
        earlier = earlier_calls(module, call.args, call.kwargs)
        if earlier.slots:
            words = " and ".join(slot.words for slot in earlier.slots[:2])
            raise NoMatch(
                f"its calls set {words}, which a graph does not do; return "
                "the value, or set it only where the module is training"
            )
        with _mode_kept(module):
            form = capture_stateless(earlier, partial(capture, module, call.args, call.kwargs))
        yield form
        while form.other is not None:
            with _mode_kept(module):
                form = form.other()
            yield form
    except CaptureError as error:
        raise NoMatch(" ".join(str(error).split("\n")[:2])) from None


def _layer(
    module: nn.Module, structure: ModuleStructure, call: ExampleCall, captured: Captured
) -> CapturedLayer:
    program = captured.program
    if program.graph.states or captured.structure.numbers:
        raise NoMatch("it returns numbers, or keeps a state")
    if module.training and not agree(program, captured.eager, captured.example):
        raise NoMatch("it computes something else where it is training")
    tensors = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    weights = tuple(value.name for value in program.graph.params)
    if other := next((name for name in weights if name not in tensors), None):
        raise NoMatch(
            f"it reads a tensor ({other}) that is neither a parameter nor a buffer, and may become "
            "another one: register it as a buffer"
        )
    leaves = [
        ... if isinstance(leaf, torch.Tensor) else leaf for _, leaf in result_leaves(call.result)
    ]
    return CapturedLayer(
        torch_function(program.graph),
        tuple(_input(program, value) for value in program.graph.inputs),
        weights,
        module.training,
        result_like(call.result, iter(leaves)),
        structure,
    )


def _input(program: Program, value: Value) -> tuple[torch.dtype, tuple[Axis, ...]]:
    """Raises NoMatch where sizes are limited together, such as their product."""
    bounds = program.graph.bounds
    if not all(name.isidentifier() for name in bounds):
        raise NoMatch(f"its graph holds for some {', '.join(bounds)} only")
    axes: list[Axis] = []
    for dim in value.shape:
        if isinstance(dim, int):
            axes.append(dim)
        elif str(dim) in bounds:
            axes.append((str(dim), bounds[str(dim)].low, bounds[str(dim)].high))
        else:
            raise NoMatch(f"{value.name} has an axis of size {dim}")
    return TORCH_DTYPES[value.dtype], tuple(axes)


def _fits(value: torch.Tensor, axes: Sequence[Axis], sizes: dict[str, int]) -> bool:
    """Whether a tensor has these sizes, together with those in `sizes`, to which its own go."""
    for size, axis in zip(value.shape, axes, strict=True):
        if isinstance(axis, int):
            if size != axis:
                return False
            continue
        name, low, high = axis
        if name not in sizes:
            sizes[name] = size
        if size != sizes[name] or (low and size < low) or (high is not None and size > high):
            return False
    return True


@contextmanager
def _mode_kept(module: nn.Module) -> Iterator[None]:
    """On leaving, all parts are in training mode that were: a capture sets evaluation mode."""
    training = [part for part in module.modules() if part.training]
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _is_one_graph(module: nn.Module, call: ExampleCall) -> bool:
    """Whether Dynamo makes one graph of the module, as it does in a prepared model."""

    def leaves(*args: Any, **kwargs: Any) -> list[Any]:
        return [leaf for _, leaf in result_leaves(module(*args, **kwargs))]

    try:
        patch = dynamo.config.patch(capture_dynamic_output_shape_ops=True)
        with values_kept(module), patch, torch.no_grad():
            dynamo.export(leaves)(*call.args, **call.kwargs)
    except Exception:  # its errors have no common class; the module's own are those of eager
        return False
    return True


def _inside(inner: str, outer: str) -> bool:
    return inner == outer or not outer or inner.startswith(f"{outer}.")


def _tensor(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer."""
    owner, _, attribute = name.rpartition(".")
    value = getattr(module.get_submodule(owner), attribute)
    assert isinstance(value, torch.Tensor)
    return value


def result_leaves(result: Any, name: str = "output") -> list[tuple[str, Any]]:
    """(name, value) of every leaf of a result: tensors, numbers, None."""
    items: list[tuple[object, Any]]
    if isinstance(result, tuple | list):
        items = list(enumerate(result))
    elif isinstance(result, dict):
        items = list(result.items())
    elif is_dataclass(result) and not isinstance(result, type):
        items = [(f.name, getattr(result, f.name)) for f in fields(result)]
    else:
        return [(name, result)]
    return [leaf for key, value in items for leaf in result_leaves(value, f"{name}.{key}")]


def result_like(result: Any, values: Iterator[Any]) -> Any:
    """The containers of `result` with the leaves `values`."""
    if isinstance(result, tuple) and hasattr(result, "_fields"):
        return type(result)(*(result_like(item, values) for item in result))
    if isinstance(result, tuple | list):
        return type(result)(result_like(item, values) for item in result)
    if isinstance(result, dict):
        return type(result)(**{key: result_like(item, values) for key, item in result.items()})
    if is_dataclass(result) and not isinstance(result, type):
        named = {f.name: result_like(getattr(result, f.name), values) for f in fields(result)}
        return type(result)(**named)
    return next(values)


# ---- what a module's behaviour depends on beside its weights -------------------------
# Dynamo traces the comparison, so that its guards hold what was compared.


_PLAIN = (bool, int, float, str, type(None), torch.dtype, FunctionType, BuiltinFunctionType)


@dataclass(frozen=True)
class ModuleStructure:
    """`parts` has a line for each submodule, `plain` the names and values of its attributes that
    are numbers, texts or functions."""

    parts: tuple[tuple[object, ...], ...]
    plain: tuple[tuple[str, str, Any], ...]

    @staticmethod
    def of(module: nn.Module) -> ModuleStructure:
        return ModuleStructure(tuple(_parts(module)), tuple(_plain(module)))

    def is_that_of(self, module: nn.Module) -> bool:
        if tuple(_parts(module)) != self.parts:
            return False
        modules = dict(module.named_modules())
        return all(
            getattr(modules[name], key, _MISSING) == value for name, key, value in self.plain
        )


_MISSING = "(missing)"


def _parts(module: nn.Module) -> Iterator[tuple[object, ...]]:
    for name, part in module.named_modules():
        yield (
            name,
            type(part),
            part.training,
            *(tuple(hooks) for hooks in (hooks_of(part), pre_hooks_of(part))),
            *(f"{key} {tuple(p.shape)}" for key, p in part.named_parameters(recurse=False)),
            *(f"{key} {tuple(b.shape)}" for key, b in part.named_buffers(recurse=False)),
            FORWARDS not in part.__dict__ and _has_own_forward(part),
        )


def _has_own_forward(part: nn.Module) -> bool:
    """Whether the instance has a forward. Dynamo has no guard for the second condition alone."""
    return not inspect.ismethod(part.forward) or "forward" in part.__dict__


def _plain(module: nn.Module) -> Iterator[tuple[str, str, Any]]:
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if isinstance(value, _PLAIN) and not key.startswith("_") and key != "training":
                yield name, key, value
