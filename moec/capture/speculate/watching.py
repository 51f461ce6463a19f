"""Records which way eager goes at the branches that a capture answered.

On Python 3.11 the instructions of the code with such branches are traced (sys.settrace); from 3.12
on the interpreter reports branches (sys.monitoring). Needs no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

from moec.capture.user_code.sites import Site

Ways = dict[Site, set[int]]
"""For each branch, the offsets at which execution continued; two where it went both ways."""


@contextmanager
def watched(sites: Collection[Site]) -> Iterator[Ways]:
    """While open, records in the result where each branch of `sites` continues in this thread."""
    ways: Ways = {}
    monitoring = getattr(sys, "monitoring", None)
    with _monitored(monitoring, sites, ways) if monitoring else _traced(sites, ways):
        yield ways


@contextmanager
def _traced(sites: Collection[Site], ways: Ways) -> Iterator[None]:
    codes = {site.code for site in sites}
    jumps = {(site.code, site.offset): site for site in sites}
    pending: dict[int, Site | None] = {}
    before = sys.gettrace()

    def local(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode":
            jump = pending.get(id(frame))
            if jump is not None:
                ways.setdefault(jump, set()).add(frame.f_lasti)
            pending[id(frame)] = jumps.get((frame.f_code, frame.f_lasti))
        elif event == "return":
            pending.pop(id(frame), None)
        return local

    def enter(frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code not in codes:
            return None
        frame.f_trace_opcodes = True
        return local

    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def _monitored(monitoring: Any, sites: Collection[Site], ways: Ways) -> Iterator[None]:
    tool = next(number for number in range(6) if monitoring.get_tool(number) is None)
    events = monitoring.events
    # 3.14 reports the two ways as separate events; before, BRANCH covers both.
    kinds = [events.BRANCH_LEFT, events.BRANCH_RIGHT] if hasattr(events, "BRANCH_LEFT") else []
    kinds = kinds or [events.BRANCH]
    jumps = {(site.code, site.offset): site for site in sites}

    def branch(code: CodeType, offset: int, destination: int) -> None:
        site = jumps.get((code, offset))
        if site is not None:
            ways.setdefault(site, set()).add(destination)

    monitoring.use_tool_id(tool, "moec.speculate")
    callback: Callable[..., Any] = branch
    try:
        for kind in kinds:
            monitoring.register_callback(tool, kind, callback)
        for code in {site.code for site in sites}:
            monitoring.set_local_events(tool, code, sum(kinds))
        yield
    finally:
        for code in {site.code for site in sites}:
            monitoring.set_local_events(tool, code, 0)
        for kind in kinds:
            monitoring.register_callback(tool, kind, None)
        monitoring.free_tool_id(tool)
