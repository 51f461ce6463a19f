"""Statistics of the backend in this process."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

from moec.errors import MoecError


class FallbackWarning(UserWarning):
    """Something that looked like MoE was left to PyTorch; the message has what and why."""


class FallbackError(MoecError):
    """Raised instead of a FallbackWarning under `strict=True`."""


@dataclass(frozen=True)
class Fallback:
    """A module or graph that was left to PyTorch, and the reason."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Stats:
    """Counts since the process began, or since the last reset.

    `compilations` counts calls of the backend: one for each graph that Dynamo captures, or captures
    again for other sizes. `blocks` are the MoE blocks replaced in them; the code of `code_compiled`
    of them was generated, that of `cache_hits` came from this process and that of `disk_hits` from
    the cache on disk. `packs` counts how often the weights of a block were packed: once, and again
    after each change.
    """

    compilations: int = 0
    blocks: int = 0
    code_compiled: int = 0
    cache_hits: int = 0
    disk_hits: int = 0
    packs: int = 0
    fallbacks: tuple[Fallback, ...] = ()

    def __str__(self) -> str:
        counts = (
            f"{self.compilations} compilations, {self.blocks} blocks replaced "
            f"({self.code_compiled} compiled, {self.cache_hits} from this process, "
            f"{self.disk_hits} from disk), weights packed {self.packs} times, "
            f"{len(self.fallbacks)} fallbacks"
        )
        return "\n".join([counts, *(f"  {fallback}" for fallback in self.fallbacks)])


class StatsRecorder:
    """The counts of the process, with a lock because Dynamo may compile in several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats = Stats()

    def add(self, **counts: int) -> None:
        with self._lock:
            now = {name: getattr(self._stats, name) + more for name, more in counts.items()}
            self._stats = replace(self._stats, **now)

    def fall_back(self, fallbacks: Iterable[Fallback], *, strict: bool) -> None:
        """Record what was left to PyTorch, with one warning for all of it.

        Raises FallbackError instead of the warning where `strict`; a filter that makes errors of
        warnings raises nothing.
        """
        unique = tuple(dict.fromkeys(fallbacks))
        if not unique:
            return
        with self._lock:
            self._stats = replace(self._stats, fallbacks=self._stats.fallbacks + unique)
        listed = "; ".join(map(str, unique))
        if strict:
            raise FallbackError(f"strict=True, and moec does not compile: {listed}")
        text = f"moec does not compile, so PyTorch runs: {listed}"
        try:
            warnings.warn(text, FallbackWarning, stacklevel=2)
        except FallbackWarning:
            # A filter makes errors of warnings, which Dynamo would end in BackendCompilerFailed.
            with warnings.catch_warnings():
                warnings.simplefilter("always", FallbackWarning)
                warnings.warn(text, FallbackWarning, stacklevel=2)

    def read(self, *, reset: bool) -> Stats:
        with self._lock:
            now = self._stats
            if reset:
                self._stats = Stats()
            return now


RECORDER = StatsRecorder()


def stats(*, reset: bool = False) -> Stats:
    """What the backend has done since the process began, or since the last `reset=True`."""
    return RECORDER.read(reset=reset)
