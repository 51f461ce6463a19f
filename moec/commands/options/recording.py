"""The option --record-routing of commands that run an artifact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moec.commands.options.files import check_writable
from moec.errors import UsageError

if TYPE_CHECKING:
    from moec.runtime.call.executor import Executor


def check_trace(path: Path) -> None:
    """Raises UsageError, before anything runs, where no trace could be written to `path`."""
    if path.suffix != ".npz":
        raise UsageError(f"--record-routing {path}: the name must end in .npz")
    check_writable(path, f"--record-routing {path}")


@contextmanager
def recorded(executor: Executor, path: Path | None) -> Iterator[None]:
    """While open, record the choices of routers, and write them to `path`; without a path, nothing.

    Raises InputError where the model was compiled without `--record-routing`. Nothing is written
    where the block raises.
    """
    if path is None:
        yield
        return
    from moec.runtime.call.recording import record_routing
    from moec.runtime.call.routing_trace import save_trace

    with record_routing(executor) as recorder:
        yield
    save_trace(recorder.trace(), path)
