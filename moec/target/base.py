"""What is asked of any target, whatever its kind."""

from __future__ import annotations

from typing import Any, Protocol


class Target(Protocol):
    """A machine that code is generated for.

    `kind` finds the backend. `needs` is what an artifact records and is checked by. What else a
    target tells is between it and its backend.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def needs(self) -> Any: ...
