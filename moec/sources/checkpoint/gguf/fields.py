"""Numbers of a GGUF file's fields, checked: a stranger wrote them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moec.errors import CaptureError

MOST = 1 << 31
"""No count or size of a model is as large."""


def integer(fields: Mapping[str, Any], name: str, default: int, least: int = 0) -> int:
    """Raises CaptureError where the field is no whole number, or less than `least`."""
    value = fields.get(name, default)
    if type(value) is not int or not least <= value < MOST:
        raise CaptureError(f"{name} is {value!r:.40}, and has to be a whole number from {least}")
    return value


def real(fields: Mapping[str, Any], name: str, default: float) -> float:
    """Raises CaptureError where the field is no positive number."""
    value = fields.get(name, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise CaptureError(f"{name} is {value!r:.40}, and has to be a positive number")
    return float(value)


def flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    """Raises CaptureError where the field is neither true nor false."""
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise CaptureError(f"{name} is {value!r:.40}, and has to be true or false")
    return value
