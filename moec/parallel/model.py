"""A compiled plan in a script that torchrun starts: text from all ranks."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.model.generate import Prompts, Writer, continued, stream
from moec.parallel.decoder import RankDecoder
from moec.parallel.process import Job, joined
from moec.parallel.process_ranks import ProcessRanks
from moec.parallel.store import text_files
from moec.parallel.terminal import agreed
from moec.runtime.package import DECODE
from moec.runtime.prompt import load_tokenizer


@dataclass(frozen=True)
class RankWriter:
    """This process's rank; all ranks call the same with the same arguments."""

    writer: Writer
    ranks: ProcessRanks

    def generate(self, prompts: Prompts, **options: Any) -> Any:
        """As `CompiledModel.generate`; the result is the same on every rank."""
        return continued(self.writer, prompts, **self._seeded(options))

    def stream(self, prompts: Prompts, **options: Any) -> Iterator[Any]:
        """As `CompiledModel.stream`."""
        return stream(self.writer, prompts, **self._seeded(options))

    def _seeded(self, options: dict[str, Any]) -> dict[str, Any]:
        """Every rank draws every token: a seed that nobody gave is rank 0's."""
        if options.get("temperature") and options.get("seed") is None:
            return {**options, "seed": agreed(self.ranks, secrets.randbits(32))}
        return options


@contextmanager
def open_rank(
    folder: Path | str,
    *,
    timeout: float = 60.0,
    threads: int = 1,
    signed_by: Path | str | None = None,
) -> Iterator[RankWriter]:
    """The rank of this process, of a folder that `moec compile --plan` wrote; `timeout` is how
    many seconds a rank waits for the others, `signed_by` the file of a public key whose owner must
    have signed the folder.

    Raises UsageError where torchrun did not start this process, or as many as were planned,
    ArtifactError, and RankError where another rank fails.
    """
    path, key = Path(folder), None if signed_by is None else Path(signed_by)
    with joined(Job(path, None, None, timeout, threads, signed_by=key), DECODE) as (ranks, files):
        decoder = RankDecoder(files, ranks)
        yield RankWriter(Writer(decoder, lambda: load_tokenizer(text_files(path, key))), ranks)
