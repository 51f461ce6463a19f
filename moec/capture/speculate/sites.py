"""Positions in the user's code: the line and the bytecode instruction of a condition."""

from __future__ import annotations

import ast
import dis
import linecache
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType


@dataclass(frozen=True)
class Site:
    """A bytecode instruction. It is a branch where it is a jump, else a call or similar."""

    code: CodeType
    offset: int

    @property
    def file(self) -> str:
        return self.code.co_filename

    @property
    def line(self) -> int:
        positions = list(self.code.co_positions())
        return positions[self.offset // 2][0] or self.code.co_firstlineno

    @property
    def text(self) -> str:
        """The text of the line; empty where the source is not available."""
        return linecache.getline(self.file, self.line).strip()

    @property
    def jumps(self) -> bool:
        return "JUMP" in _names(self.code).get(self.offset, "")

    @property
    def repeats(self) -> bool:
        """Whether the line belongs to the condition of a `while` loop."""
        return self.line in _conditions_of_loops(self.file)

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}"


@dataclass(frozen=True)
class Foreign:
    """Files that do not belong to the user, by the prefixes of their paths."""

    prefixes: tuple[str, ...]

    def holds(self, frame: FrameType) -> bool:
        return frame.f_code.co_filename.startswith(self.prefixes)

    def nearest(self, frame: FrameType | None) -> FrameType | None:
        """The user's nearest frame, from `frame` outwards."""
        while frame is not None and self.holds(frame):
            frame = frame.f_back
        return frame


def foreign(packages: Iterable[str]) -> Foreign:
    """The files of the named packages, which must be imported, and of this package."""
    paths = [str(Path(sys.modules[name].__file__ or "").parent) for name in packages]
    return Foreign((*paths, str(Path(__file__).parent), "<frozen", "<string>"))


def site_of(frame: FrameType) -> Site:
    """The branch that `frame` is about to take, or the instruction that it executes.

    Before the jump, separate instructions may convert the condition to bool, negate or copy it.
    """
    code, offset = frame.f_code, frame.f_lasti
    names = _names(code)
    order = list(names)
    at = order.index(offset) if offset in names else -1
    while 0 <= at < len(order) - 1 and names[order[at]] in ("TO_BOOL", "UNARY_NOT"):
        at += 1
    return Site(code, order[at] if at >= 0 and "JUMP" in names[order[at]] else offset)


@lru_cache(maxsize=256)
def _names(code: CodeType) -> dict[int, str]:
    """The names of the instructions by offset, without inline caches."""
    return {step.offset: step.opname for step in dis.get_instructions(code)}


@lru_cache(maxsize=256)
def _conditions_of_loops(file: str) -> frozenset[int]:
    """The lines of the conditions of a file's `while` loops; none where its text is missing."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return frozenset()
    tests = [node.test for node in ast.walk(tree) if isinstance(node, ast.While)]
    lines = [range(test.lineno, (test.end_lineno or test.lineno) + 1) for test in tests]
    return frozenset(number for numbers in lines for number in numbers)
