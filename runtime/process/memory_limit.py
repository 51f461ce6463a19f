"""The memory that the control groups of a process allow it to allocate, in bytes.

A container with `--memory 2g` on a host of 64 GB sees the free memory of the host, and is killed by
the system if it takes more than its limit. Version 2 of control groups has the limit in memory.max
(Linux, Documentation/admin-guide/cgroup-v2.rst), version 1 in memory.limit_in_bytes
(Documentation/admin-guide/cgroup-v1/memory.rst). A group's limit applies to all groups below it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def group_folders(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """The folders of the groups of versions 1 and 2 in which a controller, such as cpu or memory,
    limits the process, and of their ancestors. A container may see its own group as the root."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        group = Path(path.lstrip("/"))
        for parent in (group, *group.parents):
            yield top / parent
            if not controllers:
                yield root / "unified" / parent


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


def cpu_quota(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float:
    """Processors, perhaps a fraction; infinity if there is no limit, or it is unknown."""
    folders = group_folders("cpu", root, membership)
    return min((_limit(folder) for folder in folders), default=math.inf)


def _limit(folder: Path) -> float:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((folder / name).read_text().strip() for name in names)
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # no such file; "max"
        return math.inf
