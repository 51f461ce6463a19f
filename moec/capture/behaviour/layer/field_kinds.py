"""The kinds of values that the fields of a user's description take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

from moec.errors import UsageError

_Kind = tuple[Callable[[Any], bool], str]


def check_fields(values: Mapping[str, Any]) -> None:
    """Raises UsageError, naming the field, for a value of the wrong kind. Unknown fields pass."""
    for name, value in values.items():
        fits, words = _KINDS.get(name, (lambda v: True, ""))
        if not fits(value):
            raise UsageError(f"{name}={value!r}: give {words}")


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_fraction(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and Fraction(str(value)) >= 0
    except (ValueError, ZeroDivisionError):
        return False


def _are_names(value: Any) -> bool:
    names = (value,) if isinstance(value, str) else value
    return isinstance(names, Sequence) and all(isinstance(n, str) and n for n in names)


def _are_terms(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return _are_names(value)
    return _are_names(tuple(value)) and all(isinstance(gate, str) for gate in value.values())


def _are_groups(value: Any) -> bool:
    if not isinstance(value, tuple | list):
        return False
    return len(value) in (0, 3) and all(_is_count(size, 1) for size in value)


def _each(names: Iterable[str], kind: _Kind) -> dict[str, _Kind]:
    return dict.fromkeys(names, kind)


def _one_of(*choices: str) -> _Kind:
    return lambda v: isinstance(v, str) and v in choices, f"one of {', '.join(choices)}"


_KINDS: Mapping[str, _Kind] = {
    **_each(
        ("router", "experts"),
        (lambda v: _are_names(v) and bool(v), "the name of a part, or a list of names"),
    ),
    "source": (_are_names, "the name of a submodule, or a list of names"),
    "shared": (_are_terms, "names of submodules, or a mapping from each to its gate"),
    "correction": (lambda v: isinstance(v, str), "the name of a tensor"),
    "top_k": (lambda v: _is_count(v, 1), "a whole number of at least 1"),
    "least": (lambda v: _is_count(v, 0), "a whole number of at least 0"),
    "factor": (_is_fraction, "a number of at least 0"),
    "temperature": (lambda v: _is_number(v) and v != 0, "a number other than 0"),
    **_each(
        ("eps", "scale", "threshold"),
        (_is_number, "a finite number (in YAML, 1e-6 is text, and 1.0e-6 a number)"),
    ),
    **_each(
        ("renormalise", "renormalise_again", "eps_is_floor", "round_up"),
        (lambda v: isinstance(v, bool), "true or false"),
    ),
    "groups": (_are_groups, "three whole numbers: groups, groups kept, scores that rank a group"),
    **_each(("body", "capacity"), (lambda v: v is None or isinstance(v, Mapping), "a mapping")),
    "ranked_by": _one_of("score", "logits"),
    "threshold_on": _one_of("weight", "score", "mass"),
    "ties": _one_of("topk", "first"),
    "per": _one_of("sequence", "all"),
    "dropped": _one_of("zero", "pass", "weighted"),
    "kind": _one_of("linear", "plain", "gated", "packed"),
}
