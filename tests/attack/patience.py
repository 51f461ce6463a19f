"""Detects hanging processes by their processor time, not by the clock: a busy machine may not run a
process for minutes.

A process hangs if it has used more processor time than allowed, or if none of its threads could run
at any check for a given time. (If the system does not report that, elapsed time is used.)
"""

from __future__ import annotations

import os
import time
from pathlib import Path

INTERVAL = 0.5  # seconds between two looks
_TICK = os.sysconf("SC_CLK_TCK")


class Patience:
    """With one command of a process that runs many."""

    def __init__(self, process_id: int, seconds: float) -> None:
        self._tasks = Path(f"/proc/{process_id}/task")
        self._seconds = seconds
        self._last, self._looks = 0.0, 0
        self._start = self._last = self._used()[0]

    def verdict(self) -> str:
        """Why the process hangs, empty where it does not; to be asked every INTERVAL."""
        used, sleeps = self._used()
        self._looks = self._looks + 1 if sleeps and used == self._last else 0
        self._last = used
        if used - self._start > self._seconds:
            return f"hangs: it has used {used - self._start:.0f} s of a processor"
        if self._looks * INTERVAL > self._seconds:
            return f"hangs: it has waited for {self._looks * INTERVAL:.0f} s, and nothing wakes it"
        return ""

    def _used(self) -> tuple[float, bool]:
        """Seconds of a processor so far, and whether all threads sleep."""
        if not self._tasks.parents[1].is_dir():
            return time.monotonic(), False
        ticks, states = 0, set()
        for task in self._tasks.iterdir() if self._tasks.is_dir() else ():
            try:
                fields = (task / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # the thread has ended
                continue
            states.add(fields[0])
            ticks += int(fields[11]) + int(fields[12])
        # Threads that end take their times with them.
        return max(self._last, ticks / _TICK), states <= {"S"}
