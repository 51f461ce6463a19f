"""Opens a recording of the choices of experts of a running model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moec.errors import InputError
from moec.runtime.call.executor import Executor
from moec.runtime.call.recorder import Recorder


@contextmanager
def record_routing(executor: Executor) -> Iterator[Recorder]:
    """Record every call of the executor, from any thread, until the end of the block.

    Raises InputError where the model was compiled without `record_routing`, or is being recorded.
    """
    layers = executor.package.recorded
    if not layers:
        raise InputError(
            "this model cannot record routing: compile it with --record-routing "
            "(record_routing=True in Python)"
        )
    recorder = Recorder(layers)
    executor.start_recording(recorder)
    try:
        yield recorder
    finally:
        executor.stop_recording()
