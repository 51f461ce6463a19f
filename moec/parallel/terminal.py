"""One terminal for all ranks of a run: rank 0 writes to the launcher's, and the output of the
others is discarded, so that each can run the same code as a single process. Under torchrun the
terminal is rank 0's own.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from multiprocessing.connection import Client, Connection, Listener
from threading import Thread
from typing import TextIO, TypeVar, cast

import torch.distributed as dist

from moec.parallel.process import Job
from moec.parallel.process_ranks import ProcessRanks, as_rank_errors

T = TypeVar("T")

OUT, ERR = "out", "err"


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
            thread.join(1.0)


def _serve(listener: Listener) -> None:
    with suppress(EOFError, OSError), listener.accept() as connection:
        while True:
            kind, text = connection.recv()
            stream = sys.stdout if kind == OUT else sys.stderr
            stream.write(text)
            stream.flush()


@contextmanager
def terminal_of(job: Job, ranks: ProcessRanks) -> Iterator[None]:
    """While open, redirects stdout and stderr of this rank."""
    with ExitStack() as stack:
        out: TextIO = io.StringIO()
        err: TextIO = io.StringIO()
        if ranks.rank == 0 and job.terminal is None:
            out, err = sys.stdout, sys.stderr
        elif ranks.rank == 0:
            connection = stack.enter_context(Client(cast(str, job.terminal)))
            out, err = (cast(TextIO, _Sent(connection, kind)) for kind in (OUT, ERR))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        yield


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
