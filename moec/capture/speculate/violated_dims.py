"""What torch says about sizes of dynamic_shapes that an export cannot have, in one sentence."""

from __future__ import annotations

import re

_GUARDED = re.compile(
    r"Not all values of (?P<name>\w+) = (?P<size>L\[.+?\]\.size\(\)\[\d+\]) in the specified range "
    r"(?:<=? \d+ )?satisf\w+ the generated guard (?P<guard>.+?)\.?$",
    re.MULTILINE,
)
_CONSTANT = re.compile(
    r"You marked (?P<name>\w+) as dynamic but your code specialized it to be a constant "
    r"\((?P<size>\d+)\)"
)
_OUTSIDE = re.compile(r"^(?P<size>\d+) not in range \[(?P<low>\d+), (?P<high>\w+)\]")


def violated_dim(name: str, text: str) -> str | None:
    """The refusal of a module whose export violates a Dim that the user gave; None for another
    message of torch."""
    outside = _OUTSIDE.match(text)
    if outside:
        low, high = outside["low"], outside["high"]
        return (
            f"{name}: the example has a size of {outside['size']}, and dynamic_shapes allows "
            f"{low} to {high}; give an example within the range, or a Dim that contains it"
        )
    constant = _CONSTANT.search(text)
    if constant:
        dim, size = constant["name"], constant["size"]
        return (
            f"{name}: dynamic_shapes lets {dim} vary, and the module fixes it at {size}; leave "
            f"{dim} out of dynamic_shapes, or compute what fixes it of symbolic sizes"
        )
    guards = dict.fromkeys(
        (match["name"], match["guard"].replace(match["size"], match["name"]))
        for match in _GUARDED.finditer(text)
    )
    if not guards:
        return None
    (dim, condition), *_ = guards
    return (
        f"{name}: dynamic_shapes gives {dim} sizes at which the graph of the example fails, "
        f"because the module requires {condition}; give {dim} limits within which that is so, such "
        f'as Dim("{dim}", min=2) or 2 * Dim("{dim}"), or Dim.AUTO, with which moec finds the sizes'
    )
