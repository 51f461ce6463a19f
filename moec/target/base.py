"""The interface of targets of all kinds."""

from __future__ import annotations

from typing import Any, Protocol


class Target(Protocol):
    """A machine that code is generated for.

    `kind` selects the backend. `needs` is recorded in an artifact and checked when it is read. All
    other attributes are used by the target's backend only.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def needs(self) -> Any: ...
