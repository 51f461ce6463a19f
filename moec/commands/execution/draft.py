"""The smaller model of --draft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moec.runtime.text.prompt import Tokenizer
    from moec.runtime.text.speculation.draft import Draft
    from moec.runtime.text.texts import Decoder


def open_draft(
    path: Path | None, executor: Decoder, tokenizer: Callable[[], Tokenizer]
) -> Draft | None:
    """The model at `path` as a draft of another. Raises as `moec.load` and `draft_of`."""
    if path is None:
        return None
    from moec import load
    from moec.model.generate import Writer, draft_of

    small = load(path)
    return draft_of(Writer(executor, tokenizer), Writer(small.executor, lambda: small.tokenizer))
