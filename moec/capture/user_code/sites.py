"""Positions in the user's code: the line and the bytecode instruction of a condition."""

from __future__ import annotations

import dis
import linecache
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
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
        """Whether the branch may end a `while` loop."""
        return self.offset in _ends_of_loops(self.code)

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
    """The files of the named packages, which must be imported, and of `moec.capture.speculate`."""
    paths = [str(Path(sys.modules[name].__file__ or "").parent) for name in packages]
    return Foreign((*paths, str(Path(__file__).parents[1] / "speculate"), "<frozen", "<string>"))


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
def _ends_of_loops(code: CodeType) -> frozenset[int]:
    """The offsets of the branches that may end the innermost loop around them, if that is a `while`
    loop: one whose jumps back do not go to the next item of an iterator."""
    steps = list(dis.get_instructions(code))
    ways = {step.offset: _ways(step, after) for step, after in zip_longest(steps, steps[1:])}
    names = _names(code)
    loops: dict[int, int] = {}
    for step in steps:
        if "JUMP" in step.opname and step.argval <= step.offset:
            loops[step.argval] = step.offset
    ends = set[int]()
    for branch, successors in ways.items():
        around = [(last - first, first) for first, last in loops.items() if first <= branch <= last]
        if len(successors) != 2 or not around:
            continue
        first = min(around)[1]
        stays = [_reaches(ways, way, first, loops[first]) for way in successors]
        if names[first] != "FOR_ITER" and not all(stays):
            ends.add(branch)
    return frozenset(ends)


def _ways(step: dis.Instruction, after: dis.Instruction | None) -> tuple[int, ...]:
    """The offsets at which execution may continue after an instruction."""
    targets = [step.argval] if "JUMP" in step.opname or step.opname == "FOR_ITER" else []
    goes_on = targets == [] or "_IF_" in step.opname or step.opname == "FOR_ITER"
    if goes_on and after is not None and step.opname not in _LEAVES:
        targets.append(after.offset)
    return tuple(targets)


_LEAVES = frozenset("RETURN_VALUE RETURN_CONST RAISE_VARARGS RERAISE".split())


def _reaches(ways: Mapping[int, tuple[int, ...]], start: int, first: int, last: int) -> bool:
    """Whether execution can come from `start` to `first` without leaving `first` to `last`."""
    pending, visited = [start], set[int]()
    while pending:
        offset = pending.pop()
        if offset == first:
            return True
        if first < offset <= last and offset not in visited:
            visited.add(offset)
            pending += ways[offset]
    return False
