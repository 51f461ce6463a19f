"""The lock for what a capture replaces for all threads of the process."""

from __future__ import annotations

import threading

PROCESS_STATE = threading.RLock()
"""Held while the standard streams, torch's loggers, clocks, seeds or parts of torch are replaced.
Models that are compiled in parallel threads are therefore captured one after the other."""
