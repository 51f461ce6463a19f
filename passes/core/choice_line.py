"""What was chosen for one part of a model, as data for the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChoiceLine:
    """The format of a product, or the experts and top-k of a layer, in words; the bytes that it
    saves, the damage that was predicted for it (of a layer: measured alone), and of a layer the
    part that the dropped experts had of its results. The notes of the report have the limits and
    the damage of all together."""

    name: str
    choice: str
    bytes_saved: int
    damage: float
    share: float | None = None
