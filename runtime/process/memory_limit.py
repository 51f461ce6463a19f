"""The memory that the control groups of a process allow it to allocate, in bytes.

A container with `--memory 2g` on a host of 64 GB sees the free memory of the host, and is killed by
the system if it takes more than its limit. Version 2 of control groups has the limit in memory.max
(Linux, Documentation/admin-guide/cgroup-v2.rst), version 1 in memory.limit_in_bytes
(Documentation/admin-guide/cgroup-v1/memory.rst). A group's limit applies to all groups below it.
"""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

from moec.runtime.process.control_groups import MEMBERSHIP, ROOT, group_folders

_VERSIONS = (
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
"""The files with the limit and the usage, and the prefix of entries of memory.stat."""


def free_in_groups(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float:
    """Bytes; infinity if there is no limit, or it is unknown. Cached file pages count as free."""
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


def resident_bytes() -> int:
    """The bytes that this process and its children have in memory, files that they map included;
    0 where it is unknown."""
    folder, pages = f"/proc/{os.getpid()}", 0
    with suppress(OSError):  # no such files, or a child has ended
        children = Path(f"{folder}/task/{os.getpid()}/children").read_text().split()
        for process in (folder, *(f"/proc/{child}" for child in children)):
            pages += int(Path(process, "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
