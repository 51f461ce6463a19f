"""Runs chat templates in a process of their own, whose time and memory are limited."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from moec.errors import UsageError
from moec.extras import missing_extra

SECONDS = 5.0
PROGRAM = Path(__file__).with_name("templates.py")


class TemplateProcess:
    """Starts the process when it is first needed, and anew after one that was ended. Calls of
    several threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def render(
        self, source: str, variables: dict[str, Any] | None, seconds: float = SECONDS
    ) -> dict[str, str]:
        """See `templates.render`. Raises UsageError where jinja2 is missing."""
        try:
            request = json.dumps([source, variables]) + "\n"
        except (RecursionError, ValueError):
            return {"error": "rejected", "words": "they, or the tools, are nested too deeply"}
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            start, timer = time.monotonic(), threading.Timer(seconds, process.kill)
            timer.start()
            try:
                process.stdin.write(request)
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                line = ""
            finally:
                timer.cancel()
            if line.endswith("\n"):  # the process may have been ended in its midst
                answer: dict[str, str] = json.loads(line)
                return answer
            code = process.wait()
            self._process = None
        if time.monotonic() - start >= seconds:
            return {"error": "rejected", "words": f"it takes more than {seconds:g} seconds"}
        return {"error": "rejected", "words": f"its process ended with {code}"}

    def _started(self) -> subprocess.Popen[str]:
        """The process; after a fork, one of this process."""
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            if importlib.util.find_spec("jinja2") is None:
                raise UsageError(missing_extra(ModuleNotFoundError(name="jinja2")))
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(PROGRAM)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True, encoding="utf-8",
            )  # fmt: skip
            self._owner = os.getpid()
            weakref.finalize(self, _end, self._process, self._owner)
        return self._process


def _end(process: subprocess.Popen[str], owner: int) -> None:
    """End the process; does nothing in a fork of its owner."""
    if os.getpid() != owner:
        return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        with suppress(OSError):
            assert stream is not None
            stream.close()
