"""Where two runs of the same code part: the line of the user's that decides."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from moec.capture.speculate.sites import Site
from moec.capture.user_code.sources import is_internal, is_standard

_MOST_STEPS = 1_000_000


def parting(run: Callable[[], Any], between: Callable[[], Any]) -> Site | None:
    """The last instruction of the user's that `run` executes before it goes another way after
    `between` than before; None where it goes the same way."""
    steps = _steps(run)
    between()
    before: Site | None = None
    for step, other in zip(steps, _steps(run), strict=False):
        if step != other:
            return before
        before = step
    return None


def _steps(run: Callable[[], Any]) -> list[Site]:
    steps: list[Site] = []

    def local(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode" and len(steps) < _MOST_STEPS:
            steps.append(Site(frame.f_code, frame.f_lasti))
        return local

    def enter(frame: FrameType, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        if is_internal(file) or is_standard(file):
            return None
        frame.f_trace_opcodes = True
        return local

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        run()
    except Exception:  # the steps until then are those that count
        pass
    finally:
        sys.settrace(before)
    return steps
