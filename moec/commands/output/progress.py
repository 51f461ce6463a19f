"""Progress of a command: a live list on a terminal, plain lines otherwise.

All of it goes to stderr, so that stdout has only the result.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from moec.cache import CacheWarning

if TYPE_CHECKING:
    from rich.live import Live


_MOEC = logging.getLogger("moec")
_TOO_EARLY = 0.15  # share of the plan; before, the remaining time cannot be estimated
_MINUTES = 100.0  # beyond this many seconds, minutes are shown


def hush() -> None:
    """Silence progress bars and warnings of other libraries, unless MOEC_DEBUG=1."""
    if os.environ.get("MOEC_DEBUG") == "1":
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.simplefilter("ignore")
    warnings.simplefilter("default", CacheWarning)
    os.environ.setdefault("TORCH_LOGS", "-all")  # errors only, as for transformers
    if not logging.root.handlers:
        logging.root.addHandler(logging.NullHandler())  # otherwise Python writes warnings to stderr


COMPILE = {
    "start": 12.0, "capture": 20.0, "passes": 2.0, "generation": 0.2, "kernels": 18.0, "load": 0.1,
    "verify": 3.0, "save": 0.5,
}  # fmt: skip
"""Seconds by phase of `moec compile examples/tiny_moe/checkpoint` with an empty cache, on two cores
of a busy machine. The displayed estimate scales with the time of the phases that have ended."""
BEFORE_CODE = ("start", "capture", "passes")


@dataclass
class ProgressPhase:
    name: str
    start: float
    detail: str = ""
    share: float = 0.0
    end: float | None = None

    def seconds(self, now: float) -> float:
        return (self.end if self.end is not None else now) - self.start


@dataclass
class Progress:
    """Phases with their elapsed time; a context manager.

    `phase("kernels")` ends the previous phase and starts one; `phase("kernels 3/24")` while kernels
    runs sets its detail. A plain line is written when a phase starts, so that a log shows which
    phase is running, and again every `period` seconds; on a terminal the list is redrawn in place.
    With a `plan`, the expected seconds of each phase, it shows how much is done and about how long
    the rest takes. Log records of moec with a `detail` and perhaps a `share` update the phase.
    """

    quiet: bool = False
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    clock: Callable[[], float] = time.perf_counter
    phases: list[ProgressPhase] = field(default_factory=list)
    plan: Mapping[str, float] = field(default_factory=dict)
    period: float = 10.0
    """Seconds between lines where there is no terminal."""
    _ended: threading.Event = field(default_factory=threading.Event)
    _live: Live | None = None
    _spinners: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self._start = self.clock()
        self._level = _MOEC.level
        _MOEC.setLevel(logging.DEBUG)
        _MOEC.addHandler(self._shares)
        if not self.quiet and self.stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self.stream)
            if console.is_terminal and not console.is_dumb_terminal:
                self._live = Live(get_renderable=self._table, console=console, refresh_per_second=8)
                self._live.start()
        if not self.quiet and self._live is None:
            threading.Thread(target=self._speak, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        _MOEC.removeHandler(self._shares)
        _MOEC.setLevel(self._level)
        now = self.clock()
        self._finish(now)
        failed = error is not None
        if self._live:
            self._failed = failed
            self._live.stop()
        elif not self.quiet and self.phases:
            how = "failed in" if isinstance(error, Exception) else "stopped in"
            self._line(now, f"{how} {self.phases[-1].name}" if failed else "done")

    def _speak(self) -> None:
        """Without a terminal, a line whenever a phase has run for another while."""
        while not self._ended.wait(self.period):
            if self.phases and self.phases[-1].end is None:
                phase = self.phases[-1]
                self._line(self.clock(), f"{phase.name} {phase.detail}".rstrip())

    _failed: bool = False
    _level: int = logging.NOTSET

    def __post_init__(self) -> None:
        self._shares = _Shares(self)

    def fraction(self, now: float) -> float:
        """The share of the plan that is done, from 0 to 1."""
        total = sum(self.plan.values())
        if not total or not self.phases:
            return 0.0
        current, names = self.phases[-1], {phase.name for phase in self.phases}
        if current.end is None:
            names.discard(current.name)
        done = sum(self.plan.get(name, 0.0) for name in names)
        expected = self.plan.get(current.name, 0.0) if current.end is None else 0.0
        pace = max((current.start - self._start) / done, 0.1) if done else 1.0
        guess = min(current.seconds(now) / (expected * pace), 0.9) if expected else 0.0
        return min((done + expected * (current.share or guess)) / total, 1.0)

    def outlook(self, now: float) -> str:
        """Text such as `42 %, about 20 s left`; only the percentage where too little is done, empty
        without a plan."""
        fraction = self.fraction(now)
        if not self.plan:
            return ""
        percent = f"{fraction:.0%}".replace("%", " %")
        if fraction < _TOO_EARLY:
            return percent
        left = (now - self._start) * (1 - fraction) / fraction
        return f"{percent}, about {about(left)} left"

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
        outlook = self.outlook(now) if self.phases and self.phases[-1].end is None else ""
        shown = f"  {outlook}" if outlook else ""
        self.stream.write(f"[{now - self._start:7.1f} s{shown}] {text}\n")
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
        if self.plan and self.phases and self.phases[-1].end is None:
            table.add_row("", Text(self.outlook(now), style="bold"), "", "")
        return table


def about(seconds: float) -> str:
    """A rough duration: 8 s, 3 min."""
    return f"{seconds:.0f} s" if seconds < _MINUTES else f"{seconds / 60:.0f} min"


class _Shares(logging.Handler):
    """Passes log records of the running phase to a Progress."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.DEBUG)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        detail, phases = getattr(record, "detail", None), self._progress.phases
        if detail is not None and phases:
            phases[-1].detail = str(detail)
            phases[-1].share = getattr(record, "share", phases[-1].share)
