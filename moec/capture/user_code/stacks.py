"""The stacks that torch records of the nodes of an export, without the frames that it drops."""

from __future__ import annotations

import sys
from traceback import FrameSummary, StackSummary
from types import FrameType
from typing import Any
from unittest import mock

from torch.fx import proxy

from moec.capture.user_code.sources import is_internal


class _Stack:
    """In place of torch's CapturedTraceback, which reads the source line of each frame of the
    process for each node. torch keeps the frames of `forward` that are not internal."""

    @staticmethod
    def extract() -> _Stack:
        return _Stack()

    def summary(self) -> StackSummary:
        """The stack of the caller without internal frames, outermost frame first. Lines are read
        when the stack is printed."""
        frames: list[tuple[str, int, str]] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if not is_internal(code.co_filename):
                frames.append((code.co_filename, frame.f_lineno, code.co_name))
            frame = frame.f_back
        return StackSummary(FrameSummary(*entry, lookup_line=False) for entry in reversed(frames))


def short_stacks() -> Any:
    """While open, torch records the stack of a node in a third of the time. The text is the
    same."""
    return mock.patch.object(proxy, "CapturedTraceback", _Stack, create=True)
