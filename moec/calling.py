"""How a compiled model is called, fresh or loaded: arguments by place or by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moec.errors import InputError


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
