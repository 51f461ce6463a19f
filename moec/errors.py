"""Error classes. A message names the thing, the rule, and the remedy."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """How a command ends: the table of docs/install.md."""

    RIGHT = 0
    SETUP = 1
    USAGE = 2
    PROMPTS = 3
    DIFFERS = 4
    DEFECT = 70
    INTERRUPTED = 130


class MoecError(Exception):
    """An error that a user can correct. The command line prints it without a traceback."""

    exit_code = Exit.SETUP


class CaptureError(MoecError):
    """The model cannot be captured; the message has the reason, the place and the remedy."""


class UnsupportedError(MoecError):
    """The graph has operators without a kernel or lowering; all of them are listed."""


class VerificationError(MoecError):
    """A compiled result differs from eager by more than the tolerance."""

    exit_code = Exit.DIFFERS


class TargetError(MoecError):
    """The target is unknown, or this machine lacks its features."""


class TargetNameError(TargetError):
    """The name of a target is unknown, or names what cannot be combined."""

    exit_code = Exit.USAGE


class ArtifactError(MoecError):
    """The artifact is truncated, altered, of another version, or for another machine."""


class InputError(MoecError):
    """An input has a wrong name, type, rank, size or content."""


class UsageError(MoecError):
    """An option or argument has a wrong form or value, or contradicts another."""

    exit_code = Exit.USAGE


class SetupError(UsageError):
    """What an option or argument names cannot be used as it is: a model, a file, this machine."""

    exit_code = Exit.SETUP


class IRError(Exception):
    """The graph breaks a rule of the IR: a defect of moec. The message names op and rule."""


class NoMatch(Exception):
    """A rule examined a candidate and declined it. The reason goes into the report."""


def first_line(error: BaseException) -> str:
    """The first line of a message, or what was raised where there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
