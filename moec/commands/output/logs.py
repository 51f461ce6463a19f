"""Output of moec's loggers: to stderr with -v, to a file with --log-file.

The library itself installs no handlers; a program that uses it configures the loggers below `moec`
like any others.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import click

from moec.commands.options.files import OutputFile
from moec.commands.output.echo import echo
from moec.errors import SetupError, UsageError
from moec.files.os_errors import reason
from moec.files.printable import printable

F = TypeVar("F", bound=Callable[..., Any])

LOGGER = logging.getLogger("moec")


class _Lines(logging.Formatter):
    """One line per record, without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _Stderr(logging.Handler):
    """Writes lines to the current sys.stderr, which a live display replaces while it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{self.format(record)}\n")


class _File(logging.FileHandler):
    """A log file. If it becomes unwritable, the log is lost, with one warning."""

    error: BaseException | None = None

    def handleError(self, record: logging.LogRecord) -> None:
        self.error = self.error or sys.exception()


def log_options(command: F) -> F:
    """Adds the options -v and --log-file, which apply while the command runs."""

    @functools.wraps(command)
    def logged(*args: Any, verbose: int, log_file: Path | None, **options: Any) -> Any:
        if verbose and options.get("quiet"):
            raise UsageError("--verbose and --quiet cannot be combined: leave one out")
        with logs(verbose, log_file):
            return command(*args, **options)

    for decorator in (
        click.option(
            "--log-file", type=OutputFile(), metavar="FILE",
            help="Write a log with times to this file.",
        ),
        click.option(
            "-v", "--verbose", count=True, help="Log each step to stderr; -vv logs details."
        ),
    ):  # fmt: skip
        logged = decorator(logged)
    return logged  # type: ignore[return-value]


@contextmanager
def logs(verbose: int, log_file: Path | None) -> Iterator[None]:
    """While open, log records go to stderr if `verbose` (1: INFO, 2: DEBUG), and to a file if
    given. Raises UsageError where the file cannot be written."""
    handlers: list[logging.Handler] = []
    if verbose:
        handlers.append(_Stderr(logging.INFO if verbose == 1 else logging.DEBUG))
        handlers[-1].setFormatter(_Lines("%(name)s: %(message)s"))
    file = None if log_file is None else _opened(log_file)
    if file is not None:
        file.setFormatter(_Lines("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers.append(file)
    level = LOGGER.level
    if handlers:
        LOGGER.setLevel(logging.DEBUG)
    for handler in handlers:
        LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.setLevel(level)
        for handler in handlers:
            LOGGER.removeHandler(handler)
            with suppress(OSError):
                handler.close()
        if file is not None and isinstance(file.error, OSError):
            echo(f"warning: --log-file {log_file}: {reason(file.error)}", err=True)


def _opened(path: Path) -> _File:
    try:
        return _File(path, mode="w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise SetupError(f"--log-file {path} cannot be written: {reason(error)}") from error
