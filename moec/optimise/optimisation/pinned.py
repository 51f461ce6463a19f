"""Formats that the user has chosen for some products: PATTERN=FORMAT."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from moec.errors import UsageError
from moec.ir.formats.notation import Format
from moec.passes.approximate.choices.model_choices import UNCHANGED, parse_format


@dataclass(frozen=True)
class PinnedFormat:
    """The format of the products whose names match `pattern`; None: their weights as they are."""

    pattern: str
    format: Format | None


def parse_pinned(formats: Mapping[str, str]) -> tuple[PinnedFormat, ...]:
    """Raises UsageError, as `parse_format` does, for what is neither a format nor "unchanged"."""
    return tuple(
        PinnedFormat(pattern, None if text == UNCHANGED else parse_format(text))
        for pattern, text in formats.items()
    )


def split_pinned(texts: Collection[str]) -> dict[str, str]:
    """PATTERN=FORMAT of a command line. Raises UsageError for a text of another form."""
    for text in texts:
        if not all(text.rpartition("=")):
            raise UsageError(f"--pin {text}: write PATTERN=FORMAT, such as lm_head={UNCHANGED}")
    return {pattern: format for pattern, _, format in (text.rpartition("=") for text in texts)}


def pinned_for(name: str, pinned: Collection[PinnedFormat]) -> PinnedFormat | None:
    """The last that matches a product."""
    matching = [pin for pin in pinned if fnmatchcase(name, pin.pattern)]
    return matching[-1] if matching else None


def check_pinned(names: Collection[str], pinned: Collection[PinnedFormat]) -> None:
    """Raises UsageError for a pattern that no product matches."""
    for pin in pinned:
        if not any(fnmatchcase(name, pin.pattern) for name in names):
            first, rest = [*names][:6], len(names) - 6
            more = f" and {rest} more" if rest > 0 else ""
            raise UsageError(
                f"no product is named {pin.pattern!r}: products are {', '.join(first)}{more}"
            )
