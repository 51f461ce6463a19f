"""The call of a compiled model, with positional and keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from moec.errors import InputError
from moec.runtime.package import ROUTE, ROUTED

if TYPE_CHECKING:
    from moec.runtime.call.executor import Executor
    from moec.runtime.package import Function, RouterPorts

Choices: TypeAlias = Mapping[str, Mapping[str, Any]]
"""For each layer, by name: "experts" [T, k], and "weights" [T, k] if the routers return them."""


def bind(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs by name. None and flags that are fixed by the compilation are allowed as keywords.

    Raises InputError for too many inputs, or an input that is given twice.
    """
    if len(args) > len(names):
        raise InputError(
            f"the model takes {len(names)} inputs ({', '.join(names)}), but {len(args)} were given"
        )
    bound = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name in bound:
            raise InputError(f"input {name} was given twice, by position and by name")
        bound[name] = value
    return bound


def call(
    run: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    names: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """The output, or a dict of outputs by name if there are several."""
    outputs = run(bind(names, args, kwargs))
    return next(iter(outputs.values())) if len(outputs) == 1 else dict(outputs)


def routers(executor: Executor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Choices:
    """The choices of the hoisted routers that need no other inputs than the given ones. Raises
    InputError for a model without hoisted routers."""
    layers = _layers(executor)
    functions = executor.package.functions
    names = [port.name for port in functions[ROUTE].inputs]
    inputs = bind(names, args, kwargs)
    parts = {} if set(names) <= set(inputs) else _parts(functions, set(inputs))
    outputs = {
        name: value
        for part, ports in (parts or {ROUTE: list(inputs)}).items()
        for name, value in executor({n: inputs[n] for n in ports}, part).items()
    }
    return {
        ports.layer: {"experts": outputs[ports.experts]}
        | ({"weights": outputs[ports.weights]} if ports.weights else {})
        for ports in layers
        if ports.experts in outputs
    }


def _parts(functions: Mapping[str, Function], available: set[str]) -> dict[str, list[str]]:
    """The functions of the routers that need only the `available` inputs, with their inputs."""
    parts = {
        name: [port.name for port in function.inputs]
        for name, function in functions.items()
        if name.startswith(f"{ROUTE}_part_")
    }
    return {name: inputs for name, inputs in parts.items() if set(inputs) <= available}


def routed(
    executor: Executor, choices: Choices, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """The model with the choices of `routers`. Raises InputError where a layer's are missing."""
    choice_inputs: dict[str, Any] = {}
    for ports in _layers(executor):
        for kind, name in (("experts", ports.experts), ("weights", ports.weights)):
            if name and kind not in choices.get(ports.layer, {}):
                raise InputError(
                    f"the {kind} of {ports.layer} are missing: pass the result of routers()"
                )
            if name:
                choice_inputs[name] = choices[ports.layer][kind]
    names = [port.name for port in executor.package.main.inputs]
    return call(lambda inputs: executor({**inputs, **choice_inputs}, ROUTED), names, args, kwargs)


def _layers(executor: Executor) -> tuple[RouterPorts, ...]:
    if not executor.package.routers:
        raise InputError(
            "no router of this model runs separately: compile it with --passes +hoist-routers, "
            "and see its report"
        )
    return executor.package.routers
