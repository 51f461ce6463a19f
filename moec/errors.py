"""What can go wrong, by whose mistake it is. A message names the thing, the rule, the remedy."""

from __future__ import annotations


class MoecError(Exception):
    """A mistake that a user can mend. The command line prints it without a traceback."""

    exit_code = 1


class CaptureError(MoecError):
    """The model cannot be captured as it stands; the message says where and what to change."""


class UnsupportedError(MoecError):
    """The graph holds operators that no kernel or lowering covers; all are listed at once."""


class VerificationError(MoecError):
    """A compiled result differs from eager by more than the tolerance."""

    exit_code = 2


class TargetError(MoecError):
    """The target is unknown, or this machine lacks its features."""


class ArtifactError(MoecError):
    """The artifact is truncated, altered, of another version, or for another machine."""


class InputError(MoecError):
    """An input has a wrong name, type, rank, size or content."""


class UsageError(MoecError):
    """An option or argument is not of the form that the command takes."""


class IRError(Exception):
    """The graph breaks a rule of the IR: a defect of moec. The message names op and rule."""


class NoMatch(Exception):
    """A rule looked closely and declined. The reason goes into the report."""
