"""The options of a pass: the fields of its dataclass, each with what it says and what it may be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any, TypeAlias, TypeVar, get_type_hints

import torch

from moec.errors import UsageError

P = TypeVar("P")

Given: TypeAlias = Mapping[str, Any]
"""Inputs of the model with what they are bound to: an option for each name that is given."""
Model: TypeAlias = Any
"""A model besides the one that is compiled: its path, where it is given as text."""
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
    """A field of a pass: its default, what it means in a few words, and which values it takes."""
    limits = {"says": says, "choices": tuple(choices), "low": low, "high": high}
    return field(default=default, metadata=limits)


def validate(made: Any) -> None:
    """What `__post_init__` of a pass calls. Raises UsageError for a value that a field refuses."""
    hints = get_type_hints(type(made))
    for f in fields(made):
        value = getattr(made, f.name)
        if hints[f.name] in (Given, Model):
            continue  # compared with the model as the pass runs
        if not _fits(f, hints[f.name], value):
            raise UsageError(f"{made.name}: {f.name} is {value!r}, expected {expected(f, made)}")


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
    """What a field takes: "a number from 0 to 1", "one of usage, random"."""
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
    """A field with its default, as it is written."""
    return f"{f.name}={f.default}" if f.default is not MISSING else "INPUT=VALUE"


def made_from(kind: type[P], text: str, where: str) -> P:
    """A pass from its options as text, such as "keep=0.5,by=usage"; `where` is what was written.

    Raises UsageError for an option that does not exist or a value of another type.
    """
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    free = next((name for name, hint in hints.items() if hint == Given), None)
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if free is not None and name not in known and name and equals:
            if name in inputs:
                raise UsageError(f"{where}: {name} is given twice")
            inputs[name] = _numbers(value, name, where)
            continue
        if name not in known or not equals:
            names = ", ".join("INPUT=VALUE" if n == free else n for n in known)
            have = f"takes {names}" if known else "has no options"
            what = f"there is no option {name}" if equals else f"write {part} as option=value"
            raise UsageError(f"{where}: {what}; {_name(kind)} {have}")
        if name in given:
            raise UsageError(f"{where}: {name} is given twice")
        try:
            given[name] = _read(hints[name], value)
        except ValueError:
            wanted = expected(known[name], kind)
            raise UsageError(f"{where}: {name} is {value!r}, expected {wanted}") from None
    return kind(**given, **({free: inputs} if free else {}))


def _numbers(text: str, name: str, where: str) -> Any:
    try:
        made = [float(part) if set(part) & set(".eEnN") else int(part) for part in text.split(":")]
    except ValueError:
        raise UsageError(f"{where}: {name} is {text!r}, expected {NUMBERS}") from None
    return made if len(made) > 1 else made[0]


def _name(kind: type) -> str:
    return str(getattr(kind, "name", kind.__name__))


def _read(kind: type, text: str) -> Any:
    if kind is bool:
        return {"true": True, "false": False}[text] if text in ("true", "false") else _refuse()
    return text if kind is Model else kind(text)


def _refuse() -> Any:
    raise ValueError


def show(made: Any) -> str:
    """A pass as it is written: "merge-experts(keep=0.5)"."""
    values: dict[str, Any] = {}
    for f in fields(made):
        value = getattr(made, f.name)
        values |= show_given(value) if isinstance(value, Mapping) else {f.name: value}
    options = ",".join(f"{name}={value}" for name, value in values.items())
    return f"{made.name}({options})" if options else str(made.name)


def show_given(given: Given) -> dict[str, str]:
    """The values of inputs, as they are written."""
    return {
        name: ":".join(map(str, torch.as_tensor(value).flatten().tolist()))
        for name, value in given.items()
    }


_ITEM = re.compile(r"\s*([^,()]*(?:\([^()]*\))?[^,()]*)\s*(?:,|$)")


def split(text: str) -> list[str]:
    """The items of "+a(b=1,c=2),-d", split at the commas outside parentheses.

    Raises UsageError where a parenthesis has no partner.
    """
    items: list[str] = []
    at = 0
    while at < len(text):
        found = _ITEM.match(text, at)
        if found is None:
            raise UsageError(f"--passes {text}: a parenthesis has no partner")
        items.append(found[1].strip())
        at = found.end()
    return [item for item in items if item]
