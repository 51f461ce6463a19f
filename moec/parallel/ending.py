"""A rank that the launcher ends has a moment in which to say where it waited."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Seconds. gloo notices at once that a rank is gone; a busy host takes a while to run the others.
GRACE = 5.0


@contextmanager
def ending_late(grace: float = GRACE) -> Iterator[threading.Event]:
    """While open, SIGTERM ends this process after `grace` seconds; yields the event that SIGTERM
    came.

    The launcher sends it to all ranks as soon as one has ended, which is about when those that
    waited for that one fail by themselves, with a message that it should not cut off. The signal's
    wake-up descriptor is written while the main thread is in a collective, where Python's handlers
    do not run. Outside the main thread, which alone may change handlers, this does nothing.
    """
    request = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handler = signal.signal(signal.SIGTERM, _leave_to_thread)
    threading.Thread(target=_end_after, args=(reader, grace, request), daemon=True).start()
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(descriptor)
        os.close(writer)  # the thread reads the end of the pipe, and ends


def _leave_to_thread(number: int, frame: object) -> None:
    """A handler must be set for the descriptor to be written."""


def _end_after(reader: int, grace: float, request: threading.Event) -> None:
    """Ends the process `grace` seconds after a SIGTERM; other signals have their own handlers."""
    with open(reader, "rb", buffering=0) as signals:
        while number := signals.read(1):
            if number[0] == signal.SIGTERM:
                request.set()
                time.sleep(grace)
                os._exit(128 + signal.SIGTERM)
