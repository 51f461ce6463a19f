"""Folders whose files run as native code: others may write to nothing that leads there."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def others_may_change(path: Path) -> Path | None:
    """The folder, `path` or one that it is in, whose content other users may replace; None where
    only the user and root may. A group with the number of its user has nobody else in it."""
    if not hasattr(os, "geteuid"):
        return None
    trusted = (0, os.geteuid())
    paths = {Path(form) for form in (os.path.abspath(path), os.path.realpath(path))}
    for folder in sorted({folder for p in paths for folder in (p, *p.parents)}):
        state = folder.stat()
        alone = state.st_gid == state.st_uid
        writable = state.st_mode & (stat.S_IWOTH | (0 if alone else stat.S_IWGRP))
        sticky = state.st_mode & stat.S_ISVTX and folder not in paths  # what is in it stays its own
        owners = {state.st_uid, folder.lstat().st_uid}
        if not owners <= {*trusted} or (writable and not sticky):
            return folder
    return None
