"""A compiled plan in a script that torchrun starts: generates text on all ranks."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.model.generate import Prompts, Writer, continued, stream, with_options
from moec.parallel.decoder import RankDecoder
from moec.parallel.process import Job, joined
from moec.parallel.process_ranks import ProcessRanks
from moec.parallel.store import text_files
from moec.parallel.terminal import agreed
from moec.runtime.package import DECODE
from moec.runtime.text.prompt import load_tokenizer


@dataclass(frozen=True)
class RankWriter:
    """This process's rank. All ranks make the same calls with the same arguments."""

    writer: Writer
    ranks: ProcessRanks

    @with_options
    def generate(self, prompts: Prompts, **options: Any) -> Any:
        """As `CompiledModel.generate`; the result is the same on every rank."""
        return continued(self.writer, prompts, **self._seeded(options))

    @with_options
    def stream(self, prompts: Prompts, **options: Any) -> Iterator[Any]:
        """As `CompiledModel.stream`."""
        return stream(self.writer, prompts, **self._seeded(options))

    def _seeded(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options with rank 0's seed if none was given: every rank draws every token."""
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
    """The rank of this process in a folder that `moec compile --plan` wrote.

    `timeout` is the number of seconds that a rank waits for the others; `signed_by` is the file of
    the public key by which the folder must be signed.

    Raises UsageError where torchrun did not start this process, or started another number of ranks
    than planned, ArtifactError, and RankError where another rank fails.
    """
    path, key = Path(folder), None if signed_by is None else Path(signed_by)
    with joined(Job(path, None, None, timeout, threads, signed_by=key), DECODE) as (ranks, files):
        decoder = RankDecoder(files, ranks)
        yield RankWriter(Writer(decoder, lambda: load_tokenizer(text_files(path, key))), ranks)
