"""The check of a compiled model that a mask selects as many positions as there are rows for them.

Compiled code calls it by the name NAME in the middle of a call, because masks are computed.
"""

from __future__ import annotations

from typing import Any

NAME = "moec.require_count"


def mismatch(count: int, rows: int, exact: bool, mask: str, source: str) -> str | None:
    """A sentence about inputs of which `mask` selects `count` positions, and `source` gives `rows`
    rows to fill them; None if the numbers agree. If not `exact`, rows may be left over."""
    if count == rows or (count < rows and not exact):
        return None
    rule = "as many of one as of the other" if exact else "at least a row for each position"
    return (
        f"{_owner_name(mask)} select{_third(mask)} {count} positions (such as tokens of images), "
        f"and {_owner_name(source)} give{_third(source)} {rows} rows for them (such as features of "
        f"images): give {rule}"
    )


def require_count(count: Any, rows: Any, exact: int, mask: str, source: str) -> Any:
    """Shapes of one axis, which hold the numbers -> `rows`. Raises ValueError if they differ."""
    sentence = mismatch(count[0], rows[0], bool(exact), mask, source)
    if sentence is not None:
        raise ValueError(sentence)
    return rows


def _owner_name(inputs: str) -> str:
    return inputs or "the model"


def _third(inputs: str) -> str:
    return "" if ", " in inputs else "s"
