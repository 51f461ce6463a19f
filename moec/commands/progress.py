"""What a person sees while a command works: a live list on a terminal, plain lines otherwise.

All of it goes to stderr, so that stdout holds only what was asked for.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from moec.cache import CacheWarning

if TYPE_CHECKING:
    from rich.live import Live


def hush() -> None:
    """Keep the bars and warnings of other libraries out of the list; MOEC_DEBUG=1 lets them by."""
    if os.environ.get("MOEC_DEBUG") == "1":
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.simplefilter("ignore")
    warnings.simplefilter("default", CacheWarning)
    logging.disable(logging.WARNING)


@dataclass
class ProgressPhase:
    name: str
    start: float
    detail: str = ""
    end: float | None = None

    def seconds(self, now: float) -> float:
        return (self.end if self.end is not None else now) - self.start


@dataclass
class Progress:
    """Phases with their elapsed time; a context manager.

    `phase("kernels")` ends the phase before and starts one; `phase("kernels 3/24")` while
    kernels runs says how far it is. A plain line is written when a phase starts, so that a log
    shows what is taking long; on a terminal the list is redrawn in place.
    """

    quiet: bool = False
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    clock: Callable[[], float] = time.perf_counter
    phases: list[ProgressPhase] = field(default_factory=list)
    _live: Live | None = None
    _spinners: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self._start = self.clock()
        if not self.quiet and self.stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self.stream)
            if console.is_terminal and not console.is_dumb_terminal:
                self._live = Live(get_renderable=self._table, console=console, refresh_per_second=8)
                self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        now = self.clock()
        self._finish(now)
        failed = error is not None
        if self._live:
            self._failed = failed
            self._live.stop()
        elif not self.quiet and self.phases:
            how = "failed in" if isinstance(error, Exception) else "stopped in"
            self._line(now, f"{how} {self.phases[-1].name}" if failed else "done")

    _failed: bool = False

    def phase(self, text: str) -> None:
        name, _, detail = text.partition(" ")
        now = self.clock()
        current = self.phases[-1] if self.phases else None
        if current and current.name == name and current.end is None:
            current.detail = detail
            return
        self._finish(now)
        self.phases.append(ProgressPhase(name, now, detail))
        if not self._live and not self.quiet:
            self._line(now, text)

    def times(self) -> dict[str, float]:
        """Seconds by phase, of those that have ended."""
        seconds: dict[str, float] = {}
        for phase in self.phases:
            if phase.end is not None:
                seconds[phase.name] = seconds.get(phase.name, 0.0) + phase.seconds(phase.end)
        return seconds

    def _finish(self, now: float) -> None:
        if self.phases and self.phases[-1].end is None:
            self.phases[-1].end = now

    def _line(self, now: float, text: str) -> None:
        self.stream.write(f"[{now - self._start:7.1f} s] {text}\n")
        self.stream.flush()

    def _table(self) -> Any:
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        now = self.clock()
        table = Table.grid(padding=(0, 2))
        table.add_column(width=1)
        table.add_column(min_width=10)
        table.add_column(justify="right", min_width=8)
        table.add_column(style="dim")
        for phase in self.phases:
            mark: Any = Text("✓", style="green")
            if phase.end is None:
                mark = self._spinners.setdefault(phase.name, Spinner("dots", style="cyan"))
            elif self._failed and phase is self.phases[-1]:
                mark = Text("✗", style="red")
            seconds = f"{phase.seconds(now):.1f} s"
            table.add_row(mark, phase.name, seconds, phase.detail if phase.end is None else "")
        return table
