"""Detects unrequested actions of a process, by Python's audit hooks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORBIDDEN = frozenset(
    {
        *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty"),
        *("subprocess.Popen", "pty.spawn", "pickle.find_class", "marshal.loads"),
        *("socket.connect", "socket.bind", "urllib.Request", "webbrowser.open", "os.kill"),
        *("os.chmod", "os.chown", "os.symlink", "os.link", "os.truncate"),
    }
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Between `begin` and `end`, records forbidden actions, and files that are written outside of
    `folders`. A hook stays for the life of a process."""

    def __init__(self, folders: tuple[Path, ...], allowed: frozenset[str] = frozenset()) -> None:
        self._folders, self._forbidden = folders, FORBIDDEN - allowed
        self._on, self._acts = False, list[str]()
        sys.addaudithook(self._hook)

    @contextmanager
    def acts(self) -> Iterator[list[str]]:
        """The acts of the block, one text each."""
        self._acts, self._on = [], True
        try:
            yield self._acts
        finally:
            self._on = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event in self._forbidden and not (event == "marshal.loads" and _importing()):
            self._acts.append(f"{event}{arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path, flags = Path(os.fsdecode(arguments[0])).absolute(), arguments[2] or 0
            if flags & _WRITES and path != Path(os.devnull) and not self._allows(path):
                self._acts.append(f"writes {path}")

    def _allows(self, path: Path) -> bool:
        return "__pycache__" in path.parts or any(path.is_relative_to(f) for f in self._folders)


def _importing() -> bool:
    """Python's import system reads compiled modules by marshal."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        if "importlib._bootstrap" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
