"""The stacks that torch records of the nodes of an export, without the frames that it drops."""

from __future__ import annotations

import sys
from traceback import FrameSummary, StackSummary
from types import FrameType

from moec.capture.user_code.sources import is_internal, is_standard


class ShortStack:
    """In place of torch's CapturedTraceback, which reads the source line of each frame of the
    process for each node. torch keeps the frames of `forward` that are not internal: the text is
    the same, in a third of the time."""

    @staticmethod
    def extract() -> ShortStack:
        return ShortStack()

    def summary(self) -> StackSummary:
        """The frames of the user's `forward` in the stack of the caller, outermost first. Lines are
        read when the stack is printed."""
        frames: list[tuple[str, int, str]] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_name == "forward" and not is_internal(code.co_filename):
                frames.append((code.co_filename, frame.f_lineno, code.co_name))
            frame = frame.f_back
        return StackSummary(FrameSummary(*entry, lookup_line=False) for entry in reversed(frames))


class Internal:
    """In place of torch's set of files without user code, among which it looks for the line of a
    guard: those of torch, moec and Python."""

    def __contains__(self, file: object) -> bool:
        return isinstance(file, str) and (is_internal(file) or is_standard(file))
