"""How a compiled model is called, fresh or loaded: arguments by place or by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from moec.errors import InputError

if TYPE_CHECKING:
    from moec.runtime.executor import Executor

Choices: TypeAlias = Mapping[str, Mapping[str, Any]]
"""For each layer, by name: "experts" [T, k], and "weights" [T, k] where they are known."""


def bind(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs by name. None and flags that the compilation fixed may be repeated as keywords.

    Raises InputError for one input too many, or given twice.
    """
    if len(args) > len(names):
        raise InputError(
            f"the model takes {len(names)} inputs ({', '.join(names)}), but {len(args)} were given"
        )
    bound = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name in bound:
            raise InputError(f"input {name} was given twice, by place and by name")
        bound[name] = value
    return bound


def call(
    run: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    names: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """The one output as it is, several as a dict by name."""
    outputs = run(bind(names, args, kwargs))
    return next(iter(outputs.values())) if len(outputs) == 1 else dict(outputs)


def routers(executor: Executor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Choices:
    """What hoisted routers choose. Raises InputError where there are none."""
    known = executor.package.routers
    names = [port.name for port in known.inputs] if known else []
    made = executor.route(bind(names, args, kwargs) if known else {})
    assert known is not None
    return {
        chosen.layer: {"experts": made[chosen.experts]}
        | ({"weights": made[chosen.weights]} if chosen.weights else {})
        for chosen in known.layers
    }


def routed(
    executor: Executor, choices: Choices, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """The model with the choices of `routers`. Raises InputError where a layer's are missing."""
    known = executor.package.routers
    given: dict[str, Any] = {}
    for chosen in known.layers if known else ():
        for kind, name in (("experts", chosen.experts), ("weights", chosen.weights)):
            if name and kind not in choices.get(chosen.layer, {}):
                raise InputError(f"the {kind} of {chosen.layer} are missing: give those of routers")
            if name:
                given[name] = choices[chosen.layer][kind]
    names = [port.name for port in executor.package.inputs]
    return call(lambda inputs: executor.routed(inputs, given), names, args, kwargs)
