"""`--shapes`: which axes of which inputs may vary, and how far.

    input_ids=B[1..8]xS[1..4096]     two named sizes with bounds
    x=Tx64                           T of any size, then exactly 64
    a=BxS,b=BxS                      one name is one size, in all inputs
    x=?x64                           an axis that torch.export may name itself

A name is capital letters, digits and underscores; a small x separates axes. A bound
may be left out: S[1..] has no upper one, S[..4096] starts at 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moec.errors import CaptureError, UsageError

_AXIS = re.compile(
    r"(?P<size>\d+)|(?P<any>\?)|(?P<name>[A-Z][A-Z0-9_]*)(?:\[(?P<low>\d*)\.\.(?P<high>\d*)\])?"
)
_HOW = "write it like input_ids=B[1..8]xS[1..4096] or x=Tx64"


@dataclass(frozen=True)
class AxisSize:
    """A fixed size, or a size that varies: named and bounded, or unnamed."""

    size: int | None = None
    name: str = ""
    low: int = 1
    high: int | None = None


def parse(texts: tuple[str, ...]) -> dict[str, tuple[AxisSize, ...]]:
    """The axes of each input in the texts.

    Raises UsageError where a text does not have the form above, an input is named twice, or one
    name has two bounds.
    """
    shapes: dict[str, tuple[AxisSize, ...]] = {}
    for spec in (part.strip() for text in texts for part in text.split(",")):
        name, equals, axes = spec.partition("=")
        if not equals or not name.strip() or not axes.strip():
            raise UsageError(f"--shapes {spec!r} is not INPUT=SIZES; {_HOW}")
        if name.strip() in shapes:
            raise UsageError(f"--shapes gives {name.strip()} twice")
        shapes[name.strip()] = _axes(spec, axes.strip())
    return _with_common_bounds(shapes)


def _axes(spec: str, text: str) -> tuple[AxisSize, ...]:
    axes: list[AxisSize] = []
    at = 0
    while True:
        match = _AXIS.match(text, at)
        if match is None:
            raise UsageError(f"--shapes {spec!r}: cannot read a size at {text[at:]!r}; {_HOW}")
        axes.append(_axis(spec, match))
        at = match.end()
        if at == len(text):
            return tuple(axes)
        if text[at] != "x":
            raise UsageError(f"--shapes {spec!r}: cannot read a size at {text[at:]!r}; {_HOW}")
        at += 1


def _axis(spec: str, match: re.Match[str]) -> AxisSize:
    if match["size"]:
        return AxisSize(size=int(match["size"]))
    if match["any"]:
        return AxisSize()
    low = int(match["low"]) if match["low"] else 1
    high = int(match["high"]) if match["high"] else None
    if high is not None and high < low:
        raise UsageError(f"--shapes {spec!r}: {match['name']} ends at {high}, before {low}")
    return AxisSize(name=match["name"], low=low, high=high)


def _with_common_bounds(shapes: dict[str, tuple[AxisSize, ...]]) -> dict[str, tuple[AxisSize, ...]]:
    """Copies bounds that are written once to every axis of that name."""
    bounds: dict[str, AxisSize] = {}
    for axis in (axis for axes in shapes.values() for axis in axes if axis.name):
        previous = bounds.get(axis.name)
        unbounded = axis == AxisSize(name=axis.name)
        if previous is None or previous == AxisSize(name=axis.name):
            bounds[axis.name] = axis
        elif not unbounded and axis != previous:
            shown = [f"{a.low}..{'' if a.high is None else a.high}" for a in (previous, axis)]
            raise UsageError(f"--shapes gives {axis.name} two bounds: {shown[0]} and {shown[1]}")
    return {
        name: tuple(bounds.get(axis.name, axis) for axis in axes) for name, axes in shapes.items()
    }


def dynamic_shapes(shapes: dict[str, tuple[AxisSize, ...]]) -> dict[str, dict[int, Any]] | None:
    """The shapes in torch.export's form, by input and axis; None where no shapes were given."""
    if not shapes:
        return None
    from torch.export import Dim

    dims = {
        axis.name: Dim(axis.name, min=axis.low, max=axis.high)
        for axes in shapes.values()
        for axis in axes
        if axis.name
    }

    def dim(axis: AxisSize) -> Any:
        return dims[axis.name] if axis.name else Dim.AUTO if axis.size is None else axis.size

    return {name: {i: dim(a) for i, a in enumerate(axes)} for name, axes in shapes.items()}


_EXPLAINED = (
    (
        r"You marked (\w+) as dynamic but your code specialized it to be a constant \((\d+)\)",
        "--shapes: the model fixes {0} at {1}; write {1} in its place",
    ),
    (
        r"(\w+) is to vary, and the module runs only where it is 1",
        "--shapes: the model runs only where {0} is 1; write 1 in its place",
    ),
    (
        r"Static shape constraint of (\d+) does not match input size of (\d+)",
        "--shapes gives an axis the size {0} where the example input has {1}; write {1}, or a name",
    ),
    (
        r"(\d+) not in range \[(\d+), (\w+)\]",
        "--shapes: the example input has an axis of size {0}, which is not within {1}..{2}",
    ),
    (r"dynamic_shapes(:? .* but .*)", "--shapes{0}"),
)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


@contextmanager
def explain_sizes() -> Iterator[None]:
    """While open, errors of torch.export about sizes are explained in terms of `--shapes`."""
    try:
        yield
    except CaptureError as error:
        message = "\n".join(
            map(str, _causes(error))
        )  # the error shows only the beginning of its own
        for pattern, words in _EXPLAINED:
            if match := re.search(pattern, message):
                raise UsageError(words.format(*match.groups())) from error
        raise
