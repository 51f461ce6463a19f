"""One terminal for all ranks of a run: rank 0 writes to it, and all ranks read the same lines.

    launcher's stdout  <-  rank 0 <- its output            the output of rank 1 … is discarded
    launcher's stdin   ->  rank 0 -> every rank's stdin

Each rank can therefore run the same code as a single process. Under torchrun the terminal is rank
0's own.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from multiprocessing.connection import Client, Connection, Listener
from queue import Empty, Queue
from threading import Thread
from typing import Any, TextIO, TypeVar, cast

import torch.distributed as dist

from moec.parallel.process import Job
from moec.parallel.process_ranks import ProcessRanks, as_rank_errors

T = TypeVar("T")

LINE, OUT, ERR = "line", "out", "err"


def agreed(ranks: ProcessRanks, value: T) -> T:
    """The value of rank 0, on every rank. Raises RankError."""
    values = [value]
    with as_rank_errors(ranks, "the start of a text", "broadcast"):
        dist.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def served() -> Iterator[str]:
    """While open, rank 0 can use this process's terminal; yields the address (`Job.terminal`)."""
    with Listener() as listener:
        address = str(listener.address)
        thread = Thread(target=_serve, args=(listener,), daemon=True)
        thread.start()
        try:
            yield address
        finally:
            with suppress(OSError):
                Client(address).close()  # wakes the thread if no rank came
            thread.join(1.0)  # it may wait for a line that is never typed


def _serve(listener: Listener) -> None:
    with suppress(EOFError, OSError), listener.accept() as connection:
        while True:
            kind, text = connection.recv()
            if kind == LINE:
                connection.send(sys.stdin.readline())
                continue
            stream = sys.stdout if kind == OUT else sys.stderr
            stream.write(text)
            stream.flush()


@contextmanager
def terminal_of(job: Job, ranks: ProcessRanks) -> Iterator[None]:
    """While open, redirects stdin, stdout and stderr of this rank."""
    with ExitStack() as stack:
        out: TextIO = io.StringIO()
        err: TextIO = io.StringIO()
        ask = sys.stdin.readline
        if ranks.rank == 0 and job.terminal is None:
            out, err = sys.stdout, sys.stderr
        elif ranks.rank == 0:
            connection = stack.enter_context(Client(cast(str, job.terminal)))
            out, err = (cast(TextIO, _Sent(connection, kind)) for kind in (OUT, ERR))
            ask = _line_reader(connection)
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        stack.callback(setattr, sys, "stdin", sys.stdin)
        sys.stdin = cast(TextIO, _Lines(ranks, ask, job.timeout / 3))
        yield


def _line_reader(connection: Connection) -> Callable[[], str]:
    def ask() -> str:
        try:
            connection.send((LINE, ""))
            return cast(str, connection.recv())
        except (EOFError, OSError):
            return ""  # the launcher has ended: no more lines

    return ask


class _Sent(io.TextIOBase):
    """Sends everything that is written to the launcher."""

    encoding = "utf-8"

    def __init__(self, connection: Connection, kind: str) -> None:
        self._connection, self._kind = connection, kind

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError("a text stream accepts only str")
        if text:
            self._connection.send((self._kind, text))
        return len(text)


class _Lines(io.TextIOBase):
    """The lines of rank 0, on every rank. While the user types, rank 0 broadcasts None every
    `patience` seconds, because the exchange of the others would time out."""

    def __init__(self, ranks: ProcessRanks, ask: Callable[[], str], patience: float) -> None:
        self._ranks, self._ask, self._patience = ranks, ask, patience

    def readline(self, size: Any = -1, /) -> str:  # type: ignore[override]
        lines: Queue[str] = Queue()
        if self._ranks.rank == 0:
            Thread(target=lambda: lines.put(self._ask()), daemon=True).start()
        while True:
            line = None
            if self._ranks.rank == 0:
                with suppress(Empty):
                    line = lines.get(timeout=self._patience)
            if (line := agreed(self._ranks, line)) is not None:
                return line
