"""Suggestions for misspelt words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

_MOST_NAMES = 1000


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'X'?` for the nearest of `words`; empty where none is near."""
    near = difflib.get_close_matches(word, list(words), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def did_you_mean_file(path: Path) -> str:
    """`; did you mean 'X'?` for an existing file or folder with nearly the name of `path`."""
    try:
        entries = islice(path.parent.iterdir(), _MOST_NAMES)
        present = {entry.stem: entry for entry in entries if entry != path}
    except OSError:
        return ""
    # suffixes are similar even if names are not
    near = difflib.get_close_matches(path.stem, present, 1)
    return f"; did you mean {str(present[near[0]])!r}?" if near else ""
