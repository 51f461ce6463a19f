"""Runs the cases of a kind in worker processes, and records those that crash, hang, or end with a
wrong exit."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.attack.patience import INTERVAL, Patience

ROOT = Path(__file__).parents[2]
STDERR = "stderr.txt"
MEMORY = 12 << 30  # bytes of addresses that a worker may have


@dataclass(frozen=True)
class Fault:
    """One error of a command of a case."""

    kind: str
    seed: int
    case: int
    words: tuple[str, ...]
    says: str

    def __str__(self) -> str:
        words = " ".join(self.words)
        return f"{self.kind} {self.case} (seed {self.seed}): moec {words}\n  {self.says}"


def attack(
    kind: str, seed: int, first: int, last: int, folder: Path, seconds: float = 60
) -> Iterator[Fault]:
    """The faults of the cases `first` to `last`. A command that hangs, by its `seconds` of a
    processor or of waiting, has its worker ended, and the next begins after it, as after a
    crash."""
    while first < last:
        worker = _start(kind, seed, first, last, folder)
        assert worker.stdout is not None
        current: dict[str, object] = {}
        patience: Patience | None = None
        ending = ""
        while not ending and (line := _line(worker.stdout)) != b"":
            if line is None:
                patience = patience or Patience(worker.pid, seconds)
                ending = patience.verdict()
                continue
            patience, current = None, json.loads(line)
            if "fault" in current:
                yield _fault(kind, seed, current, str(current["fault"]))
        if ending:
            worker.kill()
        elif code := worker.wait():
            ending = f"crashes: the process ended with {code}{_last(folder)}"
        worker.wait()
        worker.stdout.close()
        if not ending:
            return
        fault = _fault(kind, seed, current or {"case": first, "words": []}, ending)
        yield fault
        first = fault.case + 1


def _last(folder: Path) -> str:
    """The last line that a worker wrote before it ended."""
    lines = (folder / STDERR).read_text(errors="replace").split("\n")
    return "".join(f": {line}" for line in [line for line in lines if line][-1:])


def _start(kind: str, seed: int, first: int, last: int, folder: Path) -> subprocess.Popen[bytes]:
    limits = ["prlimit", f"--as={MEMORY}", "--core=0"] if sys.platform == "linux" else []
    words = [sys.executable, "-X", "faulthandler", "-m", "tests.attack.worker"]
    numbers = [str(folder), kind, str(seed), str(first), str(last)]
    environment = {**os.environ, "MOEC_CACHE": "off", "PYTHONPATH": str(ROOT)}
    environment["TMPDIR"] = str(folder)
    with (folder / STDERR).open("wb") as stderr:
        return subprocess.Popen(
            [*limits, *words, *numbers], stdout=subprocess.PIPE, stderr=stderr,
            bufsize=0, cwd=ROOT, env=environment,  # `select` sees what is buffered by nobody
        )  # fmt: skip


def _line(stream: IO[bytes]) -> bytes | None:
    """The next line; empty at the end, None where none comes soon."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        if not selector.select(INTERVAL):
            return None
    return stream.readline()


def _fault(kind: str, seed: int, line: dict[str, object], says: str) -> Fault:
    case, words = line["case"], line["words"]
    assert isinstance(case, int)
    assert isinstance(words, list)
    return Fault(kind, seed, case, tuple(words), says)
