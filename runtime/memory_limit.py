"""How many bytes the control groups of a process let it take besides those that it has.

A container with `--memory 2g` on a host of 64 GB sees the free memory of the host, and is ended by
the system where it takes more than its own. Version 2 of control groups has the limit in memory.max
(Linux, Documentation/admin-guide/cgroup-v2.rst), version 1 in memory.limit_in_bytes
(Documentation/admin-guide/cgroup-v1/memory.rst). That of a group holds for all below it.
"""

from __future__ import annotations

import math
from pathlib import Path

from moec.runtime.control_groups import MEMBERSHIP, ROOT, group_folders

_VERSIONS = (
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
"""Files with the limit and with what is used, and how entries of memory.stat begin."""


def free_in_groups(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float:
    """Bytes; infinity where there is no limit, or none is told. Pages of files count as free."""
    folders = group_folders("memory", root, membership)
    return min((_free(folder) for folder in folders), default=math.inf)


def _free(folder: Path) -> float:
    for limit, usage, prefix in _VERSIONS:
        try:
            size = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
            lines = (folder / "memory.stat").read_text().splitlines()
            entries = dict(line.split(maxsplit=1) for line in lines)
            pages = sum(int(entries[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
        except (OSError, ValueError, KeyError):  # no such file; "max"
            continue
        return max(0, size - used + pages)
    return math.inf
