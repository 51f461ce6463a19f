"""Locates a failed export: the modules whose code was running, and the user's line."""

from __future__ import annotations

import inspect
import linecache
import sysconfig
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moec import errors

_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_FRAMEWORKS = tuple(str(Path(package.__file__ or "").parent) for package in (torch, errors))


@dataclass(frozen=True)
class Line:
    """A line of source code."""

    file: str
    line: int

    def __str__(self) -> str:
        text = linecache.getline(self.file, self.line).strip()
        return f"{Path(self.file).name}:{self.line}" + (f", `{text}`" if text else "")


def shown(name: str, module: nn.Module) -> str:
    """A module as it is named in messages: its name, its class, and the line of its forward."""
    kind = type(module)
    try:
        file = inspect.getsourcefile(kind.forward) or ""
        where = f" ({Path(file).name}:{inspect.getsourcelines(kind.forward)[1]})"
    except (OSError, TypeError):
        where = ""
    return f"{name or 'the model'}, a {kind.__name__}{where},"


@dataclass(frozen=True)
class Failure:
    """Names of the running modules, innermost first, and the user's last line."""

    modules: tuple[str, ...]
    line: Line | None

    @staticmethod
    def of(error: BaseException, model: nn.Module) -> Failure:
        names = {id(module): name for name, module in model.named_modules()}
        running: list[str] = []
        line = None
        for frame, number in frames(error):
            subject = frame.f_locals.get("self")
            if isinstance(subject, nn.Module) and id(subject) in names:
                running.append(names[id(subject)])
            file = frame.f_code.co_filename
            if not is_library(file):
                line = Line(file, number)
        return Failure(tuple(dict.fromkeys(reversed(running))), line)


def is_library(file: str) -> bool:
    """Whether a file belongs to torch, moec or the standard library. Installed packages are inside
    the standard library's folder, but do not belong to it."""
    python = file.startswith(_STANDARD_LIBRARY) and "site-packages" not in file
    return python or file.startswith((*_FRAMEWORKS, "<"))


def frames(error: BaseException) -> Iterator[tuple[types.FrameType, int]]:
    """The frames of an error and of the errors that caused it, the earliest error first."""
    earlier = error.__cause__ or error.__context__
    if earlier is not None and earlier is not error:
        yield from frames(earlier)
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next
