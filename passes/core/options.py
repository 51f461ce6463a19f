"""The options of a pass: the fields of its dataclass, with their descriptions and limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any, TypeAlias, TypeVar, get_type_hints

import torch

from moec.errors import UsageError
from moec.spelling import did_you_mean

P = TypeVar("P")

Given: TypeAlias = Mapping[str, Any]
"""Values of the model's inputs by name. As an option: one per bound input."""
Model: TypeAlias = Any
"""Another model than the compiled one: a module, or its path as text."""
NUMBERS = "a number, or numbers with : between them"

_WORDS = {float: "a number", int: "a whole number", str: "a word", bool: "true or false"}


def option(
    default: Any,
    says: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field for an option of a pass: its default, a short description, its values."""
    limits = {"says": says, "choices": tuple(choices), "low": low, "high": high}
    return field(default=default, metadata=limits)


def validate(pass_: Any) -> None:
    """Raises UsageError for a field whose value is not allowed. For `__post_init__` of a pass."""
    hints = get_type_hints(type(pass_))
    for f in fields(pass_):
        value = getattr(pass_, f.name)
        if hints[f.name] in (Given, Model):
            continue  # compared with the model as the pass runs
        if not _fits(f, hints[f.name], value):
            raise UsageError(f"{pass_.name}: {f.name} is {value!r}, expected {expected(f, pass_)}")


def _fits(f: Field[Any], kind: type, value: Any) -> bool:
    if isinstance(value, bool) and kind is not bool:
        return False
    if not isinstance(value, int | float if kind is float else kind):
        return False
    choices, low, high = (f.metadata.get(name) for name in ("choices", "low", "high"))
    return (
        (not choices or value in choices)
        and (low is None or value >= low)
        and (high is None or value <= high)
    )


def expected(f: Field[Any], of: Any) -> str:
    """The allowed values of a field, in words: "a number from 0 to 1", "one of usage, random"."""
    if f.metadata.get("choices"):
        return f"one of {', '.join(f.metadata['choices'])}"
    kind = get_type_hints(of if isinstance(of, type) else type(of))[f.name]
    if kind in (Given, Model):
        return NUMBERS if kind == Given else "a path"
    low, high = f.metadata.get("low"), f.metadata.get("high")
    return (
        _WORDS[kind]
        + (f" from {low:g}" if low is not None else "")
        + (f" to {high:g}" if high is not None else "")
    )


def default(f: Field[Any]) -> str:
    """A field and its default as text: "keep=0.5"."""
    return f"{f.name}={f.default}" if f.default is not MISSING else "INPUT=VALUE"


def parse_pass(kind: type[P], text: str, where: str) -> P:
    """A pass from its options as text, such as "keep=0.5,by=usage"; `where` is the user's text.

    Raises UsageError for an option that does not exist or a value of another type.
    """
    hints = get_type_hints(kind)
    options = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    free = next((name for name, hint in hints.items() if hint == Given), None)
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if free is not None and name not in options and name and equals:
            if name in inputs:
                raise UsageError(f"{where}: {name} is given twice")
            inputs[name] = _numbers(value, name, where)
            continue
        if name not in options or not equals:
            names = ", ".join("INPUT=VALUE" if n == free else n for n in options)
            have = f"takes {names}" if options else "has no options"
            near = did_you_mean(name, options)
            what = f"there is no option {name}{near}" if equals else f"write {part} as option=value"
            sentence_ends = " " if what.endswith("?") else "; "
            raise UsageError(f"{where}: {what}{sentence_ends}{_name(kind)} {have}")
        if name in values:
            raise UsageError(f"{where}: {name} is given twice")
        try:
            values[name] = _read(hints[name], value)
        except ValueError:
            description = expected(options[name], kind)
            raise UsageError(f"{where}: {name} is {value!r}, expected {description}") from None
    return kind(**values, **({free: inputs} if free else {}))


def _numbers(text: str, name: str, where: str) -> Any:
    try:
        numbers = [
            float(part) if set(part) & set(".eEnN") else int(part) for part in text.split(":")
        ]
    except ValueError:
        raise UsageError(f"{where}: {name} is {text!r}, expected {NUMBERS}") from None
    return numbers if len(numbers) > 1 else numbers[0]


def _name(kind: type) -> str:
    return str(getattr(kind, "name", kind.__name__))


def _read(kind: type, text: str) -> Any:
    if kind is bool:
        return {"true": True, "false": False}[text] if text in ("true", "false") else _refuse()
    return text if kind is Model else kind(text)


def _refuse() -> Any:
    raise ValueError


def show(pass_: Any) -> str:
    """A pass as it is written: "merge-experts(keep=0.5)"."""
    values: dict[str, Any] = {}
    for f in fields(pass_):
        value = getattr(pass_, f.name)
        values |= show_given(value) if isinstance(value, Mapping) else {f.name: value}
    options = ",".join(f"{name}={value}" for name, value in values.items())
    return f"{pass_.name}({options})" if options else str(pass_.name)


def show_given(inputs: Given) -> dict[str, str]:
    """The values of inputs, as they are written."""
    return {
        name: ":".join(map(str, torch.as_tensor(value).flatten().tolist()))
        for name, value in inputs.items()
    }
