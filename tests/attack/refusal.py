"""Opens a damaged checkpoint: one sentence has to come back, soon, and without much memory."""

from __future__ import annotations

import random
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from moec.capture.doors import open_source
from moec.errors import MoecError

MEMORY = 1 << 30
"""Bytes of addresses that reading a damaged file may add."""
SECONDS = 5.0
"""Of a processor, for one file."""
LONGEST = 2000
"""Characters of a message."""
READ = "is read, and should be refused"


def case(
    writers: Mapping[str, Callable[[Path, random.Random], Path]],
    folder: Path,
    draw: random.Random,
    memory: int = MEMORY,
) -> list[str]:
    """The faults of one of the writers' files, which is written into `folder`/case."""
    name = draw.choice([*writers])
    return [f"{name}: {fault}" for fault in faults_of(written(writers[name], folder, draw), memory)]


def written(
    writer: Callable[[Path, random.Random], Path], folder: Path, draw: random.Random
) -> Path:
    path = folder / "case"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return writer(path, draw)


def faults_of(path: Path, memory: int = MEMORY) -> list[str]:
    """What is wrong with how a damaged file is refused."""
    start = time.process_time()
    with limited(memory):
        result = _refusal(path)
    seconds = time.process_time() - start
    return [*result, *([f"takes {seconds:.1f} s"] if seconds > SECONDS else [])]


def _refusal(path: Path) -> list[str]:
    try:
        source = open_source(path)
        if source.codes is not None:
            source.codes()
    except MoecError as error:
        message = str(error)
        faults = [] if message.strip() else [f"{type(error).__name__} without a word"]
        faults += ["more than one line"] if "\n" in message else []
        faults += [f"{len(message)} characters"] if len(message) > LONGEST else []
        faults += ["memory"] if "memory" in message.lower() else []
        return [f"{fault}: {message[:300]}" for fault in faults]
    except BaseException as error:  # also what is no Exception ends a process
        return [f"ends in {error!r}"[:500]]
    return [READ]


@contextmanager
def limited(memory: int) -> Iterator[None]:
    """Allocations that would add more than `memory` bytes fail."""
    if sys.platform != "linux":
        yield
        return
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + memory, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
